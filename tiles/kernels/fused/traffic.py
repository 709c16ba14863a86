"""The least that pre and step move and compute (docs/design.md, "Bytes a token"): each tensor once."""

from __future__ import annotations

from collections.abc import Sequence

from tiles.kernels.apply import traffic as apply
from tiles.kernels.coefficients import traffic as coefficients
from tiles.kernels.fused import signature
from tiles.kernels.project import traffic as project
from tiles.kernels.spec import Argument, Problem, Traffic

READ, WRITTEN = ("input", "updated"), ("output", "partial", "updated")


def pre(problem: Problem, tokens: int) -> Traffic:
    """In the streams' elements a token: forward (n + 1)C, backward (3n + 1)C with the gradient that dx is added to."""
    return each_once(signature.pre(problem), tokens, pre_flops(problem, tokens))


def step(problem: Problem, tokens: int) -> Traffic:
    """In the streams' elements a token: forward (2n + 2)C, backward (3n + 3)C; the backward merges once more."""
    return each_once(signature.step(problem), tokens, step_flops(problem, tokens))


def each_once(arguments: Sequence[Argument], tokens: int, flops: int) -> Traffic:
    """Every argument read or written once."""
    read = sum(argument.nbytes(tokens) for argument in arguments if argument.role in READ)
    return Traffic(read, sum(argument.nbytes(tokens) for argument in arguments if argument.role in WRITTEN), flops)


def pre_flops(problem: Problem, tokens: int) -> int:
    """Of project, coefficients, aggregate and the norm of its result; the backward of that makes u again."""
    norm = (4 if problem.direction == "forward" else 4 * problem.streams + 8) * problem.width * tokens
    return problem.normalises * norm + sum(
        part(problem.of(op), tokens).flops
        for op, part in (
            ("project", project.project),
            ("coefficients", coefficients.coefficients),
            ("aggregate", apply.aggregate),
        )
    )


def step_flops(problem: Problem, tokens: int) -> int:
    """Of merge and pre; the backward merges once more."""
    flops = pre_flops(problem, tokens) + apply.merge(problem.of("merge"), tokens).flops
    if problem.direction == "backward":
        flops += apply.merge(problem.of("merge", "forward"), tokens).flops
    return flops
