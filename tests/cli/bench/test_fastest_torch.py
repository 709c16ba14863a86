"""The fastest variant in plain torch: which one is taken, and that failures do not end the run."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from cli.bench import fastest_torch
from cli.bench.cases import DIRECTIONS, TOLERANCE, make_case
from cli.bench.fastest_torch import FLOAT32, FastestTorch
from cli.bench.implementation import Implementation
from cli.bench.torch_composites import combinations, forms

SHAPE = (3, 16, 5)


@pytest.fixture
def fastest_first(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """{direction: name} of the variants that are to be the fastest."""
    fastest: dict[str, str] = {}

    def medians(
        case: object, candidates: Mapping[str, Implementation], directions: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        return {name: {d: 1.0 if fastest.get(d) == name else 2.0 for d in directions} for name in candidates}

    monkeypatch.setattr(fastest_torch, "_medians", medians)
    return fastest


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest_torch, "_compiled", lambda impl, function: function)


def names(found: Any) -> dict[str, tuple[str, ...]]:
    return {made.variant: tuple(made.directions) for made in found}


def test_the_fastest_form_of_each_direction_is_taken(fastest_first: dict[str, str]) -> None:
    fastest_first |= {"forward": "bmm, float32", "backward": "einsum, float32", "both": "bmm, float32"}
    case = make_case("aggregate", *SHAPE, "float32", 0)
    assert names(FastestTorch(*SHAPE[:2], "float32").implementations("eager", case, DIRECTIONS, [])) == {
        "bmm, float32": ("forward", "both"),
        "einsum, float32": ("backward",),
    }


def test_a_backward_by_itself_is_that_of_the_fastest_in_both(fastest_first: dict[str, str]) -> None:
    fastest_first |= {"forward": "einsum, float32", "backward": "einsum, float32", "both": "bmm, float32"}
    chooser, case = FastestTorch(*SHAPE[:2], "float32"), make_case("aggregate", *SHAPE, "float32", 0)
    assert names(chooser.implementations("eager", case, ("backward",), [])) == {"einsum, float32": ("backward",)}
    list(chooser.implementations("eager", case, ("forward", "both"), []))
    assert names(chooser.implementations("eager", case, ("backward",), [])) == {"bmm, float32": ("backward",)}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("impl", ["eager", "compile"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_alone_is_chosen_among_fixed_combinations(impl: str, dtype: str, fastest_first: dict[str, str]) -> None:
    tried = list(combinations(impl, *SHAPE[:2], dtype))
    fastest_first |= {"forward": tried[-1], "both": tried[1]}
    found = names(
        FastestTorch(*SHAPE[:2], dtype).implementations(
            impl, make_case("layer", *SHAPE, dtype, 0), ("forward", "both"), []
        )
    )
    assert {direction: name for name, directions in found.items() for direction in directions} == fastest_first


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("op", ["project", "merge", "layer"])
def test_a_form_of_equal_precision_rounds_neither_phi_nor_coefficients(op: str, fastest_first: dict[str, str]) -> None:
    """Where the fastest of all does."""
    case, chooser = make_case(op, *SHAPE, "bfloat16", 0), FastestTorch(*SHAPE[:2], "bfloat16")
    fastest_first["both"] = next(name for name in forms("compile", op, *SHAPE[:2], "bfloat16") if "native" in name)
    list(chooser.implementations("eager", case, ("both",), []))
    rounding, keeping = (names(chooser.implementations(impl, case, ("both",), [])) for impl in ("compile", FLOAT32))
    assert rounding
    assert keeping
    assert all("native" in name for name in rounding)
    assert not any("native" in name for name in keeping)


@pytest.mark.usefixtures("uncompiled")
def test_a_stack_takes_the_form_of_the_layer_or_else_the_first(fastest_first: dict[str, str]) -> None:
    chooser, tried = FastestTorch(*SHAPE[:2], "bfloat16"), list(combinations("compile", *SHAPE[:2], "bfloat16"))
    layer, stack = (make_case(op, *SHAPE, "bfloat16", 0) for op in ("layer", "stack"))
    assert list(names(chooser.implementations("compile", stack, ("both",), []))) == tried[:1]
    fastest_first["both"] = tried[1]
    list(chooser.implementations("compile", layer, ("both",), []))
    assert list(names(chooser.implementations("compile", stack, ("forward", "both"), []))) == tried[1:2]


@pytest.mark.slow
def test_torch_compile_is_an_implementation_with_the_same_results() -> None:
    torch.compiler.reset()
    case = make_case("aggregate", 2, 8, 4, "float32", seed=1)
    found = list(FastestTorch(2, 8, "float32").implementations("compile", case, DIRECTIONS, skipped := []))
    assert skipped == []
    assert {direction for made in found for direction in made.directions} == set(DIRECTIONS)
    assert all(made.error(case) <= TOLERANCE["float32"] for made in found)
    assert {made.variant for made in found} == {"broadcast, float32"}


def test_a_form_that_does_not_compile_is_skipped_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("a compiler's words\nand many more lines")

    case = make_case("layer", *SHAPE, "float32", 0)
    tried = list(combinations("compile", *SHAPE[:2], "float32"))
    variants = iter([broken])
    monkeypatch.setattr(fastest_torch, "_compiled", lambda impl, function: next(variants, function))
    skipped: list[str] = []
    assert (
        list(names(FastestTorch(*SHAPE[:2], "float32").implementations("compile", case, ("both",), skipped)))
        == tried[1:]
    )
    assert skipped == [f"compile {case.describe()} ({tried[0]}): a compiler's words"]


def test_a_form_that_takes_too_long_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(impl: str, function: Any) -> Any:
        def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            try:
                time.sleep(60)
            except Exception:
                pytest.fail("a compiler that catches exceptions goes on")
            return ()

        return run

    monkeypatch.setattr(fastest_torch, "_compiled", slow)
    monkeypatch.setattr(fastest_torch, "TIME_LIMIT", 0.05)
    skipped: list[str] = []
    case = make_case("stack", *SHAPE, "float32", 0)
    started = time.monotonic()
    assert list(FastestTorch(*SHAPE[:2], "float32").implementations("compile", case, ("both",), skipped)) == []
    assert time.monotonic() - started < 30
    assert "not ready after 0.05 s" in skipped[0]
