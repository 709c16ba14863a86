"""mhc.patch: tiny models of transformers compute, learn and write what they did, on our kernels."""

import copy
import io
import pickle

import pytest
import torch
from tiny_transformers import (
    FAMILIES,
    LOGITS,
    batch,
    expect_same,
    expect_same_gradients,
    gradients,
    made,
    off,
    outcome,
    text_model,
)
from torch import nn

import mhc
from mhc import functional
from mhc.integrations import transformers_connections
from mhc.integrations.patched_class import Patched
from mhc.integrations.transformers_layers import Layer, give_order

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own


def families(*fast):
    """All families; the fast tier has those named."""
    marks = [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in FAMILIES]
    return pytest.mark.parametrize("family", marks)


@pytest.fixture(scope="module")
def make():
    """A function that makes a model of a family."""
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")
    return lambda family, **settings: made(transformers, family, **settings)


@pytest.fixture
def counted(monkeypatch):
    """A function that runs another one, and returns how often it called each fused op."""
    counts = dict.fromkeys(("pre", "merge", "step"), 0)

    def counting(name, op):
        def run(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return run

    for name in counts:
        monkeypatch.setattr(functional, name, counting(name, getattr(functional, name)))
    with_residual = counting("pre", transformers_connections.pre_with_residual)
    monkeypatch.setattr(transformers_connections, "pre_with_residual", with_residual)

    def count(run):
        counts.update(dict.fromkeys(counts, 0))
        run()
        return dict(counts)

    return count


# --- the same numbers


@families(*FAMILIES)
def test_loss_logits_and_gradients(make, family):
    model, ids = make(family), batch()
    before, names = outcome(model, ids), {name: id(parameter) for name, parameter in model.named_parameters()}
    assert mhc.patch(model) is model
    found = outcome(model, ids)
    expect_same(found, before)
    assert not torch.equal(found[1], before[1]), "ours rounds differently: these are the model's own functions"
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == names
    assert mhc.unpatch(model) is model
    assert torch.equal(outcome(model, ids)[1], before[1])


@families("deepseek_v4")
def test_without_steps(make, family, counted):
    model, ids = make(family), batch()
    before = outcome(model, ids)
    expect_same(outcome(mhc.patch(model, steps=False), ids), before)
    assert counted(lambda: model(ids))["step"] == 0
    assert mhc.patch(model) is model
    expect_same(outcome(model, ids), before)


@families("deepseek_v4")
def test_generation_with_the_cache(make, family):
    model, ids = make(family).eval(), batch()
    given = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    wanted = model.generate(ids, **given)
    assert wanted.shape[1] > ids.shape[1] + 1
    assert torch.equal(mhc.patch(model).generate(ids, **given), wanted)


@families("deepseek_v4")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(make, family, use_reentrant):
    model, ids = make(family).train(), batch()
    before = outcome(model, ids)
    mhc.patch(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    expect_same(outcome(model, ids), before)


@families("deepseek_v4")
def test_bfloat16_is_as_near_as_it_was(make, family, tmp_path):
    """Connections keep float32 parameters where transformers does; rounding differs, so one may be a little off."""
    model, ids = make(family).eval(), batch(rows=4)
    model.save_pretrained(tmp_path)
    rounded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact, theirs, ours = model(ids).logits, rounded(ids).logits, mhc.patch(rounded)(ids).logits
    assert ours.dtype == theirs.dtype

    def error(logits):
        return ((logits.float() - exact).norm() / exact.norm()).item()

    assert error(ours) < 1.25 * error(theirs)
    assert error(ours) < 0.05


@families("deepseek_v4")
def test_autocast(make, family):
    model, ids = make(family).eval(), batch(rows=4)
    with torch.no_grad():
        exact = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs, ours = model(ids).logits, mhc.patch(model)(ids).logits
    assert ours.dtype == theirs.dtype
    assert (ours.float() - exact).norm() < 1.25 * (theirs.float() - exact).norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


# --- which ops run


def test_v4_runs_one_pass_a_boundary(make, counted):
    """Two layers: attention to MLP twice, layer to layer, layer to head."""
    model, ids = mhc.patch(make("deepseek_v4")), batch()
    assert counted(lambda: model(ids)) == {"pre": 1, "merge": 0, "step": 4}


def test_glm_ends_with_its_own_mean(make, counted):
    model, ids = mhc.patch(make("glm5_next")), batch()
    assert counted(lambda: model(ids)) == {"pre": 1, "merge": 1, "step": 3}


def test_under_checkpointing_layers_are_not_joined(make, counted):
    model, ids = mhc.patch(make("deepseek_v4")).train(), batch()
    model.gradient_checkpointing_enable()
    assert counted(lambda: model(ids)) == {"pre": 3, "merge": 2, "step": 2}


@pytest.mark.parametrize(
    ("family", "ending", "head"),
    [
        pytest.param("glm5_next", "", (), marks=pytest.mark.slow),
        pytest.param("deepseek_v4", "", ("step",), marks=pytest.mark.slow),
        pytest.param("hy_v4", "_identity", ("step",), marks=pytest.mark.slow),
    ],
)
def test_a_step_of_training_runs_on_kernels_alone(make, on_compiled, family, ending, head):
    model, ids = make(family, hidden=16), batch()
    before = outcome(model, ids)
    expect_same(outcome(mhc.patch(model), ids), before)
    rows = {(row.op, row.direction): row.runs for row in mhc.kernel_report() if (row.streams, row.width) == (4, 16)}
    ops = ("pre_norm", "step_norm", *head)
    expected = {(op + ending, direction) for op in ops for direction in ("forward", "backward")}
    assert expected <= rows.keys()
    assert "reference" not in rows.values()


# --- what the model keeps


def test_state_optimiser_and_checkpoint_see_no_change(make, tmp_path):
    model, ids = make("deepseek_v4").eval(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mhc.patch(model)
    assert model.state_dict().keys() == before.keys()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, Patched) for module in plain.modules())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name])
    assert off(model(ids).logits, plain(ids).logits) <= LOGITS
    assert "DeepseekV4DecoderLayer" in {type(module).__name__ for module in model.modules()}


