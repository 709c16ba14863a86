"""What mhc.patch refuses, in one line, and what it does with forwards that it does not know."""

import logging

import pytest
import torch
from tiny_transformers import LOGITS, batch, made, off, text_model
from torch import nn
from torch.nn.utils import parametrize

import mhc
from mhc import functional
from mhc.integrations.patched_class import Patched

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own


@pytest.fixture(scope="module")
def make():
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")
    return lambda family="deepseek_v4", **settings: made(transformers, family, **settings)


def other_formula(model):
    """A hyper-connection as another release might have it: the norm's weight, no epsilon, transposed, ..."""
    connection = text_model(model).layers[1].ffn_hc

    class Changed(type(connection)):
        def forward(self, x):
            post, comb, u = super().forward(x)
            return post, comb.transpose(-1, -2), u

    connection.__class__ = Changed


def other_outputs(model):
    connection = text_model(model).layers[0].attn_hc

    class Changed(type(connection)):
        def forward(self, x):
            post, comb, u = super().forward(x)
            return u, post, comb

    connection.__class__ = Changed


def failing(model):
    connection = text_model(model).layers[0].attn_hc

    class Failing(type(connection)):
        def forward(self, x, more):
            return super().forward(x)

    connection.__class__ = Failing


def other_streams(model):
    text_model(model).layers[0].ffn_hc.hc_mult = 2


def short_base(model):
    text_model(model).layers[0].ffn_hc.base = nn.Parameter(torch.zeros(20))


def other_head(model):
    text_model(model).hc_head.eps = torch.tensor(0.1)
    head = text_model(model).hc_head

    class Changed(type(head)):
        def forward(self, x):
            return 2 * super().forward(x)

    head.__class__ = Changed


def replaced_forward(model):
    layer = text_model(model).layers[0]
    own = layer.forward
    layer.forward = own


REFUSED = {
    "a transposed map": (
        other_formula,
        r"layers.1.ffn_hc must compute a map .*, got other results from Changed: leave",
    ),
    "other outputs": (other_outputs, "attn_hc must compute a map .*, got other results from Changed"),
    "a call that fails": (failing, "got TypeError: .* from Failing: leave"),
    "another stream count": (other_streams, r"n = hc_mult = 2, got \(24, 256\), \(24,\) and \(3,\): build"),
    "a short base": (short_base, r"hc_mult = 4, got \(24, 256\), \(20,\) and \(3,\): build"),
    "another head": (other_head, "hc_head must compute a map .*, got .* from Changed"),
    "a forward of its own": (replaced_forward, r"got another one on model.layers.0 \(DeepseekV4DecoderLayer\): patch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_left_alone(make, case):
    change, said = REFUSED[case]
    model = make()
    change(model)
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    with pytest.raises(mhc.BadInput, match=said) as caught:
        mhc.patch(model)
    assert "\n" not in str(caught.value)
    after = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    assert after.keys() == before.keys()
    assert all(after[name][0] is before[name][0] for name in before)
    assert all(after[name][1].keys() == before[name][1].keys() for name in before)


class OwnConnection(nn.Module):
    """Of an architecture that nobody knows: the same parameters, another map."""

    def __init__(self):
        super().__init__()
        self.hc_mult, self.hc_eps, self.hc_sinkhorn_iters, self.input_norm = 4, 1e-6, 20, nn.Identity()
        self.fn, self.base = nn.Parameter(torch.zeros(24, 32)), nn.Parameter(torch.zeros(24))
        self.scale = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x.mean(2)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(8, 8), "got a Linear without one: use mhc.wrap"),
        (mhc.HyperConnection(8, 4, nn.Linear(8, 8)), "got a HyperConnection without one"),
        (nn.Sequential(OwnConnection()), "0 must compute a map .* from OwnConnection: leave"),
    ],
)
def test_unknown_models(model, said):
    with pytest.raises(mhc.BadInput, match=said) as caught:
        mhc.patch(model)
    assert "\n" not in str(caught.value)
    assert mhc.unpatch(model) is model


def test_a_width_without_kernels(make):
    with pytest.raises(mhc.BadInput, match="width"):
        mhc.patch(make(hidden=36))


def test_a_failed_second_patch_leaves_the_first(make):
    model = mhc.patch(make())
    other_streams(model)
    with pytest.raises(mhc.BadInput, match="hc_mult"):
        mhc.patch(model)
    assert sum(isinstance(module, Patched) for module in model.modules()) == 7


def scaled(layer, forward, x, *args, **kwargs):
    return 0.5 * forward(x, *args, **kwargs)


def dropped(layer, forward, x, *args, **kwargs):
    return torch.nn.functional.dropout(forward(x, *args, **kwargs), 0.5, layer.training)


def other_arguments(layer, forward, x, *args, **kwargs):
    return forward(x, *args, **kwargs | {"use_cache": None})


@pytest.mark.parametrize("change", [scaled, dropped, other_arguments])
def test_a_layer_with_another_forward_keeps_it(make, change, caplog, monkeypatch):
    """As a later transformers may have it: its connections run on our kernels, its mix of streams is its own."""
    model, ids = make().eval(), batch()
    layer = text_model(model).layers[1]

    class Changed(type(layer)):
        def forward(self, hidden_states, *args, **kwargs):
            return change(self, super().forward, hidden_states, *args, **kwargs)

    layer.__class__ = Changed
    before = model(ids).logits
    with caplog.at_level(logging.WARNING, logger="mhc"):
        mhc.patch(model)
    assert [record.getMessage() for record in caplog.records if "knows" in record.getMessage()] == [
        "model.layers.1: Changed.forward is not one that mhc.patch knows: its mix of streams stays"
    ]
    assert type(layer) is Changed
    assert isinstance(layer.attn_hc, Patched)
    steps, step = [], functional.step
    monkeypatch.setattr(functional, "step", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs))
    assert off(model(ids).logits, before) <= LOGITS
    assert len(steps) == 1, "in the first layer alone"
    mhc.unpatch(model)
    assert torch.equal(model(ids).logits, before)


def test_a_class_that_was_changed_on_top(make):
    """As FSDP2 does it to layers."""
    model = mhc.patch(make())
    layer = text_model(model).layers[0]
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(mhc.BadInput, match="got Sharded on top of it: unpatch before") as caught:
        mhc.unpatch(model)
    assert "\n" not in str(caught.value)
    assert sum(isinstance(module, Patched) for module in model.modules()) == 7


def test_a_parametrised_matrix_is_heeded(make):
    """torch changes the class on top of ours."""

    class Halved(nn.Module):
        def forward(self, fn):
            return 0.5 * fn

    model, ids = make().eval(), batch()
    plain = model(ids).logits
    mhc.patch(model)
    parametrize.register_parametrization(text_model(model).layers[0].attn_hc, "fn", Halved())
    found = model(ids).logits
    assert off(found, plain) > 100 * LOGITS
    parametrize.remove_parametrizations(text_model(model).layers[0].attn_hc, "fn")
    assert off(mhc.unpatch(model)(ids).logits, found) <= LOGITS
