"""What default schedules of CUDA kernels move, counted on the emulator: `python tests/tiles/count_traffic.py > FILE`.

A table in Markdown, for one architecture and width. Kilobytes are for each token, as warps ask for them: 32-byte
sectors of global memory, whatever cache they come from, and rounds of 128 bytes of shared memory by loads, stores and
ldmatrix, not by wgmma. Sums over tokens are one split's. What a kernel does for all tokens at once is divided by those
that the schedule is for. `least` is what the op has to move.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

from emulated import Emulated, generate
from emulation import Movement, build_emulator

from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Target

OPS = ("aggregate", "merge", "project", "coefficients", "pre", "step", "single_pass")
HEAD = ("op", "direction", "n", "least kB", "global kB", "shared kB", "shared rounds / least", "sectors / least")

TOKENS = 4096
"""Tokens that the schedules are for."""


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
                    problem = Problem(op, direction, n, asked.width, "bfloat16", tokens=TOKENS)
                    counted = row(Path(name), emulator, problem, Target("cuda", asked.arch), asked.tokens)
                    print("|", " | ".join(counted), "|", flush=True)  # noqa: T201


def row(folder: Path, emulator: Path, problem: Problem, target: Target, tokens: int) -> tuple[str, ...]:
    """One line of the table."""
    spec = kernel_spec(problem.op, problem.direction)
    problem = spec.canonical(problem)
    schedule: Any = spec.default(problem, target)
    text = generate(problem, schedule, target, most_splits=1)
    moved = Emulated(folder, emulator, text).movements(tokens)
    once = {launch.kernel for launch in text.plan.launches if not re.search("tokens|splits", " ".join(launch.grid))}
    shared = [move for move in moved if move.tensor == "shared"]
    others = [move for move in moved if move.tensor != "shared"]

    def kilobytes_of(moves: list[Movement], unit: int) -> float:
        return sum(unit * move.taken / (TOKENS if move.kernel in once else tokens) for move in moves) / 1000

    least = spec.traffic(problem, TOKENS).bytes / TOKENS / 1000
    kilobytes = least, kilobytes_of(others, 32), kilobytes_of(shared, 128)
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
