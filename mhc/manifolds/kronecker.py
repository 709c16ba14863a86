"""Doubly stochastic matrices that are Kronecker products of 2 × 2 ones."""

from __future__ import annotations

import torch

from mhc.manifolds.checks import streams_of
from tiles.errors import BadInput


def kronecker_of_pairs(logits: torch.Tensor) -> torch.Tensor:
    """res = ⊗_k [[a_k, 1 − a_k], [1 − a_k, a_k]], one factor for each bit of a stream's index, highest bit first.

    a_k = σ(the mean over i of Σ_j ±h[i, j], + where i and j agree in bit k, − where they differ). logits h [..., n, n],
    n a power of two -> res [..., n, n]. Logits c · I give a_k = σ(c).

    Exactly doubly stochastic and symmetric; products are of the same kind, (A ⊗ B)(C ⊗ D) = AC ⊗ BD, and commute;
    ‖res‖₂ = 1. It has log2 n degrees of freedom where the Birkhoff polytope has (n − 1)²: all of it at n = 2, little at
    n = 16. After KromHC (arXiv 2601.21579), which has logits of the factors; here a_k is computed from the n² logits.
    """
    n = streams_of(logits)
    bits = n.bit_length() - 1
    if n != 1 << bits:
        raise BadInput(
            f"kronecker needs a power of two of streams, as its factors are 2 × 2, got {n}: "
            "take 1, 2, 4, 8 or 16 streams, or another manifold"
        )
    wide = logits.double()  # sums of logits of any finite size
    res = wide[..., :1, :1] * 0 + 1  # one, and NaN for NaN
    for bit in reversed(range(bits)):
        agree = _agreement(wide, bit)
        factor = torch.stack((agree, -agree, -agree, agree), dim=-1).sigmoid().unflatten(-1, (2, 2))
        res = res[..., :, None, :, None] * factor[..., None, :, None, :]
        res = res.flatten(-2).flatten(-3, -2)
    return res.to(logits.dtype)


def _agreement(logits: torch.Tensor, bit: int) -> torch.Tensor:
    """The mean over i of Σ_j ±h[i, j], + where i and j agree in this bit: [..., n, n] -> [...]."""
    n, low = logits.shape[-1], 1 << bit
    split = (n // (2 * low), 2, low)  # the bits above, the bit, the bits below
    sums = logits.unflatten(-1, split).unflatten(-4, split).sum(dim=(-6, -4, -3, -1))
    return (sums[..., 0, 0] + sums[..., 1, 1] - sums[..., 0, 1] - sums[..., 1, 0]) / n
