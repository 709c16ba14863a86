"""`mhc-tune compile`: what the compiler says about schedules, for devices that need not be there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import track

from autotune.measuring.resource_check import resource_usage, why_rejected
from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Job, Workers
from autotune.search.pool import enumerate_pool
from cli.ui.options import (
    DEFAULT_DTYPE,
    DEFAULT_STREAMS,
    DEFAULT_TOKENS,
    DEFAULT_WIDTH,
    DtypeOption,
    JsonOption,
    StreamsOption,
    TokensOption,
    WidthOption,
    known_choices,
    problems,
)
from cli.ui.output import messages, say, show, show_json, stdout_kept_free
from cli.ui.render import SHAPE, number, schedule_text, table
from tiles.compiler.compile import Artifact, why_no_compiler
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import Problem
from tiles.target import Target, parse_target

OPS = list(dict.fromkeys(op for op, _ in kernel_specs()))

GPU_COLUMNS = ("registers", "spilled_bytes", "shared_bytes", "occupancy_percent")

Row = dict[str, Any]


def compile_(
    target: Annotated[
        list[str], typer.Option("--target", help="auto, cpu, cuda or an architecture such as cuda:sm_90a. May repeat.")
    ] = ["auto"],  # noqa: B006 - typer reads it, nobody changes it
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
    """Compile schedules for targets, without running anything: by default every kernel's default schedule.

    For a GPU, prints the registers, spills and shared memory that the compiler reports and the occupancy that follows,
    and names the schedules that tuning would drop for it; the GPU need not be there, nvcc must be. Exits with 1 when a
    kernel does not compile.
    """
    targets = list(dict.fromkeys(parse_target(each) for each in target))
    for built in targets:
        if why := why_no_compiler(built):
            raise BadInput(f"compiling for {built} needs its compiler: {why}")
    known_choices("op", op, OPS)
    todo = problems(streams, width, tokens, dtype, op)
    jobs = [job for built in targets for problem in todo for job in _chosen(problem, built, schedules)]
    say(f"compiling {len(jobs)} schedules for {', '.join(map(str, targets))}")
    with stdout_kept_free(json), Workers() as workers:
        done = list(track(workers.compile_each(jobs), total=len(jobs), console=messages, transient=True))
    rows = _rows(jobs, done)
    if json:
        show_json({"targets": [str(built) for built in targets], "results": rows})
    for built in targets:
        _tell(built, [row for row in rows if row["target"] == str(built)], shown=not json)
    if any("failed" in row for row in rows):
        raise typer.Exit(1)


def _chosen(problem: Problem, target: Target, count: int) -> list[Job]:
    """The default schedule first, then members of the pool at equal distances."""
    spec = kernel_spec(problem.op, problem.direction)
    if count == 1:
        return [(problem, spec.default(problem, target), target)]
    pool = enumerate_pool(spec, problem, target)
    others = [member for member in range(len(pool)) if member != pool.default]
    step = max(1, -(-len(others) // (count - 1)))
    return [(problem, spec.schedule_from(pool.values(member)), target) for member in (pool.default, *others[::step])]


def _rows(jobs: Sequence[Job], done: Sequence[Artifact | TaskFailed]) -> list[Row]:
    """One row a schedule, in order; each is held against the others of its kernel and target."""
    others: dict[tuple[Problem, Target], list[Artifact]] = {}
    for (problem, _, target), artifact in zip(jobs, done, strict=True):
        if isinstance(artifact, Artifact):
            others.setdefault((problem, target), []).append(artifact)
    return [
        {"target": str(target), **asdict(problem), "schedule": asdict(schedule)}
        | ({"failed": str(artifact)} if isinstance(artifact, TaskFailed) else _told(problem, artifact))
        | _dropped(artifact, others.get((problem, target), []))
        for (problem, schedule, target), artifact in zip(jobs, done, strict=True)
    ]


def _told(problem: Problem, artifact: Artifact) -> Row:
    """What the compiler made. `bytes_per_token` is what the kernel must move, whatever its schedule."""
    traffic = kernel_spec(problem.op, problem.direction).traffic
    moved = traffic(problem, 1025).bytes - traffic(problem, 1).bytes
    seen = resource_usage(artifact)
    return {"code_bytes": len(artifact.binary), "bytes_per_token": moved / 1024} | (asdict(seen) if seen else {})


def _dropped(artifact: Artifact | TaskFailed, others: Sequence[Artifact]) -> Row:
    why = why_rejected(artifact, others) if isinstance(artifact, Artifact) else None
    return {"dropped": why} if why else {}


def _tell(target: Target, rows: Sequence[Row], *, shown: bool) -> None:
    """The table of one target where it is to be `shown`, and in a line or more what is to be known of it."""
    if shown:
        _show(target, [row for row in rows if "failed" not in row])
    for row in rows:
        if "failed" in row:
            say(f"FAILED: {_named(row)}: {row['failed']}")
        elif row.get("spilled_bytes"):
            say(f"spills {row['spilled_bytes']} bytes at {row['registers']} registers: {_named(row)}")
    if target.kind == "cuda":
        say(summary(target, rows))


def summary(target: Target, rows: Sequence[Row]) -> str:
    """What became of a GPU's schedules, on one line."""
    looked = [row for row in rows if "failed" not in row]
    spilling, dropped = sum(row["spilled_bytes"] > 0 for row in looked), sum("dropped" in row for row in looked)
    most = {name: max((row[name] for row in looked), default=0) for name in ("registers", "shared_bytes")}
    return (
        f"{target}: {len(looked)} compiled, {len(rows) - len(looked)} failed, {spilling} spill, {dropped} would be "
        f"dropped; at most {most['registers']} registers a thread and {most['shared_bytes']} bytes of shared memory"
    )


def _named(row: Mapping[str, Any]) -> str:
    shape = f"{row['op']} {row['direction']} n={row['streams']} C={row['width']} {row['dtype']}"
    return f"{shape} for {row['target']}, {schedule_text(row['schedule'])}"


def _show(target: Target, rows: Sequence[Row]) -> None:
    columns = (*(GPU_COLUMNS if target.kind == "cuda" else ()), "bytes_per_token", "code_bytes")
    made = table(f"schedules for {target}", SHAPE, tuple(name.replace("_", " ") for name in columns))
    made.add_column("schedule", overflow="fold")
    for row in rows:
        cells = [number(row[name]) for name in columns[:-1]] + [str(row["code_bytes"])]
        made.add_row(*(str(row[name]) for name in SHAPE), *cells, schedule_text(row["schedule"]))
    show(made)
