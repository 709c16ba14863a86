"""FSDP2: what a sublayer holds is sharded with the settings of the run, a connection's coefficients stay float32."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mhc.distributed.results import give_no_views
from mhc.modules.hyper_connection import HyperConnection
from mhc.modules.recompute import NORMS, Recomputed
from mhc.modules.stack import HyperConnectionStack
from mhc.modules.streams import StreamHead
from tiles.errors import BadInput


def fully_shard_streams(model: nn.Module, *, mp_policy: MixedPrecisionPolicy | None = None, **settings: Any) -> None:
    """Apply `torch.distributed.fsdp.fully_shard` to every hyper-connection below `model`, in two kinds of groups.

    Each sublayer is a group with `mp_policy`. What runs the connections (a `HyperConnectionStack`, what
    `mhc.recompute` gives, or a `HyperConnection` by itself) is a group with the coefficients, phi, alpha and bias, that
    leaves them float32 and reduces their gradients in float32; so is every `StreamHead`.
    `fully_shard(stack, mp_policy=...)` would round them to `param_dtype`. `fully_shard(block)` inside a stack would
    never gather them, as a stack does not call its blocks but begins each together with the end of the one before.

    Afterwards call `fully_shard(model, ...)` for the rest of the model, as usual. DDP needs nothing of this kind.

    Args:
        model: changed in place.
        mp_policy: precision of the sublayers (PyTorch's default: theirs).
        settings: what else `fully_shard` takes: mesh, reshard_after_forward, offload_policy, ...

    Raises `BadInput` where `model` has no hyper-connection.
    """
    runners = _runners(model)
    if not runners:
        raise BadInput(f"model must hold a HyperConnection, got {type(model).__name__} without one: use fully_shard")
    sublayer_policy = mp_policy or MixedPrecisionPolicy()
    for runner in runners:
        for sublayer in (block.sublayer for block in runner.modules() if isinstance(block, HyperConnection)):
            if isinstance(runner, Recomputed):
                _keep_norms_gathered(sublayer, sublayer_policy, settings)
            if any(True for _ in sublayer.parameters()):
                give_no_views(sublayer)
                fully_shard(sublayer, mp_policy=sublayer_policy, **settings)
        give_no_views(runner)
        fully_shard(runner, mp_policy=MixedPrecisionPolicy(), **settings)


def _runners(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that hold coefficients, in the order of the model."""
    if isinstance(model, (HyperConnection, HyperConnectionStack, StreamHead)):
        return [model]
    return [runner for child in model.children() for runner in _runners(child)]


def _keep_norms_gathered(sublayer: nn.Module, policy: MixedPrecisionPolicy, settings: dict[str, Any]) -> None:
    """Recomputation runs normalisations again before their sublayer's backward has gathered its parameters."""
    for norm in sublayer.modules():
        if type(norm).__name__.endswith(NORMS) and norm is not sublayer and any(True for _ in norm.parameters()):
            fully_shard(norm, mp_policy=policy, **settings | {"reshard_after_forward": False})
