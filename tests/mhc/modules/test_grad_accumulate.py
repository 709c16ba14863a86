"""Views that accumulate gradients in place, and change nothing else."""

from __future__ import annotations

import pytest
import torch

import mhc
from mhc import functional
from mhc.modules.grad_accumulate import grad_accumulating_views


def test_gradients_of_all_uses_are_summed():
    x = torch.randn(3, 4, requires_grad=True)
    one, two, three = grad_accumulating_views(x, 3)
    (2 * one + 3 * two + 4 * three).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 9.0))


def test_a_use_without_a_gradient_adds_nothing():
    x = torch.randn(3, requires_grad=True)
    one, _unused = grad_accumulating_views(x, 2)
    (5 * one).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 5.0))


def test_without_gradients_the_tensor_itself_is_handed_out():
    x = torch.randn(3)
    assert all(use is x for use in grad_accumulating_views(x, 2))
    with torch.no_grad():
        assert all(use is x for use in grad_accumulating_views(x.requires_grad_(), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_connection_has_the_gradients_of_the_separate_ops(dtype):
    torch.manual_seed(0)
    connection = mhc.HyperConnection(16, 4, torch.nn.Identity())
    x = torch.randn(5, 4, 16, dtype=dtype)
    upstream = torch.randn_like(x)
    parameters = (connection.phi, connection.alpha, connection.bias)
    with mhc.using(mhc.Kernels.reference()):
        shared = x.clone().requires_grad_()
        got = torch.autograd.grad(connection(shared), (shared, *parameters), upstream)
        plain = x.clone().requires_grad_()
        z, s = functional.project(plain, connection.phi)
        pre, post, res = functional.coefficients(z, s, connection.alpha, connection.bias, streams=4, width=16)
        out = functional.merge(plain, functional.aggregate(plain, pre), res, post)
        want = torch.autograd.grad(out, (plain, *parameters), upstream)
    # The three gradients of x are added in another order, and rounded after each addition.
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_a_second_backward_gives_the_same_gradients():
    x = torch.randn(2, 3, requires_grad=True)
    one, two = grad_accumulating_views(x, 2)
    out = (one * two).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(out, x)[0], first)


def test_the_callers_gradient_is_not_written_to():
    """A sum in place may only touch what the backward kernels made."""
    connection = mhc.HyperConnection(16, 4, torch.nn.Identity())
    x = torch.randn(5, 4, 16, requires_grad=True)
    upstream = torch.randn(5, 4, 16)
    before = upstream.clone()
    with mhc.using(mhc.Kernels.reference()):
        out = connection(x)
        first = torch.autograd.grad(out, x, upstream, retain_graph=True)[0].clone()
        assert torch.equal(torch.autograd.grad(out, x, upstream)[0], first)
    assert torch.equal(upstream, before)
