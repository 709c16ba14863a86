"""Hardware limits: what they are, and which ops have them."""

import pytest
import torch

from cli.bench import hardware_limits
from cli.bench.cases import OPS, make_case


def limits(op: str, dtype: str = "float32", directions: tuple[str, ...] = ("forward", "both")):
    case = make_case(op, 2, 16, 5, dtype, 0)
    return case, {
        made.impl: made
        for name in hardware_limits.NAMES
        for made in hardware_limits.implementations(name, case, directions)
    }


def test_a_copy_moves_as_many_bytes_as_the_op():
    case, found = limits("merge", "bfloat16")
    (copied,) = found["copy"].function(*case.inputs)
    assert abs(2 * copied.nbytes - case.traffic["forward"].bytes) < 8
    assert copied.eq(1).all()
    assert set(found["copy"].calls(case)) == {"forward"}


def test_the_matmul_is_project_without_its_norm():
    case, found = limits("project")
    with torch.no_grad():
        (z,) = found["matmul"].function(*case.inputs)
    torch.testing.assert_close(z.double(), case.expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", [op for op in OPS if op != "stack"])
def test_only_forwards_of_the_ops_that_are_held_against_one_have_one(op):
    assert set(limits(op)[1]) == {"aggregate": {"copy"}, "merge": {"copy"}, "project": {"matmul"}}.get(op, set())
    assert not limits(op, directions=("both",))[1]
    assert "matmul" not in limits(op, "bfloat16")[1]
