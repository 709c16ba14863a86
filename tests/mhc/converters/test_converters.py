"""Checkpoints of other codes: the same bits after a round trip, and the same network as the original's own code."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import mhc
from mhc import BadInput
from mhc.converters import from_deepseek, from_megatron, to_deepseek, to_megatron

WIDTH, STREAMS = 32, 4
MEGATRON_NAMES = {"hc_attn": "self_attention_hyper_connection", "hc_ffn": "mlp_hyper_connection"}


@pytest.fixture(scope="module")
def theirs():
    """The torch reference of tile-kernels (the extra `peers`): one file, which stands by itself."""
    (folder,) = importlib.util.find_spec("tile_kernels").submodule_search_locations
    spec = importlib.util.spec_from_file_location("tile_kernels_reference", Path(folder) / "torch" / "mhc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def deepseek(streams=STREAMS, width=WIDTH, layers=2, seed=0):
    """A checkpoint whose coefficients vary from token to token and whose res is far from symmetric."""
    random = torch.Generator().manual_seed(seed)
    fan_in, outputs = streams * width, streams * streams + 2 * streams
    state = {"embed.weight": torch.randn(5, width, generator=random)}

    def add(module, rows, gates):
        state[f"{module}_fn"] = torch.randn(rows, fan_in, generator=random) / fan_in**0.5
        state[f"{module}_scale"] = 0.5 + torch.rand(gates, generator=random)
        state[f"{module}_base"] = torch.randn(rows, generator=random)

    for prefix in [*(f"layers.{layer}" for layer in range(layers)), "mtp.0"]:
        add(f"{prefix}.hc_attn", outputs, 3)
        add(f"{prefix}.hc_ffn", outputs, 3)
        state[f"{prefix}.attn_norm.weight"] = torch.ones(width)
    add("hc_head", streams, 1)
    add("mtp.0.hc_head", streams, 1)
    return state


def megatron(**problem):
    """The same, as Megatron-Core names and splits it."""
    state = {}
    for key, tensor in deepseek(**problem).items():
        if key.startswith("mtp."):
            continue
        found = re.fullmatch(r"(layers\.\d+)\.(hc_attn|hc_ffn)_(fn|scale|base)", key)
        if not found:
            state[f"decoder.{key}"] = tensor
            continue
        module = f"decoder.{found[1]}.{MEGATRON_NAMES[found[2]]}"
        if found[3] == "scale":
            state |= {f"{module}.alpha_{name}": tensor[i : i + 1] for i, name in enumerate(("pre", "post", "res"))}
        else:
            state[module + {"fn": ".mapping_proj.weight", "base": ".bias"}[found[3]]] = tensor
    return state


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in expected
    )


def part(state, module):
    """The tensors of one module, by their names in it."""
    return {key.removeprefix(f"{module}."): value for key, value in state.items() if key.startswith(f"{module}.")}


# --- the network


class Layer(nn.Module):
    """As a model with such a checkpoint would have it: the names of its connections are the checkpoint's."""

    def __init__(self, attn, ffn):
        super().__init__()
        self.hc_attn = mhc.HyperConnection(WIDTH, STREAMS, attn)
        self.hc_ffn = mhc.HyperConnection(WIDTH, STREAMS, ffn)


class Model(nn.Module):
    def __init__(self, sublayers):
        super().__init__()
        self.layers = nn.ModuleList(Layer(*pair) for pair in sublayers)
        self.hc_head = mhc.StreamHead(WIDTH, STREAMS)

    def forward(self, x):
        blocks = [block for layer in self.layers for block in (layer.hc_attn, layer.hc_ffn)]
        streams = mhc.HyperConnectionStack(blocks)(x)
        return streams, self.hc_head(streams)


def sublayers():
    """Two layers of two sublayers, with nothing to learn: elementwise, so that they round alike anywhere."""
    return [(nn.Tanh(), nn.Softsign()), (nn.Tanh(), nn.Softsign())]


