"""What the yardsticks are, and which ops have them."""

import pytest
import torch

from cli.bench import hardware_limits as yardsticks
from cli.bench.cases import OPS, make_case


def forms(op: str, dtype: str = "float32", directions: tuple[str, ...] = ("forward", "both")):
    case = make_case(op, 2, 16, 5, dtype, 0)
    return case, {made.impl: made for name in yardsticks.NAMES for made in yardsticks.contender(name, case, directions)}


def test_a_copy_moves_as_many_bytes_as_the_op():
    case, found = forms("merge", "bfloat16")
    (copied,) = found["copy"].form(*case.inputs)
    assert abs(2 * copied.nbytes - case.traffic["forward"].bytes) < 8
    assert copied.eq(1).all()
    assert set(found["copy"].calls(case)) == {"forward"}


def test_the_matmul_is_project_without_its_norm():
    case, found = forms("project")
    with torch.no_grad():
        (z,) = found["matmul"].form(*case.inputs)
    torch.testing.assert_close(z.double(), case.wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_only_forwards_of_the_ops_that_are_held_against_one_have_one(op):
    assert set(forms(op)[1]) == {"aggregate": {"copy"}, "merge": {"copy"}, "project": {"matmul"}}.get(op, set())
    assert not forms(op, directions=("both",))[1]
    assert "matmul" not in forms(op, "bfloat16")[1]