def test_unpatch_leaves_nothing(make):
    model = make("deepseek_v4")
    own = {name: (type(module), vars(module).keys()) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    mhc.patch(model, steps=False)
    mhc.patch(model)(batch())
    assert any(give_order in module._forward_pre_hooks.values() for module in model.modules())
    mhc.unpatch(model)
    assert {name: (type(module), vars(module).keys()) for name, module in model.named_modules()} == own
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert mhc.unpatch(model) is model


def test_patching_twice_is_patching_once(make, counted):
    model = mhc.patch(mhc.patch(make("deepseek_v4")))
    kinds = [kind for kind in type(text_model(model).layers[0]).__mro__ if kind.__name__ == "DeepseekV4DecoderLayer"]
    assert len(kinds) == 2, "the patched class and the model's own"
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 1
    assert counted(lambda: model(batch()))["step"] == 4


@families("deepseek_v4")
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_and_apart(make, family, how):
    model, ids = mhc.patch(make(family)).eval(), batch()
    wanted = model(ids).logits.detach()
    if how == "torch.save":
        kept = io.BytesIO()
        torch.save(model, kept)
        kept.seek(0)
        other = torch.load(kept, weights_only=False)
    else:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(other(ids).logits, wanted)
    assert len([module for module in other.modules() if isinstance(module, Patched)]) == (7 if "v4" in family else 6)
    mhc.unpatch(model)
    assert any(isinstance(module, Layer) for module in other.modules())
    assert torch.equal(other(ids).logits, wanted)
    mhc.unpatch(other)
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_a_layer_is_copied_by_itself(make):
    layers = text_model(mhc.patch(make("deepseek_v4"))).layers
    copied = copy.deepcopy(layers[0])
    assert type(copied) is type(layers[0])
    assert sum(p.numel() for p in copied.parameters()) == sum(p.numel() for p in layers[0].parameters())


def test_layers_return_no_views(make):
    """FSDP2 and pipelines need it."""
    model, views = mhc.patch(make("deepseek_v4")), []
    for layer in text_model(model).layers:
        layer.register_forward_hook(lambda module, args, output: views.append(output._is_view()))
    model(batch())
    assert views == [False, False]


def test_inference_mode(make):
    model, ids = make("deepseek_v4").eval(), batch()
    with torch.inference_mode():
        wanted = model(ids).logits
        assert off(mhc.patch(model)(ids).logits, wanted) <= LOGITS


# --- hooks and replaced parts


def test_hooks_on_hyper_connections_and_layers_run(make, counted):
    model, ids = make("deepseek_v4"), batch()
    layers = text_model(model).layers

    def doubled_post(module, args, output):
        return (2 * output[0], *output[1:])

    def shifted(module, args, output):
        return output + 0.1

    layers[0].ffn_hc.register_forward_hook(doubled_post)
    layers[1].attn_hc.register_forward_hook(doubled_post)
    layers[0].register_forward_hook(shifted)
    before = outcome(model, ids)
    expect_same(outcome(mhc.patch(model), ids), before)
    assert counted(lambda: model(ids))["step"] == 2, "in the second layer, and from it to the head"


@pytest.mark.parametrize("change", [lambda x: x * 1.5, lambda x: x.mul_(1.5)], ids=["anew", "in place"])
def test_streams_that_are_changed_between_layers_are_heeded(make, change):
    """What was computed ahead is for streams that are no more."""
    model, ids = make("deepseek_v4"), batch()
    layer = text_model(model).layers[1]

    def changed(module, args):
        return (change(args[0]), *args[1:])

    with torch.no_grad():
        handle = layer.register_forward_pre_hook(changed)
        before = model(ids).logits
        handle.remove()
        mhc.patch(model)
        calls = type(layer).__call__
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(layer),
                "__call__",
                lambda self, x, **given: calls(self, change(x) if self is layer else x, **given),
            )
            assert off(model(ids).logits, before) <= LOGITS


