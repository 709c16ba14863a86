"""Stacks of single-pass mHC: the recurrence of DeepSeek-V4.1's report, section 2.4.1, in plain torch."""

import pytest
import torch
from torch import nn

import mhc
from mhc import functional

WIDTH, STREAMS, TOKENS = 16, 4, 6


def blocks(count, settings=({},)):
    """Blocks with maps that depend on the token; `settings` are dealt out in turn."""
    torch.manual_seed(0)
    made = []
    for number in range(count):
        sublayer = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        block = mhc.HyperConnection(WIDTH, STREAMS, sublayer, **settings[number % len(settings)])
        with torch.no_grad():
            if block.dynamic:
                block.alpha.fill_(0.7)
            block.bias.add_(torch.randn_like(block.bias))
        made.append(block)
    return made


def maps(block, x):
    """pre, post, res of a block in plain torch."""
    n = STREAMS
    flat = x.flatten(-2)
    h = flat @ block.phi.T * torch.rsqrt(flat.square().mean(-1, keepdim=True) + block.eps)
    h = h * torch.repeat_interleave(block.alpha, torch.tensor([n, n, n * n])) + block.bias
    res = h[..., 2 * n :].unflatten(-1, (n, n)).softmax(-2) + block.hc_eps
    res = res / (res.sum(-1, keepdim=True) + block.hc_eps)
    for _ in range(block.rounds - 1):
        res = res / (res.sum(-2, keepdim=True) + block.hc_eps)
        res = res / (res.sum(-1, keepdim=True) + block.hc_eps)
    return h[..., :n].sigmoid() + block.hc_eps, block.post_scale * h[..., n : 2 * n].sigmoid(), res


def plain(made, x, pre=None):
    """The recurrence, a sublayer at a time: x and the pre that is left."""
    if pre is None:
        pre = torch.tensor([1.0, 0, 0, 0]).expand(x.shape[:-1])
    for block in made:
        own, post, res = maps(block, x)
        f = block.sublayer((pre.unsqueeze(-1) * x).sum(-2))
        x, pre = res @ x + post.unsqueeze(-1) * f.unsqueeze(-2), own
    return x, pre


def outcome(run, made, x, upstream):
    x = x.clone().requires_grad_()
    for block in made:
        block.zero_grad()
    result = run(x)
    result.backward(upstream)
    return [result.detach(), x.grad, *(parameter.grad.clone() for block in made for parameter in block.parameters())]


