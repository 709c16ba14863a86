"""mhc.wrap on models whose norms are RMSNorms: blocks have them, with the model's own parameters."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mhc

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own

VOCABULARY, WIDTH, LAYERS = 97, 32, 2
LIKE = {"rtol": 1e-4, "atol": 1e-5}
"""Float32 through 4 sublayers, sums in another order."""


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")


def build(transformers, family="Llama"):
    """A model whose norms have weights of all values, and an eps that matters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, rms_norm_eps=0.01)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for layer in model.model.layers:
        for norm in norms_of(layer):
            nn.init.normal_(norm.weight)
    return model.eval()


def norms_of(layer):
    return [layer.input_layernorm, layer.post_attention_layernorm]


def tokens():
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


def outcome(model, parameters):
    ids = tokens()
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), [parameter.grad.clone() for parameter in parameters]


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, mhc.HyperConnection)]


@pytest.mark.parametrize("settings", [{}, {"manifold": "identity"}, {"mode": "residual"}, {"dynamic": False}], ids=str)
def test_a_wrapped_model_and_its_gradients_are_the_models(transformers, settings):
    model = build(transformers)
    parameters = list(model.parameters())
    wanted, wanted_grads = outcome(model, parameters)
    mhc.wrap(model, 4, **settings)
    found, grads = outcome(model, parameters)
    torch.testing.assert_close(found, wanted, **LIKE)
    for mine, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert {id(parameter) for parameter in parameters} <= {id(parameter) for parameter in model.parameters()}


def test_the_norms_run_inside_of_the_ops(transformers, monkeypatch):
    model, called = build(transformers), []
    kind = type(model.model.norm)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, u: called.append(self) or forward(self, u))
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, u: pytest.fail("torch's is called"))
    mhc.wrap(model)
    called.clear()
    with mhc.using(mhc.Kernels.reference()) as kernels:
        model(tokens())
    assert called == [model.model.norm]
    assert {row.op for row in kernels.report()} == {"pre_norm", "step_norm", "merge"}


def test_weights_are_named_by_their_blocks(transformers):
    model = build(transformers)
    weights = [norm.weight for layer in model.model.layers for norm in norms_of(layer)]
    weights[1].requires_grad_(False)
    mhc.wrap(model)
    names = [name for name in model.state_dict() if "norm" in name]
    blocks = [f"model.layers.{layer}.blocks.{place}" for layer in range(LAYERS) for place in range(2)]
    assert names == [*(f"{block}.norm.weight" for block in blocks), "model.norm.weight"]
    assert all(block.norm.weight is weight for block, weight in zip(blocks_of(model), weights, strict=True))
    assert [block.norm.weight.requires_grad for block in blocks_of(model)] == [True, False, True, True]
    assert {block.norm.eps for block in blocks_of(model)} == {0.01}
    assert not any(module.training for module in model.modules())
    other = mhc.wrap(build(transformers))
    other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_norms_of_their_own(transformers, copied):
    model = mhc.wrap(build(transformers))
    other, wanted = copied(model), model(tokens()).logits
    with torch.no_grad():
        for block in blocks_of(model):
            block.norm.weight.zero_()
    assert torch.equal(other(tokens()).logits, wanted)


def test_a_weight_that_two_norms_share_stays_one(transformers):
    model = build(transformers)
    first, second = norms_of(model.model.layers[0])
    second.weight = first.weight
    parameters = list(model.parameters())
    _, wanted = outcome(model, parameters)
    mhc.wrap(model)
    assert blocks_of(model)[0].norm.weight is blocks_of(model)[1].norm.weight
    _, grads = outcome(model, parameters)
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_weight_in_float32_and_streams_in_bfloat16(transformers):
    exact = build(transformers)
    model = copy.deepcopy(exact).bfloat16()
    for layer in model.model.layers:
        for norm in norms_of(layer):
            norm.float()
    found = mhc.wrap(model)(tokens()).logits
    assert found.dtype == torch.bfloat16
    wanted = exact(tokens()).logits
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_another_norm_stays_in_the_sublayer(transformers):
    model = build(transformers, "Gemma")
    parameters = list(model.parameters())
    wanted, wanted_grads = outcome(model, parameters)
    mhc.wrap(model)
    assert [block.norm for block in blocks_of(model)] == [None] * 2 * LAYERS
    assert "model.layers.0.blocks.1.sublayer.norm.weight" in model.state_dict()
    found, grads = outcome(model, parameters)
    torch.testing.assert_close(found, wanted, **LIKE)
    for mine, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_norm_with_hooks_stays_in_the_sublayer_and_they_run(transformers):
    model, calls = build(transformers), []
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda *_: calls.append(1))
    wanted = model(tokens()).logits
    mhc.wrap(model)
    assert [block.norm is None for block in blocks_of(model)] == [False, False, True, False]
    torch.testing.assert_close(model(tokens()).logits, wanted, **LIKE)
    assert calls == [1, 1]


def encoder():
    settings = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 48, **settings), 2, enable_nested_tensor=False)
    for layer in model.layers:
        layer.norm1, layer.norm2 = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
    return model, (torch.randn(2, 5, WIDTH),)


def decoder():
    settings = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, 48, **settings), 2)
    for layer in model.layers:
        layer.norm2 = nn.RMSNorm(WIDTH)
    return model, (torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH))


@pytest.mark.parametrize(("make", "inside"), [(encoder, [True, False]), (decoder, [False, True, False])])
def test_pytorchs_layers_with_an_rms_norm_in_place_of_theirs(make, inside):
    torch.manual_seed(0)
    model, given = make()
    wanted = model(*given)
    torch.testing.assert_close(mhc.wrap(model)(*given), wanted, **LIKE)
    assert [block.norm is not None for block in blocks_of(model)] == 2 * inside
