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
from autotune.sass.bytes_in_flight import GPUS, LATENCY, KernelLook, least_ratio, look
from autotune.sass.disassembler import NotDisassembled
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
NOTE = (
    "in flight / need: bytes in flight, of those that fill the GPU's memory, by a look at\n"
    "the code; of the kernel that has the least of those that read streams"
)

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
    needs nvcc but no GPU. Where nvdisasm is installed, also how many bytes the code has in flight, of those that fill
    the GPU's memory: a look at the code, no measurement. Exits with 1 when a kernel does not compile.
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
    looks, unread = _looks(jobs, done)
    rows = _rows(jobs, done, looks)
    for reason in unread:
        say(f"no look at bytes in flight: {reason}")
    if json:
        show_json({"targets": [str(built) for built in targets]} | _looked_at_for(targets, looks) | {"results": rows})
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


def _looks(jobs: Sequence[Job], done: Sequence[Artifact | TaskFailed]) -> tuple[list[list[KernelLook]], list[str]]:
    """A look at the kernels of each schedule for a GPU that compiled, and the reasons why there is none, each once."""
    found: list[list[KernelLook]] = [[] for _ in jobs]
    reasons: dict[str, None] = {}
    for place, ((problem, _, target), artifact) in enumerate(zip(jobs, done, strict=True)):
        if isinstance(artifact, Artifact) and target.kind == "cuda":
            try:
                found[place] = look(artifact, problem.tokens)
            except NotDisassembled as why:
                reasons[str(why)] = None
    return found, list(reasons)


def _looked_at_for(targets: Sequence[Target], looks: Sequence[Sequence[KernelLook]]) -> Row:
    """What the look assumes of each target's GPU, where there is one."""
    gpus = {str(target): GPUS[target.arch] for target in targets if target.arch in GPUS}
    assumed = {target: asdict(gpu) | {"latency_seconds": LATENCY} for target, gpu in gpus.items()}
    return {"in_flight_assumes": assumed} if any(looks) else {}


def _rows(
    jobs: Sequence[Job], done: Sequence[Artifact | TaskFailed], looks: Sequence[Sequence[KernelLook]]
) -> list[Row]:
    """One row per schedule, in order; each is compared with the others of its kernel and target."""
    others: dict[tuple[Problem, Target], list[Artifact]] = {}
    for (problem, _, target), artifact in zip(jobs, done, strict=True):
        if isinstance(artifact, Artifact):
            others.setdefault((problem, target), []).append(artifact)
    return [
        {"target": str(target), **asdict(problem), "schedule": asdict(schedule)}
        | ({"failed": str(artifact)} if isinstance(artifact, TaskFailed) else _resources(problem, artifact))
        | _dropped(artifact, others.get((problem, target), []))
        | _seen(seen)
        for (problem, schedule, target), artifact, seen in zip(jobs, done, looks, strict=True)
    ]


def _resources(problem: Problem, artifact: Artifact) -> Row:
    """Size and resources of compiled code. `bytes_per_token`: what the kernel must move, whatever its schedule."""
    traffic = kernel_spec(problem.op, problem.direction).traffic
    moved = traffic(problem, 1025).bytes - traffic(problem, 1).bytes
    seen = resource_usage(artifact)
    return {"code_bytes": len(artifact.binary), "bytes_per_token": moved / 1024} | (asdict(seen) if seen else {})


def _seen(looks: Sequence[KernelLook]) -> Row:
    return {"in_flight_ratio": least_ratio(looks), "kernels": [each.as_json() for each in looks]} if looks else {}


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
    looked = ("in_flight_ratio",) if any("in_flight_ratio" in row for row in rows) else ()
    columns = (*(GPU_COLUMNS if target.kind == "cuda" else ()), *looked, "bytes_per_token", "code_bytes")
    made = table(f"schedules for {target}", (), ())
    made.add_column("kernel, schedule", min_width=20)
    for name in columns:
        heading = "in flight / need" if name == "in_flight_ratio" else name.replace("_percent", " %").replace("_", " ")
        made.add_column(heading, justify="right")
    for row in rows:
        cells = [number(row.get(name)) for name in columns[:-1]] + [str(row["code_bytes"])]
        made.add_row(f"{_kernel(row)}\n  {schedule_text(row['schedule'])}", *cells)
    if looked:
        made.caption = NOTE
    show(made)
