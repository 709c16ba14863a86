"""Doubly stochastic matrices without Sinkhorn: a weighted mean of all permutation matrices."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional

from mhc.manifolds.checks import streams_of
from tiles.errors import BadInput

MOST_STREAMS = 5
"""5! = 120 permutations; 6 streams would have 720."""


def mean_permutation(logits: torch.Tensor) -> torch.Tensor:
    """res = Σ_σ w_σ P_σ over all n! permutations, w_σ ∝ exp(Σ_i h[i, σ(i)]), P_σ[i, σ(i)] = 1.

    logits h [..., n, n], n at most 5 -> res [..., n, n]. Exactly doubly stochastic, as a mean of permutations is; so
    are products; ‖res‖₂ = 1.

    Weights over permutations give every doubly stochastic matrix (Birkhoff and von Neumann) without iteration: the idea
    of mHC-lite (arXiv 2601.05732), which has a logit for each permutation. Here n² logits are enough: w is the
    exponential family whose sufficient statistic is P, and the means of such a family are the whole relative interior
    of the convex hull of its statistics, here of the Birkhoff polytope. Adding a constant to a row or column of h
    changes nothing, as with Sinkhorn.

    Computed in float64: sums of large logits keep their differences, and neither autocast nor TF32 rounds the products.
    """
    n = streams_of(logits)
    if n > MOST_STREAMS:
        raise BadInput(
            f"permutations need at most {MOST_STREAMS} streams, as there are n! of them, got {n}: "
            "take sinkhorn or sinkhorn-tolerance"
        )
    permutations = _permutation_matrices(n, logits.device)
    weights = torch.softmax(logits.double().flatten(-2) @ permutations.T, dim=-1)
    return (weights @ permutations).unflatten(-1, (n, n)).to(logits.dtype)


_CACHE: dict[tuple[int, torch.device], torch.Tensor] = {}


def _permutation_matrices(n: int, device: torch.device) -> torch.Tensor:
    """All P_σ, flattened: [n!, n²] float64."""
    if (n, device) in _CACHE:
        return _CACHE[n, device]
    with torch.inference_mode(False):  # later calls may need gradients
        images = torch.tensor(list(itertools.permutations(range(n))), device="cpu")
        matrices = functional.one_hot(images, n).flatten(1).double().to(device)
    if type(matrices) is torch.Tensor:  # not a tracer's fake tensor
        _CACHE[n, device] = matrices
    return matrices


# What torch.compiler.assume_constant_result does; calling it here would import Dynamo, which takes longer than torch.
_permutation_matrices._dynamo_marked_constant = True  # type: ignore[attr-defined]
