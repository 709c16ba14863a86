"""The torch forms that bench compares with: each computes the same maths, and what does not is not timed."""

from collections.abc import Sequence

import pytest
import torch

from cli import bench, contenders, peers
from cli.baselines import COMPILED, Form, forms, layer
from cli.cases import DIRECTIONS, OPS, ROUNDING, layer_case, op_case
from cli.contenders import Contender, Forms, is_right
from mhc.kernels import Kernels
from tiles.family import DTYPES

SHAPE = (3, 16, 5)
ALL_FORMS = [(op, dtype, name) for dtype in DTYPES for op in OPS for name in forms(op, *SHAPE[:2], dtype)]


@pytest.mark.parametrize(("op", "dtype", "name"), ALL_FORMS)
def test_a_form_and_its_gradients_equal_the_reference(op: str, dtype: str, name: str) -> None:
    case = op_case(op, *SHAPE, dtype, seed=1)
    assert case.error(forms(op, *SHAPE[:2], dtype)[name]) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pick", [0, -1])
def test_the_layer_equals_the_reference(dtype: str, pick: int) -> None:
    case = layer_case(*SHAPE, dtype, seed=1)
    parts = {op: list(forms(op, *SHAPE[:2], dtype).values())[pick] for op in OPS}
    assert case.error(layer(parts)) <= ROUNDING[dtype]


def test_float32_streams_need_no_native_forms() -> None:
    assert not any(name.endswith("native") for op in OPS for name in forms(op, 4, 64, "float32"))
    assert any(name.endswith("native") for name in forms("merge", 4, 64, "bfloat16"))


def test_forms_for_the_compiler_exist() -> None:
    assert all(set(COMPILED[op]) <= set(forms(op, 4, 64, "bfloat16")) for op in OPS)


def test_wrong_maths_is_said_and_not_timed() -> None:
    case = op_case("merge", *SHAPE, "float32", seed=1)
    right = forms("merge", *SHAPE[:2], "float32")["einsum, float32"]

    def transposed(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return right(x, f, res.mT, post)

    skipped: list[str] = []
    assert is_right(Contender("eager", right, "einsum"), case, skipped)
    assert skipped == []
    assert not is_right(Contender("eager", transposed, "einsum"), case, skipped)
    assert "wrong, relative error" in skipped[0]


def test_results_that_are_not_numbers_are_wrong() -> None:
    case = op_case("aggregate", *SHAPE, "float32", seed=1)

    def broken(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((pre[:, :, None] * x).sum(1) * torch.nan,)

    assert not is_right(Contender("eager", broken, "broken"), case, [])


@pytest.mark.parametrize("wrong", ["one round instead of 20", "post without its 2"])
def test_the_bound_tells_wrong_coefficients_from_rounding(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = op_case("coefficients", *SHAPE, "bfloat16", seed=1)
    right = forms("coefficients", *SHAPE[:2], "bfloat16")["divide loop"]

    def halved(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pre, post, res = right(*inputs)
        return pre, post / 2, res

    if wrong == "one round instead of 20":
        monkeypatch.setattr("cli.baselines.ROUNDS", 1)
        halved = right
    assert case.error(halved) > ROUNDING["bfloat16"]


def test_the_fastest_form_of_each_direction_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = {"forward": "bmm, float32", "backward": "einsum, float32", "both": "bmm, float32"}

    def medians(case: object, candidates: dict[str, Form], directions: Sequence[str]) -> dict[str, dict[str, float]]:
        return {name: {d: 1.0 if fastest[d] == name else 2.0 for d in directions} for name in candidates}

    monkeypatch.setattr(contenders, "_medians", medians)
    chooser = Forms(*SHAPE[:2], "float32", ["eager"])
    found = list(chooser.contenders(op_case("aggregate", *SHAPE, "float32", 0), DIRECTIONS, {}, []))
    assert {contender.chosen: contender.directions for contender in found} == {
        "bmm, float32": ("forward", "both"),
        "einsum, float32": ("backward",),
    }


def test_torch_compile_is_a_contender_with_the_same_results() -> None:
    torch.compiler.reset()
    case = op_case("aggregate", 2, 8, 4, "float32", seed=1)
    chooser = Forms(2, 8, "float32", ["compile"])
    found = list(chooser.contenders(case, DIRECTIONS, {}, []))
    assert {direction for contender in found for direction in contender.directions} == set(DIRECTIONS)
    assert all(contender.error(case) <= ROUNDING["float32"] for contender in found)
    rows = bench._measure(case, found, DIRECTIONS)
    assert {row["impl"] for row in rows} == {"compile"}
    assert all(row["form"] == "broadcast, float32" and row["median_ms"] > 0 for row in rows)


def test_what_runs_the_reference_is_not_called_tuned() -> None:
    skipped: list[str] = []
    chooser = Forms(2, 8, "float32", ["tuned"])
    case = op_case("aggregate", 2, 8, 4, "float32", seed=1)
    assert list(chooser.contenders(case, DIRECTIONS, {"tuned": Kernels.reference()}, skipped)) == []
    assert "the torch reference was asked for" in skipped[0]


@pytest.mark.parametrize("op", ["aggregate", "merge", "layer"])
def test_the_peer_computes_our_maths(op: str) -> None:
    case = layer_case(*SHAPE, "bfloat16", 1) if op == "layer" else op_case(op, *SHAPE, "bfloat16", 1)
    form = peers.form("tile-kernels", case)
    assert not isinstance(form, str), f"the test extra installs tile-kernels, yet: {form}"
    assert case.error(form) <= ROUNDING["bfloat16"]


def test_a_peer_that_is_not_installed_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers._tile_kernels.cache_clear()
    try:
        assert "not installed" in str(peers.form("tile-kernels", op_case("merge", *SHAPE, "bfloat16", 1)))
    finally:
        peers._tile_kernels.cache_clear()


def test_bytes_are_those_of_the_ops() -> None:
    layer_traffic = layer_case(*SHAPE, "bfloat16", 1).traffic
    parts = [op_case(op, *SHAPE, "bfloat16", 1).traffic for op in OPS]
    assert layer_traffic == {direction: sum(part[direction] for part in parts) for direction in DIRECTIONS}
    assert op_case("merge", *SHAPE, "bfloat16", 1).traffic["forward"] > 0
    assert op_case("merge", *SHAPE, "float32", 1).traffic["forward"] > parts[-1]["forward"]
