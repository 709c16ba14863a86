"""`mhc-tune record`: measurements of every valid schedule of one kernel, for `mhc-tune replay`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import TextColumn, TimeRemainingColumn

from autotune.processes.worker import TaskFailed
from autotune.processes.workers import Workers
from autotune.recorded.sweep import record as sweep
from cli.ui import options
from cli.ui.options import check_choices, measured_device
from cli.ui.output import say
from cli.ui.progress import progress_bars
from cli.ui.render import number
from tiles.compiler.compile import why_no_compiler
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem


def record(
    op: Annotated[str, typer.Option("--op", help=f"One of {', '.join(options.KERNEL_OPS)}.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT.json.gz", help="The file to write.")],
    direction: Annotated[Literal["forward", "backward"], typer.Option("--direction", help="Pass.")] = "forward",
    target: options.TargetOption = "cpu",
    streams: Annotated[int, typer.Option("--streams", help="Residual streams n, 1 to 16.")] = 4,
    width: Annotated[int, typer.Option("--width", help="Model width C, a multiple of 8.")] = 1280,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help=options.TOKENS_HELP)] = 2048,
    dtype: Annotated[str, typer.Option("--dtype", help=options.DTYPE_HELP)] = "float32",
) -> None:
    """Time every valid schedule of one kernel on this device, for mhc-tune replay.

    Every schedule is compiled and verified first; failures are recorded with the reason. At the end, what was timed
    while the machine was busy is timed again, then the fastest side by side, so that no lucky timing is the optimum.
    Each measurement is kept in OUT.part at once: after Ctrl-C or a crash, run the same command to continue.
    """
    check_choices("op", [op], options.KERNEL_OPS)
    device = measured_device(target)
    if why := why_no_compiler(device.target):
        raise BadInput(f"recording compiles kernels for {device.target}: {why}")
    asked = Problem(op, direction, streams, width, dtype, tokens)
    problem = replace(kernel_spec(op, direction).canonical(asked), tokens=tokens)
    say(f"recording {problem.describe()} to {out}")
    bars = progress_bars("schedules", TextColumn("{task.fields[note]}"), TimeRemainingColumn())
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
        say(f"interrupted: the measurements are kept beside {out}; run the same command to continue")
        raise typer.Exit(options.INTERRUPTED) from None
    default_ms = space.ms[space.pool.default]
    say(
        f"{problem.describe()}: {len(space.pool)} schedules, {len(space.reasons)} failed; "
        f"best {number(space.optimum)} ms, default {number(default_ms)} ms, worst {number(space.worst)} ms; in {out}"
    )
