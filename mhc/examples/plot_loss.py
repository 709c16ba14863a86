"""Plot of loss curves and step times: `python -m mhc.examples.plot_loss OUT.png RUN.json ...`.

The files are written by `train_bytes --json` or `compare_residuals --json`. Needs matplotlib.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def main(out: str, *files: str) -> None:
    """Plot one curve a run, labelled by its file or, with several runs in a file, by its contender; beside them the
    median step times with their quartiles, where the runs have them.
    """
    from matplotlib.figure import Figure

    runs = {name: run for file in files for name, run in runs_of(Path(file)).items()}
    timed = {name: run["step_ms"][1:] for name, run in runs.items() if len(run.get("step_ms", ())) > 2}
    figure = Figure(figsize=(11 if timed else 7, 4), layout="constrained")
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    for name, run in runs.items():
        axes[0].plot(run["losses"], label=name, linewidth=1)
    axes[0].set(xlabel="step", ylabel="training loss, nats a byte")
    axes[0].legend()
    if timed:
        quartiles = [statistics.quantiles(times, n=4) for times in timed.values()]
        errors = [[middle - low for low, middle, _ in quartiles], [high - middle for _, middle, high in quartiles]]
        axes[1].bar(list(timed), [middle for _, middle, _ in quartiles], yerr=errors, capsize=4)
        axes[1].set(ylabel="ms a step, median and quartiles")
    figure.savefig(out, dpi=150)


def runs_of(path: Path) -> dict[str, dict[str, Any]]:
    """The runs in a file by name."""
    held = json.loads(path.read_text(encoding="utf-8"))
    return held.get("runs") or {path.stem: held}


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m mhc.examples.plot_loss OUT.png RUN.json ...")
    main(*sys.argv[1:])
