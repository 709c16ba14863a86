"""Draw the loss curves that `train_bytes --json` wrote: `python -m mhc.examples.plot_loss OUT.png RUN.json ...`.

Needs matplotlib, which mhc itself does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(out: str, *runs: str) -> None:
    """One curve a run, named by its file."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for run in runs:
        axes.plot(json.loads(Path(run).read_text(encoding="utf-8"))["losses"], label=Path(run).stem, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss, nats a byte")
    axes.legend()
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m mhc.examples.plot_loss OUT.png RUN.json ...")
    main(*sys.argv[1:])
