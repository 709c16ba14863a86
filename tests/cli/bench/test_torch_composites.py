"""Composites of the torch ops: each computes the same maths as the reference, and the tolerance tells wrong maths."""

from collections.abc import Callable

import pytest
import torch

from cli.bench.cases import TOLERANCE, make_case
from cli.bench.torch_composites import COMBINATIONS, STACK_LAYERS, combinations, composite, composite_of_ops
from cli.bench.torch_ops import OpFunction
from tiles.kernels.spec import DTYPES

SHAPE = (3, 16, 5)
ALL_COMBINATIONS = [
    (impl, dtype, name)
    for dtype in DTYPES
    for impl in ("eager", "compile")
    for name in combinations(impl, 3, 16, dtype)
]


@pytest.mark.parametrize(
    ("op", "impl", "dtype", "name"),
    [
        *(("layer", *combination) for combination in ALL_COMBINATIONS),
        *((op, *ALL_COMBINATIONS[place]) for op, place in {"pre": 0, "step": -1, "single_pass": 5, "stack": 5}.items()),
    ],
)
def test_compositions_of_every_combination_equal_the_reference(op: str, impl: str, dtype: str, name: str) -> None:
    parts = combinations(impl, *SHAPE[:2], dtype)[name]
    case = make_case(op, *SHAPE, dtype, seed=1)
    assert case.error(composite_of_ops(op, parts)) <= TOLERANCE[dtype]


def test_a_stack_runs_all_its_layers() -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def counting(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(parameters)
        return (x[:, :, 0], x[:, :, 0], x)

    case = make_case("stack", *SHAPE, "float32", seed=1)
    composite("stack", counting, lambda x, weights: (x[:, 0],), lambda x, u, res, post: (x,))(*case.inputs)
    assert len(seen) == STACK_LAYERS
    assert [id(parameter) for parameters in seen for parameter in parameters] == list(map(id, case.inputs[1:]))


@pytest.mark.parametrize("impl", ["eager", "compile"])
def test_half_precision_has_a_combination_that_keeps_phi_and_coefficients_in_float32(impl: str) -> None:
    wide = [name for name in combinations(impl, 4, 64, "bfloat16") if "native" not in name]
    assert len(wide) == 1
    assert all(len(names) == len(set(names)) for names in COMBINATIONS.values())


@pytest.mark.parametrize("wrong", ["one round instead of 20", "post without its 2"])
@pytest.mark.parametrize("op", ["coefficients", "pre", "single_pass", "layer"])
def test_the_bound_tells_wrong_coefficients_from_rounding(op: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(op, *SHAPE, "bfloat16", seed=1)
    parts = dict(combinations("compile", *SHAPE[:2], "bfloat16").popitem()[1])
    if wrong == "one round instead of 20":
        monkeypatch.setattr("cli.bench.torch_ops.ROUNDS", 1)
    else:
        parts["coefficients"] = _halved_post(parts["coefficients"])
    function = parts[op] if op in parts else composite_of_ops(op, parts)
    assert case.error(function) > TOLERANCE["bfloat16"]


def _halved_post(right: OpFunction) -> Callable[..., tuple[torch.Tensor, ...]]:
    def halved(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, post, res = right(*inputs)
        return weights, post / 2, res

    return halved


def test_a_stack_with_one_wrong_layer_is_wrong() -> None:
    case = make_case("stack", *SHAPE, "float32", seed=1)
    parts = combinations("eager", *SHAPE[:2], "float32").popitem()[1]
    function = composite_of_ops("stack", parts)

    def swapped(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return function(x, *parameters[:-1], parameters[2])

    assert case.error(function) <= TOLERANCE["float32"]
    assert case.error(swapped, gradients=False) > 10 * TOLERANCE["float32"]
