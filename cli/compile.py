"""`mhc-tune compile`: what the compiler says about the default schedules, for a device that need not be there."""

from __future__ import annotations

import typer

from cli.options import (
    DEFAULT_DTYPE,
    DEFAULT_STREAMS,
    DEFAULT_TOKENS,
    DEFAULT_WIDTH,
    DtypeOption,
    StreamsOption,
    TargetOption,
    TokensOption,
    WidthOption,
    problems,
)
from cli.output import say, show, stdout_kept_free
from cli.render import SHAPE, shape_of, table
from tiles.compile import CompileError, compile_kernel, why_no_compiler
from tiles.errors import BadInput
from tiles.registry import kernel_spec
from tiles.target import parse_target

DETAILS = ("registers", "spill_stores", "spill_loads", "static_shared_bytes")


def compile_(
    target: TargetOption = "auto",
    streams: StreamsOption = DEFAULT_STREAMS,
    width: WidthOption = DEFAULT_WIDTH,
    tokens: TokensOption = DEFAULT_TOKENS,
    dtype: DtypeOption = DEFAULT_DTYPE,
) -> None:
    """Compile every kernel's default schedule for a target, without running anything.

    For a GPU, prints the registers, spills and shared memory that the compiler reports; the GPU need not be there,
    nvcc must be. Exits with 1 when a kernel does not compile.
    """
    built = parse_target(target)
    if why := why_no_compiler(built):
        raise BadInput(f"compiling for {built} needs its compiler: {why}")
    numbers = DETAILS if built.kind == "cuda" else ()
    made = table(f"default schedules for {built}", SHAPE, (*numbers, "code bytes"))
    failures = []
    for problem in problems(streams, width, tokens, dtype):
        say(f"compiling {problem.describe()}")
        schedule = kernel_spec(problem.op, problem.direction).default(problem, built)
        try:
            with stdout_kept_free():
                artifact = compile_kernel(problem, schedule, built)
        except CompileError as error:
            failures.append(str(error))
            continue
        reported = (str(artifact.details.get(name, "-")) for name in numbers)
        made.add_row(*map(str, shape_of(problem)), *reported, str(len(artifact.binary)))
    show(made)
    for failure in failures:
        say(f"FAILED: {failure}")
    if failures:
        raise typer.Exit(1)
