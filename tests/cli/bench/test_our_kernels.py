"""Our kernels as implementations: what runs under which name, and schedules that are given."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotune.measuring.roofline import Roofline
from cli.bench import our_kernels
from cli.bench.cases import DIRECTIONS, OPS, make_case
from cli.bench.implementation import Implementation
from cli.bench.torch_composites import COMPOSITES
from mhc.dispatch import resolve
from mhc.dispatch.kernels import Kernels
from mhc.dispatch.resolve import Resolver
from tiles.cache.cache import KernelCache
from tiles.kernels.spec import EVERY_TOKENS, Problem

SHAPE = (2, 8, 4)


@pytest.fixture(autouse=True)
def _roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roofline, "measure", lambda kind: Roofline(10.0, 50.0))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_our_form_of_every_op_computes_what_is_wanted(op: str, fused: bool) -> None:
    case = make_case(op, *SHAPE, "float32", seed=1)
    made = Implementation("tuned", our_kernels.op_function(case, fused=fused), "", kernels=Kernels.reference())
    assert made.error(case) < 1e-5


@pytest.mark.parametrize(
    ("impl", "op", "runs"),
    [
        ("default", "stack", {"pre", "step", "merge"}),
        ("separate", "stack", {"pre", "project", "coefficients", "aggregate", "merge"}),
        ("default", "layer", {"pre", "merge"}),
        ("separate", "layer", {"pre", "project", "coefficients", "aggregate", "merge"}),
        ("default", "pre_norm", {"pre_norm"}),
        ("separate", "pre_norm", {"pre"}),
        ("default", "step", {"step"}),
        ("separate", "step", {"pre", "project", "coefficients", "aggregate", "merge"}),
        ("default", "single_pass", {"single_pass"}),
        ("separate", "single_pass", {"project", "coefficients", "aggregate", "merge"}),
    ],
)
def test_fused_passes_run_where_the_name_says_so(
    impl: str, op: str, runs: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels = Kernels.defaults(fused=impl == "default" or op == "pre_norm")
    monkeypatch.setattr(Resolver, "_compiled", _reference_in_its_place)
    monkeypatch.setattr(our_kernels, "KERNELS", dict.fromkeys((impl, "tuned"), (lambda folder: kernels, "default")))
    case = make_case(op, *SHAPE, "float32", seed=1)
    assert len(list(our_kernels.implementations(impl, case, ("both",), tmp_path, skipped := []))) == 1, skipped
    assert {row.op for row in kernels.report()} == runs


def _reference_in_its_place(resolver: Resolver, option: Any, problem: Problem, here: Any) -> Any:
    return resolve.reference(problem, torch.device("cpu"), "the test").call, ""


def test_names_mean_fused_passes_or_none_and_batch_invariance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = SimpleNamespace(key=SimpleNamespace(tokens=EVERY_TOKENS))
    monkeypatch.setattr(KernelCache, "records", lambda self: [record])
    made = {impl: make(tmp_path) for impl, (make, _) in our_kernels.KERNELS.items()}
    assert {impl: (kernels.resolver.fused, kernels.batch_invariant) for impl, kernels in made.items()} == {
        "tuned": (True, False),
        "separate": (False, False),
        "invariant": (True, True),
        "default": (True, False),
    }


@pytest.mark.parametrize("impl", our_kernels.KERNELS)
def test_what_runs_the_reference_is_not_called_a_kernel(
    impl: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        our_kernels, "KERNELS", {impl: (lambda folder: Kernels.reference(), our_kernels.KERNELS[impl][1])}
    )
    skipped: list[str] = []
    case = make_case("layer", *SHAPE, "float32", seed=1)
    assert list(our_kernels.implementations(impl, case, DIRECTIONS, tmp_path, skipped)) == []
    assert "the torch reference was asked for" in skipped[0]


def test_separate_is_said_where_there_is_something_to_fuse_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kernels = (lambda folder: Kernels.reference(), "reference")
    monkeypatch.setattr(our_kernels, "KERNELS", {"separate": kernels, "tuned": kernels})
    timed = {
        op
        for op in OPS
        if list(
            our_kernels.implementations("separate", make_case(op, *SHAPE, "float32", 1), ("forward",), tmp_path, [])
        )
    }
    assert timed == set(COMPOSITES)


def test_a_schedule_that_breaks_a_rule_or_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Resolver, "_compiled", _reference_in_its_place)
    skipped: list[str] = []
    case = make_case("merge", *SHAPE, "float32", 0)
    wrong = our_kernels.ScheduleOverride("odd", "merge", "forward", {"threads": 7})
    assert list(our_kernels.with_override(wrong, case, ("forward",), skipped)) == []
    assert "odd merge n=2" in skipped[0]
    assert "threads" in skipped[0]
    assert (
        list(our_kernels.with_override(our_kernels.parse_override("a:pre.forward={}"), case, ("forward",), skipped))
        == []
    )
    assert "merge runs no pre.forward" in skipped[1]
