"""Manifolds: functions from the n² logits of a token to res, the matrix that mixes the streams.

A manifold maps logits [..., n, n] float32 to res [..., n, n] float32, differentiably; res[i, j] weighs input stream j
in output stream i. Each file states whether its matrices are doubly stochastic, whether their products (over layers)
are matrices of the same kind, and a bound of ‖res‖₂, which bounds the amplification of the streams at any depth:

| name               | doubly stochastic              | products        | ‖res‖₂            | streams        |
|--------------------|--------------------------------|-----------------|-------------------|----------------|
| sinkhorn           | rows; columns after the rounds | errors add up   | ≤ sqrt(1 + error) | 1 to 16        |
| sinkhorn-tolerance | rows; columns to the tolerance | errors add up   | ≤ sqrt(1 + error) | 1 to 16        |
| permutations       | exactly                        | are of the kind | 1                 | 1 to 5         |
| kronecker          | exactly, and symmetric         | are of the kind | 1                 | 1, 2, 4, 8, 16 |
| orthogonal         | no: QᵀQ = I                    | are of the kind | 1                 | 1 to 16        |
| identity           | exactly                        | are of the kind | 1                 | 1 to 16        |

`exactly` means to float32 rounding. The error is the largest |column sum − 1|: ‖res‖₂² ≤ ‖res‖₁ ‖res‖∞, the largest
column sum times the largest row sum. For large logits 20 rounds leave an error of up to n − 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mhc import functional
from mhc.manifolds.identity import identity_of
from mhc.manifolds.kronecker import kronecker_of_pairs
from mhc.manifolds.orthogonal import cayley
from mhc.manifolds.permutations import MOST_STREAMS, mean_permutation
from mhc.manifolds.tolerance import SinkhornToTolerance
from tiles.errors import BadInput

__all__ = [
    "MOST_STREAMS",
    "NAMES",
    "Manifold",
    "SinkhornToTolerance",
    "cayley",
    "identity_of",
    "kronecker_of_pairs",
    "mean_permutation",
    "named",
]

Manifold = Callable[[torch.Tensor], torch.Tensor]
"""logits [..., n, n] -> res [..., n, n], both float32."""

_MAKERS: dict[str, Callable[[], Manifold]] = {
    "sinkhorn": lambda: functional.sinkhorn,
    "sinkhorn-tolerance": SinkhornToTolerance,
    "permutations": lambda: mean_permutation,
    "kronecker": lambda: kronecker_of_pairs,
    "orthogonal": lambda: cayley,
    "identity": lambda: identity_of,
}

NAMES = tuple(_MAKERS)
"""The names that `named` accepts."""


def named(name: str) -> Manifold:
    """The manifold of this name, a new object if it has state; raises `BadInput` for a name not in `NAMES`."""
    if name not in _MAKERS:
        raise BadInput(f"manifold must be one of {', '.join(NAMES)}, got {name}: choose one of them")
    return _MAKERS[name]()
