"""What default schedules of CUDA kernels move, counted on the emulator: `python tests/tiles/count_traffic.py > FILE`.

A table in Markdown, for one architecture and width. Kilobytes are for each token, as warps ask for them: 32-byte
sectors of global memory, whatever cache they come from, and rounds of 128 bytes of shared memory by loads, stores and
ldmatrix, not by wgmma. Sums over tokens are one split's. `least` is what the op has to move.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from emulated import Emulated, generate
from emulation import Movement, build_emulator

from tiles.family import Problem
from tiles.registry import kernel_spec
from tiles.target import Target

OPS = ("aggregate", "merge", "project", "coefficients", "pre", "step")
HEAD = ("op", "direction", "n", "least kB", "global kB", "shared kB", "shared rounds / least", "sectors / least")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--tokens", type=int, default=256)
    asked = parser.parse_args()
    print("|", " | ".join(HEAD), "|")  # noqa: T201
    print("|---|---|" + "---|" * (len(HEAD) - 2))  # noqa: T201
    with tempfile.TemporaryDirectory() as name:
        emulator = build_emulator(Path(name))
        for op in OPS:
            for direction in ("forward", "backward"):
                for n in asked.streams:
                    problem = Problem(op, direction, n, asked.width, "bfloat16", tokens=4096)
                    counted = row(Path(name), emulator, problem, Target("cuda", asked.arch), asked.tokens)
                    print("|", " | ".join(counted), "|", flush=True)  # noqa: T201


def row(folder: Path, emulator: Path, problem: Problem, target: Target, tokens: int) -> tuple[str, ...]:
    """One line of the table."""
    spec = kernel_spec(problem.op, problem.direction)
    problem = spec.canonical(problem)
    schedule: Any = spec.default(problem, target)
    kernel = Emulated(folder, emulator, generate(problem, schedule, target, most_splits=1))
    moved = kernel.movements(tokens)
    shared = [move for move in moved if move.tensor == "shared"]
    others = [move for move in moved if move.tensor != "shared"]
    kilobytes = (
        spec.traffic(problem, tokens).bytes / tokens / 1000,
        32 * sum(move.taken for move in others) / tokens / 1000,
        128 * sum(move.taken for move in shared) / tokens / 1000,
    )
    return (
        *(problem.op, problem.direction, str(problem.streams)),
        *(f"{value:.1f}" for value in kilobytes),
        *(ratio(shared), ratio(others)),
    )


def ratio(moved: list[Movement]) -> str:
    """What is taken for what would do."""
    return f"{sum(move.taken for move in moved) / sum(move.least for move in moved):.2f}" if moved else ""


if __name__ == "__main__":
    main()
