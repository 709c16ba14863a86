"""Arguments that several kernels have: streams, rows, gates, matrices, and the parameters of the maps."""

from __future__ import annotations

from tiles.kernels.spec import TOKENS, Argument, Problem, Role

EPS = Argument("eps", (), "float32", "scalar")
"""Added to the mean square of a token's streams (of the RMS norm)."""
HC_EPS = Argument("hc_eps", (), "float32", "scalar")
"""Added to pre, and in Sinkhorn to the softmax and to every sum; 0 in the paper, 1e-6 in DeepSeek-V4."""
POST_SCALE = Argument("post_scale", (), "float32", "scalar")
"""The factor of post's sigmoid; 2 in the paper."""
MAP_SCALARS = (EPS, HC_EPS, POST_SCALE)
NORM_EPS = Argument("norm_eps", (), "float32", "scalar")
"""Added to the mean square of the sublayer's input, where that is normalised."""
PAPER_SCALARS = {"eps": 1e-6, "hc_eps": 0.0, "post_scale": 2.0}
"""Their values in the paper; its eps is not stated, this is DeepSeek-V4's."""


DX_IS_GIVEN = Argument("dx_is_given", (), "float32", "flag")
"""1 where dx holds a gradient that is added to, 0 where it holds nothing."""


def streams(name: str, problem: Problem, role: Role) -> Argument:
    """[T, n, C] in the streams' dtype; programs see a token as one row of n·C."""
    return Argument(name, (TOKENS, problem.streams, problem.width), problem.dtype, role, flat=True)


def row(name: str, problem: Problem, role: Role) -> Argument:
    """[T, C] in the streams' dtype: a sublayer's input or output."""
    return Argument(name, (TOKENS, problem.width), problem.dtype, role)


def gates(name: str, problem: Problem, role: Role) -> Argument:
    """[T, n] float32: pre, post and their gradients."""
    return Argument(name, (TOKENS, problem.streams), "float32", role)


def matrix(name: str, problem: Problem, role: Role) -> Argument:
    """[T, n, n] float32: res, its logits and their gradients."""
    return Argument(name, (TOKENS, problem.streams, problem.streams), "float32", role)


def mixing(name: str, problem: Problem, role: Role) -> tuple[Argument, ...]:
    """res or its gradient, where it is not the identity."""
    return (matrix(name, problem, role),) if problem.mixes else ()


def projected(z: str, s: str, problem: Problem, role: Role) -> tuple[Argument, ...]:
    """z [T, N] and s [T], float32, or their gradients."""
    return Argument(z, (TOKENS, problem.outputs), "float32", role), Argument(s, (TOKENS,), "float32", role)


def phi(name: str, problem: Problem, role: Role) -> Argument:
    """[N, K] float32."""
    return Argument(name, (problem.outputs, problem.fan_in), "float32", role)


def scalars(problem: Problem) -> tuple[Argument, ...]:
    """Those of the maps, and of the norm of the sublayer's input where there is one."""
    return (*MAP_SCALARS, NORM_EPS) if problem.normalises else MAP_SCALARS


def norm_weight(name: str, problem: Problem, role: Role) -> tuple[Argument, ...]:
    """[C] float32, or its gradient, where the sublayer's input is normalised."""
    return (Argument(name, (problem.width,), "float32", role),) if problem.normalises else ()


def affine(alpha: str, bias: str, problem: Problem, role: Role) -> tuple[Argument, ...]:
    """alpha [3] (or [2], of pre and post alone) and bias [N], float32, or their gradients."""
    return Argument(alpha, (problem.maps,), "float32", role), Argument(bias, (problem.outputs,), "float32", role)
