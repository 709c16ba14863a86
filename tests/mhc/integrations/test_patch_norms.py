"""mhc.patch: the RMSNorms of what attention and MLP get run inside of pre and step, and as modules where they must."""

import copy
import pickle

import pytest
import torch
from tiny_transformers import FAMILIES, LOGITS, batch, expect_same, made, off, outcome, text_model
from torch import nn

import mhc
from mhc.integrations.transformers_layers import Layer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own


@pytest.fixture(scope="module")
def make():
    """A function that makes a model of a family whose norms have weights of all values."""
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")

    def model_of(family="deepseek_v4", **settings):
        model = made(transformers, family, **settings)
        for norm in norms_of(model):
            nn.init.normal_(norm.weight)
        return model

    return model_of


def norms_of(model):
    """In the order in which they run."""
    return [
        norm for layer in text_model(model).layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    ]


@pytest.fixture
def called(monkeypatch):
    """A function that runs a model -> the layers' norms that were called, by their number, and the names of ops."""

    def calls_of(model):
        norms, found = norms_of(model), []
        with monkeypatch.context() as patch:
            for kind in {type(norm) for norm in norms}:
                patch.setattr(kind, "forward", counting(kind.forward, norms, found))
            with mhc.using(mhc.Kernels.reference()) as kernels:
                model(batch())
        return found, {row.op.removesuffix("_identity") for row in kernels.report()}

    def counting(forward, norms, found):
        def run(self, *args):
            found.extend(number for number, norm in enumerate(norms) if norm is self)
            return forward(self, *args)

        return run

    return calls_of


@pytest.mark.parametrize(
    "family", [name if name == "deepseek_v4" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.parametrize("steps", [True, False])
def test_no_norm_of_a_layer_is_called(make, called, family, steps):
    model, ids = make(family), batch()
    before = outcome(model, ids)
    assert called(model)[0] == [0, 1, 2, 3]
    expect_same(outcome(mhc.patch(model, steps=steps), ids), before)
    norms, ops = called(model)
    assert norms == []
    head = {"step"} if steps else {"pre"}
    if family == "glm5_next":
        head = {"merge"} if steps else set()
    assert ops == ({"pre_norm", "step_norm"} if steps else {"pre_norm", "merge"}) | head
    assert called(mhc.unpatch(model))[0] == [0, 1, 2, 3]
    assert not any("norms" in vars(layer) for layer in text_model(model).layers)


def scaled(module, args, output):
    return 1.5 * output


@pytest.mark.parametrize("steps", [True, False])
def test_hooks_on_norms_run(make, called, steps):
    """Those of an attention behind another layer, and of an MLP, installed before and after the patch."""
    model, ids = make(), batch()
    norms = norms_of(model)
    norms[2].register_forward_hook(scaled)
    handle = norms[1].register_forward_hook(scaled)
    before = outcome(model, ids)
    handle.remove()
    mhc.patch(model, steps=steps)
    handle = norms[1].register_forward_hook(scaled)
    expect_same(outcome(model, ids), before)
    assert called(model)[0] == [1, 2]
    handle.remove()
    assert called(model)[0] == [2]


def test_a_hook_that_comes_between_two_layers_runs(make):
    """The layer before has normalised ahead of time: that is not used."""
    model, ids = make().eval(), batch()
    layer = text_model(model).layers[1]
    handle = layer.input_layernorm.register_forward_hook(scaled)
    with torch.no_grad():
        before = model(ids).logits
        handle.remove()
        mhc.patch(model)
        calls = type(layer).__call__

        def call(self, x, **given):
            if self is layer:
                assert self.ready.before.normed
                self.input_layernorm.register_forward_hook(scaled)
            return calls(self, x, **given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(layer), "__call__", call)
            assert off(model(ids).logits, before) <= LOGITS
        assert layer.input_layernorm._forward_hooks


class Doubled(nn.Module):
    """A norm of one's own."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, u):
        return 2 * self.norm(u)


def test_norms_that_are_replaced_afterwards_are_called(make, called):
    model, ids = mhc.patch(make()), batch()
    layers = text_model(model).layers
    layers[0].post_attention_layernorm = Doubled(layers[0].post_attention_layernorm)
    layers[1].input_layernorm = copy.deepcopy(layers[1].input_layernorm)
    found = outcome(model, ids)
    assert called(model)[0] == [1, 2]
    mhc.unpatch(model)
    expect_same(found, outcome(model, ids))
    mhc.patch(model)
    assert called(model)[0] == [1], "a second patch knows the new one"


def test_a_norm_of_another_formula_is_called(make, called):
    """As a later transformers may have it."""
    model, ids = make(), batch()
    for norm in norms_of(model)[1:3]:

        class Changed(type(norm)):
            def forward(self, u):
                return super().forward(u) + u

        norm.__class__ = Changed
    before = outcome(model, ids)
    expect_same(outcome(mhc.patch(model), ids), before)
    assert set(called(model)[0]) == {1, 2}


def test_weights_and_eps_are_read_at_every_call(make):
    model, ids = mhc.patch(make()).eval(), batch()
    norms = norms_of(model)
    with torch.no_grad():
        model(ids)
        norms[0].weight = nn.Parameter(2 * norms[0].weight)
        norms[1].weight.mul_(0.5)
        norms[2].variance_epsilon = 0.1
        found = model(ids).logits
        assert off(found, mhc.unpatch(model)(ids).logits) <= LOGITS


def test_a_frozen_norm_is_left_alone(make):
    model, ids = mhc.patch(make()), batch()
    for norm in norms_of(model)[::2]:
        norm.requires_grad_(False)
    found = outcome(model, ids)
    assert [norm.weight.grad is None for norm in norms_of(model)] == [True, False, True, False]
    mhc.unpatch(model)
    expect_same(found, outcome(model, ids))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_norms_of_copies_run_inside_too(make, called, copied):
    model, ids = mhc.patch(make()).eval(), batch()
    wanted, other = model(ids).logits.detach(), copied(model)
    with torch.no_grad():
        for norm in norms_of(model):
            norm.weight.zero_()
    assert torch.equal(other(ids).logits, wanted)
    assert called(other) == ([], {"pre_norm", "step_norm", "step"})
    own = {id(module) for module in other.modules()}
    layers = [module for module in other.modules() if isinstance(module, Layer)]
    assert all(id(known.module) in own for layer in layers for known in layer.norms)


@pytest.mark.parametrize("steps", [True, False])
def test_gradient_checkpointing(make, called, steps):
    model, ids = make().train(), batch()
    before = outcome(model, ids)
    mhc.patch(model, steps=steps).gradient_checkpointing_enable()
    expect_same(outcome(model, ids), before)
    assert called(model)[0] == []
