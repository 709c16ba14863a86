"""Shape, dtype and device checks of the functional ops; each error is one line."""

from __future__ import annotations

import math

import torch

from tiles.errors import BadInput
from tiles.kernels.reference_inputs import DTYPES
from tiles.kernels.spec import WIDTH_MULTIPLE, why_bad_streams, why_bad_width

LEAST_HC_EPS = 1e-30
"""Sums of it have reciprocals in float32."""

STREAM_DTYPES = frozenset(DTYPES.values())


def stream_shape(x: torch.Tensor) -> tuple[int, int]:
    """n and C of x [..., n, C]; raises `BadInput` where they break a rule (docs/design.md, "The maths")."""
    if x.dim() < 2:
        raise BadInput(f"x must be [..., streams, width], got {tuple(x.shape)}: give it a dimension of streams")
    if x.dtype not in STREAM_DTYPES:
        raise BadInput(f"x must be one of {', '.join(DTYPES)}, got {x.dtype}: cast the streams to one of them")
    streams, width = x.shape[-2:]
    check_problem(streams, width)
    return streams, width


def check_problem(streams: int, width: int = WIDTH_MULTIPLE) -> None:
    """Raise `BadInput` for a stream count or a width that no kernel supports."""
    why = why_bad_streams(streams) or why_bad_width(width)
    if why:
        raise BadInput(why)


def check_scalars(hc_eps: float, post_scale: float = 2.0) -> None:
    """Raise `BadInput` for an hc_eps or a post_scale with which the maps are not finite."""
    if hc_eps != 0 and not LEAST_HC_EPS <= hc_eps <= 1:
        raise BadInput(f"hc_eps must be 0, or in {LEAST_HC_EPS}..1, got {hc_eps}: DeepSeek-V4 has 1e-6, the paper 0")
    if not 0 < post_scale < math.inf:
        raise BadInput(f"post_scale must be positive and finite, got {post_scale}: the paper has 2")


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise `BadInput` unless `tensor` has this shape, dtype and device."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise BadInput(
            f"{name} must be {dtype} {tuple(shape)} on {device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: reshape, cast or move it"
        )
