"""`mhc-tune compile`: what the compiler says about schedules, for a device that need not be there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import track

from autotune.pool import enumerate_pool
from autotune.worker import TaskFailed
from autotune.workers import COMPILERS, Workers
from cli.options import (
    DEFAULT_DTYPE,
    DEFAULT_STREAMS,
    DEFAULT_TOKENS,
    DEFAULT_WIDTH,
    DtypeOption,
    JsonOption,
    StreamsOption,
    TargetOption,
    TokensOption,
    WidthOption,
    known_choices,
    problems,
)
from cli.output import messages, say, show, show_json, stdout_kept_free
from cli.render import SHAPE, number, schedule_text, table
from tiles.compile import Artifact, why_no_compiler
from tiles.errors import BadInput
from tiles.family import Problem
from tiles.occupancy import occupancy
from tiles.registry import kernel_spec, kernel_specs
from tiles.target import Target, parse_target

OPS = list(dict.fromkeys(op for op, _ in kernel_specs()))

GPU_COLUMNS = ("registers", "spilled_bytes", "shared_bytes", "occupancy_percent")


def compile_(
    target: TargetOption = "auto",
    streams: StreamsOption = DEFAULT_STREAMS,
    width: WidthOption = DEFAULT_WIDTH,
    tokens: TokensOption = DEFAULT_TOKENS,
    dtype: DtypeOption = DEFAULT_DTYPE,
    op: Annotated[list[str], typer.Option("--op", help=f"Of {', '.join(OPS)}; default: all. May repeat.")] = OPS,
    schedules: Annotated[
        int, typer.Option("--schedules", min=1, help="The default schedule and so many others of each kernel's pool.")
    ] = 1,
    json: JsonOption = False,
) -> None:
    """Compile schedules for a target, without running anything: by default every kernel's default schedule.

    For a GPU, prints the registers, spills and shared memory that the compiler reports and the occupancy that follows;
    the GPU need not be there, nvcc must be. Exits with 1 when a kernel does not compile.
    """
    built = parse_target(target)
    if why := why_no_compiler(built):
        raise BadInput(f"compiling for {built} needs its compiler: {why}")
    known_choices("op", op, OPS)
    todo = problems(streams, width, tokens, dtype, op)
    jobs = [(problem, _chosen(problem, built, schedules)) for problem in todo]
    total = sum(len(chosen) for _, chosen in jobs)
    say(f"compiling {total} schedules for {built}")
    with stdout_kept_free(json):
        rows = list(track(_looked_at(jobs, built), total=total, console=messages, transient=True))
    if json:
        show_json({"target": str(built), "results": rows})
    else:
        _show(rows, built)
    failed = [row for row in rows if "failed" in row]
    for row in failed:
        say(f"FAILED: {row['op']} {row['direction']} {schedule_text(row['schedule'])}: {row['failed']}")
    if failed:
        raise typer.Exit(1)


def _chosen(problem: Problem, target: Target, count: int) -> list[Any]:
    """The default schedule first, then members of the pool at equal distances."""
    spec = kernel_spec(problem.op, problem.direction)
    if count == 1:
        return [spec.default(problem, target)]
    pool = enumerate_pool(spec, problem, target)
    others = [member for member in range(len(pool)) if member != pool.default]
    step = max(1, -(-len(others) // (count - 1)))
    return [spec.schedule(**pool.values(member)) for member in (pool.default, *others[::step])]


def _looked_at(jobs: list[tuple[Problem, list[Any]]], target: Target) -> Iterator[dict[str, Any]]:
    """One row a schedule, in order."""
    with Workers() as workers:
        for problem, schedules in jobs:
            for first in range(0, len(schedules), COMPILERS):
                some = schedules[first : first + COMPILERS]
                for schedule, artifact in zip(some, workers.compile(problem, some, target), strict=True):
                    yield _row(problem, schedule, artifact, target)


def _row(problem: Problem, schedule: Any, artifact: Artifact | TaskFailed, target: Target) -> dict[str, Any]:
    """What became of a schedule. `bytes_per_token` is what the kernel must move, whatever its schedule."""
    traffic = kernel_spec(problem.op, problem.direction).traffic
    row: dict[str, Any] = {**asdict(problem), "schedule": asdict(schedule)}
    if isinstance(artifact, TaskFailed):
        return row | {"failed": str(artifact)}
    moved = traffic(problem, 1025).bytes - traffic(problem, 1).bytes
    row |= {"code_bytes": len(artifact.binary), "bytes_per_token": moved / 1024}
    return row | (_resources(artifact.details, target.arch) if target.kind == "cuda" else {})


def _resources(details: Mapping[str, int], arch: str) -> dict[str, Any]:
    """Registers and spills of a thread, shared memory of a block, and what of a multiprocessor they leave busy."""
    shared = details["static_shared_bytes"] + details["dynamic_shared_bytes"]
    found = occupancy(arch, details["threads"], details["registers"], shared)
    return {
        "registers": details["registers"],
        "spilled_bytes": details["spill_stores"] + details["spill_loads"],
        "shared_bytes": shared,
        "occupancy_percent": found.percent,
        "limited_by": found.limited_by,
    }


def _show(rows: list[dict[str, Any]], target: Target) -> None:
    columns = GPU_COLUMNS if target.kind == "cuda" else ()
    numbers = (*(name.replace("_", " ") for name in columns), "code bytes")
    made = table(f"schedules for {target}", SHAPE, numbers)
    made.add_column("schedule", overflow="fold")
    for row in rows:
        if "failed" not in row:
            cells = [number(row[name]) for name in columns] + [str(row["code_bytes"])]
            made.add_row(*(str(row[name]) for name in SHAPE), *cells, schedule_text(row["schedule"]))
    show(made)
