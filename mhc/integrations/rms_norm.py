"""A model's own RMSNorm, weight · u / sqrt(mean(u²) + eps), recognised so that an op may do its work.

Models have classes of their own for it. A module is known by its parts and by what it computes of a random input, with
a random weight on the CPU in place of its own, so that models on any device, meta too, can be tried.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import nn

from mhc.checks import STREAM_DTYPES
from mhc.integrations.plain_call import is_plain_call

TOKENS = 3
TOLERANCE = 1e-5
"""Of float32 results, relative to the largest: far above rounding, far below what another formula gives."""


class KnownNorm(NamedTuple):
    """A module that was found to be an RMSNorm, and its class then."""

    module: nn.Module
    kind: type[nn.Module]


def known_norms(*modules: nn.Module) -> tuple[KnownNorm, ...]:
    """Those of the modules that are RMSNorms, hooks left aside."""
    return tuple(KnownNorm(module, type(module)) for module in modules if is_rms_norm(module))


def runs_inside(norm: nn.Module, known: tuple[KnownNorm, ...], device: torch.device) -> bool:
    """Whether an op on streams of this device may do the norm's work now: it is one of the known, as it was found, and
    a call of it would be its forward alone."""
    found = any(each.module is norm and each.kind is type(norm) for each in known)
    return found and is_plain_call(norm) and _has_weight(norm) and norm.weight.device == device


def settings_for_ops(norm: nn.Module | None) -> dict[str, Any]:
    """norm_weight and norm_eps, as `mhc.functional.pre` and `step` take them; none where there is no norm."""
    return {} if norm is None else {"norm_weight": norm.weight, "norm_eps": eps_of(norm)}


def torch_norm(norm: nn.Module) -> nn.RMSNorm | None:
    """An `nn.RMSNorm` that does what the norm does, with the very same parameter; None where it is another norm, has
    hooks, or has a weight that its own module alone may hold, as a sharded one."""
    if not is_rms_norm(norm) or not is_plain_call(norm) or not _has_weight(norm):
        return None
    weight = norm.weight
    if type(weight) is not nn.Parameter:
        return None
    if type(norm) is nn.RMSNorm:
        return norm
    made = nn.RMSNorm(len(weight), eps=eps_of(norm), device="meta")
    made.weight = weight
    return made.train(norm.training)


def eps_of(norm: Any) -> float:
    """What an RMSNorm adds to the mean square."""
    eps: float | None = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return torch.finfo(torch.float32).eps if eps is None else eps


def is_rms_norm(module: nn.Module) -> bool:
    """Whether the forward of a module's class computes an RMSNorm with the module's weight [C] and eps, and nothing
    else decides about it."""
    parameters = {name for name, parameter in module._parameters.items() if parameter is not None}
    others = [*module.children(), *module.buffers(recurse=False)]
    if parameters != {"weight"} or others or "forward" in vars(module):
        return False
    try:
        return _computes_rms_norm(module)
    except Exception:  # a module may be any code
        return False


def _has_weight(norm: nn.Module) -> bool:
    """Whether the weight is a parameter that ops take, and not computed anew, as a parametrised one is."""
    weight = norm._parameters.get("weight")
    return weight is not None and weight.dtype in STREAM_DTYPES


def _computes_rms_norm(module: Any) -> bool:
    """Whether a copy with a random weight does so in training and evaluation, of inputs of ordinary size and of others
    whose mean square is about eps; tokens differ in size."""
    eps, (width,) = eps_of(module), module.weight.shape
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        return False
    random = torch.Generator(device="cpu").manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")

    weight, tokens = drawn(width), drawn(1, TOKENS, 1) * drawn(1, TOKENS, width)
    probe = copy.copy(module)
    probe._parameters = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for training, scale in itertools.product((True, False), (1.0, math.sqrt(eps) or 1e-3)):
            probe.training, u = training, scale * tokens
            wanted = weight * u / torch.sqrt(u.square().mean(-1, keepdim=True) + eps)
            if not _alike(probe.forward(u.clone()), wanted):
                return False
    return True


def _alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    same_kind = found.shape == wanted.shape and found.dtype == wanted.dtype
    return same_kind and bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
