"""A stack is its blocks in sequence; its fused passes are the separate kernels joined."""

from itertools import pairwise

import pytest
import torch

import mhc
from mhc import functional

WIDTH = 16


def blocks(modes, streams=4):
    """A mode, `static`, or a manifold's name for each."""
    settings = {"static": {"dynamic": False}} | {name: {"manifold": name} for name in ("orthogonal", "identity")}
    torch.manual_seed(0)
    made = []
    for mode in modes:
        sublayer = torch.nn.Sequential(torch.nn.RMSNorm(WIDTH), torch.nn.Linear(WIDTH, WIDTH))
        block = mhc.HyperConnection(WIDTH, streams, sublayer, **settings.get(mode, {"mode": mode}))
        if mode != "residual":
            with torch.no_grad():
                if block.dynamic:
                    block.alpha.fill_(0.7)
                block.bias.add_(torch.randn_like(block.bias))
        made.append(block)
    return made


def outcome(model, x, upstream):
    """The result, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    result = model(x)
    result.backward(upstream)
    return [result.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


MODES = [
    ["mhc"],
    ["mhc", "mhc"],
    ["mhc", "mhc", "mhc", "mhc"],
    ["hc", "mhc", "hc"],
    ["residual", "mhc", "residual", "hc", "mhc"],
    ["mhc", "static", "mhc", "orthogonal"],
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("modes", MODES, ids="-".join)
def test_a_stack_is_its_blocks_in_turn(modes, fused):
    made = blocks(modes)
    x, upstream = torch.randn(2, 5, 4, WIDTH), torch.randn(2, 5, 4, WIDTH)
    with mhc.using(mhc.Kernels.reference()):
        wanted = outcome(torch.nn.Sequential(*made), x, upstream)
    with mhc.using(mhc.Kernels.defaults(fused=fused)) as active:
        found = outcome(mhc.HyperConnectionStack(made), x, upstream)
        ran = {(row.op, row.runs) for row in active.report()}
    for actual, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=2e-5)
    fusable = any(following == "mhc" and mode != "residual" for mode, following in pairwise(modes))
    assert (("step", "default" if fused else "separate") in ran) == fusable


@pytest.mark.slow
def test_bfloat16_stacks_agree_to_rounding(on_compiled):
    made = blocks(["mhc"] * 3)
    x, upstream = torch.randn(40, 4, WIDTH).bfloat16(), torch.randn(40, 4, WIDTH).bfloat16()
    stack = mhc.HyperConnectionStack(made)
    for block in made:
        block.sublayer.bfloat16()
    fused = outcome(stack, x, upstream)
    with mhc.using(mhc.Kernels.defaults(fused=False)):
        separate = outcome(stack, x, upstream)
    for one, other in zip(fused, separate, strict=True):
        # three blocks round to 2^-9 several times each; the fused passes round the gradients of x less often
        assert (one.double() - other.double()).norm() <= 0.02 * other.double().norm()


def test_the_callers_tensors_are_not_written_to(kernels):
    stack = mhc.HyperConnectionStack(blocks(["mhc", "mhc"]))
    x, upstream = torch.randn(7, 4, WIDTH), torch.randn(7, 4, WIDTH)
    before = x.clone(), upstream.clone()
    first, second = outcome(stack, x, upstream), outcome(stack, x, upstream)
    assert torch.equal(x, before[0])
    assert torch.equal(upstream, before[1])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_graph_can_be_walked_twice(kernels):
    stack = mhc.HyperConnectionStack(blocks(["mhc", "mhc"]))
    x = torch.randn(7, 4, WIDTH, requires_grad=True)
    result = stack(x)
    upstream = torch.randn_like(result)
    first = torch.autograd.grad(result, x, upstream, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(result, x, upstream)[0], first)


def test_arguments_go_to_every_sublayer(kernels):
    class Scaled(torch.nn.Module):
        def forward(self, u, factor, *, shift):
            return u * factor + shift

    made = [mhc.HyperConnection(WIDTH, 4, Scaled()) for _ in range(2)]
    x = torch.randn(4, 4, WIDTH)
    found = mhc.HyperConnectionStack(made)(x, 2.0, shift=1.0)
    wanted = made[1](made[0](x, 2.0, shift=1.0), 2.0, shift=1.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_sublayers_return_beside_their_output_is_dropped(kernels):
    class Two(torch.nn.Module):
        def forward(self, u):
            return 2 * u, "more"

    made = [mhc.HyperConnection(WIDTH, 4, Two(), mode=mode) for mode in ("mhc", "mhc", "residual")]
    x = torch.randn(4, 4, WIDTH)
    wanted = x
    for block in made:
        wanted, _ = block(wanted)
    torch.testing.assert_close(mhc.HyperConnectionStack(made)(x), wanted, rtol=1e-5, atol=1e-5)


def test_watchers_see_the_map_of_every_block(kernels):
    made, seen = blocks(["mhc", "mhc", "hc", "residual", "mhc"]), {}
    for block in made:
        block.watchers.append(lambda block, res: seen.setdefault(block, []).append(res))
    x = torch.randn(4, 4, WIDTH)
    mhc.HyperConnectionStack(made)(x)
    for block in made:
        found, before = list(seen.get(block, [])), x
        x = block(x)
        assert len(found) == (block.mode != "residual")
        for res in found:
            assert not res.requires_grad
            torch.testing.assert_close(res, block.pre_with_residual(before)[2].detach(), rtol=1e-4, atol=1e-5)


def test_streams_of_another_shape_are_refused():
    for modes in (["mhc"], ["residual"]):
        with pytest.raises(mhc.BadInput, match=r"\(4, 4, 16\).*\(4, 5, 16\)"):
            mhc.HyperConnectionStack(blocks(modes))(torch.randn(4, 5, WIDTH))


@pytest.mark.parametrize("shapes", [[], [(24, 3), (24, 4)], [(24, 3), (32, 3)]])
def test_blocks_that_do_not_fit_are_refused(shapes):
    made = [mhc.HyperConnection(width, streams, torch.nn.Identity()) for width, streams in shapes]
    with pytest.raises(mhc.BadInput, match="a stack needs blocks of one stream count and width"):
        mhc.HyperConnectionStack(made)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
@pytest.mark.parametrize("single_pass", [False, True])
def test_a_stack_compiles_in_one_graph(single_pass):
    stack = mhc.HyperConnectionStack(blocks(["mhc", "mhc", "hc", "identity", "identity"]), single_pass=single_pass)
    x, upstream = torch.randn(2, 5, 4, WIDTH), torch.randn(2, 5, *((WIDTH,) if single_pass else (4, WIDTH)))
    wanted = outcome(stack, x, upstream)
    found = outcome(torch.compile(stack, fullgraph=True, backend="aot_eager"), x, upstream)
    for actual, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (3, 2)])
def test_step_is_merge_then_pre_for_any_leading_dimensions(kernels, leading):
    n, outputs = 4, 24
    x, f = torch.randn(*leading, n, WIDTH), torch.randn(*leading, WIDTH)
    post, res = torch.rand(*leading, n), torch.rand(*leading, n, n)
    phi, alpha, bias = torch.randn(outputs, n * WIDTH), torch.full((3,), 0.1), torch.randn(outputs)
    found = functional.step(x, f, post, res, phi, alpha, bias)
    x_next = functional.merge(x, f, res, post)
    z, s = functional.project(x_next, phi)
    pre, post_next, res_next = functional.coefficients(z, s, alpha, bias, streams=n, width=WIDTH)
    wanted = (x_next, functional.aggregate(x_next, pre), post_next, res_next)
    for actual, want in zip(found, wanted, strict=True):
        assert actual.shape == want.shape
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-5)


def test_non_contiguous_streams_and_gradients(kernels):
    stack = mhc.HyperConnectionStack(blocks(["mhc", "mhc"]))
    x, upstream = torch.randn(4, WIDTH, 7), torch.randn(WIDTH, 4, 7)
    x, upstream = x.permute(2, 0, 1), upstream.permute(2, 1, 0)
    for actual, want in zip(
        outcome(stack, x, upstream), outcome(stack, x.contiguous(), upstream.contiguous()), strict=True
    ):
        torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-6)
