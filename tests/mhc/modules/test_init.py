"""Initial parameters, as the docstring of mhc.modules.init states them."""

import math

import pytest
import torch
from torch import nn

import mhc
from mhc.modules.hyper_connection import init_cyclic_pre

WIDTH = 16


def block(n=4, **settings):
    return mhc.HyperConnection(WIDTH, n, nn.Linear(WIDTH, WIDTH), **settings)


def network(n, seed=0, **settings):
    torch.manual_seed(seed)
    return nn.ModuleList(block(n, **settings) for _ in range(8))


def plain(layers, h):
    for layer in layers:
        h = h + layer.sublayer(h)
    return h


def connected(layers, h, n):
    x = mhc.expand_streams(h, n)
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize(("init", "alpha", "kept"), [("paper", 0.01, 0.95), ("identity", 0.0, 0.999)])
@pytest.mark.parametrize("n", [2, 3, 16])
def test_parameters_start_as_documented(n, init, alpha, kept):
    torch.manual_seed(0)
    layer = block(n, init=init)
    assert layer.alpha.tolist() == pytest.approx([alpha] * 3)
    assert layer.phi.std().item() == pytest.approx(1 / math.sqrt(n * WIDTH), rel=0.2)
    layer.alpha.data.zero_()
    pre, post, res = layer.maps(torch.randn(1, n, WIDTH))
    torch.testing.assert_close(pre, torch.full((1, n), 1 / n))
    torch.testing.assert_close(post, torch.ones(1, n))
    torch.testing.assert_close(res[0], torch.full((n, n), (1 - kept) / (n - 1)).fill_diagonal_(kept))


@pytest.mark.parametrize("init", ["paper", "identity"])
def test_hc_starts_with_the_identity(init):
    pre, post, res = block(3, mode="hc", init=init, dynamic=True).bias.split((3, 3, 9))
    torch.testing.assert_close(pre, torch.full((3,), 1 / 3))
    assert torch.equal(post, torch.ones(3))
    assert torch.equal(res.view(3, 3), torch.eye(3))


@pytest.mark.parametrize("settings", [{"init": "identity"}, {"init": "identity", "mode": "hc"}, {"dynamic": False}])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_identity_and_static_starts_are_the_plain_residual(n, settings):
    layers, h = network(n, **settings), torch.randn(3, 5, WIDTH)
    # 8 layers of sums of n float32 terms
    torch.testing.assert_close(mhc.reduce_streams(connected(layers, h, n)), plain(layers, h), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("manifold", [name for name in mhc.manifolds.NAMES if name != "sinkhorn"])
def test_every_manifold_starts_near_the_plain_residual(manifold):
    layers, h = network(4, manifold=manifold, init="identity"), torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(mhc.reduce_streams(connected(layers, h, 4)), plain(layers, h), rtol=2e-5, atol=2e-5)


def test_the_paper_start_is_close_to_the_plain_residual_but_not_it():
    layers, h = network(4), torch.randn(3, 5, WIDTH)
    off = mhc.reduce_streams(connected(layers, h, 4)) - plain(layers, h)
    assert 1e-4 < off.square().mean().sqrt() / h.square().mean().sqrt() < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init": "identity"},
        {"init": "identity", "mode": "hc"},
        {"dynamic": False},
        {"dynamic": False, "mode": "hc"},
        {"dynamic": False, "init": "identity"},
    ],
)
def test_equal_streams_part_in_training(settings):
    """Without something that makes the streams unequal they would get equal gradients for ever."""
    layers, h = network(4, **settings), torch.randn(16, WIDTH)
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        mhc.reduce_streams(connected(layers, h, 4)).tanh().square().mean().backward()
        optimizer.step()
    assert connected(layers, h, 4).std(dim=-2).mean() > 1e-3


def test_hc_can_start_as_its_paper_says():
    layers, h = network(3, mode="hc"), torch.randn(5, WIDTH)
    init_cyclic_pre(layers)
    for place, layer in enumerate(layers):
        assert layer.bias[:3].tolist() == [float(place % 3 == stream) for stream in range(3)]
        assert not layer.phi.any()
        assert layer.alpha.tolist() == pytest.approx([0.01] * 3)
    torch.testing.assert_close(mhc.reduce_streams(connected(layers, h, 3)), plain(layers, h), rtol=2e-5, atol=2e-5)
    with pytest.raises(mhc.BadInput, match="start of mode hc, got mhc"):
        init_cyclic_pre([block()])


def test_parameters_made_on_the_meta_device_can_start_later():
    with torch.device("meta"):
        layer = block(init="identity")
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    torch.manual_seed(0)
    wanted = block(init="identity")
    torch.testing.assert_close(layer.bias, wanted.bias)
    assert torch.equal(layer.alpha, torch.zeros(3))
    assert layer.phi.std().item() == pytest.approx(wanted.phi.std().item(), rel=0.1)
