"""Which modules are recognised as an RMSNorm, and when a recognised one runs as it was known."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mhc.integrations.rms_norm import eps_of, is_rms_norm, known_norms, runs_inside, settings_for_ops, torch_norm

WIDTH, EPS, CPU = 32, 1e-3, torch.device("cpu")
FLOAT32 = torch.finfo(torch.float32).eps


class Llama(nn.Module):
    """As most models of transformers have it."""

    def __init__(self, width=WIDTH, eps=EPS):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), eps

    def forward(self, u):
        dtype, u = u.dtype, u.float()
        return self.scaled((u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(dtype))

    def scaled(self, u):
        return self.weight * u


class OnePlus(Llama):
    """As Gemma has it."""

    def scaled(self, u):
        return (1 + self.weight) * u


class Half(Llama):
    """Something small besides."""

    def scaled(self, u):
        return self.weight * u + 1e-4


class InTraining(Llama):
    """Another thing in training."""

    def scaled(self, u):
        return self.weight * (2 * u if self.training else u)


class InEvaluation(Llama):
    """Another thing in evaluation."""

    def scaled(self, u):
        return self.weight * (u if self.training else 2 * u)


class EpsOutside(Llama):
    """Adds eps to the root, not under it."""

    def forward(self, u):
        return self.weight * u / (u.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class NoEps(Llama):
    """Has an eps, and does not use it."""

    def forward(self, u):
        return self.weight * u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True))


class OfAllTokens(Llama):
    """One mean for all."""

    def forward(self, u):
        return self.weight * u * torch.rsqrt(u.pow(2).mean() + self.variance_epsilon)


class Biased(Llama):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))


class Buffered(Llama):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))


class Nested(Llama):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()


class InATuple(Llama):
    def scaled(self, u):
        return (self.weight * u,)


class InFloat64(Llama):
    def scaled(self, u):
        return (self.weight * u).double()


class Failing(Llama):
    def forward(self, u, gate):
        return super().forward(u) * gate


class WithoutEps(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, u):
        return nn.functional.rms_norm(u, (WIDTH,), self.weight, EPS)


def on_meta():
    with torch.device("meta"):
        return Llama()


def with_own_forward():
    norm = Llama()
    norm.forward = Llama().forward
    return norm


def parametrised():
    norm = Llama()
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


RECOGNISED = {
    "Llama's": Llama,
    "a large eps": lambda: Llama(eps=0.5),
    "no eps": lambda: Llama(eps=0),
    "torch's": lambda: nn.RMSNorm(WIDTH, eps=EPS),
    "torch's without eps": lambda: nn.RMSNorm(WIDTH),
    "bfloat16": lambda: Llama().bfloat16(),
    "meta": on_meta,
    "frozen and wide": lambda: Llama(7168, 1e-6).requires_grad_(False),
}
OTHERS = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "LayerNorm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "torch's without weight": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
    "torch's of two dimensions": lambda: nn.RMSNorm((2, WIDTH)),
    "a linear layer": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "nothing": nn.Identity,
    "no number as eps": lambda: Llama(eps="1e-6"),
    "a negative eps": lambda: Llama(eps=-0.1),
    "a forward of its own": with_own_forward,
    "parametrised": parametrised,
    **{kind.__name__: kind for kind in (OnePlus, Half, InTraining, InEvaluation, EpsOutside, NoEps, OfAllTokens)},
    **{kind.__name__: kind for kind in (Biased, Buffered, Nested, InATuple, InFloat64, Failing, WithoutEps)},
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_rms_norms_are_recognised_and_left_alone(name):
    norm = RECOGNISED[name]().eval()
    before, weight, state = dict(vars(norm)), norm.weight, torch.get_rng_state()
    copied = weight.detach().clone()
    assert is_rms_norm(norm)
    assert vars(norm) == before
    assert norm.weight is weight
    assert weight.is_meta or torch.equal(weight, copied)
    assert not norm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert runs_inside(norm, known_norms(norm), weight.device)


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules_are_not(name):
    norm = OTHERS[name]()
    assert not is_rms_norm(norm)
    assert torch_norm(norm) is None
    assert known_norms(norm) == ()
    assert not runs_inside(norm, (), CPU)


@pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own
@pytest.mark.parametrize(
    ("model", "name", "recognised"),
    [
        ("llama", "LlamaRMSNorm", True),
        ("qwen3", "Qwen3RMSNorm", True),
        ("mixtral", "MixtralRMSNorm", True),
        ("deepseek_v4", "DeepseekV4RMSNorm", True),
        ("glm5_next", "Glm5NextTextRMSNorm", True),
        ("hy_v4", "HYV4RMSNorm", True),
        ("gemma", "GemmaRMSNorm", False),
        ("glm5_next", "Glm5NextTextRMSNormGated", False),
    ],
)
def test_transformers_own(model, name, recognised):
    pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")
    kind = getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), name)
    assert is_rms_norm(kind(WIDTH, eps=1e-6)) == recognised


def test_an_eps_is_read_where_it_is():
    assert eps_of(Llama(eps=0.25)) == 0.25
    assert eps_of(nn.RMSNorm(WIDTH, eps=0.5)) == 0.5
    assert eps_of(nn.RMSNorm(WIDTH)) == FLOAT32
    norm = Llama()
    norm.variance_epsilon = 0.125
    assert settings_for_ops(norm) == {"norm_weight": norm.weight, "norm_eps": 0.125}
    assert settings_for_ops(None) == {}


def nothing(*_):
    """What hooks do here."""


HOOKS = {
    "forward": lambda norm: norm.register_forward_hook(nothing),
    "before forward": lambda norm: norm.register_forward_pre_hook(nothing),
    "backward": lambda norm: norm.register_full_backward_hook(nothing),
    "before backward": lambda norm: norm.register_full_backward_pre_hook(nothing),
    "everywhere": lambda norm: nn.modules.module.register_module_forward_hook(nothing),
}


@pytest.mark.parametrize("where", HOOKS)
def test_a_norm_with_hooks_is_called(where):
    norm = Llama()
    known = known_norms(norm)
    handle = HOOKS[where](norm)
    try:
        assert known_norms(norm) == known, "they may be removed later"
        assert not runs_inside(norm, known, CPU)
        assert torch_norm(norm) is None
    finally:
        handle.remove()
    assert runs_inside(norm, known, CPU)


def replace_forward(norm):
    norm.forward = nn.Identity().forward


def change_class(norm):
    norm.__class__ = OnePlus


def parametrise(norm):
    parametrize.register_parametrization(norm, "weight", nn.Softplus())


@pytest.mark.parametrize(
    "change", [replace_forward, change_class, parametrise, nn.Module.double, lambda norm: norm.to("meta")]
)
def test_a_norm_that_was_changed_is_called(change):
    norm = Llama()
    known = known_norms(norm)
    assert runs_inside(norm, known, CPU)
    change(norm)
    assert not runs_inside(norm, known, CPU)


def test_another_norm_is_not_a_known_one():
    known = known_norms(Llama(), nn.LayerNorm(WIDTH), Llama())
    assert len(known) == 2
    assert not runs_inside(Llama(), known, CPU)


@pytest.mark.parametrize("training", [True, False])
def test_torchs_norm_shares_the_parameter(training):
    norm = Llama(eps=0.25).train(training)
    norm.weight.data.uniform_()
    norm.weight.requires_grad_(False)
    made = torch_norm(norm)
    assert type(made) is nn.RMSNorm
    assert made.weight is norm.weight
    assert (made.eps, made.normalized_shape, made.training) == (0.25, (WIDTH,), training)
    assert [name for name, _ in made.named_parameters()] == ["weight"]
    u = torch.randn(3, WIDTH)
    torch.testing.assert_close(made(u), norm(u))


def test_torchs_norm_is_itself_and_subclasses_are_not():
    norm = nn.RMSNorm(WIDTH)
    assert torch_norm(norm) is norm

    class Mine(nn.RMSNorm):
        """One with something of its own."""

    made = torch_norm(Mine(WIDTH))
    assert type(made) is nn.RMSNorm
    assert made.eps == FLOAT32


class OwnParameter(nn.Parameter):
    """One that its module alone knows what to do with, as a sharded weight."""


def test_weights_of_other_kinds_stay_where_they_are():
    norm = Llama()
    norm.weight = OwnParameter(torch.ones(WIDTH))
    assert is_rms_norm(norm)
    assert torch_norm(norm) is None
    assert torch_norm(Llama().double()) is None