def streams(tokens=50):
    """bfloat16, as their reference wants them: [1, T, n, C]."""
    return torch.randn(1, tokens, STREAMS, WIDTH, generator=torch.Generator().manual_seed(9)).bfloat16()


def theirs_before(theirs, state, module, x, eps=1e-6):
    """u, post and comb of their reference: x [1, T, n, C]."""
    mixes = theirs.mhc_pre_norm_fn_ref(x, state[f"{module}_fn"], None, 1e-6)
    gates = state[f"{module}_scale"], state[f"{module}_base"]
    pre, post, logits = theirs.mhc_pre_split_mixes_ref(mixes, *gates, STREAMS, 2.0, eps)
    comb = theirs.sinkhorn_normalize_ref(logits, repeat=20, eps=eps)
    return theirs.mhc_pre_apply_mix_ref(x, pre), post, comb


def theirs_forward(theirs, state, x):
    for layer, pair in enumerate(sublayers()):
        for name, sublayer in zip(("hc_attn", "hc_ffn"), pair, strict=True):
            u, post, comb = theirs_before(theirs, state, f"layers.{layer}.{name}", x)
            x = theirs.mhc_post_ref(sublayer(u), x, post, comb)
    mixes = theirs.mhc_pre_norm_fn_ref(x, state["hc_head_fn"], None, 1e-6)
    gates = theirs.mhc_head_compute_mix_ref(mixes, state["hc_head_scale"], state["hc_head_base"], 1e-6)
    return x, theirs.mhc_pre_apply_mix_ref(x, gates[..., None])


def loaded(state):
    model = Model(sublayers())
    missing, _ = model.load_state_dict(state, strict=False)
    assert not missing
    return model.requires_grad_(requires_grad=False)


def untransposed(state):
    """The same with every res block turned round again: what a converter that forgot it would give."""
    return {
        key: torch.cat((value[: 2 * STREAMS], value[2 * STREAMS :].unflatten(0, (STREAMS, STREAMS)).mT.flatten(0, 1)))
        if key.endswith(".bias") and len(value) > STREAMS
        else value
        for key, value in state.items()
    }


