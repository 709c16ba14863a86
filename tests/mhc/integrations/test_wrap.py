"""mhc.wrap: a wrapped model computes what the model did, and then learns; what cannot be wrapped is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mhc
from mhc.integrations.connected import ConnectedLayer

WIDTH, HEADS = 32, 4
LIKE = {"rtol": 1e-4, "atol": 1e-5}
"""Float32 through up to 6 sublayers, sums in another order."""


def encoder(layers=3, *, norm=True, **settings):
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, "norm_first": True, **settings}
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, **settings)
    made = nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH) if norm else None, enable_nested_tensor=False)
    return unlike(made)


def decoder(layers=2, **settings):
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, "norm_first": True, **settings}
    return unlike(nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 48, **settings), layers))


def unlike(model):
    """PyTorch's layers start as copies of one; here every parameter has values of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, mhc.HyperConnection)]


def opened(model):
    """The maps far from where they start."""
    with torch.no_grad():
        for block in blocks_of(model):
            for parameter in (block.alpha, block.bias):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def outcome(model, *args, **kwargs):
    """The result, and the gradients of the arguments and of the model's parameters by their identity."""
    given = [arg.clone().requires_grad_() for arg in args]
    model.zero_grad()
    result = model(*given, **kwargs)
    result.square().sum().backward()
    return result.detach(), [each.grad for each in given]


def assert_same(model, *args, **kwargs):
    """The model before and after `wrap`, with the gradients of what it had before."""
    parameters = list(model.parameters())
    wanted, wanted_grads = outcome(model, *args, **kwargs)
    before = [parameter.grad.clone() for parameter in parameters]
    assert mhc.wrap(model, 3) is model
    found, found_grads = outcome(model, *args, **kwargs)
    torch.testing.assert_close(found, wanted, **LIKE)
    for actual, want in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-3, atol=1e-4)
    assert {id(each) for each in parameters} <= {id(each) for each in model.parameters()}
    for parameter, want in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-3, atol=1e-4)


PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7)


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, {}),
        ({"norm": False, "activation": "gelu", "bias": False}, {"mask": CAUSAL, "is_causal": True}),
        ({"activation": nn.SiLU()}, {"src_key_padding_mask": PADDING}),
        ({"layers": 1}, {"mask": CAUSAL > -1, "src_key_padding_mask": PADDING}),
    ],
    ids=["plain", "causal", "padded", "both"],
)
def test_a_wrapped_encoder_is_the_encoder(settings, given):
    assert_same(encoder(**settings), torch.randn(2, 7, WIDTH), **given)


def test_sequences_may_come_first():
    assert_same(encoder(batch_first=False), torch.randn(7, 2, WIDTH), src_key_padding_mask=PADDING)


def test_a_wrapped_decoder_is_the_decoder():
    masks = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING[:, :5]}
    assert_same(decoder(), torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH), **masks)
    masks = {"tgt_key_padding_mask": PADDING, "memory_mask": torch.randn(7, 5)}
    assert_same(decoder(), torch.randn(2, 7, WIDTH), torch.randn(2, 5, WIDTH), **masks)


def test_both_halves_of_a_transformer_are_wrapped():
    settings = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    with pytest.warns(UserWarning, match="enable_nested_tensor"):  # what PyTorch says of every pre-norm encoder
        model = nn.Transformer(WIDTH, HEADS, 2, 3, 48, **settings)
    assert_same(unlike(model), torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH))
    assert len(blocks_of(model)) == 2 * 2 + 3 * 3


def test_a_list_of_layers_in_a_model_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = encoder()
            self.layers, self.body = self.body.layers, None
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, h):
            for layer in self.layers:
                h = layer(h)
            return self.head(h)

    assert_same(Own(), torch.randn(2, 7, WIDTH))


def test_streams_are_between_the_layers_alone():
    model, shapes = mhc.wrap(encoder(), 3), []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, args, out: shapes.append((args[0].shape[2:], out.shape[2:])))
    model(torch.randn(2, 7, WIDTH))
    streams, plain = (3, WIDTH), (WIDTH,)
    assert shapes == [(plain, streams), (streams, streams), (streams, plain)]


@pytest.mark.parametrize("settings", [{}, {"mode": "hc"}, {"dynamic": False}, {"manifold": "orthogonal"}], ids=str)
def test_evaluation_takes_no_path_past_the_connections(settings):
    """PyTorch's encoder layers have a fast path in eval mode, which knows nothing of streams."""
    model, h = encoder(), torch.randn(2, 7, WIDTH)
    plain = model(h).detach()
    if "dynamic" in settings:
        mhc.wrap(model, **settings)
        for block in blocks_of(model):
            block.bias.data.add_(0.5 * torch.randn_like(block.bias))
    else:
        opened(mhc.wrap(model, **settings))
    trained = model(h).detach()
    with torch.no_grad():
        evaluated = model.eval()(h, src_key_padding_mask=torch.zeros(2, 7, dtype=torch.bool))
    torch.testing.assert_close(evaluated, trained, **LIKE)
    assert not torch.allclose(evaluated, plain, rtol=0.01, atol=0.01)


