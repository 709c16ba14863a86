"""Module outputs that are no views, without a copy."""

import pytest
import torch

from mhc.distributed.output_views import unview_outputs


class Halves(torch.nn.Module):
    def forward(self, x):
        return x[:2], (x[2:], "rest")


def test_results_are_no_views_and_gradients_pass():
    halves = Halves()
    unview_outputs(halves)
    x = torch.randn(4, requires_grad=True)
    doubled = 2 * x
    one, (other, rest) = halves(doubled)
    assert not one._is_view()
    assert not other._is_view()
    assert rest == "rest"
    assert other.data_ptr() == doubled[2:].data_ptr()
    (3 * one + other).sum().backward()
    assert x.grad.tolist() == [6, 6, 2, 2]


def test_a_write_is_still_noticed():
    halves = Halves()
    unview_outputs(halves)
    doubled = 2 * torch.randn(4, requires_grad=True)
    one, _ = halves(doubled)
    loss = one.square().sum()
    one.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_changes_without_gradients():
    halves = Halves()
    unview_outputs(halves)
    assert halves(torch.randn(4))[0]._is_view()
