"""Blocks with manifold="identity": streams are not mixed, and maps are pre and post alone (Hunyuan-V4)."""

import copy

import pytest
import torch
from torch import nn

import mhc
from mhc import functional

WIDTH, N = 16, 4
SETTINGS = {"hc_eps": 1e-2, "post_scale": 1.25, "eps": 1e-5}


def block(streams=N, manifold="identity", **settings):
    """A block whose maps differ from token to token and from stream to stream."""
    sublayer = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    made = mhc.HyperConnection(WIDTH, streams, sublayer, manifold=manifold, **(SETTINGS | settings))
    with torch.no_grad():
        made.bias.normal_()
        if made.dynamic:
            made.alpha.fill_(0.7)
    return made


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def in_float64(made, x):
    """The block after its formulas: x' = x + post f, with pre = σ + hc_eps and post = post_scale σ + hc_eps."""
    n, flat = made.streams, x.double().flatten(-2)
    h = made.bias.double()
    if made.dynamic:
        z = flat @ made.phi.double().T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + made.eps)
        h = made.alpha.double().repeat_interleave(n) * z + h
    pre, post = h.expand(*x.shape[:-2], 2 * n).sigmoid().split(n, -1)
    u = ((pre + made.hc_eps).unsqueeze(-1) * x.double()).sum(-2)
    f = copy.deepcopy(made.sublayer).double()
    for mine, theirs in zip(f.parameters(), made.sublayer.parameters(), strict=True):
        mine.data = theirs.detach().double()
    return x.double() + (made.post_scale * post + made.hc_eps).unsqueeze(-1) * f(u).unsqueeze(-2)


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


