"""The maps and heads of DeepSeek-V4, GLM-5.3 and Hunyuan-V4, against transformers' own modules, in float32."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from released import AS_RELEASED, GRADIENTS, OUTPUTS, TOKENS, WIDTH, drawn, gates, maps, off
from torch import nn

import mhc
from mhc import functional

PREFIXES = {"deepseek_v4": "DeepseekV4", "glm5_next": "Glm5NextText", "hy_v4": "HYV4"}
SINKHORN = ("deepseek_v4", "glm5_next")
"""The models whose res is Sinkhorn's; Hunyuan's is the identity."""

STREAMS, SPREADS, HC_EPS, EPS = (4, 3, 2), (1, 4, 12), (0, 1e-6, 1e-4), (1e-20, 1e-6, 1e-5)
EVERY = list(product(STREAMS, SPREADS, HC_EPS, EPS))
PAIRS = [(STREAMS[i], SPREADS[j], HC_EPS[(i + j) % 3], EPS[(i + 2 * j) % 3]) for i in range(3) for j in range(3)]


@pytest.fixture(scope="module")
def made():
    """A function that makes a model's own HyperConnection or HyperHead."""
    pytest.importorskip("transformers", reason="transformers is not installed")

    def make(model, kind, *, n, hc_eps=1e-6, eps=1e-6, magnitude=2.0):
        modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
        settings = {"hc_mult": n, "hc_eps": hc_eps, "rms_norm_eps": eps, "hidden_size": WIDTH}
        config = SimpleNamespace(**settings, hc_sinkhorn_iters=20, hc_magnitude=magnitude)
        module = getattr(modeling, PREFIXES[model] + kind)
        return module() if (model, kind) == ("glm5_next", "HyperHead") else module(config)

    return make


def filled(module, **values):
    """The module with these parameters."""
    assert values.keys() == {name for name, _ in module.named_parameters()}
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(value)
    return module


def named(phi, alpha, bias):
    """A connection's parameters by their names."""
    return {"fn": phi, "scale": alpha, "base": bias}


def transposed(packed, n):
    """Their res block, comb = resᵀ, of phi or bias, as ours; and back."""
    res = packed[2 * n :].unflatten(0, (n, n)).transpose(0, 1).flatten(0, 1)
    return torch.cat((packed[: 2 * n], res))


def leaf(tensor):
    return tensor.clone().requires_grad_()


def gradients(results, given):
    """Of the sum of the results, each weighed at random; the same weights for the same shapes."""
    random = torch.Generator().manual_seed(1)
    upstream = [torch.randn(result.shape, generator=random) for result in results]
    return torch.autograd.grad(results, given, upstream)


def assert_same(found, wanted, tolerance):
    """Equal to the tolerance, relative to the largest; streams token by token, as a small token's gradient is large."""
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert torch.isfinite(mine).all()
        for part, whole in zip(mine, theirs, strict=True) if mine.dim() == 3 else [(mine, theirs)]:
            assert off(part, whole) < tolerance if whole.any() else not part.any()


def pre_of(u, x):
    """The pre that made u of x, but for the token that is zero: theirs is not among their results."""
    return torch.linalg.lstsq(x[1:].mT.double(), u[1:].double().unsqueeze(-1)).solution.squeeze(-1)


def of_sinkhorn(module, x):
    """u, post and res of their module."""
    post, comb, collapsed = module(x[None])
    return collapsed[0], post[0], comb[0].mT


def is_fast(model, kernels, case):
    """Compiling takes seconds: the fast tier has one stream count compiled, which other tests compile too."""
    return case in PAIRS and (kernels == "reference" or (model == "deepseek_v4" and case[0] == 4))


@pytest.mark.parametrize(
    ("model", "kernels", "n", "spread", "hc_eps", "eps"),
    [
        pytest.param(model, kernels, *case, marks=() if is_fast(model, kernels, case) else pytest.mark.slow)
        for model in SINKHORN
        for kernels, cases in (("reference", EVERY), ("compiled", PAIRS))
        for case in cases
    ],
    indirect=["kernels"],
)
def test_maps_and_gradients(made, model, kernels, n, spread, hc_eps, eps):
    x, phi, alpha, bias = drawn(n, spread)
    given = (transposed(phi, n), alpha, transposed(bias, n))
    module = filled(made(model, "HyperConnection", n=n, hc_eps=hc_eps, eps=eps), **named(*given))
    theirs_x, ours = leaf(x), [leaf(tensor) for tensor in (x, phi, alpha, bias)]
    wanted, found = of_sinkhorn(module, theirs_x), functional.pre(*ours, eps=eps, hc_eps=hc_eps)
    assert_same(found, wanted, OUTPUTS)
    dx, dphi, dalpha, dbias = gradients(wanted, (theirs_x, module.fn, module.scale, module.base))
    assert_same(gradients(found, ours), (dx, transposed(dphi, n), dalpha, transposed(dbias, n)), GRADIENTS)


