"""The maps of released models: hc_eps and post_scale, against float64."""

import math

import pytest
import torch
from released import GRADIENTS, OUTPUTS, TOKENS, WIDTH, drawn, maps, off
from torch import nn

import mhc
from mhc import functional


def both(run, wanted, tensors):
    """Results and gradients of our float32 and of their float64."""
    sides = []
    for function, dtype in ((run, torch.float32), (wanted, torch.float64)):
        given = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        results = function(*given)
        random = torch.Generator().manual_seed(1)
        upstream = [torch.randn(result.shape, generator=random, dtype=torch.float64).to(dtype) for result in results]
        sides.append((results, torch.autograd.grad(results, given, upstream)))
    return sides


CASES = [
    (4, 1, 1e-6, 1e-6),
    (4, 12, 1e-4, 1e-20),
    (3, 6, 1e-6, 1e-5),
    (2, 12, 1e-6, 1e-20),
    (1, 3, 1e-2, 1e-6),
    (4, 6, 0, 1e-6),
]

on_both = pytest.mark.parametrize(
    ("kernels", "n", "spread", "hc_eps", "eps"),
    [
        pytest.param(kernels, *case, marks=pytest.mark.slow if kernels == "compiled" and case[0] != 4 else ())
        for kernels in ("reference", "compiled")
        for case in CASES
    ],
    indirect=["kernels"],
)
"""Compiling takes seconds: the fast tier has one stream count compiled."""


@on_both
@pytest.mark.parametrize("post_scale", [2.0, 0.5])
def test_pre_follows_the_released_formula(kernels, n, spread, hc_eps, eps, post_scale):
    settings = {"eps": eps, "hc_eps": hc_eps, "post_scale": post_scale}

    def wanted(x, phi, alpha, bias):
        pre, post, res = maps(x, phi, alpha, bias, **settings)
        return (pre.unsqueeze(-1) * x).sum(-2), post, res

    mine, theirs = both(lambda *given: functional.pre(*given, **settings), wanted, drawn(n, spread))
    for found, right in zip(mine[0], theirs[0], strict=True):
        assert off(found, right) < OUTPUTS
    for found, right in zip(mine[1], theirs[1], strict=True):
        assert torch.isfinite(found).all()
        # Where the norm's eps is 1e-20 the zero token's gradient is 1e10 times the others'.
        for part, whole in ((found, right),) if found.dim() < 3 else zip(found, right, strict=True):
            assert off(part, whole) < GRADIENTS or whole.abs().max() < 1e-6


@pytest.mark.parametrize("hc_eps", [1e-6, 1e-3])
def test_step_and_the_single_ops_have_the_same_maps(kernels, hc_eps):
    settings = {"hc_eps": hc_eps, "post_scale": 1.5, "eps": 1e-6}
    x, phi, alpha, bias = drawn(4, 3)
    f, post, res = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS, 4), torch.rand(TOKENS, 4, 4)
    x_next, u, *after = functional.step(x, f, post, res, phi, alpha, bias, **settings)
    z, s = functional.project(x_next, phi)
    pre, *separate = functional.coefficients(z, s, alpha, bias, streams=4, width=WIDTH, **settings)
    for found, wanted in zip((u, *after), (functional.aggregate(x_next, pre), *separate), strict=True):
        assert off(found, wanted) < OUTPUTS
    logits = (bias[8:] + alpha[2] * z[:, 8:] * torch.rsqrt(s / (4 * WIDTH) + 1e-6)[:, None]).unflatten(-1, (4, 4))
    assert off(functional.sinkhorn(logits, hc_eps=hc_eps), separate[1]) < OUTPUTS


@pytest.mark.parametrize("op", ["sinkhorn", "pre"])
def test_every_place_of_hc_eps_is_seen(kernels, op):
    """An epsilon that is left out, or that a matrix is transposed, is further off than the tolerance."""
    x, phi, alpha, bias = (tensor.double() for tensor in drawn(4, 4))
    pre, _post, res = maps(x, phi, alpha, bias, 1e-6, 1e-4, 2.0)
    plain = maps(x, phi, alpha, bias, 1e-6, 0.0, 2.0)
    assert off(plain[0], pre) > 10 * OUTPUTS
    assert off(plain[2], res) > 10 * OUTPUTS
    assert off(res.mT, res) > 0.1
    x, phi, alpha, bias = drawn(4, 4)
    mine = functional.pre(x, phi, alpha, bias, hc_eps=1e-4) if op == "pre" else None
    found = mine[2] if mine else functional.sinkhorn(torch.randn(3, 4, 4), hc_eps=1e-4)
    assert (found.sum(-1) - 1).abs().max() > 1e-5  # rows sum to less than one: the sums that divide have hc_eps too