@pytest.mark.parametrize("settings", [{"streams": 1}, {"streams": 3}, {}, {"dynamic": False}])
def test_the_streams_and_their_gradients_are_those_of_the_formulas(settings):
    made = block(**settings)
    x = leaf(2, 5, made.streams, WIDTH)
    found, wanted, upstream = made(x), in_float64(made, x), torch.randn(2, 5, made.streams, WIDTH)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    given = [x, *made.parameters(recurse=False)]
    for mine, theirs in zip(
        torch.autograd.grad(found, given, upstream), torch.autograd.grad(wanted, given, upstream.double()), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_blocks_stacks_and_recomputation_are_the_same_on_kernels(on_compiled):
    """One stack on compiled kernels, and the blocks one by one on the reference; which kernels ran is told."""
    blocks = [block() for _ in range(3)]
    stack, again = mhc.HyperConnectionStack(blocks), mhc.recompute(blocks, segment=3)
    x, upstream = leaf(2, 5, N, WIDTH), torch.randn(2, 5, N, WIDTH)
    given = [x, *stack.parameters()]
    with mhc.using(mhc.Kernels.reference()):
        wanted = nn.Sequential(*blocks)(x)
        right = torch.autograd.grad(wanted, given, upstream)
    one_by_one = nn.Sequential(*blocks)(x)
    kept = upstream.clone()
    for found in (one_by_one, stack(x)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(found, given, upstream)
        for mine, theirs in zip(gradients, right, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(upstream, kept), "the gradient of x' is that of x, and is not written to"
    for mine, theirs in zip(torch.autograd.grad(again(x), given, upstream), gradients, strict=True):
        assert torch.equal(mine, theirs)
    ran = {(row.op, row.direction): row.runs for row in on_compiled.report() if row.op.endswith("_identity")}
    assert {op for op, _ in ran} >= {"pre_identity", "merge_identity", "step_identity"}
    assert set(ran.values()) == {"default"}


@pytest.mark.slow
def test_single_pass_feeds_a_sublayer_through_the_pre_before(on_compiled):
    """Against the recurrence in plain torch (DeepSeek-V4.1's report, equation 6, with res the identity)."""
    blocks = [block() for _ in range(3)]
    x = leaf(7, N, WIDTH)
    found = mhc.HyperConnectionStack(blocks, single_pass=True)(x)
    streams, pre = x, torch.eye(N)[0].expand(7, N)
    for made in blocks:
        u = (pre.unsqueeze(-1) * streams).sum(-2)
        pre, post, res = made.maps(streams)
        assert res is None
        streams = streams + post.unsqueeze(-1) * made.sublayer(u).unsqueeze(-2)
    wanted = (pre.unsqueeze(-1) * streams).sum(-2)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    given = [x, *(parameter for made in blocks for parameter in made.parameters())]
    upstream = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, given, upstream), torch.autograd.grad(wanted, given, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("single_pass", [False, True])
def test_a_stack_may_mix_in_some_blocks_only(single_pass):
    """No boundary joins a block that mixes with one that does not, and the stack is the same network."""
    kinds = ["identity", "sinkhorn", "sinkhorn", "identity", "identity", "orthogonal", "identity"]
    blocks, x = [block(manifold=kind) for kind in kinds], torch.randn(5, N, WIDTH)
    with mhc.using(mhc.Kernels.reference()) as active:
        found = mhc.HyperConnectionStack(blocks, single_pass=single_pass)(x)
        ops = {row.op for row in active.report()}
    joined = "single_pass" if single_pass else "step"
    assert {joined, f"{joined}_identity", "merge", "merge_identity"} <= ops
    if not single_pass:
        torch.testing.assert_close(found, nn.Sequential(*blocks)(x), rtol=1e-5, atol=1e-5)


def test_its_function_is_the_same_as_its_name():
    named, given = block(), block(manifold=mhc.manifolds.identity_of)
    given.load_state_dict(named.state_dict())
    given.sublayer.load_state_dict(named.sublayer.state_dict())
    x = torch.randn(5, N, WIDTH)
    assert given.fused
    assert torch.equal(given(x), named(x))


def test_watchers_see_the_identity():
    model = nn.Sequential(block(), block(manifold="sinkhorn"))
    with mhc.diagnostics.Watch(model) as watch:
        model(torch.randn(5, N, WIDTH))
        measures, layers = watch.measure(), watch.layers()
    assert torch.equal(layers["0"], torch.eye(N).expand(5, N, N))
    assert measures.forward[0] == 1
    assert measures.composite_forward[0] == pytest.approx(measures.forward[1])


def test_a_checkpoint_from_when_it_had_logits_of_res_loads():
    made = block()
    older = made.state_dict()
    older["phi"] = torch.cat((older["phi"], torch.randn(N * N, N * WIDTH)))
    older["bias"], older["alpha"] = torch.cat((older["bias"], torch.randn(N * N))), torch.ones(3)
    older["alpha"][:2] = made.alpha.detach()
    fresh = block()
    fresh.load_state_dict(older)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(fresh.parameters(), made.parameters(), strict=True))
    with pytest.raises(mhc.BadInput, match=r"got mode=mhc, manifold=sinkhorn, 4 streams, width 16"):
        fresh.load_state_dict(block(manifold="sinkhorn").state_dict())


def test_a_boundary_with_the_identity_on_one_side_is_refused():
    x, f, post, res = torch.zeros(5, N, 8), torch.zeros(5, 8), torch.zeros(5, N), torch.zeros(5, N, N)
    two = torch.zeros(8, 32), torch.zeros(2), torch.zeros(8)
    three = torch.zeros(24, 32), torch.zeros(3), torch.zeros(24)
    of_res, of_none = r"\(5, 4, 4\) and phi \(8, 32\)", r"None and phi \(24, 32\)"
    for given, parameters, said in ((res, two, of_res), (None, three, of_none)):
        with pytest.raises(mhc.BadInput, match=f"res must be None, the identity, on both sides .*, got {said}"):
            functional.step(x, f, post, given, *parameters)
        with pytest.raises(mhc.BadInput, match=f"on both sides of a boundary or on none, got {said}"):
            functional.single_pass(x, f, post, post, given, *parameters)
    with pytest.raises(mhc.BadInput, match=r"alpha must be torch.float32 \(2,\)"):
        functional.pre(x, two[0], three[1], two[2])
