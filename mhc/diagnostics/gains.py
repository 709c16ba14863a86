"""Measures of residual maps res [..., n, n], one value a matrix; res[i, j] weighs input stream j in output stream i.

All take any leading dimensions, usually tokens, and keep res's dtype. Sums are of signed entries, as in arXiv
2512.24880 (section 3.1, figures 3 and 8): entries of opposite sign cancel, and the absolute value is that of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tiles.errors import BadInput


def forward_gain(res: torch.Tensor) -> torch.Tensor:
    """The Amax gain of the forward signal, max_i |Σ_j res_ij|: res [..., n, n] -> [...].

    The largest factor by which the map scales equal streams. 1 where rows sum to one.
    """
    return _square(res).sum(-1).abs().amax(-1)


def backward_gain(res: torch.Tensor) -> torch.Tensor:
    """The Amax gain of the backward gradient, max_j |Σ_i res_ij|: res [..., n, n] -> [...].

    The backward multiplies by resᵀ. 1 where columns sum to one.
    """
    return _square(res).sum(-2).abs().amax(-1)


def column_error(res: torch.Tensor) -> torch.Tensor:
    """The error of the column sums, max_j |Σ_i res_ij − 1|, which a finite number of Sinkhorn rounds leaves."""
    return (_square(res).sum(-2) - 1).abs().amax(-1)


def spectral_norm(res: torch.Tensor) -> torch.Tensor:
    """The largest singular value: 1 for doubly stochastic and for orthogonal maps. NaN where res is not finite."""
    finite = _square(res).isfinite().all(-1).all(-1)
    norm = torch.linalg.matrix_norm(torch.where(finite[..., None, None], res, 0.0), ord=2)
    return torch.where(finite, norm, torch.nan)


def entropy(res: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the rows in nats, each row as shares p_j = |res_ij| / Σ_j |res_ij|: −Σ_j p_j log p_j.

    0 for a permutation, log n where every stream becomes the mean of all.
    """
    weights = _square(res).abs()
    return torch.special.entr(weights / weights.sum(-1, keepdim=True)).sum(-1).mean(-1)


def composites(layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For every layer l of L the composite map to the last layer, res_{L-1} ··· res_l, per token.

    L tensors [..., n, n] -> L tensors like them, float64 (arXiv 2512.24880, equation 4). Raises `BadInput` where the
    layers' shapes differ.
    """
    shapes = {tuple(_square(res).shape) for res in layers}
    if len(shapes) > 1:
        raise BadInput(
            f"layers must have res of one shape, got {sorted(shapes)}: compose those with equal tokens alone"
        )
    products: list[torch.Tensor] = []
    for res in reversed(layers):
        products.append(products[-1] @ res.double() if products else res.double())
    return products[::-1]


def _square(res: torch.Tensor) -> torch.Tensor:
    if res.dim() < 2 or res.shape[-1] != res.shape[-2] or not res.is_floating_point():
        raise BadInput(f"res must be floating point [..., n, n], got {res.dtype} {tuple(res.shape)}: pass square maps")
    return res
