"""Probes of modules, tried on tiny inputs: does what takes a module's place do what the module does?

A probe is a module of the same class and attributes with tiny parameters and submodules in place of its own, so that
nothing is computed at the model's size and models on the meta device can be tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mhc.dispatch.kernels import Kernels, using
from mhc.integrations.patched_class import Patched, own_class, patched_class
from mhc.integrations.transformers_layers import PARTS, Layer

WIDTH, TOKENS = 8, 3
TOLERANCE = 1e-5
"""Of float32 results, relative to the largest: far above rounding, far below what another formula gives."""

ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings", "cache", "input_ids", "use_cache")
"""What a layer is called with beside the streams and what another layer has returned."""

OTHER_OUTPUTS = ("attention weights", "indices")
"""What attention returns beside its output."""


def probe(module: nn.Module, kind: type[nn.Module], parameters: Any, modules: Any) -> nn.Module:
    """A module of class `kind` with the attributes of `module`, these parameters and submodules, and no hooks."""
    made: nn.Module = object.__new__(kind)
    nn.Module.__init__(made)
    bare = {name: value for name, value in vars(made).items() if name.endswith("_hooks")}
    vars(made).update(vars(module) | bare, _parameters=parameters, _modules=modules)
    return made


def tiny_parameters(module: nn.Module, streams: int) -> dict[str, nn.Parameter]:
    """Random parameters of width `WIDTH`; matrices [rows, n · C] are the only ones that depend on the width."""
    random = torch.Generator().manual_seed(0)

    def drawn(shape: torch.Size) -> nn.Parameter:
        size = (shape[0], streams * WIDTH) if len(shape) == 2 else shape
        return nn.Parameter(torch.randn(size, generator=random, dtype=torch.float32, device="cpu"), requires_grad=False)

    return {name: drawn(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}


def tiny_streams(streams: int) -> torch.Tensor:
    """Random streams [1, tokens, n, C]."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(1, TOKENS, streams, WIDTH, generator=random, dtype=torch.float32, device="cpu")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Plain torch, without gradients or autocast; the kernels' report does not show what runs inside."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), using(Kernels.reference()):
        yield


def alike(found: Any, wanted: Any) -> bool:
    """Whether tensors are equal to `TOLERANCE`, containers have alike items, and all else is the same."""
    if isinstance(wanted, torch.Tensor):
        if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            return False
        return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
    if isinstance(wanted, (tuple, list)):
        return type(found) is type(wanted) and len(found) == len(wanted) and all(map(alike, found, wanted))
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(alike(found[k], wanted[k]) for k in wanted)
        )
    return found is wanted


def same_behaviour(module: nn.Module, mixin: type[Patched], streams: int) -> str | None:
    """None where a connection or head with `mixin` returns what it does now; else what is different, or an error."""
    parameters, x = tiny_parameters(module, streams), tiny_streams(streams)
    own = own_class(module)
    kinds = own, patched_class(mixin, own)
    with undisturbed():
        try:
            wanted, found = (probe(module, kind, parameters, module._modules).forward(x) for kind in kinds)
        except Exception as error:  # a module may be any code
            return f"{type(error).__name__}: {error}"
    return None if alike(found, wanted) else "other results"


class _Recorder(nn.Module):
    """Stands in for a sublayer: keeps what it is called with; returns one tensor, or a tuple that begins with one."""

    def __init__(self, factor: float, outputs: int, calls: list[Any]) -> None:
        super().__init__()
        self.factor, self.outputs, self.calls = factor, outputs, calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        u = args[0] if args else kwargs["hidden_states"]
        f = torch.tanh(self.factor * u)
        return f if self.outputs == 1 else (f, *OTHER_OUTPUTS[: self.outputs - 1])


def same_layer(layer: nn.Module, mixin: type[Layer], connections: type[Patched], streams: int) -> bool:
    """Whether a layer with `mixin` around connections with `connections` does what the layer does: in training and
    evaluation, what its sublayers are called with included."""
    x = tiny_streams(streams)
    given = {name: f"the {name}" for name in (*ARGUMENTS, "prev_topk_indices", "anything_else")}

    def outcome(patched: bool, training: bool) -> Any:
        calls: list[Any] = []
        kind = patched_class(mixin, own_class(layer)) if patched else own_class(layer)
        outputs = mixin.attention_outputs(layer)
        stand_ins = (_Recorder(0.5, 1, calls), _Recorder(0.9, outputs, calls), _Recorder(0.7, 1, calls))
        modules: dict[str, nn.Module] = dict(zip(PARTS, (*stand_ins, _Recorder(1.1, 1, calls)), strict=False))
        for name in PARTS[len(modules) :]:
            own = getattr(layer, name)
            kind_of_own = patched_class(connections, own_class(own)) if patched else own_class(own)
            modules[name] = probe(own, kind_of_own, tiny_parameters(own, streams), own._modules)
        made = probe(layer, kind, layer._parameters, modules)
        vars(made).update(training=training, gradient_checkpointing=False)
        return made.forward(x, **given), calls

    with undisturbed():
        try:
            return all(alike(outcome(True, training), outcome(False, training)) for training in (True, False))
        except Exception:  # a layer may be any code
            return False
