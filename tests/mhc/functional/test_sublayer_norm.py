"""The RMSNorm of a sublayer's input inside of pre, step and single_pass, against torch's rms_norm after them."""

import re

import pytest
import torch

import mhc
from mhc import functional, sublayer_norm
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem

WIDTH, TOKENS = 16, 5
OPS = ("pre", "step", "single_pass")
EPS = 1e-3


def inputs(op, n, mixes=True, dtype=torch.float32):
    """Tensors of the op without a norm, leaves; None where res is the identity."""
    problem = Problem(op if mixes else f"{op}_identity", "forward", n, WIDTH, str(dtype).removeprefix("torch."))
    values = kernel_spec(problem.op, "forward").inputs(problem, TOKENS, 0)
    given = {name: value.requires_grad_() for name, value in values.items() if isinstance(value, torch.Tensor)}
    if op != "pre":
        given.setdefault("res", None)
    return given


def weight_of(dtype=torch.float32):
    return (torch.rand(WIDTH) + 0.5).to(dtype).requires_grad_()


def outcome(results, given):
    """The results, and gradients of what is given from fixed gradients of the results."""
    results = [result for result in results if result is not None]
    random = torch.Generator().manual_seed(1)
    upstream = [torch.randn(result.shape, generator=random).to(result.dtype) for result in results]
    return [*results, *torch.autograd.grad(results, [each for each in given if each is not None], upstream)]


def composed(op, given, weight, eps=EPS):
    """The op, then torch's norm of its u in float32."""
    results = list(getattr(functional, op)(**given))
    at = 0 if op == "pre" else 1
    u = results[at]
    normed = torch.nn.functional.rms_norm(u.float(), (WIDTH,), weight.float(), eps)
    results[at] = normed.to(u.dtype)
    return results


def normed(op, given, weight, eps=EPS):
    return getattr(functional, op)(**given, norm_weight=weight, norm_eps=eps)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["in the op", "after the op"])
def place(request, monkeypatch):
    """Where it runs: as on a CPU, and as on devices whose kernels have no norm."""
    if request.param == "after the op":
        monkeypatch.setattr(sublayer_norm, "FUSED_DEVICES", ())
    return request.param


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize("op", OPS)
def test_results_and_gradients_are_those_of_torchs_norm_after_the_op(place, op, n, mixes):
    given, weight = inputs(op, n, mixes), weight_of()
    tensors = [*given.values(), weight]
    found, wanted = outcome(normed(op, given, weight), tensors), outcome(composed(op, given, weight), tensors)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with mhc.using(mhc.Kernels.reference()) as kernels:
        normed(op, given, weight)
        (row,) = kernels.report()
    assert ("norm" in row.op) == (place == "in the op")


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_bfloat16_is_rounded_as_torch_does(place, op, weight_dtype):
    given, weight = inputs(op, 4, dtype=torch.bfloat16), weight_of(weight_dtype)
    tensors = [*given.values(), weight]
    found, wanted = outcome(normed(op, given, weight), tensors), outcome(composed(op, given, weight), tensors)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        # A bfloat16 has 8 bits: one unit in the last place of u, and what gradients make of it.
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients_and_forward_mode_run_in_torch(op):
    given, weight = inputs(op, 2), weight_of()

    def squared(run, scale):
        return sum(result.square().sum() for result in run(op, given, weight * scale))

    for run in (normed, composed):
        scale = torch.ones((), requires_grad=True)
        (slope,) = torch.autograd.grad(squared(run, scale), scale, create_graph=True)
        (curve,) = torch.autograd.grad(slope, scale)
        _, along = torch.func.jvp(lambda scale, run=run: squared(run, scale), (torch.ones(()),), (torch.ones(()),))
        if run is normed:
            found = slope, curve, along
    for one, other in zip(found, (slope, curve, along), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_tensors_that_are_not_contiguous_and_tokens_of_zeros(op):
    given = inputs(op, 4)
    x = torch.zeros(4, WIDTH, TOKENS)
    x[..., 1:] = torch.randn(4, WIDTH, TOKENS - 1)
    given["x"] = x.permute(2, 0, 1).requires_grad_()
    if "f" in given:
        with torch.no_grad():
            given["f"][0] = 0
    weight = torch.rand(WIDTH, 2)[:, 0].requires_grad_()
    tensors = [*given.values(), weight]
    found, wanted = outcome(normed(op, given, weight), tensors), outcome(composed(op, given, weight), tensors)
    assert all(each.isfinite().all() for each in found)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_it_is_one_graph_under_a_compiler():
    given, weight = inputs("pre", 2), weight_of()
    run = torch.compile(lambda weight: normed("pre", given, weight), fullgraph=True, backend="aot_eager")
    for one, other in zip(run(weight), normed("pre", given, weight), strict=True):
        torch.testing.assert_close(one, other)


BAD = {
    "width": ({"norm_weight": torch.ones(8)}, r"norm_weight must be .* \(16,\) on cpu, got .*\(8,\)", "reshape"),
    "matrix": ({"norm_weight": torch.ones(1, 16)}, r"norm_weight must be .*\(1, 16\)", "reshape"),
    "dtype": ({"norm_weight": torch.ones(16).double()}, "norm_weight must be one of float32, .*float64", "cast"),
    "device": ({"norm_weight": torch.ones(16, device="meta")}, "norm_weight must be .* on cpu, got .* on meta", "move"),
    "negative eps": ({"norm_weight": torch.ones(16), "norm_eps": -1.0}, "norm_eps must be .*got -1.0", "1e-6"),
    "eps that is no number": ({"norm_weight": torch.ones(16), "norm_eps": float("nan")}, "got nan", "1e-6"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("op", OPS)
def test_a_bad_norm_is_one_line(op, case):
    settings, received, remedy = BAD[case]
    with pytest.raises(mhc.BadInput) as caught:
        getattr(functional, op)(**inputs(op, 2), **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(received, text), text
    assert remedy in text


def test_a_cuda_schedule_for_a_norm_is_refused_in_a_line():
    from tiles.target import parse_target

    problem = Problem("single_pass_norm_identity", "backward", 4, 64)
    with pytest.raises(mhc.BadInput, match=r"^ops with a norm must .*, got single_pass_norm_identity on CUDA: "):
        kernel_spec(problem.op, "backward").default(problem, parse_target("cuda:sm_90a"))
