"""Warm-up: every kernel that a model will run is found and loaded before the first request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from mhc.checks import STREAM_DTYPES
from mhc.dispatch.kernel_report import Row, WarmUpReport
from mhc.dispatch.kernels import DTYPE_NAMES, active
from mhc.serving.ops_of_model import dtype_of_streams, ops_of_model
from tiles.cache.cache import token_bucket
from tiles.errors import BadInput
from tiles.kernels.spec import MAX_TOKENS, Direction, Problem


def warm_up(model: nn.Module, tokens: Sequence[int], *, dtype: torch.dtype | None = None) -> WarmUpReport:
    """Find and load the kernels that the model's hyper-connections run at these token counts; returns a row for each.

    Args:
        model: a model with `HyperConnection`s, stacks or heads of `mhc`, or one that `mhc.patch` has changed; on the
            device that it will run on. In training mode (`model.training`) kernels of the backward are loaded too.
        tokens: token counts of a call, batch and sequence together. All counts up to the largest power of two share
            buckets, so that `[2**k for k in range(14)]` serves 1 to 8192.
        dtype: of the streams; without it, that of most of the model's parameters besides the hyper-connections'.

    What the process's kernels (`mhc.load_kernels`) lack is compiled now, where there is a compiler. Every kernel that
    was not loaded yet is called once on one token, so that a GPU has its code: a request finds, loads and compiles
    nothing. `print` the report to see what runs and what is missing; `report.missing` holds the rows without a tuned
    kernel. A second call does nothing but report.

    Raises `BadInput` for a model without hyper-connections or on the meta device, and for token counts or a dtype that
    no kernel has. What a manifold of your own calls is not known here.
    """
    counts = _checked(tokens)
    if not isinstance(model, nn.Module):
        raise BadInput(f"warm_up needs a torch module, got {type(model).__name__}: pass the model")
    calls = ops_of_model(model)
    if not calls:
        raise BadInput(
            f"warm_up needs a model with hyper-connections, got {type(model).__name__} without any: pass one that "
            "mhc.wrap or mhc.patch returned, or that has mhc.HyperConnection"
        )
    if any(call.device.type == "meta" for call in calls):
        raise BadInput("warm_up needs a model with memory, got parameters on meta: call it after to_empty or loading")
    dtype = dtype or dtype_of_streams(model)
    if dtype not in STREAM_DTYPES:
        raise BadInput(f"dtype must be one of {', '.join(DTYPE_NAMES.values())}, got {dtype}: pass the streams' dtype")
    directions: tuple[Direction, ...] = ("forward", "backward") if model.training else ("forward",)
    kernels, rows = active(), dict[Row, None]()
    for call in calls:
        shape = call.streams, call.width, DTYPE_NAMES[dtype]
        problem = Problem(call.called(dtype), "forward", *shape, rounds=call.rounds)
        for direction in directions:
            for count in [1] if call.alone else counts:
                found = kernels.warm_up(replace(problem, direction=direction, tokens=count), call.device)
                rows |= dict.fromkeys(each.row for each in found)
    return WarmUpReport(rows)


def _checked(tokens: Sequence[int]) -> list[int]:
    """One count of each bucket, the smallest bucket first; raises `BadInput`."""
    try:
        given = list(tokens)
    except TypeError:
        given = []
    if not given or any(type(count) is not int or not 1 <= count <= MAX_TOKENS // 2 for count in given):
        raise BadInput(f"tokens must be a list of token counts from 1 on, got {tokens!r}: pass such as [1, 64, 4096]")
    return sorted({token_bucket(count) for count in given})
