"""Logs of a model's measures in training: JSON lines, TensorBoard, or any other sink."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from mhc.diagnostics.watch import Measures, Watch

Sink = Callable[[int, Measures, Mapping[str, float]], None]
"""Called with a step's number, its measures, and other scalars such as the loss."""


class Log:
    """Watches a model; call it with a step's number after that step's forward to pass the measures to every sink.

    Keyword arguments are logged beside the measures: `log(step, loss=loss.item(), gradient_norm=norm.item())`. Only
    calls cost time.
    """

    def __init__(self, model: nn.Module, *sinks: Sink) -> None:
        self.watch = Watch(model)
        self.sinks = sinks

    def __call__(self, step: int, **scalars: float) -> None:
        """Measure the latest forward and log it; raises `BadInput` where there was none."""
        measures = self.watch.measure()
        for sink in self.sinks:
            sink(step, measures, scalars)


class JsonLines:
    """Appends one JSON object a step to a file: step, the scalars, `names` of the layers, and a list per measure.

    Numbers that are not finite, which JSON lacks, become null.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, step: int, measures: Measures, scalars: Mapping[str, float]) -> None:
        """Append a line."""
        record = {"step": step, **scalars, "names": measures.names, **measures.series()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")


class ScalarWriter(Protocol):
    """The part of torch.utils.tensorboard.SummaryWriter that `TensorBoard` uses."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Add one point to a curve."""


class TensorBoard:
    """Writes curves with a `torch.utils.tensorboard.SummaryWriter`, or another object with its `add_scalar`.

    Tags: the scalars' own names, `mhc/<measure>/<layer>`, and `mhc_worst/<measure>`, the largest over all layers.
    """

    def __init__(self, writer: ScalarWriter) -> None:
        self.writer = writer

    def __call__(self, step: int, measures: Measures, scalars: Mapping[str, float]) -> None:
        """Add a point to every curve."""
        for name, scalar in scalars.items():
            self.writer.add_scalar(name, scalar, step)
        for measured, values in measures.series().items():
            self.writer.add_scalar(f"mhc_worst/{measured}", max(values), step)
            for layer, value in zip(measures.names, values, strict=True):
                self.writer.add_scalar(f"mhc/{measured}/{layer}", value, step)


def finite(value: Any) -> Any:
    """Plain data with None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
