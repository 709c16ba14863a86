"""Blocks that have the RMSNorm of their sublayer's input inside (`norm`)."""

import copy

import pytest
import torch
from torch import nn

import mhc
from mhc import sublayer_norm

WIDTH, N = 16, 4
SETTINGS = {
    "mhc": {},
    "identity": {"manifold": "identity"},
    "orthogonal": {"manifold": "orthogonal"},
    "hc": {"mode": "hc"},
    "static": {"dynamic": False},
    "residual": {"mode": "residual"},
}


def norm(eps=1e-3):
    made = nn.RMSNorm(WIDTH, eps=eps)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    return made


def block(settings="mhc", eps=1e-3):
    """A block whose maps differ from token to token."""
    made = mhc.HyperConnection(WIDTH, N, nn.Linear(WIDTH, WIDTH), norm=norm(eps), **SETTINGS[settings])
    with torch.no_grad():
        for parameter in (each for each in made.parameters(recurse=False)):
            nn.init.normal_(parameter, std=0.5)
    return made


def outside(made):
    """The same block with the norm in its sublayer, and the same parameters."""
    twin = copy.deepcopy(made)
    twin.sublayer, twin.norm = nn.Sequential(twin.norm, twin.sublayer), None
    return twin


def parameters_of(blocks):
    return [*(each.norm.weight if each.norm else each.sublayer[0].weight for each in blocks), *own(blocks)]


def own(blocks):
    return [parameter for each in blocks for parameter in each.parameters(recurse=False)]


def compare(model, wanted_model, blocks, twins, x, rtol=1e-4, atol=1e-4):
    x = x.requires_grad_()
    found, wanted = model(x), wanted_model(x)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
    upstream = torch.randn(found.shape).to(found.dtype)
    gradients = (
        torch.autograd.grad(result, [x, *parameters_of(of)], upstream)
        for result, of in ((found, blocks), (wanted, twins))
    )
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_block_is_that_with_the_norm_in_its_sublayer(settings):
    made = block(settings)
    twin = outside(made)
    compare(made, twin, [made], [twin], torch.randn(2, 5, N, WIDTH))


@pytest.mark.parametrize("eps", [None, 1e-6])
def test_the_norms_eps_is_taken_and_where_it_has_none_torchs(eps):
    made = block(eps=eps)
    twin = outside(made)
    compare(made, twin, [made], [twin], 1e-4 * torch.randn(5, N, WIDTH), rtol=1e-3)


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("kinds", [["mhc"] * 3, ["residual", "mhc", "hc", "mhc"], ["identity", "identity", "static"]])
def test_stacks_fuse_the_next_blocks_norm(single_pass, kinds):
    if single_pass:
        kinds = [kind for kind in kinds if kind != "residual"]
    blocks = [block(kind) for kind in kinds]
    twins = [outside(each) for each in blocks]
    stacks = [mhc.HyperConnectionStack(of, single_pass=single_pass) for of in (blocks, twins)]
    compare(*stacks, blocks, twins, torch.randn(5, N, WIDTH))
    with mhc.using(mhc.Kernels.reference()) as kernels:
        stacks[0](torch.randn(5, N, WIDTH))
        ops = {row.op for row in kernels.report()}
    joined = "single_pass" if single_pass else "step"
    assert any(op.startswith(f"{joined}_norm") for op in ops)


@pytest.mark.parametrize("single_pass", [False, True])
def test_recomputation_has_the_bits_of_the_same_passes(single_pass):
    blocks = [block() for _ in range(3)] + [block("hc")]
    model = mhc.recompute(blocks, segment=4, single_pass=single_pass)
    twin, x = mhc.HyperConnectionStack(blocks, single_pass=single_pass), torch.randn(5, N, WIDTH, requires_grad=True)
    results = [run(x) for run in (model, twin)]
    upstream = torch.randn_like(results[0])
    gradients = (torch.autograd.grad(result, [x, *model.parameters()], upstream) for result in results)
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_a_stack_on_compiled_kernels(on_compiled):
    blocks = [block() for _ in range(3)]
    twins = [outside(each) for each in blocks]

    def wanted(x):
        with mhc.using(mhc.Kernels.reference()):
            return nn.Sequential(*twins)(x)

    compare(mhc.HyperConnectionStack(blocks), wanted, blocks, twins, torch.randn(7, N, WIDTH))
    assert {row.op for row in on_compiled.report()} >= {"pre_norm", "step_norm"}


def test_bfloat16_blocks_and_streams():
    made = block()
    twin = outside(made)
    for each in (made, twin):
        each.to(torch.bfloat16)
    compare(made, twin, [made], [twin], torch.randn(5, N, WIDTH).bfloat16(), rtol=5e-2, atol=5e-2)


def test_where_kernels_have_no_norm_torchs_follows(monkeypatch):
    monkeypatch.setattr(sublayer_norm, "FUSED_DEVICES", ())
    blocks = [block() for _ in range(2)]
    twins = [outside(each) for each in blocks]
    stacks = [mhc.HyperConnectionStack(of) for of in (blocks, twins)]
    with mhc.using(mhc.Kernels.reference()) as kernels:
        compare(*stacks, blocks, twins, torch.randn(5, N, WIDTH))
    assert not any("norm" in row.op for row in kernels.report())


def test_checkpoints_name_its_weight():
    made, other = block(), block()
    assert [name for name in made.state_dict() if "norm" in name] == ["norm.weight"]
    other.load_state_dict(made.state_dict())
    x = torch.randn(5, N, WIDTH)
    assert torch.equal(made(x), other(x))
    without = mhc.HyperConnection(WIDTH, N, nn.Linear(WIDTH, WIDTH))
    assert not any("norm" in name for name in without.state_dict())


@pytest.mark.parametrize(
    "bad", [nn.LayerNorm(WIDTH), nn.RMSNorm(8), nn.RMSNorm((2, WIDTH)), nn.RMSNorm(WIDTH, elementwise_affine=False)]
)
def test_another_norm_is_refused_in_a_line(bad):
    with pytest.raises(mhc.BadInput, match=r"^norm must be an nn\.RMSNorm of \(16,\) .*, got .*: leave other"):
        mhc.HyperConnection(WIDTH, N, nn.Identity(), norm=bad)
