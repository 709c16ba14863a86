"""FSDP2 for hyper-connections: sublayers are sharded as usual, the connections' parameters stay float32."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mhc.distributed.output_views import unview_outputs
from mhc.modules.hyper_connection import HyperConnection
from mhc.modules.recompute import NORMS, RecomputedStack
from mhc.modules.stack import HyperConnectionStack
from mhc.modules.streams import StreamHead
from tiles.errors import BadInput


def fully_shard_streams(model: nn.Module, *, mp_policy: MixedPrecisionPolicy | None = None, **settings: Any) -> None:
    """Apply `torch.distributed.fsdp.fully_shard` to every hyper-connection in `model`.

    Each sublayer is a parameter group with `mp_policy`. phi, alpha and bias form a group per module that runs
    connections (a `HyperConnectionStack`, the result of `mhc.recompute`, or a `HyperConnection` by itself); they stay
    float32, as do their gradients' reductions; so does every `StreamHead`. `fully_shard(stack, mp_policy=...)` would
    round them to `param_dtype`, and `fully_shard(block)` inside a stack would never unshard them, as a stack does not
    call its blocks' forward.

    Afterwards call `fully_shard(model, ...)` for the rest of the model, as usual. DDP needs no such call.

    Args:
        model: changed in place.
        mp_policy: the mixed precision policy of the sublayers (default: PyTorch's).
        settings: further arguments of `fully_shard`: mesh, reshard_after_forward, offload_policy, ...

    Raises `BadInput` where `model` has no hyper-connection.
    """
    runners = _runners(model)
    if not runners:
        raise BadInput(f"model must hold a HyperConnection, got {type(model).__name__} without one: use fully_shard")
    sublayer_policy = mp_policy or MixedPrecisionPolicy()
    for runner in runners:
        for sublayer in (block.sublayer for block in runner.modules() if isinstance(block, HyperConnection)):
            if isinstance(runner, RecomputedStack):
                _keep_norms_gathered(sublayer, sublayer_policy, settings)
            if any(True for _ in sublayer.parameters()):
                unview_outputs(sublayer)
                fully_shard(sublayer, mp_policy=sublayer_policy, **settings)
        unview_outputs(runner)
        fully_shard(runner, mp_policy=MixedPrecisionPolicy(), **settings)


def _runners(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with phi, alpha and bias, in the model's order."""
    if isinstance(model, (HyperConnection, HyperConnectionStack, StreamHead)):
        return [model]
    return [runner for child in model.children() for runner in _runners(child)]


def _keep_norms_gathered(sublayer: nn.Module, policy: MixedPrecisionPolicy, settings: dict[str, Any]) -> None:
    """Keep norms unsharded: recomputation runs them before their sublayer's backward has unsharded its parameters."""
    for norm in sublayer.modules():
        if type(norm).__name__.endswith(NORMS) and norm is not sublayer and any(True for _ in norm.parameters()):
            fully_shard(norm, mp_policy=policy, **settings | {"reshard_after_forward": False})
