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

TENSOR_HEAD = ("op", "direction", "n", "tensor", "read kB", "written kB")

TOKENS = 4096
"""Tokens that the schedules are for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--by-tensor", action="store_true", help="a row for each tensor of global memory")
    asked = parser.parse_args()
    head = TENSOR_HEAD if asked.by_tensor else HEAD
    print("|", " | ".join(head), "|")  # noqa: T201
    print("|---|---|" + "---|" * (len(head) - 2))  # noqa: T201
    with tempfile.TemporaryDirectory() as name:
        emulator = build_emulator(Path(name))
        for op in asked.op:
            for direction in ("forward", "backward"):
                for n in asked.streams:
                    problem = Problem(op, direction, n, asked.width, "bfloat16", tokens=TOKENS)
                    given = (Path(name), emulator, problem, Target("cuda", asked.arch), asked.tokens)
                    for counted in tensor_rows(*given) if asked.by_tensor else [row(*given)]:
                        print("|", " | ".join(counted), "|", flush=True)  # noqa: T201


def count(
    folder: Path, emulator: Path, problem: Problem, target: Target, tokens: int
) -> tuple[list[Movement], set[str]]:
    """What a default moves, and the kernels that do the same for any number of tokens."""
    schedule: Any = kernel_spec(problem.op, problem.direction).default(problem, target)
    text = generate(problem, schedule, target, most_splits=1)
    once = {launch.kernel for launch in text.plan.launches if not re.search("tokens|splits", " ".join(launch.grid))}
    return Emulated(folder, emulator, text).movements(tokens), once


def tensor_rows(folder: Path, emulator: Path, problem: Problem, target: Target, tokens: int) -> list[tuple[str, ...]]:
    """Lines of what a default reads and writes of every tensor, the largest first."""
    moved, once = count(folder, emulator, problem, target, tokens)
    sums: dict[str, list[float]] = {}
    for move in moved:
        if move.tensor != "shared":
            both = sums.setdefault(move.tensor, [0.0, 0.0])
            both[move.writes] += 32 * move.taken / (TOKENS if move.kernel in once else tokens) / 1000
    named = (problem.op, problem.direction, str(problem.streams))
    return [
        (*named, name, f"{read:.2f}", f"{written:.2f}")
        for name, (read, written) in sorted(sums.items(), key=lambda item: -sum(item[1]))
    ]


def row(folder: Path, emulator: Path, problem: Problem, target: Target, tokens: int) -> tuple[str, ...]:
    """One line of the table."""
    spec = kernel_spec(problem.op, problem.direction)
    problem = spec.canonical(problem)
    moved, once = count(folder, emulator, problem, target, tokens)
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
