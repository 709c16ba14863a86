"""The decoder layers of transformers' models with hyper-connections: merge and the next pre in one pass.

A layer's forward is that of the original, with its mix of streams and the hyper-connection after it replaced by
`mhc.functional.step`. The end of a layer is joined with the beginning of the next one, or with the head, too: the
model hands every layer the order of its modules, and what is computed ahead of time is kept on the next module until it
is called with these very streams.

Layers are not joined where the next one's parameters may not be ready before it is called, where a layer will be run
once more, or where somebody else sees what it returns, whose gradient would not be whole: under gradient checkpointing,
FSDP2 by layers, compilation by layers, and with hooks on layers. A hyper-connection with hooks of its own is called as
a module.

The RMSNorms of the sublayers' inputs run inside of pre and step. One that is no RMSNorm, has hooks, or was put there
after the patch is called as a module: that is seen at every call.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from mhc import functional
from mhc.integrations import rms_norm
from mhc.integrations.plain_call import is_plain_call
from mhc.integrations.transformers_connections import Before, Connection, Head, Receiver
from mhc.modules.unview import unview

Order = tuple[nn.Module, ...]
"""The layers in the order in which a model runs them, then its head."""

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp", "attn_hc", "ffn_hc")
"""The submodules of such a layer."""


class Layer(Receiver):
    """x [B, S, n, C] -> x': attention and MLP, each between a pre and a merge; a subclass knows what they are called
    with."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module
    attn_hc: nn.Module
    ffn_hc: nn.Module
    gradient_checkpointing: bool

    steps: bool = True
    """Whether merge and the next pre run in one pass."""

    norms: tuple[rms_norm.KnownNorm, ...] = ()
    """Its RMSNorms, as they were when the model was patched."""

    own_attributes = (*Receiver.own_attributes, "steps", "norms")

    @staticmethod
    @abstractmethod
    def attention_outputs(layer: nn.Module) -> int:
        """How many values the attention of such a layer returns; one stands alone."""

    def inside(self, norm: nn.Module, device: torch.device) -> nn.Module | None:
        """The norm, where an op on streams of this device does its work."""
        return norm if rms_norm.runs_inside(norm, self.norms, device) else None

    def start(self, x: torch.Tensor) -> Before:
        """What is before attention."""
        ready, norm = self.take_ready(x), self.inside(self.input_layernorm, x.device)
        if ready is None or (ready.normed and norm is None):
            return _before(self.attn_hc, x, norm)
        return ready

    def between(self, before: Before, f: torch.Tensor) -> Before:
        """What is before the MLP, after attention has returned f [B, S, C]."""
        norm = self.inside(self.post_attention_layernorm, before.x.device)
        if self.steps and _runs_as_known(self.ffn_hc):
            return _step(before, f, self.ffn_hc, norm)
        return _before(self.ffn_hc, _merge(before, f), norm)

    def finish(self, before: Before, f: torch.Tensor, order: Order | None) -> torch.Tensor:
        """x', after the MLP has returned f; with what is before the next layer's attention, or in the head."""
        following = self._following(order, before.x)
        if following is None:
            return unview(_merge(before, f))
        joined = _step(before, f, _entry(following), _entry_norm(following, before.x.device))
        joined = joined._replace(x=unview(joined.x))
        following.receive(joined)
        return joined.x

    def _following(self, order: Order | None, x: torch.Tensor) -> Receiver | None:
        """The module after this layer, where what is before it may be computed ahead of its call."""
        pairs = zip(order or (), (order or ())[1:], strict=False)
        following = next((after for module, after in pairs if module is self), None)
        if not isinstance(following, Receiver) or following._forward_pre_hooks or self._forward_hooks:
            return None
        entry = _entry(following)
        ready = _runs_as_known(entry) and entry.matrix.device == x.device
        return following if ready and not _runs_twice(self) and not _runs_twice(following) else None