def largest_error(found, expected):
    """Relative to the largest value."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def test_a_deepseek_checkpoint_runs_like_its_reference(theirs):
    """bfloat16 rounds u, f and x' on both sides: 4 sublayers, each half an ulp (2^-9) off, may flip roundings of the
    other side; 2^-6 allows for 8 of them at the largest value."""
    state, x = deepseek(), streams()
    expected_streams, expected_hidden = theirs_forward(theirs, state, x)
    found_streams, found_hidden = loaded(from_deepseek(state, streams=STREAMS))(x)
    assert largest_error(found_streams, expected_streams) < 2**-6
    assert largest_error(found_hidden, expected_hidden) < 2**-6


@pytest.mark.parametrize("what", ["all", "bias"])
def test_without_the_transpose_it_does_not(theirs, what):
    state, x = deepseek(), streams()
    expected, _ = theirs_forward(theirs, state, x)
    converted = from_deepseek(state, streams=STREAMS)
    if what == "bias":
        wrong = untransposed(converted)
    else:
        wrong = {
            key: state[re.sub(r"\.(phi|bias)$", lambda name: {"phi": "_fn", "bias": "_base"}[name[1]], key)]
            if re.search(r"hc_\w+\.(phi|bias)$", key)
            else value
            for key, value in converted.items()
        }
    found, _ = loaded(wrong)(x)
    assert largest_error(found, expected) > 0.05


@pytest.mark.parametrize(("eps", "allowed"), [(1e-6, 2e-4), (0.0, 2e-6)])
def test_coefficients_differ_by_their_constants_alone(theirs, eps, allowed):
    """In float32. Their 1e-6 in 40 sums and in every entry of the softmax moves matrices that 20 rounds leave far
    from converged by up to 1e-4; without it what is left is rounding."""
    state, x = deepseek(), streams()
    module = "layers.1.hc_ffn"
    _, post, comb = theirs_before(theirs, state, module, x, eps)
    block = mhc.HyperConnection(WIDTH, STREAMS, nn.Identity())
    block.load_state_dict(part(from_deepseek(state, streams=STREAMS), module))
    _, found_post, found_res, _ = block.pre_with_residual(x)
    assert (found_post - post[..., 0]).abs().max() < 1e-6
    assert (found_res - comb.mT).abs().max() < allowed


def test_the_head_is_a_stream_head(theirs):
    state, x = deepseek(), streams()
    mixes = theirs.mhc_pre_norm_fn_ref(x, state["mtp.0.hc_head_fn"], None, 1e-6)
    gates = theirs.mhc_head_compute_mix_ref(mixes, state["mtp.0.hc_head_scale"], state["mtp.0.hc_head_base"], 1e-6)
    head = mhc.StreamHead(WIDTH, STREAMS)
    head.load_state_dict(part(from_deepseek(state, streams=STREAMS), "mtp.0.hc_head"))
    assert largest_error(head(x), theirs.mhc_pre_apply_mix_ref(x, gates[..., None])) < 2**-8  # one rounding to bfloat16


# --- the bits


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_keep_every_bit(n, dtype):
    state = {key: value.to(dtype) for key, value in deepseek(streams=n).items()}
    assert same(to_deepseek(from_deepseek(state, streams=n), streams=n), state)
    state = {key: value.to(dtype) for key, value in megatron(streams=n).items()}
    for transposed in (True, False):
        converted = from_megatron(state, streams=n, transposed=transposed)
        assert same(to_megatron(converted, streams=n, transposed=transposed), state)


def test_layouts_and_names():
    state = deepseek()
    found = from_deepseek(state, streams=STREAMS)
    assert found["embed.weight"] is state["embed.weight"]
    assert not [key for key in found if key.startswith("hc_") and "." not in key]
    phi, bias = found["layers.0.hc_attn.phi"], found["layers.0.hc_attn.bias"]
    theirs_phi, theirs_bias = state["layers.0.hc_attn_fn"], state["layers.0.hc_attn_base"]
    assert torch.equal(phi[:8], theirs_phi[:8])
    for i in range(STREAMS):
        for j in range(STREAMS):
            ours, other = 2 * STREAMS + i * STREAMS + j, 2 * STREAMS + j * STREAMS + i
            assert torch.equal(phi[ours], theirs_phi[other])
            assert bias[ours] == theirs_bias[other]
    assert torch.equal(found["layers.0.hc_attn.alpha"], state["layers.0.hc_attn_scale"])
    assert torch.equal(found["hc_head.phi"], state["hc_head_fn"])


def test_megatron_is_deepseek_by_other_names():
    ours = from_deepseek(deepseek(), streams=STREAMS)
    found = from_megatron(megatron(), streams=STREAMS)
    for layer in range(2):
        for name, other in MEGATRON_NAMES.items():
            assert same(part(found, f"decoder.layers.{layer}.{other}"), part(ours, f"layers.{layer}.{name}"))
    assert same(part(found, "decoder.hc_head"), part(ours, "hc_head"))
    old = from_megatron(megatron(), streams=STREAMS, transposed=False)
    module = "decoder.layers.0.mlp_hyper_connection"
    assert torch.equal(old[f"{module}.phi"], megatron()[f"{module}.mapping_proj.weight"])
    assert torch.equal(old[f"{module}.bias"], megatron()[f"{module}.bias"])
    wrapped = {f"module.{key}": value for key, value in megatron().items()}
    assert same(part(from_megatron(wrapped, streams=STREAMS), "module"), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_pass_checkpoint_has_no_head(dtype):
    """DeepSeek-V4.1's: connections of the same names and shapes, converted alike."""

    def headless(state):
        return {key: value.to(dtype) for key, value in state.items() if "hc_head" not in key}

    state = headless(deepseek())
    found = from_deepseek(state, streams=STREAMS)
    assert same(found, headless(from_deepseek(deepseek(), streams=STREAMS)))
    assert same(to_deepseek(found, streams=STREAMS), state)
    block = mhc.HyperConnection(WIDTH, STREAMS, nn.Identity(), eps=1e-20, hc_eps=1e-6)
    for module in ("layers.0.hc_attn", "layers.1.hc_ffn", "mtp.0.hc_ffn"):
        block.load_state_dict(part(found, module))


