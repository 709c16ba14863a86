"""The torch forms that bench compares with: each computes the same maths, and what does not is not timed."""

from collections.abc import Callable

import pytest
import torch

from cli.bench import peers
from cli.bench.cases import OPS, ROUNDING, make_case
from cli.bench.implementation import Contender, is_right
from cli.bench.torch_composites import BLOCKS, COMBINATIONS, COMPOSED, PARTS, combinations, composed, pre
from cli.bench.torch_ops import COMPILED, Form, forms
from tiles.kernels.spec import DTYPES

SHAPE = (3, 16, 5)
ALL_FORMS = [(op, dtype, name) for dtype in DTYPES for op in PARTS for name in forms(op, *SHAPE[:2], dtype)]
ALL_COMBINATIONS = [
    (impl, dtype, name)
    for dtype in DTYPES
    for impl in ("eager", "compile")
    for name in combinations(impl, 3, 16, dtype)
]


@pytest.mark.parametrize(("op", "dtype", "name"), ALL_FORMS)
def test_a_form_and_its_gradients_equal_the_reference(op: str, dtype: str, name: str) -> None:
    case = make_case(op, *SHAPE, dtype, seed=1)
    assert case.error(forms(op, *SHAPE[:2], dtype)[name]) <= ROUNDING[dtype]


@pytest.mark.parametrize("op", COMPOSED)
@pytest.mark.parametrize(("impl", "dtype", "name"), ALL_COMBINATIONS)
def test_compositions_of_every_combination_equal_the_reference(op: str, impl: str, dtype: str, name: str) -> None:
    parts = combinations(impl, *SHAPE[:2], dtype)[name]
    case = make_case(op, *SHAPE, dtype, seed=1)
    assert case.error(composed(op, pre(parts), parts["merge"])) <= ROUNDING[dtype]


def test_a_stack_runs_all_its_layers() -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def counting(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(parameters)
        return (x[:, 0], x[:, :, 0], x)

    case = make_case("stack", *SHAPE, "float32", seed=1)
    composed("stack", counting, lambda x, u, res, post: (x,))(*case.inputs)
    assert len(seen) == BLOCKS
    assert [id(parameter) for parameters in seen for parameter in parameters] == list(map(id, case.inputs[1:]))


def test_float32_streams_need_no_native_forms() -> None:
    assert not any(name.endswith("native") for op in PARTS for name in forms(op, 4, 64, "float32"))
    assert any(name.endswith("native") for name in forms("merge", 4, 64, "bfloat16"))


def test_forms_for_the_compiler_exist() -> None:
    assert all(set(COMPILED[op]) <= set(forms(op, 4, 64, "bfloat16")) for op in PARTS)


@pytest.mark.parametrize("impl", ["eager", "compile"])
def test_half_precision_has_a_combination_that_keeps_phi_and_coefficients_in_float32(impl: str) -> None:
    wide = [name for name in combinations(impl, 4, 64, "bfloat16") if "native" not in name]
    assert len(wide) == 1
    assert all(len(names) == len(set(names)) for names in COMBINATIONS.values())


def test_wrong_maths_is_said_and_not_timed() -> None:
    case = make_case("merge", *SHAPE, "float32", seed=1)
    right = forms("merge", *SHAPE[:2], "float32")["einsum, float32"]

    def transposed(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return right(x, f, res.mT, post)

    skipped: list[str] = []
    assert is_right(Contender("eager", right, "einsum"), case, skipped)
    assert skipped == []
    assert not is_right(Contender("eager", transposed, "einsum"), case, skipped)
    assert "wrong, relative error" in skipped[0]


@pytest.mark.parametrize("directions", [("forward",), ("both",)])
def test_results_that_are_not_numbers_are_wrong(directions: tuple[str, ...]) -> None:
    case = make_case("aggregate", *SHAPE, "float32", seed=1)

    def broken(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((pre[:, :, None] * x).sum(1) * torch.nan,)

    assert not is_right(Contender("eager", broken, "broken", directions), case, [])


def test_gradients_count_where_they_are_timed() -> None:
    case = make_case("aggregate", *SHAPE, "float32", seed=1)

    def detached(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((pre[:, :, None] * x.detach()).sum(1) + 0 * x.sum(1),)

    assert is_right(Contender("eager", detached, "", ("forward",)), case, [])
    assert not is_right(Contender("eager", detached, "", ("forward", "both")), case, [])


@pytest.mark.parametrize("wrong", ["one round instead of 20", "post without its 2"])
@pytest.mark.parametrize("op", ["coefficients", "pre", "layer"])
def test_the_bound_tells_wrong_coefficients_from_rounding(op: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(op, *SHAPE, "bfloat16", seed=1)
    parts = dict(combinations("compile", *SHAPE[:2], "bfloat16").popitem()[1])
    if wrong == "one round instead of 20":
        monkeypatch.setattr("cli.bench.torch_ops.ROUNDS", 1)
    else:
        parts["coefficients"] = _halved_post(parts["coefficients"])
    form = parts[op] if op in parts else composed(op, pre(parts), parts["merge"])
    assert case.error(form) > ROUNDING["bfloat16"]


def _halved_post(right: Form) -> Callable[..., tuple[torch.Tensor, ...]]:
    def halved(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, post, res = right(*inputs)
        return weights, post / 2, res

    return halved


def test_a_stack_with_one_wrong_layer_is_wrong() -> None:
    case = make_case("stack", *SHAPE, "float32", seed=1)
    parts = combinations("eager", *SHAPE[:2], "float32").popitem()[1]
    form = composed("stack", pre(parts), parts["merge"])

    def swapped(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return form(x, *parameters[:-1], parameters[2])

    assert case.error(form) <= ROUNDING["float32"]
    assert case.error(swapped, gradients=False) > 10 * ROUNDING["float32"]


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("project", "coefficients")])
def test_the_peer_computes_our_maths(op: str) -> None:
    case = make_case(op, *SHAPE, "bfloat16", 1)
    form = peers.form("tile-kernels", case)
    assert not isinstance(form, str), f"the test extra installs tile-kernels, yet: {form}"
    assert case.error(form) <= ROUNDING["bfloat16"]


def test_a_peer_that_is_not_installed_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers._tile_kernels.cache_clear()
    skipped: list[str] = []
    try:
        case = make_case("merge", *SHAPE, "bfloat16", 1)
        assert list(peers.contender("tile-kernels", case, ("both",), skipped)) == []
    finally:
        peers._tile_kernels.cache_clear()
    assert "not installed" in skipped[0]