@pytest.mark.parametrize("reach", [1e2, 1e4, 3e38])
@pytest.mark.parametrize("hc_eps", [1e-30, 1e-6])
def test_any_finite_logits_stay_finite(kernels, reach, hc_eps):
    logits = (reach * (2 * torch.rand(50, 4, 4) - 1)).requires_grad_()
    res = functional.sinkhorn(logits, hc_eps=hc_eps)
    (gradient,) = torch.autograd.grad(res.square().sum(), logits)
    assert torch.isfinite(res).all()
    assert torch.isfinite(gradient).all()
    wanted = maps_of_logits(logits.detach().double(), hc_eps)
    assert hc_eps < 1e-20 or off(res, wanted) < OUTPUTS


def maps_of_logits(logits, hc_eps):
    res = (logits - logits.amax(-2, keepdim=True)).softmax(-2) + hc_eps
    for half in range(1, 40):
        res = res / (res.sum(-1 if half % 2 else -2, keepdim=True) + hc_eps)
    return res


BLOCKS = {
    "block": {},
    "static": {"dynamic": False},
    "kronecker": {"manifold": "kronecker"},
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("how", ["alone", "stack", "recompute"])
def test_modules_have_them(kernels, name, how):
    torch.manual_seed(0)
    settings = {"hc_eps": 1e-3, "post_scale": 1.5} | BLOCKS[name]
    blocks = [mhc.HyperConnection(WIDTH, 4, nn.Linear(WIDTH, WIDTH), **settings) for _ in range(2)]
    x = torch.randn(TOKENS, 4, WIDTH)
    net = {"alone": lambda b: nn.Sequential(*b), "stack": mhc.HyperConnectionStack, "recompute": mhc.recompute}[how]
    found, wanted = net(blocks)(x), x.double()
    for block in blocks:
        parameters = [parameter.detach().double() for parameter in (block.bias,)]
        n, bias = 4, parameters[0]
        if block.dynamic:
            pre, post, res = maps(wanted, block.phi.double(), block.alpha.double(), bias, 1e-6, 1e-3, 1.5)
            if name == "kronecker":
                flat = wanted.flatten(-2)
                z = flat @ block.phi.double().T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
                res = mhc.manifolds.named("kronecker")(
                    (block.alpha[2].double() * z + bias)[:, 8:].unflatten(-1, (4, 4))
                )
        else:
            pre, post = bias[:n].sigmoid() + 1e-3, 1.5 * bias[n : 2 * n].sigmoid()
            res = maps_of_logits(bias[2 * n :].view(n, n), 1e-3)
            pre, post, res = (part.expand(TOKENS, *part.shape) for part in (pre, post, res))
        f = block.sublayer((pre.unsqueeze(-1) * wanted).sum(-2).float()).double()
        wanted = res @ wanted + post.unsqueeze(-1) * f.unsqueeze(-2)
    assert off(found, wanted.detach()) < 2 * OUTPUTS
    assert "hc_eps=0.001, post_scale=1.5" in repr(blocks[0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: functional.sinkhorn(torch.zeros(4, 4), hc_eps=-1e-6),
            r"hc_eps must be 0, or in 1e-30\.\.1, got -1e-06",
        ),
        (lambda: functional.sinkhorn(torch.zeros(4, 4), hc_eps=math.nan), "got nan"),
        (lambda: functional.pre(*drawn(4, 1), hc_eps=math.inf), "got inf: DeepSeek-V4 has 1e-6, the paper 0"),
        (lambda: functional.pre(*drawn(4, 1), post_scale=0.0), "post_scale must be positive and finite, got 0.0"),
        (lambda: mhc.HyperConnection(16, 4, nn.Identity(), hc_eps=2.0), "got 2.0"),
        (
            lambda: mhc.HyperConnection(16, 4, nn.Identity(), mode="hc", hc_eps=1e-6),
            "are for mode mhc, got 1e-06 and 2.0",
        ),
        (lambda: mhc.StreamHead(16, 4, hc_eps=-1.0), "got -1.0"),
    ],
)
def test_bad_scalars_are_one_line(make, said):
    with pytest.raises(mhc.BadInput, match=said):
        make()
