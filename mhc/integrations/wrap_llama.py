"""Layers like Llama's in Hugging Face transformers, recognised by their submodules: transformers is not needed."""

from __future__ import annotations

import copy
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from mhc.integrations.connected import ConnectedLayer, FeedForward, MakeConnection
from tiles.errors import BadInput

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
"""The submodules of such a layer; one with others computes something else."""


class Attention(nn.Module):
    """u -> self_attn(norm(u), ...), which may return a tuple whose first element is its output."""

    def __init__(self, norm: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = norm, attention

    def forward(self, u: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """u [..., C]; masks, positions and the KV cache go to the attention."""
        return self.attention(self.norm(u), *args, **kwargs)


class LlamaLayer(ConnectedLayer):
    """Blocks: attention, MLP. Returns a tuple if the layer that it replaces did."""

    gradient_checkpointing = False
    """Set by transformers' `gradient_checkpointing_enable()`, together with `_gradient_checkpointing_func`."""

    _gradient_checkpointing_func: Any

    def __init__(self, blocks: Any, *, returns_tuple: bool) -> None:
        super().__init__(blocks)
        self.returns_tuple = returns_tuple

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [..., n, C], or h [..., C] for the first layer -> the same, or h [..., C] from the last one."""
        run: Any = super().forward
        if self.gradient_checkpointing and self.training:
            # Recomputation would write to the cache again.
            kwargs = {name: None if name == "past_key_values" else value for name, value in kwargs.items()}
            run = partial(self._gradient_checkpointing_func, partial(run, **kwargs))
            kwargs = {}
        x = run(x, *args, **kwargs)
        return (x,) if self.returns_tuple else x


def wrap_llama_layer(layer: nn.Module, connection: MakeConnection, width: int | None) -> ConnectedLayer | None:
    """The layer with hyper-connections around the same submodules; None where its submodules are not `PARTS`.

    Raises `BadInput` where its forward is not h + self_attn(norm(h)), then h + mlp(norm(h)), as in models that scale
    their residuals; or where the norm has no weight and no width is given.
    """
    parts = dict(layer.named_children())
    if parts.keys() != set(PARTS):
        return None
    norm, attention, second_norm, mlp = (parts[name] for name in PARTS)
    returns_tuple = _returns_tuple(layer)
    weight = getattr(norm, "weight", None)
    if width is None and weight is None:
        raise BadInput(f"the width must be known, got a {type(norm).__name__} without weight: give mhc.wrap the width")
    width = width or weight.shape[-1]  # type: ignore[union-attr]
    sublayers = Attention(norm, attention), FeedForward(second_norm, mlp)
    return LlamaLayer([connection(each, width, 0.0) for each in sublayers], returns_tuple=returns_tuple)


class _Scale(nn.Module):
    """Stands in for a submodule: returns factor times its input, in a tuple if asked to, as attention may."""

    def __init__(self, factor: int, in_tuple: bool = False) -> None:
        super().__init__()
        self.factor, self.in_tuple = factor, in_tuple

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        product = self.factor * hidden_states
        return (product, None) if self.in_tuple else product


def _returns_tuple(layer: nn.Module) -> bool:
    """Whether the layer's own forward returns a tuple, found by running it with factors in place of its submodules.

    Raises `BadInput` where the result is not h + 3·2·h = 7h, then 7h + 7·5·7h = 252h.
    """
    found: Any = None
    for in_tuple in (True, False):
        probe = copy.copy(layer)
        probe.training = False
        factors = (_Scale(2), _Scale(3, in_tuple), _Scale(5), _Scale(7))
        probe._modules = dict(zip(PARTS, factors, strict=True))
        others = list(signature(layer.forward).parameters.values())[1:]
        required = [None for each in others if each.default is Parameter.empty and each.kind in _POSITIONAL]
        try:
            answer = probe.forward(torch.ones(1, 1, 1, dtype=torch.float32, device="cpu"), *required)
            found = answer[0] if isinstance(answer, tuple) else answer
            if torch.equal(found, torch.full_like(found, 252.0)):
                return isinstance(answer, tuple)
        except Exception as error:  # a layer may be any code
            found = found if found is not None else f"{type(error).__name__}: {error}"
    text = " ".join(str(found).split())
    raise BadInput(
        "a Llama-style layer must be h + self_attn(norm(h)), then h + mlp(norm(h)), got another result from "
        f"{type(layer).__name__} ({text}): put mhc.HyperConnection around its sublayers by hand"
    )


_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