def test_settings_reach_every_block():
    given = {"mode": "mhc", "manifold": "kronecker", "init": "paper", "dynamic": True}
    for block in blocks_of(mhc.wrap(encoder(dropout=0.3), 8, **given)):
        assert {name: getattr(block, name) for name in given} == given
        assert (block.streams, block.width, block.dropout) == (8, WIDTH, 0.3)


def test_hc_reads_in_turn_with_its_papers_start():
    model, h = encoder(), torch.randn(2, 7, WIDTH)
    plain = model(h)
    blocks = blocks_of(mhc.wrap(model, 3, mode="hc", init="paper"))
    assert [block.bias[:3].argmax().item() for block in blocks] == [0, 1, 2, 0, 1, 2]
    torch.testing.assert_close(model(h), plain, **LIKE)


def test_residual_mode_is_the_model_with_idle_streams():
    model, h = encoder(), torch.randn(2, 7, WIDTH)
    plain, names = model(h), len(model.state_dict())
    torch.testing.assert_close(mhc.wrap(model, 2, mode="residual")(h), plain, **LIKE)
    assert len(model.state_dict()) == names


def test_training_and_evaluation_stay_what_they_were():
    model = encoder(dropout=0.5)
    assert all(module.training for module in mhc.wrap(copy.deepcopy(model)).modules())
    assert not any(module.training for module in mhc.wrap(model.eval()).modules())
    h = torch.randn(2, 7, WIDTH)
    assert torch.equal(model(h), model(h))
    assert not torch.equal(model.train()(h), model(h))


def test_a_wrapped_model_learns():
    torch.manual_seed(0)
    model, h, target = mhc.wrap(encoder(2)), torch.randn(2, 7, WIDTH), torch.randn(2, 7, WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append((model(h) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    unmoved = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    # the first block mixes equal streams (res does not matter), but its phi has rows of pre and post too
    assert unmoved == []


def test_a_wrapped_models_state_dict_has_documented_names_and_loads(tmp_path):
    model, h = opened(mhc.wrap(encoder(1, norm=False))), torch.randn(2, 7, WIDTH)
    parts = {
        0: ["norm.bias", "norm.weight", "attention.in_proj_weight", "attention.in_proj_bias"],
        1: ["norm.bias", "norm.weight", "mlp.linear1.weight", "mlp.linear1.bias", "mlp.linear2.weight"],
    }
    parts[0] += ["attention.out_proj.weight", "attention.out_proj.bias"]
    parts[1] += ["mlp.linear2.bias"]
    names = {f"layers.0.blocks.{place}.sublayer.{name}" for place in parts for name in parts[place]}
    names |= {f"layers.0.blocks.{place}.{name}" for place in parts for name in ("phi", "alpha", "bias")}
    assert set(model.state_dict()) == names
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = mhc.wrap(unlike(encoder(1, norm=False)))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(h), model(h))
    assert torch.equal(copy.deepcopy(model)(h), model(h))


def test_parameters_of_connections_stay_float32_on_the_layers_device():
    model = mhc.wrap(encoder().bfloat16())
    assert {block.phi.dtype for block in blocks_of(model)} == {torch.float32}
    assert model(torch.randn(2, 7, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.device("meta"):
        model = encoder()
    assert {parameter.device.type for parameter in mhc.wrap(model).parameters()} == {"meta"}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
def test_a_wrapped_model_compiles_in_one_graph():
    torch._dynamo.reset()
    model, h = opened(mhc.wrap(encoder(2))), torch.randn(2, 7, WIDTH)
    expected, (expected_grad,) = outcome(model, h)
    found, (found_grad,) = outcome(torch.compile(model, fullgraph=True, backend="aot_eager"), h)
    torch.testing.assert_close(found, expected, **LIKE)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-3, atol=1e-4)


class MiniAttention(nn.Module):
    """Attends to the mean so far, with positions added; answers like transformers' attention."""

    def __init__(self, place):
        super().__init__()
        self.place, self.mix = place, nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, past_key_values=None, **kwargs):
        hidden_states = hidden_states + position_embeddings
        if past_key_values is not None:
            past_key_values[self.place] = torch.cat([*past_key_values.get(self.place, ()), hidden_states], dim=-2)
        weights = attention_mask / attention_mask.sum(-1, keepdim=True)
        return self.mix(weights @ hidden_states), weights


class MiniLayer(nn.Module):
    """A layer of Llama's build."""

    scale = 1.0

    def __init__(self, place, norm=nn.RMSNorm, returns_tuple=False):
        super().__init__()
        self.self_attn = MiniAttention(place)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.SiLU(), nn.Linear(48, WIDTH))
        self.input_layernorm, self.post_attention_layernorm = norm(WIDTH), norm(WIDTH)
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states, attention_mask, position_embeddings=None, **kwargs):
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + self.scale * attended
        hidden_states = hidden_states + self.scale * self.mlp(self.post_attention_layernorm(hidden_states))
        return (hidden_states,) if self.returns_tuple else hidden_states


