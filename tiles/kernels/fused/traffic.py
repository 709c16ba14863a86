"""The least that pre and step move and compute (docs/design.md, "Bytes a token"): each tensor once."""

from __future__ import annotations

from dataclasses import replace

from tiles.kernels.apply import traffic as apply
from tiles.kernels.coefficients import traffic as coefficients
from tiles.kernels.fused import signature
from tiles.kernels.project import traffic as project
from tiles.kernels.spec import Problem, Traffic

READ, WRITTEN = ("input", "updated"), ("output", "partial", "updated")


def pre(problem: Problem, tokens: int) -> Traffic:
    """In the streams' elements a token: forward (n + 1)C, backward (3n + 1)C with the gradient that dx is added to."""
    flops = sum(
        part(replace(problem, op=op), tokens).flops
        for op, part in (
            ("project", project.project),
            ("coefficients", coefficients.coefficients),
            ("aggregate", apply.aggregate),
        )
    )
    arguments = signature.pre(problem)
    read = sum(argument.nbytes(tokens) for argument in arguments if argument.role in READ)
    return Traffic(read, sum(argument.nbytes(tokens) for argument in arguments if argument.role in WRITTEN), flops)


def step(problem: Problem, tokens: int) -> Traffic:
    """In the streams' elements a token: forward (2n + 2)C, backward (3n + 3)C; the backward merges once more."""
    merged = replace(problem, op="merge")
    flops = pre(problem, tokens).flops + apply.merge(merged, tokens).flops
    if problem.direction == "backward":
        flops += apply.merge(replace(merged, direction="forward"), tokens).flops
    arguments = signature.step(problem)
    read = sum(argument.nbytes(tokens) for argument in arguments if argument.role in READ)
    return Traffic(read, sum(argument.nbytes(tokens) for argument in arguments if argument.role in WRITTEN), flops)
