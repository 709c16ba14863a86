"""transformers' layout of DeepSeek-V4 and GLM-5.3, against its own modules."""

import pytest
import torch
from torch import nn

import mhc
from mhc.converters import from_hugging_face, to_hugging_face

N, WIDTH = 4, 16


class Config:
    hc_mult, hc_sinkhorn_iters, hc_eps, rms_norm_eps, hidden_size, hc_magnitude = N, 20, 1e-6, 1e-6, WIDTH, 2.0


@pytest.fixture(scope="module", params=["deepseek_v4", "glm5_next"])
def theirs(request):
    """A layer's two connections and the head, as the model's names have them; GLM's head has no parameters."""
    torch.manual_seed(0)
    layer = nn.ModuleDict({name: module_of(request.param, "HyperConnection") for name in ("attn_hc", "ffn_hc")})
    layer["mlp"] = nn.Linear(WIDTH, WIDTH)
    made = nn.ModuleDict({"layers": nn.ModuleList([layer]), "hc_head": module_of(request.param, "HyperHead")})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return nn.ModuleDict({"model": made})


def module_of(model, kind):
    pytest.importorskip("transformers", reason="transformers is not installed")
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    prefix = {"deepseek_v4": "DeepseekV4", "glm5_next": "Glm5NextText", "hy_v4": "HYV4"}[model]
    return getattr(modeling, prefix + kind)(*[] if (model, kind) == ("glm5_next", "HyperHead") else [Config()])


def test_a_checkpoint_runs_like_its_model(theirs):
    ours = from_hugging_face(theirs.state_dict(), streams=N)
    x = torch.randn(2, 5, N, WIDTH)
    for name in ("attn_hc", "ffn_hc"):
        block = mhc.HyperConnection(WIDTH, N, nn.Identity(), hc_eps=1e-6)
        prefix = f"model.layers.0.{name}."
        block.load_state_dict({key.removeprefix(prefix): value for key, value in ours.items() if prefix in key})
        post, comb, collapsed = theirs["model"]["layers"][0][name](x)
        u, my_post, res, _ = block.pre_with_residual(x)
        for mine, wanted in ((u, collapsed), (my_post, post), (res, comb.mT)):
            assert (mine - wanted).abs().max() < 5e-6 * wanted.abs().max()
    wanted = theirs["model"]["hc_head"](x)
    parameters = {key.rpartition(".")[2]: value for key, value in ours.items() if "hc_head" in key}
    head = mhc.StreamHead(WIDTH, N, hc_eps=1e-6) if parameters else mhc.reduce_streams
    if parameters:
        head.load_state_dict(parameters)
    assert (head(x) - wanted).abs().max() < 5e-6 * wanted.abs().max()


def test_hunyuan_runs_like_its_model_and_round_trips():
    torch.manual_seed(1)
    connection = module_of("hy_v4", "HyperConnection")
    for parameter in connection.parameters():
        nn.init.normal_(parameter, std=0.5)
    prefix = "model.layers.0.attn_hc."
    state = {prefix + key: value for key, value in connection.state_dict().items()}
    ours = from_hugging_face(state, streams=N)
    block = mhc.HyperConnection(WIDTH, N, nn.Identity(), manifold="identity", hc_eps=1e-6)
    block.load_state_dict({key.removeprefix(prefix): value for key, value in ours.items()})
    x = torch.randn(2, 5, N, WIDTH)
    u, my_post, res, _ = block.pre_with_residual(x)
    assert res is None
    for mine, wanted in zip((my_post, u), connection(x), strict=True):
        assert (mine - wanted).abs().max() < 5e-6 * wanted.abs().max()
    back = to_hugging_face(ours, streams=N)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(mhc.BadInput, match=r"fn of model\.layers\.0\.attn_hc must be \(4, 2 · width\) at 2 streams"):
        from_hugging_face(state, streams=2)


def test_a_round_trip_gives_the_same_bits_and_passes_others_through(theirs):
    state = theirs.state_dict()
    ours = from_hugging_face(state, streams=N)
    assert "model.layers.0.mlp.weight" in ours
    assert not any(key.endswith((".fn", ".base", ".scale", "hc_fn")) for key in ours)
    back = to_hugging_face(ours, streams=N)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_bad_input_is_one_line(theirs):
    state = theirs.state_dict()
    with pytest.raises(
        mhc.BadInput, match=r"attn_hc.\*, ffn_hc.\* or hc_head.\* tensors of transformers' .* got no tensors"
    ):
        from_hugging_face({}, streams=N)
    with pytest.raises(mhc.BadInput, match=r"fn of model\.layers\.0\.attn_hc must be"):
        from_hugging_face(state, streams=2)
    lacking = {key: value for key, value in state.items() if not key.endswith("attn_hc.base")}
    with pytest.raises(mhc.BadInput, match=r"model\.layers\.0\.attn_hc needs fn, scale, base, got fn, scale"):
        from_hugging_face(lacking, streams=N)
    with pytest.raises(mhc.BadInput, match="parameters of ours, got"):
        to_hugging_face(state, streams=N)
