"""The check of logits that all manifolds share."""

from __future__ import annotations

import torch

from mhc.checks import check_problem
from tiles.errors import BadInput


def streams_of(logits: torch.Tensor) -> int:
    """n of logits [..., n, n]; raises `BadInput` unless they are square float32 or float64 matrices with n in 1..16."""
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise BadInput(f"logits must be [..., n, n], got {tuple(logits.shape)}: pass square matrices")
    if logits.dtype not in (torch.float32, torch.float64):
        raise BadInput(f"logits must be float32 or float64, got {logits.dtype}: widen them, they are few")
    check_problem(logits.shape[-1])
    return logits.shape[-1]
