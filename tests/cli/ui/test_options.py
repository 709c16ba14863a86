"""Problems that options describe."""

import pytest

from cli.ui.options import KERNEL_OPS, problems
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_specs


def test_every_kernel_in_both_directions_and_those_of_the_identity_where_they_are_named() -> None:
    found = problems([4], [64], [32], ["float32"])
    mixing = {kernel for kernel in kernel_specs() if not ("_identity" in kernel[0] or "_norm" in kernel[0])}
    assert {(problem.op, problem.direction) for problem in found} == mixing
    named = problems([4], [64], [32], ["float32"], KERNEL_OPS)
    assert {(problem.op, problem.direction) for problem in named} == set(kernel_specs())
    assert all(problem.tokens == 32 for problem in found)


def test_a_kernel_without_streams_of_its_own_is_tuned_once_for_all_dtypes() -> None:
    found = problems([4], [64], [32], ["float32", "bfloat16"])
    counts = {op: sum(problem.op == op for problem in found) for op, _ in kernel_specs()}
    assert counts["merge"] == counts["aggregate"] == counts["project"] == 4
    assert counts["coefficients"] == counts["sinkhorn"] == 2


def test_options_multiply() -> None:
    found = problems([2, 4], [64, 128], [32, 64], ["bfloat16"])
    assert sum(problem.op == "merge" and problem.direction == "forward" for problem in found) == 8
    assert len(set(found)) == len(found)


def test_each_problem_is_checked() -> None:
    with pytest.raises(BadInput, match="got 17"):
        problems([4, 17], [64], [32], ["float32"])


def test_ops_can_be_chosen_and_fused_kernels_come_after_their_parts() -> None:
    chosen = problems([4], [64], [32], ["float32"], ["pre", "merge"])
    assert [problem.op for problem in chosen] == ["merge", "merge", "pre", "pre"]
    order = [problem.op for problem in problems([4], [64], [32], ["float32"])]
    fused, parts = ("pre", "step", "single_pass"), ("project", "coefficients", "aggregate", "merge")
    assert min(map(order.index, fused)) > max(map(order.index, parts))
