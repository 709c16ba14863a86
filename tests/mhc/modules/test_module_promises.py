"""What users of nn.Module count on: writes in place, hooks, copies, checkpoints, the meta device."""

import copy
import functools
import io
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import mhc
from mhc.modules.hyper_connection import _name_of
from tiles.runtime import cpu_memory_pool

N, WIDTH = 4, 16


class InPlace(nn.Module):
    """Begins with a write to its input, or does the same to a copy."""

    def __init__(self, how, copies):
        super().__init__()
        self.how, self.copies, self.linear = how, copies, nn.Linear(WIDTH, WIDTH)

    def forward(self, u):
        u = u.clone() if self.copies else u
        u = nn.functional.relu(u, inplace=True) if self.how == "relu" else u.mul_(3)
        return self.linear(u)


@pytest.fixture(params=["torch", "pool"])
def _from_torch_or_the_pool(request, monkeypatch):
    """Results as small ones and as large ones are allocated."""
    if request.param == "pool":
        monkeypatch.setattr(cpu_memory_pool, "MIN_POOLED_BYTES", 1)


NETS = {
    "block": lambda blocks: nn.Sequential(*blocks),
    "stack": mhc.HyperConnectionStack,
    "recompute": lambda blocks: mhc.recompute(blocks, segment=2),
}
IN_PLACE = [
    (net, how, mode)
    for net in NETS.values()
    for how, mode in (("relu", "mhc"), ("mul", "mhc"), ("relu", "hc"), ("mul", "residual"))
]


def single_pass(blocks):
    return mhc.recompute(blocks, segment=2, single_pass=True)


def tiers(cases):
    """On the reference, then on compiled kernels; step and single_pass take long to compile."""
    reference, compiled = ([(kernels, *case) for case in cases] for kernels in ("reference", "compiled"))
    return reference + [
        case if case[1] is NETS["block"] else pytest.param(*case, marks=pytest.mark.slow) for case in compiled
    ]


@pytest.mark.parametrize(
    ("kernels", "net", "how", "mode"),
    tiers([*IN_PLACE, *((single_pass, how, "mhc") for how in ("relu", "mul"))]),
    indirect=["kernels"],
)
@pytest.mark.usefixtures("_from_torch_or_the_pool")
def test_a_sublayer_may_begin_in_place(kernels, net, how, mode):
    def outcome(copies):
        torch.manual_seed(0)
        built = net([mhc.HyperConnection(WIDTH, N, InPlace(how, copies), mode=mode) for _ in range(3)])
        x = torch.randn(5, N, WIDTH, requires_grad=True)
        out = built(x)
        out.square().sum().backward()
        return [out.detach(), x.grad, *(parameter.grad for parameter in built.parameters())]

    for mine, wanted in zip(outcome(copies=False), outcome(copies=True), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.usefixtures("_from_torch_or_the_pool")
def test_results_may_be_written_to(kernels):
    x = torch.randn(5, N, WIDTH, requires_grad=True)
    block = mhc.HyperConnection(WIDTH, N, nn.Identity())
    out = block(x)
    out.mul_(2)
    (doubled,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(doubled, 2 * torch.autograd.grad(block(x).sum(), x)[0])


class Halves:
    """A manifold that is an object of a user's."""

    def __call__(self, logits):
        return logits.softmax(-1)


def test_a_checkpoint_of_a_callable_manifold_loads_in_another_process():
    def saved(block):
        file = io.BytesIO()
        torch.save(block.state_dict(), file)
        file.seek(0)
        return torch.load(file)

    block = mhc.HyperConnection(WIDTH, N, nn.Identity(), manifold=Halves())
    state = saved(block)
    assert not any("0x" in str(held) for held in state._metadata.values())
    mhc.HyperConnection(WIDTH, N, nn.Identity(), manifold=Halves()).load_state_dict(state)
    with pytest.raises(mhc.BadInput, match="got mode=mhc, manifold=Halves"):
        mhc.HyperConnection(WIDTH, N, nn.Identity(), manifold="identity").load_state_dict(state)
    for older in ("<__main__.Halves object at 0x7f31c2a9b010>", "<a.b.Halves object at 0x1>"):
        state._metadata[""]["maps"] = f"mode=mhc, manifold={older}"
        block.load_state_dict(state)
    iterated = mhc.HyperConnection(WIDTH, N, nn.Identity(), manifold=mhc.manifolds.SinkhornToTolerance(1e-3))
    state = saved(iterated)
    state._metadata[""]["maps"] = "mode=mhc, manifold=SinkhornToTolerance(tolerance=0.001, most_rounds=100)"
    iterated.load_state_dict(state)


@pytest.mark.parametrize(
    ("manifold", "name"),
    [
        ("kronecker", "kronecker"),
        (torch.softmax, "softmax"),
        (functools.partial(torch.softmax, dim=-1), "softmax"),
        (Halves(), "Halves"),
        (Halves().__call__, "__call__"),
    ],
)
def test_names_of_manifolds(manifold, name):
    assert _name_of(manifold) == name


def test_a_head_on_the_meta_device_is_initialised_later():
    torch.manual_seed(0)
    usual = mhc.StreamHead(WIDTH, N)
    with torch.device("meta"):
        head = mhc.StreamHead(WIDTH, N)
    head.to_empty(device="cpu")
    for parameter in head.parameters():
        nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(0)
    head.reset_parameters()
    for mine, wanted in zip(head.parameters(), usual.parameters(), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("net", NETS)
def test_hooks_of_blocks_run_and_may_change_what_passes(kernels, net):
    torch.manual_seed(0)
    built = NETS[net]([mhc.HyperConnection(WIDTH, N, nn.Linear(WIDTH, WIDTH)) for _ in range(4)])
    blocks = [module for module in built.modules() if isinstance(module, mhc.HyperConnection)]
    x = torch.randn(5, N, WIDTH, requires_grad=True)
    usual, seen = built(x), []
    blocks[1].register_forward_pre_hook(lambda module, given: seen.append("before"))
    blocks[2].register_forward_hook(lambda module, given, out: seen.append("after"))
    blocks[2].register_full_backward_hook(lambda module, given, out: seen.append("backward"))
    out = built(x)
    torch.testing.assert_close(out, usual)
    out.sum().backward()
    assert seen == ["before", "after", "backward"]
    blocks[2].register_forward_hook(lambda module, given, out: 0 * out)
    assert not torch.allclose(built(x), usual)


class Normed(nn.Module):
    def forward(self, phi):
        return phi / phi.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("net", NETS)
def test_copies_pickles_and_parametrisations(net):
    built = NETS[net]([mhc.HyperConnection(WIDTH, N, nn.Linear(WIDTH, WIDTH)) for _ in range(2)])
    x = torch.randn(5, N, WIDTH)
    for twin in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert torch.equal(twin(x), built(x))
    twin = copy.deepcopy(built)
    blocks = [module for module in twin.modules() if isinstance(module, mhc.HyperConnection)]
    parametrize.register_parametrization(blocks[0], "phi", Normed())
    assert blocks[0].phi.norm(dim=-1).sub(1).abs().max() < 1e-6
    other = copy.deepcopy(twin)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other(x), twin(x))
    assert not torch.equal(twin(x), built(x))
    other(x).sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


def test_nothing_is_logged_for_what_is_usual(caplog):
    with caplog.at_level(logging.WARNING, logger="mhc"):
        mhc.HyperConnection(WIDTH, N, InPlace("relu", False))(torch.randn(5, N, WIDTH)).sum().backward()
    assert caplog.records == []