@pytest.mark.parametrize("model", SINKHORN)
@pytest.mark.parametrize("n", STREAMS)
def test_pre_alone(made, model, n):
    x, phi, alpha, bias = drawn(n, 4)
    module = made(model, "HyperConnection", n=n, hc_eps=1e-4)
    filled(module, **named(transposed(phi, n), alpha, transposed(bias, n)))
    u, post, res = of_sinkhorn(module, x)
    found = functional.coefficients(
        *functional.project(x, phi), alpha, bias, streams=n, width=WIDTH, eps=1e-6, hc_eps=1e-4
    )
    assert_same((found[0][1:], *found[1:]), (pre_of(u, x), post, res), OUTPUTS)


OTHER_PLACES = {
    "left out": (),
    "of pre": AS_RELEASED - {"pre"},
    "of the softmax": AS_RELEASED - {"softmax"},
    "of the sums": AS_RELEASED - {"sums"},
    "to post, not pre": AS_RELEASED - {"pre"} | {"post"},
    "to post too": AS_RELEASED | {"post"},
    "after the rounds, not before": AS_RELEASED - {"softmax"} | {"rounds"},
}


@pytest.mark.parametrize("model", SINKHORN)
def test_no_other_formula_would_pass(made, model):
    """An epsilon that is left out or elsewhere, or a transposed matrix, is further off theirs than the tolerance."""
    x, *parameters = drawn(4, 4)
    phi, alpha, bias = parameters
    module = made(model, "HyperConnection", n=4, hc_eps=1e-4)
    filled(module, **named(transposed(phi, 4), alpha, transposed(bias, 4)))
    wanted = of_sinkhorn(module, x)

    def apart(eps=1e-6, places=AS_RELEASED, turned=lambda res: res):
        """The largest difference of u, post and res from theirs, in float64."""
        pre, post, res = maps(*(tensor.double() for tensor in (x, *parameters)), eps, 1e-4, places=places)
        found = (pre.unsqueeze(-1) * x).sum(-2), post, turned(res)
        return max(off(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))

    assert apart() < OUTPUTS
    for name, places in OTHER_PLACES.items():
        assert apart(places=places) > 10 * OUTPUTS, name
    assert apart(eps=1e-20) > 10 * OUTPUTS
    assert apart(turned=lambda res: res.mT) > 0.1


# --- Hunyuan


def hunyuan(made, n, spread, hc_eps, eps, magnitude):
    """x, their module and our block with its parameters."""
    x, phi, alpha, bias = drawn(n, spread)
    phi, alpha, bias = phi[: 2 * n], alpha[:2], bias[: 2 * n]
    module = made("hy_v4", "HyperConnection", n=n, hc_eps=hc_eps, eps=eps, magnitude=magnitude)
    filled(module, **named(phi, alpha, bias))
    settings = {"manifold": "identity", "eps": eps, "hc_eps": hc_eps, "post_scale": magnitude}
    return x, module, filled(mhc.HyperConnection(WIDTH, n, nn.Tanh(), **settings), phi=phi, alpha=alpha, bias=bias)


@pytest.mark.parametrize("magnitude", [2.0, 0.5])
@pytest.mark.parametrize(
    ("kernels", "n", "spread", "hc_eps", "eps"),
    [
        pytest.param(kernels, *case, marks=() if kernels == "reference" and case in PAIRS else pytest.mark.slow)
        for kernels, cases in (("reference", EVERY), ("compiled", PAIRS))
        for case in cases
    ],
    indirect=["kernels"],
)
def test_hunyuan(made, kernels, n, spread, hc_eps, eps, magnitude):
    """pre, post and u, the streams after a sublayer as their layer adds it, and all gradients."""
    x, module, block = hunyuan(made, n, spread, hc_eps, eps, magnitude)
    theirs_x, ours_x = leaf(x), leaf(x)
    post, collapsed = (result[0] for result in module(theirs_x[None]))
    wanted = collapsed, post, post.unsqueeze(-1) * collapsed.tanh().unsqueeze(-2) + theirs_x
    u, my_post, res, _ = block.pre_with_residual(ours_x)
    found = u, my_post, block(ours_x)
    assert_same(found, wanted, OUTPUTS)
    assert_same((block.maps(x)[0][1:],), (pre_of(collapsed, x),), OUTPUTS)
    assert res is None
    right = gradients(wanted, (theirs_x, module.fn, module.scale, module.base))
    assert_same(gradients(found, (ours_x, block.phi, block.alpha, block.bias)), right, GRADIENTS)


