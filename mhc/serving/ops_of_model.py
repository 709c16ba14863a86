"""The ops that a model's hyper-connections call, found from its modules alone, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from mhc.checks import STREAM_DTYPES
from mhc.functional import ANY_WIDTH, ROUNDS
from mhc.integrations.plain_call import is_plain_call
from mhc.integrations.transformers_connections import Connection, Head
from mhc.integrations.transformers_layers import Layer
from mhc.modules.hyper_connection import FUSED_MANIFOLD, HyperConnection
from mhc.modules.recompute import RecomputedStack
from mhc.modules.stack import HyperConnectionStack, has_hooks, with_next
from mhc.modules.streams import StreamHead
from mhc.sublayer_norm import op_with_norm
from tiles.kernels.spec import IDENTITY

CONNECTIONS = (HyperConnection, StreamHead, Connection, Head)
"""Modules whose own parameters are not of the streams' dtype."""


class OpCall(NamedTuple):
    """An op as a module calls it; `alone` is for one that has a single matrix, whatever the tokens, `normed` for one
    whose sublayer's input is normalised, in the op or after it."""

    op: str
    streams: int
    width: int
    rounds: int
    device: torch.device
    alone: bool = False
    normed: bool = False

    def called(self, dtype: torch.dtype) -> str:
        """The op that is called for streams of this dtype."""
        if not self.normed:
            return self.op
        return op_with_norm(self.op, self.streams, self.width, self.rounds, dtype, self.device)


def ops_of_model(model: nn.Module) -> list[OpCall]:
    """Every op that the modules of `model` may call, once, in the order of the modules."""
    stacks = [module for module in model.modules() if isinstance(module, HyperConnectionStack)]
    stacked = {id(block) for stack in stacks for block in stack.blocks}
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    of_layers = {id(connection) for layer in layers for connection in (layer.attn_hc, layer.ffn_hc)}
    found: dict[OpCall, None] = {}
    for module in model.modules():
        if isinstance(module, HyperConnectionStack):
            found |= dict.fromkeys(_of_stack(module))
        elif isinstance(module, HyperConnection) and id(module) not in stacked:
            found |= dict.fromkeys(_of_block(module))
        elif isinstance(module, StreamHead):
            found[OpCall("aggregate", module.streams, module.width, ROUNDS, module.phi.device)] = None
        elif isinstance(module, Layer):
            found |= dict.fromkeys(_of_layer(module))
        elif isinstance(module, Head):
            found |= dict.fromkeys(_of_head(module, joined=any(layer.steps for layer in layers)))
        elif isinstance(module, Connection) and id(module) not in of_layers:
            found[_of_connection(module, "pre")] = None
    return list(found)


def dtype_of_streams(model: nn.Module) -> torch.dtype:
    """That of most of the model's parameters but those of the hyper-connections, which are float32 in any model."""
    own = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, CONNECTIONS)
        for parameter in module.parameters(recurse=False)
    }
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if id(parameter) not in own and parameter.dtype in STREAM_DTYPES:
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _of_stack(stack: HyperConnectionStack) -> Iterator[OpCall]:
    """As `mhc.modules.stack.run_blocks` goes through each segment."""
    blocks: list[HyperConnection] = list(stack.blocks)  # type: ignore[arg-type]
    last, join = blocks[-1], "single_pass" if stack.single_pass else "step"
    for length in stack.segments if isinstance(stack, RecomputedStack) else [len(blocks)]:
        started = False
        for block, following in with_next(blocks[:length]):
            if has_hooks(block):
                yield from _of_block(block)
                continue
            if not started:
                yield from _start(block, single_pass=stack.single_pass)
            started = following is not None and not has_hooks(following) and _joins(block, following)
            if started:
                assert following is not None
                yield _normed(following, join)
            elif block.mode != "residual":
                yield _call(block, _mixing("merge", block))
        blocks = blocks[length:]
    if stack.single_pass and stack.collapse:
        yield _call(last, "aggregate")


def _joins(block: HyperConnection, following: HyperConnection) -> bool:
    return block.mode != "residual" and following.fused and following.mixes == block.mixes


def _of_block(block: HyperConnection) -> Iterator[OpCall]:
    """As a block runs by itself."""
    if block.mode != "residual":
        yield from _start(block, single_pass=False)
        yield _call(block, _mixing("merge", block))


def _start(block: HyperConnection, *, single_pass: bool) -> Iterator[OpCall]:
    """What is before a sublayer, from streams alone."""
    if block.mode == "residual":
        return
    if block.fused and not single_pass:
        yield _normed(block, "pre")
        return
    if block.dynamic:
        yield _call(block, "project")
    if block.fused and block.mixes:
        yield _call(block, "coefficients", block.rounds)
    elif block.mode == "mhc" and block.manifold == FUSED_MANIFOLD:
        yield OpCall("sinkhorn", block.streams, ANY_WIDTH, block.rounds, block.bias.device, alone=True)
    yield _call(block, "aggregate")


def _call(block: HyperConnection, op: str, rounds: int = ROUNDS) -> OpCall:
    return OpCall(op, block.streams, block.width, rounds, block.bias.device)


def _mixing(op: str, block: HyperConnection) -> str:
    return op if block.mixes else op + IDENTITY


def _normed(block: HyperConnection, op: str) -> OpCall:
    """An op that computes the block's maps and its sublayer's input."""
    return _call(block, _mixing(op, block), block.rounds)._replace(normed=block.norm is not None)


def _of_layer(layer: Layer) -> Iterator[OpCall]:
    """A patched layer merges by itself, or in one pass with what follows; the norm before a sublayer runs inside."""
    sublayers = (layer.attn_hc, layer.input_layernorm), (layer.ffn_hc, layer.post_attention_layernorm)
    for connection, norm in sublayers:
        if not isinstance(connection, Connection):
            continue
        inside = is_plain_call(connection) and layer.inside(norm, connection.matrix.device) is not None
        for op in ("pre", "step") if layer.steps else ("pre",):
            yield _of_connection(connection, op)._replace(normed=inside)
        yield _of_connection(connection, "merge")


def _of_head(head: Head, *, joined: bool) -> Iterator[OpCall]:
    """A patched head runs by itself, or joined with the end of the last layer."""
    for op in ("pre", "step") if joined else ("pre",):
        yield _of_connection(head, op)


def _of_connection(module: Connection | Head, op: str) -> OpCall:
    """An op with the maps of a patched connection or head."""
    phi, alpha, _ = module.parameters_for_ops()
    rounds = module.settings_for_ops().get("rounds", ROUNDS) if op != "merge" else ROUNDS
    name = op if len(alpha) == 3 else op + IDENTITY
    return OpCall(name, module.hc_mult, phi.shape[1] // module.hc_mult, rounds, module.matrix.device)
