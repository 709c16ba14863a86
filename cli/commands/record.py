"""`mhc-tune record`: measure every valid schedule of one kernel, for `mhc-tune replay`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.recorded.sweep import record as sweep
from cli.ui.options import TargetOption, known_choices, measured_device
from cli.ui.output import messages, say
from cli.ui.render import number
from tiles.compiler.compile import why_no_compiler
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import Problem

INTERRUPTED = 130

OPS = list(dict.fromkeys(op for op, _ in kernel_specs()))


def record(
    op: Annotated[str, typer.Option("--op", help=f"One of {', '.join(OPS)}.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT.json.gz", help="The file to make.")],
    direction: Annotated[Literal["forward", "backward"], typer.Option("--direction")] = "forward",
    target: TargetOption = "cpu",
    streams: Annotated[int, typer.Option("--streams", help="Residual streams n, 1 to 16.")] = 4,
    width: Annotated[int, typer.Option("--width", help="Model width C, a multiple of 8.")] = 1280,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens a call.")] = 2048,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the streams: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Compile, verify and time every valid schedule of one kernel on this device, and write them to a file.

    What is measured is kept in OUT.part at once: after Ctrl-C or a crash the same command goes on. Schedules that fail
    are recorded with the reason.
    """
    known_choices("op", [op], OPS)
    device = measured_device(target)
    if why := why_no_compiler(device.target):
        raise BadInput(f"recording compiles kernels for {device.target}: {why}")
    asked = Problem(op, direction, streams, width, dtype, tokens)
    problem = replace(kernel_spec(op, direction).canonical(asked), tokens=tokens)
    say(f"recording {problem.describe()} to {out}")
    bars = Progress(
        TextColumn("schedules"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=messages,
        disable=not messages.is_terminal,
        transient=True,
    )
    bar = bars.add_task("", total=None, note="")

    def on_member(done: int, failed: int, members: int) -> None:
        bars.update(bar, completed=done, total=members, note=f"{failed} failed" if failed else "")

    try:
        with bars, Workers(kind=device.kind) as workers:
            space = sweep(problem, device, out, workers, on_member=on_member)
    except TaskFailed as error:
        say(f"FAILED: {problem.describe()}: the default schedule fails: {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        say(f"interrupted: what was measured is kept beside {out}; run the same command to go on")
        raise typer.Exit(INTERRUPTED) from None
    default_ms = space.ms[space.pool.default]
    say(
        f"{problem.describe()}: {len(space.pool)} schedules, {len(space.reasons)} failed; "
        f"best {number(space.optimum)} ms, default {number(default_ms)} ms, worst {number(space.worst)} ms; in {out}"
    )
