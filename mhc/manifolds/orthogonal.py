"""Rotations of the streams, which keep their norm."""

from __future__ import annotations

import torch

from mhc.manifolds.checks import streams_of


def cayley(logits: torch.Tensor) -> torch.Tensor:
    """Q = (I − A)(I + A)⁻¹ with A = (h − hᵀ)/2, the Cayley transform of the skew-symmetric part of the logits.

    logits h [..., n, n] -> Q [..., n, n], orthogonal with determinant 1; symmetric logits give the identity. Not doubly
    stochastic: entries may be negative, and the mean over streams is not preserved. Products are orthogonal (and of
    this form unless −1 becomes an eigenvalue, which no Q has); ‖Qx‖ = ‖x‖ for every x, so depth neither amplifies nor
    damps the streams, forward or backward.

    After JPmHC (arXiv 2602.18308), which iterates for Q. Here a linear system is solved, in float64, as I + A is badly
    conditioned for large logits: QᵀQ is off by about 1e-16 times the largest logit; in float32 it would be off by 1e-3
    at logits of 1e4.
    """
    n = streams_of(logits)
    wide = logits.double()
    skew = (wide - wide.mT) / 2
    eye = torch.eye(n, dtype=wide.dtype, device=wide.device)
    # I + A is never singular: A's eigenvalues are imaginary. solve_ex, as solve would wait for a GPU to check that.
    # (I + A)⁻¹ and I − A commute.
    result, _ = torch.linalg.solve_ex(eye + skew, eye - skew)
    return result.to(logits.dtype)
