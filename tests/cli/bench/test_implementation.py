"""Correctness of implementations: wrong results, NaN and wrong gradients are not timed."""

import pytest
import torch

from cli.bench.cases import make_case
from cli.bench.implementation import Implementation, is_correct
from cli.bench.torch_ops import variants

SHAPE = (3, 16, 5)


def test_wrong_maths_is_said_and_not_timed() -> None:
    case = make_case("merge", *SHAPE, "float32", seed=1)
    right = variants("merge", *SHAPE[:2], "float32")["einsum, float32"]

    def transposed(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return right(x, f, res.mT, post)

    skipped: list[str] = []
    assert is_correct(Implementation("eager", right, "einsum"), case, skipped)
    assert skipped == []
    assert not is_correct(Implementation("eager", transposed, "einsum"), case, skipped)
    assert "wrong, relative error" in skipped[0]


@pytest.mark.parametrize("directions", [("forward",), ("both",)])
def test_results_that_are_not_numbers_are_wrong(directions: tuple[str, ...]) -> None:
    case = make_case("aggregate", *SHAPE, "float32", seed=1)

    def broken(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((pre[:, :, None] * x).sum(1) * torch.nan,)

    assert not is_correct(Implementation("eager", broken, "broken", directions), case, [])


def test_gradients_count_where_they_are_timed() -> None:
    case = make_case("aggregate", *SHAPE, "float32", seed=1)

    def detached(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((pre[:, :, None] * x.detach()).sum(1) + 0 * x.sum(1),)

    assert is_correct(Implementation("eager", detached, "", ("forward",)), case, [])
    assert not is_correct(Implementation("eager", detached, "", ("forward", "both")), case, [])
