"""The norm's weight gamma [nC] in front of phi, which openPangu-2.0 has and the paper absorbs in phi.

phi · (gamma ∘ x̄) = (phi ∘ gamma) · x̄, so a checkpoint with gamma runs as one without whose phi has its columns scaled.
"""

from __future__ import annotations

import torch

from tiles.errors import BadInput


def fold_norm_weight(phi: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """phi [N, K] and gamma [K] -> phi ∘ gamma [N, K] in float32. Raises `BadInput` for other shapes."""
    _check(phi, gamma)
    return phi.float() * gamma.float()


def unfold_norm_weight(phi: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """phi ∘ gamma [N, K] and gamma [K] -> phi [N, K] in float32: the inverse of `fold_norm_weight`, to rounding.

    Which gamma is the caller's choice: that of the checkpoint keeps its phi where phi was not trained further. Raises
    `BadInput` for a gamma with zeros, which has lost columns of phi, and for other shapes.
    """
    _check(phi, gamma)
    if zeros := int((gamma == 0).sum()):
        raise BadInput(f"gamma must have no zeros to be unfolded, got {zeros} of {gamma.numel()}: keep phi folded")
    return phi.float() / gamma.float()


def _check(phi: torch.Tensor, gamma: torch.Tensor) -> None:
    if phi.dim() != 2 or gamma.shape != phi.shape[1:]:
        raise BadInput(
            f"phi must be [N, K] and gamma [K], got {tuple(phi.shape)} and {tuple(gamma.shape)}: pass a block's"
        )