def test_a_converted_block_goes_back():
    """From a trained block of ours: the inverse does not need theirs to have been there first."""
    block = mhc.HyperConnection(WIDTH, STREAMS, nn.Linear(WIDTH, WIDTH))
    ours = {f"layers.0.hc_attn.{key}": value for key, value in block.state_dict().items()}
    exported = to_deepseek(ours, streams=STREAMS)
    assert exported.keys() == {
        "layers.0.hc_attn_fn",
        "layers.0.hc_attn_scale",
        "layers.0.hc_attn_base",
        "layers.0.hc_attn.sublayer.weight",
        "layers.0.hc_attn.sublayer.bias",
    }
    assert same(from_deepseek(exported, streams=STREAMS), ours)


# --- bad input


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: from_deepseek({}, streams=4), "hc_attn_*, .* got no tensors: take the converter"),
        (lambda: from_deepseek({"model.weight": torch.zeros(1)}, streams=4), "got 1 tensors, the first model.weight"),
        (
            lambda: from_deepseek(megatron(), streams=4),
            "DeepSeek-V4's layout alone, got decoder.* take the converter for",
        ),
        (
            lambda: from_megatron(deepseek(), streams=4),
            "Megatron-Core's layout, got 28 tensors, the first embed.weight",
        ),
        (lambda: to_deepseek(deepseek(), streams=4), "parameters of ours, got"),
        (
            lambda: to_megatron(megatron(), streams=4),
            "layers.0.self_attention_hyper_connection needs phi, alpha, bias, got",
        ),
        (lambda: to_deepseek(from_megatron(megatron(), streams=4), streams=4), "layout alone, got decoder"),
        (
            lambda: from_deepseek(without(deepseek(), "layers.1.hc_ffn_base"), streams=4),
            "layers.1.hc_ffn needs fn, scale, base, got fn, scale: pass base",
        ),
        (
            lambda: from_megatron(without(megatron(), "decoder.layers.0.mlp_hyper_connection.alpha_post"), streams=4),
            "needs mapping_proj.weight, alpha_pre, alpha_post, alpha_res, bias, got .*: pass alpha_post",
        ),
        (
            lambda: from_deepseek(deepseek(streams=2), streams=4),
            "fn of layers.0.hc_attn must be (24, 4 · width) at 4 streams, got (8, 64): pass the checkpoint's own",
        ),
        (
            lambda: from_deepseek(deepseek() | {"hc_head_scale": torch.ones(4)}, streams=4),
            "scale of hc_head must be (1,) at 4 streams, got (4,)",
        ),
        (
            lambda: from_deepseek(deepseek() | {"hc_head_fn": torch.ones(4)}, streams=4),
            "fn of hc_head must be (4, 4 · width) at 4 streams, got (4,)",
        ),
        (lambda: from_deepseek(deepseek(width=12), streams=4), "multiple of 8, got 12"),
        (lambda: from_deepseek(deepseek(), streams=17), "streams"),
    ],
)
def test_bad_input_is_said_in_a_line(call, says):
    with pytest.raises(BadInput, match=re.escape(says).replace(r"\.\*", ".*")) as caught:
        call()
    assert "\n" not in str(caught.value)