def test_no_other_formula_would_pass_for_hunyuan(made):
    x, module, block = hunyuan(made, 4, 4, 1e-4, 1e-6, 0.5)
    theirs = [result[0] for result in module(x[None])]
    parameters = [parameter.detach().double() for parameter in (block.phi, block.alpha, block.bias)]

    def apart(eps=1e-6, places=("pre", "post")):
        pre, post = gates(x.double(), *parameters, eps, 1e-4, 0.5, places=places)
        return max(off(post, theirs[0]), off((pre.unsqueeze(-1) * x).sum(-2), theirs[1]))

    assert apart() < OUTPUTS
    for places in ((), ("pre",), ("post",)):
        assert apart(places=places) > 10 * OUTPUTS
    assert apart(eps=1e-20) > 10 * OUTPUTS


@pytest.mark.parametrize("join", [mhc.HyperConnectionStack, mhc.recompute])
def test_a_stack_of_hunyuan(made, join):
    """Two sublayers, as their layer runs them."""
    x, module, block = hunyuan(made, 4, 3, 1e-2, 1e-5, 1.5)
    wanted = x[None]
    for _ in range(2):
        post, u = module(wanted)
        wanted = post.unsqueeze(-1) * u.tanh().unsqueeze(-2) + wanted
    assert_same((join([block, block])(x),), (wanted[0],), 2 * OUTPUTS)


# --- heads


@pytest.mark.parametrize("model", ["deepseek_v4", "hy_v4"])
@pytest.mark.parametrize(("n", "hc_eps", "eps"), [(4, 0, 1e-6), (4, 1e-4, 1e-5), (3, 1e-6, 1e-20), (2, 1e-2, 1e-6)])
def test_learned_heads(made, model, n, hc_eps, eps):
    x, phi, _, bias = drawn(n, 3)
    values = {"phi": phi[:n], "alpha": torch.tensor([1.5]), "bias": bias[:n]}
    theirs, mine = (
        made(model, "HyperHead", n=n, hc_eps=hc_eps, eps=eps),
        mhc.StreamHead(WIDTH, n, eps=eps, hc_eps=hc_eps),
    )
    filled(theirs, hc_fn=values["phi"], hc_scale=values["alpha"], hc_base=values["bias"])
    filled(mine, **values)
    theirs_x, ours_x = leaf(x), leaf(x)
    wanted, found = theirs(theirs_x[None])[0], mine(ours_x)
    assert_same((found,), (wanted,), OUTPUTS)
    right = gradients((wanted,), (theirs_x, theirs.hc_fn, theirs.hc_scale, theirs.hc_base))
    assert_same(gradients((found,), (ours_x, mine.phi, mine.alpha, mine.bias)), right, GRADIENTS)


@pytest.mark.parametrize("model", ["deepseek_v4", "hy_v4"])
def test_no_other_head_would_pass(made, model):
    x, phi, _, bias = drawn(4, 3)
    values = {"phi": phi[:4], "alpha": torch.tensor([1.5]), "bias": bias[:4]}
    theirs = made(model, "HyperHead", n=4, hc_eps=1e-4)
    wanted = filled(theirs, hc_fn=values["phi"], hc_scale=values["alpha"], hc_base=values["bias"])(x[None])[0]
    for settings in ({"hc_eps": 0.0}, {"hc_eps": 1e-4, "eps": 1e-20}):
        assert off(filled(mhc.StreamHead(WIDTH, 4, **settings), **values)(x)[1], wanted[1]) > 10 * OUTPUTS


def test_the_head_of_glm_is_the_mean(made):
    head, x = made("glm5_next", "HyperHead", n=4), torch.randn(2, TOKENS, 4, WIDTH)
    assert off(mhc.reduce_streams(x), head(x)) < OUTPUTS