class MiniLlama(nn.Module):
    """What surrounds the layers in transformers: embedding, final norm, head, keyword arguments."""

    def __init__(self, layers=3, layer=MiniLayer, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(layer(place, **settings) for place in range(layers))
        self.norm, self.lm_head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, tokens, past_key_values=None):
        h = self.embed_tokens(tokens)
        positions = torch.linspace(-1, 1, h.shape[1]).unsqueeze(-1)
        mask = torch.ones(h.shape[1], h.shape[1]).tril()
        given = {"position_embeddings": positions, "past_key_values": past_key_values, "use_cache": True}
        for layer in self.layers:
            h = layer(h, attention_mask=mask, **given)
            h = h[0] if isinstance(h, tuple) else h
        return self.lm_head(self.norm(h))


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_a_wrapped_llama_is_the_llama(returns_tuple):
    model, tokens = MiniLlama(returns_tuple=returns_tuple), torch.randint(11, (2, 6))
    cache, wrapped_cache = {}, {}
    wanted = model(tokens, cache)
    mhc.wrap(model)
    torch.testing.assert_close(model(tokens, wrapped_cache), wanted, **LIKE)
    assert wrapped_cache.keys() == cache.keys() == {0, 1, 2}
    for place, kept in cache.items():
        torch.testing.assert_close(wrapped_cache[place], kept, **LIKE)
    assert len(blocks_of(model)) == 6
    model(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert isinstance(model.layers[2](torch.randn(1, 3, 4, WIDTH), torch.ones(3, 3), torch.zeros(1)), tuple) == (
        returns_tuple
    )


def test_gradient_checkpointing_runs_the_layer_again():
    """As transformers switches it on: two attributes of every module that has the first."""
    model, tokens, runs, cache = opened(mhc.wrap(MiniLlama())), torch.randint(11, (2, 6)), [], {}
    model(tokens).sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    for layer in model.layers:
        assert layer.gradient_checkpointing is False
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=False)
    blocks_of(model)[1].watchers.append(lambda block, res: runs.append(block))
    model.zero_grad()
    model(tokens, cache).sum().backward()
    assert len(runs) == 2
    assert cache == {}, "a cache would be written to twice"
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want, **LIKE)
    model.eval()(tokens, cache)
    assert len(runs) == 3
    assert len(cache) == 3


class ScaledLayer(MiniLayer):
    """As Granite has it."""

    scale = 0.22


class RefusingLayer(MiniLayer):
    """Wants what a probe does not have."""

    def forward(self, hidden_states, attention_mask, **kwargs):
        return super().forward(hidden_states, attention_mask + 1, **kwargs)


class OwnLayer(nn.TransformerEncoderLayer):
    """Who knows what it does."""


class WeightlessNorm(nn.Module):
    """A norm that tells no width."""

    def __init__(self, width):
        super().__init__()

    def forward(self, h):
        return nn.functional.layer_norm(h, h.shape[-1:])


def mixed():
    model = encoder(2)
    model.layers.append(nn.Linear(WIDTH, WIDTH))
    return model


def own_layers():
    settings = {"batch_first": True, "norm_first": True}
    return nn.TransformerEncoder(OwnLayer(WIDTH, HEADS, 48, **settings), 2, enable_nested_tensor=False)


REFUSED = {
    "post-norm": (lambda: encoder(norm_first=False), "got TransformerEncoderLayer with norm_first=False: build it"),
    "post-norm decoder": (lambda: decoder(norm_first=False), "got TransformerDecoderLayer with norm_first=False"),
    "no layers": (lambda: nn.Sequential(nn.Linear(8, 8)), "nn.ModuleList of .* got a Sequential without one: put"),
    "a subclass": (own_layers, "got a TransformerEncoder without one"),
    "wrapped already": (lambda: mhc.wrap(encoder()), "got a TransformerEncoder without one"),
    "mixed": (mixed, "of one kind, got EncoderLayer, NoneType from layers: put"),
    "scaled residuals": (lambda: MiniLlama(layer=ScaledLayer), r"another result from ScaledLayer \(tensor.*\): put"),
    "a layer that fails": (lambda: MiniLlama(layer=RefusingLayer), r"from RefusingLayer \(TypeError: .*\): put"),
    "norm without weight": (lambda: MiniLlama(norm=WeightlessNorm), "got a WeightlessNorm without weight: give"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_wrapped_is_refused_and_left_alone(case):
    make, expected = REFUSED[case]
    model = make()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(mhc.BadInput, match=expected) as caught:
        mhc.wrap(model)
    assert "\n" not in str(caught.value)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_streams_and_settings_are_checked_before_anything_changes():
    for wrong in ({"streams": 17}, {"manifold": "kronecker", "streams": 3}, {"mode": "x"}, {"init": "x"}):
        model = encoder(1)
        with pytest.raises(mhc.BadInput):
            mhc.wrap(model, **wrong)
        assert not any(isinstance(module, ConnectedLayer) for module in model.modules())


def test_a_given_width_serves_where_the_norm_tells_none():
    model, tokens = MiniLlama(norm=WeightlessNorm), torch.randint(11, (2, 6))
    wanted = model(tokens)
    torch.testing.assert_close(mhc.wrap(model, width=WIDTH)(tokens), wanted, **LIKE)