class DeepseekLayer(Layer):
    """DeepSeek-V4's: x -> x'."""

    @staticmethod
    def attention_outputs(layer: nn.Module) -> int:
        """See `Layer`."""
        return 2

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        *,
        mhc_order: Order | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the original's."""
        before = self.start(hidden_states)
        f, _ = self.self_attn(_normed(before, self.input_layernorm), **kwargs)
        before = self.between(before, f)
        f = self.mlp(_normed(before, self.post_attention_layernorm), input_ids=input_ids)
        return self.finish(before, f, mhc_order)


class IndexedLayer(Layer):
    """GLM-5.3's and Hunyuan-V4's, where the next layer may use the indices of this one: x -> (x', indices)."""

    @staticmethod
    def attention_outputs(layer: nn.Module) -> int:
        """See `Layer`."""
        return 1 if _is_linear(layer) else 3

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        use_cache: Any = False,
        position_embeddings: Any = None,
        prev_topk_indices: Any = None,
        *,
        mhc_order: Order | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """As the original's."""
        before = self.start(hidden_states)
        u = _normed(before, self.input_layernorm)
        given = {"hidden_states": u, "attention_mask": attention_mask, "cache": cache}
        if _is_linear(self):
            f, topk_indices = self.self_attn(**given, **kwargs), None
        else:
            given |= {"position_ids": position_ids, "position_embeddings": position_embeddings}
            given |= {"use_cache": use_cache, "prev_topk_indices": prev_topk_indices}
            f, _, topk_indices = self.self_attn(**given, **kwargs)
        before = self.between(before, f)
        f = self.mlp(_normed(before, self.post_attention_layernorm))
        return self.finish(before, f, mhc_order), topk_indices


def _is_linear(layer: nn.Module) -> bool:
    return getattr(layer, "block_type", None) == "linear_attention"


def give_order(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook of the module that runs the layers: tells each of them what comes after it."""
    layers: list[nn.Module] = list(model.layers)  # type: ignore[arg-type]
    if not all(isinstance(layer, Layer) for layer in layers):
        return None
    head = getattr(model, "hc_head", None)
    order = (*layers, head) if isinstance(head, nn.Module) else (*layers,)
    return args, {**kwargs, "mhc_order": order}


def _entry(module: Receiver) -> Any:
    """What is run first in a layer or head, on the streams."""
    return module.attn_hc if isinstance(module, Layer) else module


def _entry_norm(module: Receiver, device: torch.device) -> nn.Module | None:
    """The norm that an op runs inside there; a head has none."""
    return module.inside(module.input_layernorm, device) if isinstance(module, Layer) else None


def _normed(before: Before, norm: nn.Module) -> Any:
    """The sublayer's input, through its norm where no op has done that."""
    return before.u if before.normed else norm(before.u)


def _before(connection: Any, x: torch.Tensor, norm: nn.Module | None) -> Before:
    """What is before a sublayer, by a hyper-connection that may be any module; the norm runs inside if it can."""
    if _runs_as_known(connection):
        return connection.before(x, norm)
    post, *comb, u = connection(x)
    return Before(x, u, post.float(), comb[0].transpose(-1, -2).float() if comb else None)


def _merge(before: Before, f: torch.Tensor) -> torch.Tensor:
    return functional.merge(before.x, f.to(before.x.dtype), before.res, before.post)


def _step(before: Before, f: torch.Tensor, connection: Any, norm: nn.Module | None) -> Before:
    """Merge, and what is before the sublayer of `connection`, or in a head, with the norm where one is given."""
    settings = connection.settings_for_ops() | rms_norm.settings_for_ops(norm)
    given = before.x, f.to(before.x.dtype), before.post, before.res
    x, u, post, res = functional.step(*given, *connection.parameters_for_ops(), **settings)
    return Before(x, u, post, res, normed=norm is not None)


def _runs_twice(layer: nn.Module) -> bool:
    """Whether a backward runs the layer again, or a compiler takes it by itself."""
    checkpoints = getattr(layer, "gradient_checkpointing", False) and layer.training
    return checkpoints or "forward" in vars(layer) or layer._compiled_call_impl is not None


def _runs_as_known(module: Any) -> bool:
    """Whether a call of the module would be its forward alone, and that is ours."""
    return isinstance(module, (Connection, Head)) and is_plain_call(module)
