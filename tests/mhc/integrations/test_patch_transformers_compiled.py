"""Patched models under torch.compile and torch.export."""

import pytest
import torch
from tiny_transformers import LOGITS, batch, expect_same, made, off, outcome, text_model

import mhc

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # transformers' own


@pytest.fixture(scope="module")
def make():
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")
    return lambda family, **settings: made(transformers, family, **settings)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def test_a_compiled_model_learns_the_same(make):
    """In one graph, as the unpatched model is."""
    model, ids = make("deepseek_v4"), batch()
    before = outcome(model, ids)
    mhc.patch(model).compile(backend="aot_eager", fullgraph=True)
    expect_same(outcome(model, ids), before)


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_a_compiled_model_answers_the_same(make, how):
    model, ids = make("hy_v4").eval(), batch()
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        mhc.patch(model)
        for module in [model] if how == "whole" else text_model(model).layers:
            module.compile(backend="eager", fullgraph=True)
        assert off(model(ids, use_cache=False).logits, before) <= LOGITS
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert off(model(ids, use_cache=False).logits, before) <= LOGITS


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4"])
def test_a_layer_is_exported(make, family):
    model, ids = make(family).eval(), batch()
    layer, given = text_model(model).layers[0], {}

    def keep(module, args, kwargs):
        given.update(args=args, kwargs={name: value for name, value in kwargs.items() if name != "mhc_order"})

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()

    def first(returned):
        return returned if isinstance(returned, torch.Tensor) else returned[0]

    with torch.no_grad():
        wanted = first(layer(*given["args"], **given["kwargs"]))
        mhc.patch(model)
        exported = torch.export.export(layer, given["args"], given["kwargs"], strict=False)
        assert any("mhc.step" in str(node.target) for node in exported.graph.nodes)
        assert off(first(exported.module()(*given["args"], **given["kwargs"])), wanted) <= LOGITS
