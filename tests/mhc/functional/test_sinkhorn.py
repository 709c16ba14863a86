"""Sinkhorn at its edges: sums, far logits, wide ranges."""

import pytest
import torch

from mhc import functional


def draw(n, tokens=6, seed=0):
    return torch.randn(tokens, n, n, generator=torch.Generator().manual_seed(seed))


def log_domain(logits, rounds=20):
    """float64, exact to rounding for any range."""
    for _ in range(rounds):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_rows_sum_to_one_and_columns_converge(kernels, scale):
    res = functional.sinkhorn(scale * draw(4))
    assert torch.allclose(res.sum(-1), torch.ones(6, 4), rtol=0, atol=1e-6)
    if scale <= 1:
        assert torch.allclose(res.sum(-2), torch.ones(6, 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30, 1e38])
def test_finite_logits_of_any_size_stay_finite(kernels, size):
    logits = (size * draw(4).clamp(-3, 3)).requires_grad_()
    res = functional.sinkhorn(logits)
    assert res.isfinite().all()
    assert (res >= 0).all()
    (grad,) = torch.autograd.grad(res, logits, draw(4, seed=1))
    assert grad.isfinite().all()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_far_logits_of_coefficients_stay_finite(kernels, size):
    bias = size * torch.linspace(-1, 1, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    z = draw(24, 1)[0, :5].contiguous()
    given = [value.requires_grad_() for value in (z, torch.full((5,), 32.0), torch.full((3,), size), bias)]
    results = functional.coefficients(*given, streams=4, width=8)
    assert all(result.isfinite().all() and (result >= 0).all() for result in results)
    found = torch.autograd.grad(results, given, [torch.ones_like(result) for result in results])
    assert all(grad.isfinite().all() for grad in found)


@pytest.mark.parametrize("reach", [20.0, 40.0, 60.0])
def test_wide_ranges_match_float64(kernels, reach):
    """Logits spread over `reach`: where the factors of a product of exps would underflow if they were not rescaled."""
    logits = (reach * (torch.rand(8, 4, 4, generator=torch.Generator().manual_seed(3)) - 0.5)).requires_grad_()
    logits.data[0, 0, 0], logits.data[0, 1, 1] = -reach / 2, reach / 2
    wide = logits.detach().double().requires_grad_()
    res, expected = functional.sinkhorn(logits), log_domain(wide)
    # A float32 logit of 30 is known to 30 · 2^-24 only, and each of 40 half rounds rounds once.
    assert torch.allclose(res.double(), expected, rtol=1e-4, atol=1e-6)
    grads = draw(4, tokens=8, seed=1)
    (grad,) = torch.autograd.grad(res, logits, grads)
    (truth,) = torch.autograd.grad(expected, wide, grads.double())
    assert torch.allclose(grad.double(), truth, rtol=1e-4, atol=1e-5)
