"""Diagnostics of a model's residual maps in training: how they amplify signals and gradients.

    log = diagnostics.Log(model, diagnostics.JsonLines("gains.jsonl"))
    for step, batch in enumerate(batches):
        loss = model(batch)
        ...
        if step % 100 == 0:
            log(step, loss=loss.item())

`Watch` records res of every forward and measures it (`Measures`), `Log` passes the measures to sinks, `plot_gains` and
`plot_mappings` plot them, `check_finite` raises at the first block with a value that is not finite.
"""

from mhc.diagnostics.gains import (
    backward_gain,
    column_error,
    composites,
    entropy,
    forward_gain,
    spectral_norm,
)
from mhc.diagnostics.log import JsonLines, Log, TensorBoard
from mhc.diagnostics.plot import plot_gains, plot_mappings
from mhc.diagnostics.watch import Measures, Watch, check_finite, measure

__all__ = [
    "JsonLines",
    "Log",
    "Measures",
    "TensorBoard",
    "Watch",
    "backward_gain",
    "check_finite",
    "column_error",
    "composites",
    "entropy",
    "forward_gain",
    "measure",
    "plot_gains",
    "plot_mappings",
    "spectral_norm",
]