def test_recorded_hidden_states_and_their_gradients(make):
    model, ids = make("deepseek_v4").eval(), batch()

    def recorded():
        out = model(ids, labels=ids, output_hidden_states=True, output_router_logits=True)
        inside = out.hidden_states[1]
        return (*out.hidden_states, *out.router_logits, *torch.autograd.grad(out.loss, inside))

    before = recorded()
    mhc.patch(model)
    for mine, theirs in zip(recorded(), before, strict=True):
        assert off(mine, theirs) <= 10 * LOGITS


class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as LoRA has it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def test_adapters_around_sublayers(make):
    model, ids = mhc.patch(make("deepseek_v4")), batch()
    for layer in text_model(model).layers:
        layer.self_attn.q_a_proj = Adapter(layer.self_attn.q_a_proj)
        layer.mlp.shared_experts = nn.Sequential(layer.mlp.shared_experts)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".down." in name or ".up." in name)
    found = outcome(model, ids)
    mhc.unpatch(model)
    expect_same(found, outcome(model, ids))
    assert len(found[2]) == 4


class Nothing(nn.Module):
    """A connection of one's own: the first stream, and no mixing."""

    def forward(self, x):
        eye = torch.eye(4).expand(*x.shape[:2], 4, 4)
        return torch.ones(x.shape[:3]), eye, x[:, :, 0]


def test_a_hyper_connection_that_was_replaced_afterwards(make):
    model, ids = mhc.patch(make("deepseek_v4")), batch()
    text_model(model).layers[1].attn_hc = Nothing()
    found = outcome(model, ids)
    mhc.unpatch(model)
    expect_same(found, outcome(model, ids))


def test_layers_that_were_removed_or_swapped_afterwards(make):
    model, ids = mhc.patch(make("deepseek_v4", layers=3)), batch()
    inner = text_model(model)
    inner.layers = inner.layers[:2]
    inner.layers[0].attn_hc, inner.layers[1].attn_hc = inner.layers[1].attn_hc, inner.layers[0].attn_hc
    found = outcome(model, ids)
    mhc.unpatch(model)
    expect_same(found, outcome(model, ids))


def test_checkpointing_by_hand_around_some_layers(make):
    """Modules in between, whose forward runs twice: layers are not joined with them."""

    class Checkpointed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, **kwargs):
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False, **kwargs)

    model, ids = mhc.patch(make("deepseek_v4", layers=3, use_cache=False)), batch()
    before = outcome(model, ids)
    inner = text_model(model)
    inner.layers[1] = Checkpointed(inner.layers[1])
    found = outcome(model, ids)
    expect_same((*found[:2], {name.replace(".1.layer.", ".1."): grad for name, grad in found[2].items()}), before)


def test_a_second_backward_through_the_graph(make):
    model, ids = mhc.patch(make("deepseek_v4")), batch()
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    expect_same_gradients(gradients(model), {name: 2 * grad for name, grad in once.items()})
