"""The patch of transformers' models (`mhc.patch`, `mhc.unpatch`): fused kernels for their hyper-connections, in place.

Modules are known by their parameters and submodules and by what they compute on tiny inputs, not by the version of
transformers, which is not imported here.
"""

from __future__ import annotations

import logging

from torch import nn

from mhc.checks import check_problem
from mhc.integrations import probes
from mhc.integrations.patched_class import Patched, check_restorable, patched_class, restore
from mhc.integrations.rms_norm import known_norms
from mhc.integrations.transformers_connections import (
    Connection,
    Head,
    IdentityConnection,
    IdentityHead,
    Receiver,
    SinkhornConnection,
    SinkhornHead,
)
from mhc.integrations.transformers_layers import PARTS, DeepseekLayer, IndexedLayer, Layer, give_order
from tiles.errors import BadInput

LOG = logging.getLogger("mhc")

CONNECTIONS: tuple[type[Connection], ...] = (SinkhornConnection, IdentityConnection)
HEADS: dict[type[Connection], type[Head]] = {SinkhornConnection: SinkhornHead, IdentityConnection: IdentityHead}
LAYERS: tuple[type[Layer], ...] = (DeepseekLayer, IndexedLayer)

Plan = dict[nn.Module, type[Patched]]
"""What each module of a model will do otherwise."""


