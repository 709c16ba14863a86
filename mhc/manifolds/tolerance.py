"""Sinkhorn-Knopp to a tolerance instead of for a fixed number of rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch._compile import _disable_dynamo

from mhc.dispatch.torch_form import is_transformed
from mhc.manifolds.checks import streams_of
from tiles.errors import BadInput


class SinkhornToTolerance:
    """The limit of Sinkhorn-Knopp: rows and columns of exp(logits) scaled so that all sum to one.

    logits [..., n, n] -> res [..., n, n]. Rows sum to one to rounding, columns to 1 ± tolerance unless `most_rounds`
    were not enough; a product of L such matrices is off by (1 + tolerance)^L − 1 at most, and ‖res‖₂ ≤ sqrt(1 +
    tolerance). The paper's 20 rounds (arXiv 2512.24880) leave an error that depends on the logits and adds up over
    layers (mHC-lite, arXiv 2601.05732); here the error is fixed instead. A round scales the columns, as Sinkhorn-Knopp
    does or by a step of Newton's method (Sinkhorn-Newton, arXiv 1710.06635), whichever leaves the smaller error, and
    then the rows: about 10 rounds for logits of standard deviation 3, where Sinkhorn-Knopp alone takes more than 1000
    for some tokens.

    - `rounds` and `error` are of the last call: the most rounds that a token took, and the largest |column sum − 1|.
      For logits of hundreds and more the rounds may run out, and the error is above the tolerance.
    - Each token stops by its own error: its result does not depend on the others in its batch.
    - The gradient is that of the limit, by the implicit function theorem (as in JPmHC, arXiv 2602.18308): no round is
      saved for it, and it can be differentiated again. Forward mode and the transforms of torch.func raise `BadInput`.
    - Rounds are counted on the host, which waits for a GPU each round. torch.compile breaks its graph here, so that
      `fullgraph=True` raises.

    Args:
        tolerance: of the column sums, in float64, in which everything is computed.
        most_rounds: the maximum number of rounds.
    """

    def __init__(self, tolerance: float = 1e-6, most_rounds: int = 100) -> None:
        if not tolerance > 0 or most_rounds < 1:
            raise BadInput(
                f"tolerance must be above 0 and most_rounds at least 1, got {tolerance} and {most_rounds}: raise them"
            )
        self.tolerance, self.most_rounds = tolerance, most_rounds
        self.rounds, self.error = 0, 0.0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [..., n, n] -> res [..., n, n]."""
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg="how many rounds there are depends on the logits")
        return self._scaled(logits)

    @_disable_dynamo  # torch.compiler.disable would import Dynamo here, which takes longer than torch
    def _scaled(self, logits: torch.Tensor) -> torch.Tensor:
        n = streams_of(logits)
        if is_transformed((logits,)):
            raise BadInput(
                "sinkhorn-tolerance has gradients in reverse mode only, as its rounds depend on the logits, "
                "got forward mode or a transform of torch.func: take the manifold sinkhorn"
            )
        flat = logits.detach().double().reshape(-1, n, n)
        log, errors, self.rounds = scale(flat, self.tolerance, self.most_rounds)
        self.error = errors.amax().item() if len(errors) else 0.0
        res: torch.Tensor = _ImplicitGradient.apply(logits, log.exp().view(logits.shape))  # type: ignore[no-untyped-call]
        return res.to(logits.dtype)

    def __repr__(self) -> str:
        return f"SinkhornToTolerance(tolerance={self.tolerance}, most_rounds={self.most_rounds})"


def scale(logits: torch.Tensor, tolerance: float, most_rounds: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """logits [T, n, n] float64 -> log res [T, n, n], each token's column error [T], and the slowest token's rounds."""
    result = logits.log_softmax(-1)
    errors = _column_error(result)
    rounds = 0
    while rounds < most_rounds and len(active := torch.nonzero(errors > tolerance)[:, 0]):
        log = result[active]
        sinkhorn = (log - log.logsumexp(-2, keepdim=True)).log_softmax(-1)
        newton = (log + _newton_step(log.exp()).mT).log_softmax(-1)
        nearer = _column_error(newton) < _column_error(sinkhorn)  # False where the step overflowed
        result[active] = torch.where(nearer[:, None, None], newton, sinkhorn)
        errors[active] = _column_error(result[active])
        rounds += 1
    return result, errors, rounds


def _column_error(log: torch.Tensor) -> torch.Tensor:
    return (log.exp().sum(-2) - 1).abs().amax(-1)


def _newton_step(res: torch.Tensor) -> torch.Tensor:
    """The step of the columns' logs [T, n, 1] after which, to first order, both columns and rows sum to one."""
    return _solve_columns(res, 1 - res.sum(-2).unsqueeze(-1))


def _solve_columns(res: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """b [..., n, 1] of (diag(c) − resᵀ res) b = right, for rows that sum to one and columns that sum to c.

    The kernel is constant b, which scaling the rows undoes: 11ᵀ/n regularises it, and `right` has no part in it. 1e-14
    regularises the near-kernel where res is nearly block diagonal; there too `right` has nearly no part.
    """
    n = res.shape[-1]
    matrix = torch.diag_embed(res.sum(-2) + 1e-14) - res.mT @ res + 1 / n
    return torch.linalg.solve_ex(matrix, right)[0]


class _ImplicitGradient(torch.autograd.Function):
    """Returns res in float64, with the gradient of the matrix that has its row and column sums.

    res = diag(e^u) e^h diag(e^v), and u and v keep the sums of rows (one) and columns (c) while h changes: for a
    gradient g of res that of h is res ∘ (g − a 1ᵀ − 1 bᵀ), where a + res b are the row sums of res ∘ g and resᵀ a + c∘b
    its column sums. c is one within the tolerance, or the sums that were reached where the rounds ran out.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, res: torch.Tensor) -> torch.Tensor:
        ctx.dtype = logits.dtype
        res = res.clone()
        ctx.save_for_backward(res)  # the result itself: its own gradient is that of the backward
        return res

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (res,) = ctx.saved_tensors
        weighted = res * grad
        rows, columns = weighted.sum(-1, keepdim=True), weighted.sum(-2).unsqueeze(-1)
        b = _solve_columns(res, columns - res.mT @ rows)
        a = rows - res @ b
        return (weighted - res * (a + b.mT)).to(ctx.dtype), None
