"""Numerics: errors by result and gradient, limits, and repeatability."""

from pathlib import Path

import pytest
import torch

from autotune.measuring.verify import WrongResult
from cli.bench import our_kernels
from cli.bench.cases import OPS, make_case
from cli.bench.implementation import Implementation
from cli.gpu import numerics as gpu_numerics
from mhc.dispatch.kernels import Kernels
from tiles.target import detect_device

CPU = detect_device("cpu")


@pytest.mark.parametrize("op", ["project", "pre", "step", "single_pass", "layer"])
def test_numerics_tell_every_result_and_gradient(op: str) -> None:
    case = make_case(op, 2, 16, 9, "bfloat16", 1)
    checked = gpu_numerics.errors_of(
        Implementation("default", our_kernels.op_function(case), "", kernels=Kernels.reference()), case
    )
    assert list(checked["errors"]) == [*gpu_numerics.result_names(case), *(f"d{name}" for name in case.names)]
    assert checked["within"]
    assert checked["repeats"]
    assert 0 < max(checked["errors"].values()) < 1e-2


@pytest.mark.parametrize("op", OPS)
def test_every_result_has_a_name(op: str) -> None:
    case = make_case(op, 2, 16, 3, "float32", 0)
    assert len(gpu_numerics.result_names(case)) == len(case.grad_outputs)


def test_numerics_see_what_is_wrong_and_what_does_not_repeat() -> None:
    case = make_case("aggregate", 2, 16, 9, "float32", 1)
    calls: list[float] = []

    def drifting(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(1.0)
        return ((pre[:, :, None] * x).sum(1) * (1 + 1e-4 * len(calls)),)

    checked = gpu_numerics.errors_of(Implementation("default", drifting, ""), case)
    assert (checked["within"], checked["repeats"]) == (True, False)
    checked = gpu_numerics.errors_of(
        Implementation("default", lambda x, pre: (x.sum(1) * pre.sum() * torch.nan,), ""), case
    )
    assert (checked["within"], checked["errors"]["u"]) == (False, None)


def test_numerics_say_which_kernels_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(our_kernels, "KERNELS", {"default": (lambda folder: Kernels.reference(), "default")})
    about = ("merge", 2, 16, 5, "float32", CPU, tmp_path)
    assert "the torch reference was asked for" in gpu_numerics.check_op("default", *about)["skipped"][0]
    monkeypatch.undo()
    assert "that holds some" in gpu_numerics.check_op("tuned", *about)["skipped"][0]


def test_numerics_that_are_far_off_are_no_skipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(our_kernels, "KERNELS", {"default": (lambda folder: Kernels.reference(), "reference")})
    monkeypatch.setattr(
        our_kernels, "op_function", lambda case, fused: lambda x, pre: ((2 * pre[:, :, None] * x).sum(1),)
    )
    with pytest.raises(WrongResult, match="wrong, relative error"):
        gpu_numerics.check_op("default", "aggregate", 2, 16, 5, "float32", CPU, tmp_path)
