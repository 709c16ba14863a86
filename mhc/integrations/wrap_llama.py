"""Layers built like Llama's in Hugging Face transformers, known by their parts: transformers itself is not needed."""

from __future__ import annotations

import copy
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from mhc.integrations.connected import ConnectedLayer, Connection, FeedForward
from tiles.errors import BadInput

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
"""All submodules of such a layer; one with more of them has other maths."""


class Attention(nn.Module):
    """u -> self_attn(norm(u), ...), which may return a tuple that begins with its output."""

    def __init__(self, norm: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = norm, attention

    def forward(self, u: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Masks, positions and the cache of keys and values are the attention's."""
        return self.attention(self.norm(u), *args, **kwargs)


class LlamaLayer(ConnectedLayer):
    """The blocks are attention and MLP. Answers with a tuple where the layer that it replaces did."""

    gradient_checkpointing = False
    """What `model.gradient_checkpointing_enable()` of transformers sets, with the function that is called here."""

    _gradient_checkpointing_func: Any

    def __init__(self, blocks: Any, *, answers_tuple: bool) -> None:
        super().__init__(blocks)
        self.answers_tuple = answers_tuple

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [..., n, C], or h [..., C] of the first layer -> the same, or h of the last one."""
        run: Any = super().forward
        if self.gradient_checkpointing and self.training:
            # The cache would be written to again when the layer is run again.
            kwargs = {name: None if name == "past_key_values" else value for name, value in kwargs.items()}
            run = partial(self._gradient_checkpointing_func, partial(run, **kwargs))
            kwargs = {}
        x = run(x, *args, **kwargs)
        return (x,) if self.answers_tuple else x


def connected_llama(layer: nn.Module, connection: Connection, width: int | None) -> ConnectedLayer | None:
    """The layer with hyper-connections, of the same submodules; None where it has not `PARTS` and nothing else.

    Raises `BadInput` where its forward is not h + self_attn(norm(h)), then h + mlp(norm(h)), as in models that scale
    their residuals; or where the norm does not tell the width and none is given.
    """
    parts = dict(layer.named_children())
    if parts.keys() != set(PARTS):
        return None
    norm, attention, second_norm, mlp = (parts[name] for name in PARTS)
    answers_tuple = _answers_tuple(layer)
    weight = getattr(norm, "weight", None)
    if width is None and weight is None:
        raise BadInput(f"the width must be known, got a {type(norm).__name__} without weight: give mhc.wrap the width")
    width = width or weight.shape[-1]  # type: ignore[union-attr]
    sublayers = Attention(norm, attention), FeedForward(second_norm, mlp)
    return LlamaLayer([connection(each, width, 0.0) for each in sublayers], answers_tuple=answers_tuple)


class _Times(nn.Module):
    """Stands in for a part: so many times its input, in a tuple as attention may return it."""

    def __init__(self, factor: int, in_tuple: bool = False) -> None:
        super().__init__()
        self.factor, self.in_tuple = factor, in_tuple

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        product = self.factor * hidden_states
        return (product, None) if self.in_tuple else product


def _answers_tuple(layer: nn.Module) -> bool:
    """Whether the layer's own forward returns a tuple, found by running it with its parts replaced by factors.

    Raises `BadInput` where the result is not h + 3·2·h = 7h, then 7h + 7·5·7h = 252h.
    """
    found: Any = None
    for in_tuple in (True, False):
        probe = copy.copy(layer)
        probe.training = False
        factors = (_Times(2), _Times(3, in_tuple), _Times(5), _Times(7))
        probe._modules = dict(zip(PARTS, factors, strict=True))
        others = list(signature(layer.forward).parameters.values())[1:]
        required = [None for each in others if each.default is Parameter.empty and each.kind in _POSITIONAL]
        try:
            answer = probe.forward(torch.ones(1, 1, 1), *required)
            found = answer[0] if isinstance(answer, tuple) else answer
            if torch.equal(found, torch.full((1, 1, 1), 252.0)):
                return isinstance(answer, tuple)
        except Exception as error:  # the layer is anybody's code
            found = found if found is not None else f"{type(error).__name__}: {error}"
    text = " ".join(str(found).split())
    raise BadInput(
        "a Llama-style layer must be h + self_attn(norm(h)), then h + mlp(norm(h)), got another result from "
        f"{type(layer).__name__} ({text}): put mhc.HyperConnection around its sublayers by hand"
    )


_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
