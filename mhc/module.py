"""A residual connection over n streams around any sublayer."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from mhc import functional
from mhc.checks import check_problem, expect, stream_shape
from mhc.init import ALPHA, constrained_bias, draw_phi, unconstrained_bias
from mhc.joined import pre_and_streams
from mhc.sharing import share
from tiles.errors import BadInput

Mode = Literal["mhc", "hc", "residual"]


class HyperConnection(nn.Module):
    """x [..., n, C] -> x' [..., n, C]: u = Σ_i pre_i x_i;  x'_i = Σ_j res_ij x_j + post_i sublayer(u).

    The sublayer maps [..., C] to [..., C] and brings its own normalisation, as in a pre-norm network. With n equal
    streams, alpha = 0 and the biases as they start, the connection is the plain residual h + sublayer(h).

    Args:
        width, streams: C, a multiple of 8, and n in 1..16.
        sublayer: the module that is wrapped.
        mode: `mhc`, manifold-constrained (arXiv 2512.24880): pre and post are sigmoids, res is doubly stochastic;
            `hc`, unconstrained (arXiv 2409.19606): each is alpha · tanh(projection) + bias;
            `residual`, nothing learned: u is the streams' mean, and each stream gets sublayer(u) added.
        rounds: Sinkhorn rounds (`mhc` alone).
        eps: added to the mean square of a token's streams before its root is taken.

    Parameters (float32; in `residual` none): phi [N, K], alpha [3] (pre, post, res) and bias [N], N packed
    [pre | post | res row-major]. How they start, and why: `mhc.init`.
    """

    def __init__(
        self,
        width: int,
        streams: int,
        sublayer: nn.Module,
        *,
        mode: Mode = "mhc",
        rounds: int = functional.ROUNDS,
        eps: float = functional.EPS,
    ) -> None:
        super().__init__()
        check_problem(streams, width)
        if mode not in get_args(Mode):
            raise BadInput(f"mode must be one of {', '.join(get_args(Mode))}, got {mode}: choose one of them")
        self.width, self.streams, self.sublayer = width, streams, sublayer
        self.mode, self.rounds, self.eps = mode, rounds, eps
        if mode != "residual":
            bias = constrained_bias(streams) if mode == "mhc" else unconstrained_bias(streams)
            self.phi = nn.Parameter(draw_phi(len(bias), streams * width))
            self.alpha = nn.Parameter(torch.full((3,), ALPHA))
            self.bias = nn.Parameter(bias)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., n, C] -> x' like x. What else is given goes to the sublayer."""
        stream_shape(x)
        expect("x", x, (*x.shape[:-2], self.streams, self.width), x.dtype, x.device)
        if self.mode == "residual":
            return x + self.sublayer(x.mean(-2), *args, **kwargs).unsqueeze(-2)
        u, post, res, x = self.before(x)
        return functional.merge(x, self.apply_sublayer(u, *args, **kwargs), res, post)

    def before(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """u [..., C], post [..., n], res [..., n, n], and x for the op that merges, alone (`mhc.joined`)."""
        if self.mode == "mhc":
            return pre_and_streams(x, *self.parameters_for_ops(), rounds=self.rounds, eps=self.eps)
        phi, alpha, bias = self.parameters_for_ops()
        n = self.streams
        x_project, x_aggregate, x_merge = share(x, 3)
        z, s = functional.project(x_project, phi)
        r = torch.rsqrt(s / (n * self.width) + self.eps).unsqueeze(-1)
        gate = torch.cat((alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)))
        pre, post, res = (gate * torch.tanh(z * r) + bias).split((n, n, n * n), dim=-1)
        return functional.aggregate(x_aggregate, pre), post, res.unflatten(-1, (n, n)), x_merge

    def apply_sublayer(self, u: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sublayer's output in u's dtype, the streams': under autocast a sublayer may answer in another one."""
        f: torch.Tensor = self.sublayer(u, *args, **kwargs)
        return f.to(u.dtype)

    def parameters_for_ops(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """phi, alpha, bias; widened where they were cast with the model."""
        return self.phi.float(), self.alpha.float(), self.bias.float()

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"width={self.width}, streams={self.streams}, mode={self.mode}"
