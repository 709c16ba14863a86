"""HyperConnection: its start, its modes, what it passes on."""

import math

import pytest
import torch
from torch import nn

import mhc

WIDTH = 16


class Block(nn.Module):
    """A pre-norm sublayer."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, u):
        return self.down(torch.nn.functional.gelu(self.up(self.norm(u))))


def connections(count, n, mode="mhc"):
    torch.manual_seed(1)
    return nn.ModuleList(mhc.HyperConnection(WIDTH, n, Block(), mode=mode) for _ in range(count))


@pytest.mark.parametrize("mode", ["mhc", "hc", "residual"])
@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_without_gates_a_stack_is_the_plain_residual_network(n, mode):
    stack, h = connections(12, n, mode), torch.randn(2, 5, WIDTH)
    x = mhc.expand_streams(h, n)
    for layer in stack:
        if mode != "residual":
            layer.alpha.data.zero_()
        x, h = layer(x), h + layer.sublayer(h)
    torch.testing.assert_close(mhc.reduce_streams(x), h, rtol=2e-5, atol=2e-5)


def test_a_stack_on_compiled_kernels_is_the_plain_residual_network(on_compiled):
    test_without_gates_a_stack_is_the_plain_residual_network(4, "mhc")


@pytest.mark.parametrize("mode", ["mhc", "hc"])
def test_a_fresh_stack_starts_close_to_the_plain_network_with_every_gradient_alive(mode):
    stack, h = connections(12, 4, mode), torch.randn(2, 5, WIDTH)
    x = mhc.expand_streams(h, 4)
    for layer in stack:
        x, h = layer(x), h + layer.sublayer(h)
    assert (mhc.reduce_streams(x) - h).square().mean() < 0.01 * h.square().mean()
    assert x.std(dim=-2).max() > 1e-4, "the streams part"
    (x * torch.randn_like(x)).sum().backward()
    for name, parameter in stack.named_parameters():
        if name.startswith("0.") and name.endswith(("phi", "bias")):  # equal streams: no way of mixing them matters yet
            continue
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_parameters_start_as_documented():
    layer = mhc.HyperConnection(64, 4, nn.Identity())
    assert (layer.phi.shape, layer.alpha.shape, layer.bias.shape) == ((24, 256), (3,), (24,))
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    assert layer.alpha.tolist() == pytest.approx([0.01] * 3)
    assert layer.phi.std().item() == pytest.approx(1 / math.sqrt(256), rel=0.1)
    nothing = torch.zeros(1, 24), torch.ones(1), torch.zeros(3), layer.bias
    pre, post, res = mhc.functional.coefficients(*nothing, streams=4, width=64)
    torch.testing.assert_close(pre, torch.full((1, 4), 0.25))
    torch.testing.assert_close(post, torch.ones(1, 4))
    torch.testing.assert_close(res[0], torch.full((4, 4), 0.05 / 3).fill_diagonal_(0.95))


def test_modes_differ_in_their_maps():
    """hc may weigh a stream negatively, mhc may not; residual learns nothing."""
    x = torch.randn(3, 4, WIDTH)
    for mode, bound in (("hc", -0.5), ("mhc", 0.0)):
        layer = mhc.HyperConnection(WIDTH, 4, nn.Identity(), mode=mode)
        layer.bias.data.fill_(-1.0)
        u, post, res, _x = layer.before(x)
        assert (post.min() >= bound) == (mode == "mhc")
        assert u.shape == (3, WIDTH)
        assert torch.allclose(res.sum(-1), torch.ones(3, 4)) == (mode == "mhc")
    assert not list(mhc.HyperConnection(WIDTH, 4, nn.Identity(), mode="residual").parameters())


def test_hc_follows_its_formula():
    layer, x = mhc.HyperConnection(WIDTH, 2, nn.Identity(), mode="hc"), torch.randn(1, 2, WIDTH)
    layer.alpha.data.copy_(torch.tensor([0.5, -2.0, 3.0]))
    flat = x.flatten()
    t = torch.tanh(layer.phi @ flat / (flat.square().mean() + 1e-6).sqrt())
    h = torch.tensor([0.5, 0.5, -2, -2, 3, 3, 3, 3]) * t + layer.bias
    u = h[0] * x[0, 0] + h[1] * x[0, 1]
    expected = h[4:].view(2, 2) @ x[0] + h[2:4, None] * u
    torch.testing.assert_close(layer(x)[0], expected)


def test_what_else_is_given_goes_to_the_sublayer():
    class Scaled(nn.Module):
        def forward(self, u, by, *, shift):
            return by * u + shift

    x = torch.randn(3, 4, WIDTH)
    for mode in ("mhc", "hc", "residual"):
        layer = mhc.HyperConnection(WIDTH, 4, Scaled(), mode=mode)
        assert not torch.allclose(layer(x, 2.0, shift=1.0), layer(x, 2.0, shift=2.0))
        with pytest.raises(TypeError):
            layer(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_streams_keep_their_dtype(dtype):
    layer = mhc.HyperConnection(WIDTH, 4, Block().to(dtype))
    out = layer(torch.randn(3, 4, WIDTH, dtype=dtype))
    assert out.dtype == dtype
    out.sum().backward()
    assert layer.phi.grad.dtype == torch.float32


def test_a_model_cast_as_a_whole_still_runs():
    layer = mhc.HyperConnection(WIDTH, 4, Block()).bfloat16()
    out = layer(torch.randn(3, 4, WIDTH, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == layer.phi.grad.dtype == torch.bfloat16


def test_autocast_keeps_the_streams_dtype():
    layer, x = mhc.HyperConnection(WIDTH, 4, Block()), torch.randn(3, 4, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, layer(x), rtol=0.05, atol=0.05)


def test_weights_survive_saving(tmp_path):
    layer, other = connections(1, 4)[0], mhc.HyperConnection(WIDTH, 4, Block())
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    x = torch.randn(3, 4, WIDTH)
    assert torch.equal(layer(x), other(x))
