"""`mhc-tune compile`: compiler results of schedules (registers, spills, shared memory), also for absent devices."""

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
from cli.ui import options
from cli.ui.options import problems
from cli.ui.output import messages, say, show, show_json, stdout_to_stderr
from cli.ui.render import number, schedule_text, table
from cli.ui.shapes import shapes
from tiles.compiler.compile import Artifact, why_no_compiler
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Target, parse_target

GPU_COLUMNS = ("registers", "spilled_bytes", "shared_bytes", "occupancy_percent")

Row = dict[str, Any]


def compile_(
    target: Annotated[
        list[str],
        typer.Option("--target", help="Compile for auto, cpu, cuda or one architecture (cuda:sm_90a). May repeat."),
    ] = ["auto"],  # noqa: B006 - typer only reads it
    model: options.ModelOption = None,
    streams: options.StreamsOption = None,
    width: options.WidthOption = None,
    tokens: options.TokensOption = options.DEFAULT_TOKENS,
    dtype: options.DtypeOption = None,
    op: options.OpOption = None,
    schedules: Annotated[
        int, typer.Option("--schedules", min=1, help="Schedules per kernel: the default one, then others of its pool.")
    ] = 1,
    json: options.JsonOption = False,
) -> None:
    """Compile schedules for one or more targets without running them.

    By default, every kernel's default schedule is compiled. For a GPU, shows the registers, spills and shared memory
    that the compiler reports, the occupancy that follows, and which schedules tuning would drop for these reasons; this
    needs nvcc but no GPU. Exits with 1 when a kernel does not compile.
    """
    targets = list(dict.fromkeys(parse_target(each) for each in target))
    for built in targets:
        if why := why_no_compiler(built):
            raise BadInput(f"compiling for {built} needs its compiler: {why}")
    found = shapes(model, streams, width, dtype, op)
    todo = problems(found.streams, found.widths, tokens, found.dtypes, found.ops, found.rounds)
    jobs = [job for built in targets for problem in todo for job in _jobs(problem, built, schedules)]
    for reason in found.reasons():
        say(reason)
    say(f"compiling {len(jobs)} schedules for {', '.join(map(str, targets))}")
    with stdout_to_stderr(json), Workers() as workers:
        done = list(track(workers.compile_each(jobs), total=len(jobs), console=messages, transient=True))
    rows = _rows(jobs, done)
    if json:
        show_json({"targets": [str(built) for built in targets], "results": rows})
    for built in targets:
        _report(built, [row for row in rows if row["target"] == str(built)], shown=not json)
    if any("failed" in row for row in rows):
        raise typer.Exit(1)


def _jobs(problem: Problem, target: Target, count: int) -> list[Job]:
    """The default schedule, then other schedules of the pool, evenly spaced."""
    spec = kernel_spec(problem.op, problem.direction)
    if count == 1:
        return [(problem, spec.default(problem, target), target)]
    pool = enumerate_pool(spec, problem, target)
    others = [member for member in range(len(pool)) if member != pool.default]
    step = max(1, -(-len(others) // (count - 1)))
    return [(problem, spec.schedule_from(pool.values(member)), target) for member in (pool.default, *others[::step])]


def _rows(jobs: Sequence[Job], done: Sequence[Artifact | TaskFailed]) -> list[Row]:
    """One row per schedule, in order; each is compared with the others of its kernel and target."""
    others: dict[tuple[Problem, Target], list[Artifact]] = {}
    for (problem, _, target), artifact in zip(jobs, done, strict=True):
        if isinstance(artifact, Artifact):
            others.setdefault((problem, target), []).append(artifact)
    return [
        {"target": str(target), **asdict(problem), "schedule": asdict(schedule)}
        | ({"failed": str(artifact)} if isinstance(artifact, TaskFailed) else _resources(problem, artifact))
        | _dropped(artifact, others.get((problem, target), []))
        for (problem, schedule, target), artifact in zip(jobs, done, strict=True)
    ]


def _resources(problem: Problem, artifact: Artifact) -> Row:
    """Size and resources of compiled code. `bytes_per_token`: what the kernel must move, whatever its schedule."""
    traffic = kernel_spec(problem.op, problem.direction).traffic
    moved = traffic(problem, 1025).bytes - traffic(problem, 1).bytes
    seen = resource_usage(artifact)
    return {"code_bytes": len(artifact.binary), "bytes_per_token": moved / 1024} | (asdict(seen) if seen else {})


def _dropped(artifact: Artifact | TaskFailed, others: Sequence[Artifact]) -> Row:
    why = why_rejected(artifact, others) if isinstance(artifact, Artifact) else None
    return {"dropped": why} if why else {}


def _report(target: Target, rows: Sequence[Row], *, shown: bool) -> None:
    """Print the table of one target if `shown`, then lines on failures and spills, and for a GPU a summary."""
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
    """One line: how many of a GPU's schedules compile, fail, spill and would be dropped."""
    looked = [row for row in rows if "failed" not in row]
    spilling, dropped = sum(row["spilled_bytes"] > 0 for row in looked), sum("dropped" in row for row in looked)
    most = {name: max((row[name] for row in looked), default=0) for name in ("registers", "shared_bytes")}
    return (
        f"{target}: {len(looked)} compiled, {len(rows) - len(looked)} failed, {spilling} spill, {dropped} would be "
        f"dropped; at most {most['registers']} registers a thread and {most['shared_bytes']} bytes of shared memory"
    )


def _named(row: Mapping[str, Any]) -> str:
    return f"{_kernel(row)} for {row['target']}, {schedule_text(row['schedule'])}"


def _kernel(row: Mapping[str, Any]) -> str:
    return f"{row['op']} {row['direction']} n={row['streams']} C={row['width']} {row['dtype']}"


def _show(target: Target, rows: Sequence[Row]) -> None:
    columns = (*(GPU_COLUMNS if target.kind == "cuda" else ()), "bytes_per_token", "code_bytes")
    made = table(f"schedules for {target}", (), ())
    made.add_column("kernel, schedule", min_width=20)
    for name in columns:
        made.add_column(name.replace("_percent", " %").replace("_", " "), justify="right")
    for row in rows:
        cells = [number(row[name]) for name in columns[:-1]] + [str(row["code_bytes"])]
        made.add_row(f"{_kernel(row)}\n  {schedule_text(row['schedule'])}", *cells)
    show(made)