def assert_close(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        scale = other.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("join", [mhc.HyperConnectionStack, mhc.recompute])
@pytest.mark.parametrize("kernels", ["reference", pytest.param("compiled", marks=pytest.mark.slow)], indirect=True)
def test_a_stack_of_twelve_is_the_recurrence(kernels, join):
    made = blocks(12, ({"hc_eps": 1e-3, "post_scale": 1.5},))
    x, upstream = torch.randn(2, TOKENS, STREAMS, WIDTH), torch.randn(2, TOKENS, WIDTH)

    def wanted(x):
        x, pre = plain(made, x)
        return (pre.unsqueeze(-1) * x).sum(-2)

    stack = join(made, single_pass=True)
    assert_close(outcome(stack, made, x, upstream), outcome(wanted, made, x, upstream))
    ordinary = join(made)(x).mean(-2)
    assert (ordinary - stack(x)).abs().max() > 0.1  # it is another network


def test_it_runs_the_kernel_between_blocks():
    x = torch.randn(TOKENS, STREAMS, WIDTH)
    with mhc.using(mhc.Kernels.reference()) as active:
        mhc.HyperConnectionStack(blocks(3), single_pass=True)(x)
    assert {row.op for row in active.report()} == {"project", "coefficients", "aggregate", "single_pass", "merge"}


@pytest.mark.parametrize("kernels", ["reference", pytest.param("compiled", marks=pytest.mark.slow)], indirect=True)
def test_blocks_that_no_kernel_computes_follow_too(kernels):
    made = blocks(5, ({}, {"manifold": "orthogonal"}, {"dynamic": False}, {"mode": "hc"}))
    x, upstream = torch.randn(TOKENS, STREAMS, WIDTH), torch.randn(TOKENS, WIDTH)

    def wanted(x):
        pre = torch.tensor([1.0, 0, 0, 0]).expand(x.shape[:-1])
        for block in made:
            own, post, res = block.maps(x)
            f = block.sublayer((pre.unsqueeze(-1) * x).sum(-2))
            x, pre = res @ x + post.unsqueeze(-1) * f.unsqueeze(-2), own
        return (pre.unsqueeze(-1) * x).sum(-2)

    found = outcome(mhc.HyperConnectionStack(made, single_pass=True), made, x, upstream)
    assert_close(found, outcome(wanted, made, x, upstream))


def test_without_gates_it_is_a_plain_residual_network(kernels):
    """alpha = 0, the initial bias and equal streams: h + sublayer(h), as of an ordinary stack."""
    made = [mhc.HyperConnection(WIDTH, STREAMS, nn.Linear(WIDTH, WIDTH)) for _ in range(3)]
    for block in made:
        nn.init.zeros_(block.alpha)
    h = torch.randn(TOKENS, WIDTH)
    wanted = h
    for block in made:
        wanted = wanted + block.sublayer(wanted)
    found = mhc.HyperConnectionStack(made, single_pass=True)(mhc.expand_streams(h, STREAMS))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("join", [mhc.HyperConnectionStack, mhc.recompute])
def test_stages_hand_on_their_pre(kernels, join):
    made = blocks(4)
    x, upstream = torch.randn(TOKENS, STREAMS, WIDTH), torch.randn(TOKENS, WIDTH)
    first, second = join(made[:1], single_pass=True, collapse=False), join(made[1:], single_pass=True)

    def in_stages(x):
        x, pre = first(x)
        return second(x, pre=pre)

    found = outcome(in_stages, made, x, upstream)
    assert_close(found, outcome(mhc.HyperConnectionStack(made, single_pass=True), made, x, upstream))


def test_a_given_pre_weighs_the_first_streams(kernels):
    made, x, pre = blocks(1), torch.randn(TOKENS, STREAMS, WIDTH), torch.rand(TOKENS, STREAMS)
    x_next, own = mhc.HyperConnectionStack(made, single_pass=True, collapse=False)(x, pre=pre)
    wanted, wanted_pre = plain(made, x, pre)
    torch.testing.assert_close(x_next, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, wanted_pre, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segment", [1, 2, 3])
def test_recomputed_gradients_are_bitwise_those_of_saved_ones(kernels, segment):
    made = blocks(5)
    x, upstream = torch.randn(TOKENS, STREAMS, WIDTH), torch.randn(TOKENS, WIDTH)
    ends = range(0, 5, segment)
    parts = [mhc.HyperConnectionStack(made[at : at + segment], single_pass=True, collapse=False) for at in ends]

    def saved(x):
        pre = None
        for part in parts:
            x, pre = part(x, pre=pre)
        return functional.aggregate(x, pre)

    recomputed = mhc.recompute(made, segment=segment, single_pass=True)
    for one, other in zip(outcome(recomputed, made, x, upstream), outcome(saved, made, x, upstream), strict=True):
        assert torch.equal(one, other)


def test_watchers_see_res_in_order_once(kernels):
    made, seen = blocks(3), []
    for number, block in enumerate(made):
        block.watchers.append(lambda _, res, number=number: seen.append((number, res)))
    x = torch.randn(TOKENS, STREAMS, WIDTH, requires_grad=True)
    mhc.recompute(made, single_pass=True)(x).sum().backward()
    assert [number for number, _ in seen] == [0, 1, 2]
    torch.testing.assert_close(seen[0][1], maps(made[0], x.detach())[2], rtol=1e-4, atol=1e-5)


def test_the_state_dict_tells_which_network_it_is():
    single, ordinary = mhc.HyperConnectionStack(blocks(2), single_pass=True), mhc.HyperConnectionStack(blocks(2))
    state = single.state_dict()
    assert state.keys() == ordinary.state_dict().keys()
    mhc.HyperConnectionStack(blocks(2), single_pass=True).load_state_dict(state)
    with pytest.raises(mhc.BadInput, match="single_pass=False, got one with single_pass=True: build the stack as"):
        ordinary.load_state_dict(state)
    with pytest.raises(mhc.BadInput, match="single_pass=True, got one with single_pass=False"):
        nn.Sequential(single).load_state_dict(nn.Sequential(ordinary).state_dict())
    single.load_state_dict(dict(ordinary.state_dict()))  # a plain dict does not say
    assert "single_pass=True, collapse=True" in repr(single)


def hooked():
    made = blocks(2)
    made[1].register_forward_hook(lambda *_: None)
    return made


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: mhc.HyperConnectionStack(
                [*blocks(1), mhc.HyperConnection(WIDTH, STREAMS, nn.Identity(), mode="residual")], single_pass=True
            ),
            r"that have a pre, got modes \['mhc', 'residual'\]: leave out mode residual",
        ),
        (lambda: mhc.HyperConnectionStack(blocks(1), collapse=False), "collapse=False is for single_pass=True"),
        (
            lambda: mhc.HyperConnectionStack(hooked(), single_pass=True)(torch.zeros(2, STREAMS, WIDTH)),
            r"got hooks on \[1\]: hook sublayers",
        ),
        (
            lambda: mhc.HyperConnectionStack(blocks(1), single_pass=True)(
                torch.zeros(2, STREAMS, WIDTH), pre=torch.zeros(2, 3)
            ),
            r"pre must be torch.float32 \(2, 4\) on cpu, got torch.float32 \(2, 3\)",
        ),
        (
            lambda: functional.single_pass(*bad_pre()),
            r"pre must be .*\(2, 4\)",
        ),
    ],
)
def test_bad_input_is_one_line(make, said):
    with pytest.raises(mhc.BadInput, match=said) as raised:
        make()
    assert "\n" not in str(raised.value)


def bad_pre():
    x, f, post, res = torch.zeros(2, 4, 16), torch.zeros(2, 16), torch.zeros(2, 4), torch.zeros(2, 4, 4)
    return x, f, torch.zeros(2, 5), post, res, torch.zeros(24, 64), torch.zeros(3), torch.zeros(24)