def patch(model: nn.Module, *, steps: bool = True) -> nn.Module:
    """Run the hyper-connections of transformers' DeepSeek-V4, GLM-5.3 or Hunyuan-V4 on our kernels, in place.

    Each hyper-connection runs `mhc.functional.pre`, each layer mixes its streams with `mhc.functional.merge`, and where
    one follows the other, from attention to MLP, from layer to layer and from the last layer to a learned head, both
    are one `mhc.functional.step`, with the layers' RMSNorms of what attention and MLP get inside of them. The maps stay
    float32 where the layers' own code rounds them to the streams' dtype.

    Parameters stay the objects that they are, under their names: optimisers, checkpoints, `save_pretrained` and FSDP
    units see no change. Hooks stay and run, sublayers and norms may be replaced later (adapters), copies and pickles of
    a patched model are patched. A norm that has hooks, was replaced, or is no RMSNorm is called as a module. Layers are
    fused inside of themselves, but not with the next one, under gradient checkpointing, when they are FSDP2 units or
    compiled one by one, with hooks on layers (transformers hooks them when it records hidden states or router logits),
    and where the next one lies on another device.

    A model that is patched already is patched anew, with these settings. A layer whose forward is not one that we know
    keeps it, with a line in the log `mhc`; its hyper-connections run on our kernels.

    Args:
        model: changed in place, also returned; it may hold such a model anywhere inside.
        steps: whether merge and the next pre run in one pass; if not, one after the other.

    Raises `BadInput` (a `ValueError`), and leaves the model as it was, where it holds no such hyper-connection, or one
    whose parameters do not fit its settings, or that computes something else.

    Example:
        >>> model = mhc.patch(transformers.AutoModelForCausalLM.from_pretrained("deepseek-ai/DeepSeek-V4-Flash"))
    """
    plan = _plan(model)
    unpatch(model)
    for module, mixin in plan.items():
        module.__class__ = patched_class(mixin, type(module))
        if isinstance(module, Receiver):
            module.ready = None  # here, as a compiler sees the first call leave it on the module and compiles anew
        if isinstance(module, Layer):
            module.steps = steps
            module.norms = known_norms(module.input_layernorm, module.post_attention_layernorm)
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if steps and isinstance(layers, nn.ModuleList) and any(isinstance(layer, Layer) for layer in layers):
            module.register_forward_pre_hook(give_order, with_kwargs=True)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`, in place: every module computes with its own functions again. A model that is not patched stays as
    it is.

    Raises `BadInput`, and leaves the model as it was, where the class of a patched module was changed once more.
    """
    patched = [module for module in model.modules() if isinstance(module, Patched)]
    for module in patched:
        check_restorable(module)
    for module in patched:
        restore(module)
    for other in model.modules():
        for key in [key for key, hook in other._forward_pre_hooks.items() if hook is give_order]:
            del other._forward_pre_hooks[key]
            other._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def _plan(model: nn.Module) -> Plan:
    """What each module will do; raises `BadInput`."""
    plan: Plan = {}
    for name, module in model.named_modules():
        if _has_parameters(module, "fn", "base", "scale") and hasattr(module, "hc_mult"):
            plan[module] = _connection(name, module)
    if not plan:
        raise BadInput(
            "patch needs a model with hyper-connections of transformers' DeepSeek-V4, GLM-5.3 or Hunyuan-V4, got a "
            f"{type(model).__name__} without one: use mhc.wrap for a transformer that has none"
        )
    for name, module in model.named_modules():
        if {"attn_hc", "ffn_hc"} <= dict(module.named_children()).keys() and module.attn_hc in plan:
            _check_own_forward(name, module)
            if mixin := _layer(name, module, plan):
                plan[module] = mixin
    (connections, *_) = [mixin for mixin in plan.values() if issubclass(mixin, Connection)]
    for name, module in model.named_modules():
        if _has_parameters(module, "hc_fn", "hc_base", "hc_scale"):
            plan[module] = _head(name, module, HEADS[connections])
    return plan


def _has_parameters(module: nn.Module, *names: str) -> bool:
    return {name for name, _ in module.named_parameters(recurse=False)} == set(names)


def _connection(name: str, module: nn.Module) -> type[Connection]:
    """What a hyper-connection will do; raises `BadInput` where it is not one that we know."""
    streams: int = module.hc_mult  # type: ignore[assignment]
    shapes = {part: tuple(parameter.shape) for part, parameter in module.named_parameters(recurse=False)}
    for mixin in CONNECTIONS:
        rows, width = mixin.rows(streams), shapes["fn"][-1] // streams
        if shapes == {"fn": (rows, streams * width), "base": (rows,), "scale": (mixin.gates,)}:
            check_problem(streams, width)
            _check_own_forward(name, module)
            _check_behaviour(name, module, mixin, streams)
            return mixin
    raise BadInput(
        f"fn, base and scale of {name} must be [N, nC], [N] and [3] or [2], with N = n² + 2n or 2n and n = hc_mult = "
        f"{streams}, got {shapes['fn']}, {shapes['base']} and {shapes['scale']}: build it from its own config"
    )


def _head(name: str, module: nn.Module, mixin: type[Head]) -> type[Head]:
    """What a learned head will do; raises `BadInput` where it is not one that we know."""
    streams: int = module.hc_mult  # type: ignore[assignment]
    _check_own_forward(name, module)
    _check_behaviour(name, module, mixin, streams)
    return mixin


def _layer(name: str, layer: nn.Module, plan: Plan) -> type[Layer] | None:
    """What a layer will do; None, with a line in the log, where its forward is not one that we know."""
    connections, streams = plan[layer.attn_hc], layer.attn_hc.hc_mult  # type: ignore[index, union-attr]
    if set(PARTS) == dict(layer.named_children()).keys():
        for mixin in LAYERS:
            if probes.same_layer(layer, mixin, connections, streams):  # type: ignore[arg-type]
                return mixin
    LOG.warning("%s: %s.forward is not one that mhc.patch knows: its mix of streams stays", name, type(layer).__name__)
    return None


def _check_behaviour(name: str, module: nn.Module, mixin: type[Patched], streams: int) -> None:
    if different := probes.same_behaviour(module, mixin, streams):
        raise BadInput(
            f"{name} must compute a map of transformers' DeepSeek-V4, GLM-5.3 or Hunyuan-V4, got {different} from "
            f"{type(module).__name__}: leave it unpatched"
        )


def _check_own_forward(name: str, module: nn.Module) -> None:
    if "forward" in vars(module):
        raise BadInput(
            f"modules must run the forward of their class, got another one on {name} ({type(module).__name__}): "
            "patch before what replaces forwards"
        )
