"""Which form of plain torch is compared with: the fastest right one, and what fails does not end the run."""

import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from cli.bench import fastest_torch as choice
from cli.bench.cases import DIRECTIONS, ROUNDING, make_case
from cli.bench.fastest_torch import Choice
from cli.bench.implementation import Contender
from cli.bench.time_limit import TooSlow, patience
from cli.bench.torch_composites import combinations

SHAPE = (3, 16, 5)


@pytest.fixture
def fastest_first(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """{direction: name} of the forms that are to be the fastest."""
    fastest: dict[str, str] = {}

    def medians(
        case: object, contenders: Mapping[str, Contender], directions: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        return {name: {d: 1.0 if fastest.get(d) == name else 2.0 for d in directions} for name in contenders}

    monkeypatch.setattr(choice, "_medians", medians)
    return fastest


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_ready", lambda impl, form: form)


def names(found: Any) -> dict[str, tuple[str, ...]]:
    return {contender.chosen: tuple(contender.directions) for contender in found}


def test_the_fastest_form_of_each_direction_is_taken(fastest_first: dict[str, str]) -> None:
    fastest_first |= {"forward": "bmm, float32", "backward": "einsum, float32", "both": "bmm, float32"}
    case = make_case("aggregate", *SHAPE, "float32", 0)
    assert names(Choice(*SHAPE[:2], "float32").fastest("eager", case, DIRECTIONS, [])) == {
        "bmm, float32": ("forward", "both"),
        "einsum, float32": ("backward",),
    }


def test_a_backward_by_itself_is_that_of_the_fastest_in_both(fastest_first: dict[str, str]) -> None:
    fastest_first |= {"forward": "einsum, float32", "backward": "einsum, float32", "both": "bmm, float32"}
    chooser, case = Choice(*SHAPE[:2], "float32"), make_case("aggregate", *SHAPE, "float32", 0)
    assert names(chooser.fastest("eager", case, ("backward",), [])) == {"einsum, float32": ("backward",)}
    list(chooser.fastest("eager", case, ("forward", "both"), []))
    assert names(chooser.fastest("eager", case, ("backward",), [])) == {"bmm, float32": ("backward",)}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("impl", ["eager", "compile"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_alone_is_chosen_among_fixed_combinations(impl: str, dtype: str, fastest_first: dict[str, str]) -> None:
    tried = list(combinations(impl, *SHAPE[:2], dtype))
    fastest_first |= {"forward": tried[-1], "both": tried[1]}
    found = names(
        Choice(*SHAPE[:2], dtype).fastest(impl, make_case("layer", *SHAPE, dtype, 0), ("forward", "both"), [])
    )
    assert {direction: name for name, directions in found.items() for direction in directions} == fastest_first


@pytest.mark.usefixtures("uncompiled")
def test_a_stack_takes_the_form_of_the_layer_or_else_the_first(fastest_first: dict[str, str]) -> None:
    chooser, tried = Choice(*SHAPE[:2], "bfloat16"), list(combinations("compile", *SHAPE[:2], "bfloat16"))
    layer, stack = (make_case(op, *SHAPE, "bfloat16", 0) for op in ("layer", "stack"))
    assert list(names(chooser.fastest("compile", stack, ("both",), []))) == tried[:1]
    fastest_first["both"] = tried[1]
    list(chooser.fastest("compile", layer, ("both",), []))
    assert list(names(chooser.fastest("compile", stack, ("forward", "both"), []))) == tried[1:2]


def test_torch_compile_is_a_contender_with_the_same_results() -> None:
    torch.compiler.reset()
    case = make_case("aggregate", 2, 8, 4, "float32", seed=1)
    found = list(Choice(2, 8, "float32").fastest("compile", case, DIRECTIONS, skipped := []))
    assert skipped == []
    assert {direction for contender in found for direction in contender.directions} == set(DIRECTIONS)
    assert all(contender.error(case) <= ROUNDING["float32"] for contender in found)
    assert {contender.chosen for contender in found} == {"broadcast, float32"}


def test_a_form_that_does_not_compile_is_skipped_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("a compiler's words\nand many more lines")

    case = make_case("layer", *SHAPE, "float32", 0)
    tried = list(combinations("compile", *SHAPE[:2], "float32"))
    forms = iter([broken])
    monkeypatch.setattr(choice, "_ready", lambda impl, form: next(forms, form))
    skipped: list[str] = []
    assert list(names(Choice(*SHAPE[:2], "float32").fastest("compile", case, ("both",), skipped))) == tried[1:]
    assert skipped == [f"compile {case.describe()} ({tried[0]}): a compiler's words"]


def test_a_form_that_takes_too_long_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(impl: str, form: Any) -> Any:
        def run(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            try:
                time.sleep(60)
            except Exception:
                pytest.fail("a compiler that catches exceptions goes on")
            return ()

        return run

    monkeypatch.setattr(choice, "_ready", slow)
    monkeypatch.setattr(choice, "PATIENCE", 0.05)
    skipped: list[str] = []
    case = make_case("stack", *SHAPE, "float32", 0)
    started = time.monotonic()
    assert list(Choice(*SHAPE[:2], "float32").fastest("compile", case, ("both",), skipped)) == []
    assert time.monotonic() - started < 30
    assert "not ready after 0.05 s" in skipped[0]


def test_patience_ends_with_its_block_and_leaves_other_timers_alone() -> None:
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with patience(5):
            pass
        with pytest.raises(TooSlow, match=r"^not ready after 0\.01 s$"), patience(0.01):
            time.sleep(1)
        time.sleep(0.5)
        assert len(rang) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)
