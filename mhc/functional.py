"""Differentiable ops of manifold-constrained hyper-connections (arXiv 2512.24880).

Shapes: `...` are any leading dimensions (batch, sequence), flattened to tokens; n streams in 1..16; width C, a multiple
of 8; K = nC, N = n² + 2n. N is packed [pre (n) | post (n) | res (n², row-major)]; res[i, j] weighs input stream j in
output stream i. Streams are float32, bfloat16 or float16; coefficients and parameters are float32. All functions raise
`BadInput` (a `ValueError`) for other shapes, mixed dtypes or mixed devices, make their inputs contiguous, and work with
`torch.compile(fullgraph=True)`. Kernels compute gradients in reverse mode; forward mode, the transforms of `torch.func`
and gradients of gradients run in plain torch, more slowly. In the formulas x̄ [..., K] is x, flattened per token.

With `out`, what a function returns without it (a tensor, or a tuple of tensors), `coefficients`, `aggregate`, `merge`,
`pre`, `step` and `single_pass` write to these tensors, allocate no results, and return `out`: for inference, without
autograd. Its tensors are contiguous and share no memory with inputs or each other (`mhc.dispatch.preallocated`).

Where res is the identity (Hunyuan-V4, and the cheapest way to wrap a plain model), `merge`, `pre`, `step` and
`single_pass` take and return None for it, and parameters of pre and post alone: N = 2n, alpha [2]. Streams are not
mixed, x' = x + post f, and hc_eps is added to post as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mhc.checks import check_problem, check_scalars, expect, stream_shape
from mhc.dispatch.operators import call
from mhc.dispatch.preallocated import write_results
from mhc.sublayer_norm import NORM_EPS, sublayer_norm
from tiles.errors import BadInput
from tiles.kernels.spec import IDENTITY, PAPER_ROUNDS, WIDTH_MULTIPLE

Out = Sequence[torch.Tensor | None] | None
"""Tensors that a function writes its results to, in their order."""

ROUNDS = PAPER_ROUNDS
"""The default number of Sinkhorn rounds."""

EPS = 1e-6
"""The default eps of the norm, added to the mean square of a token's streams."""

POST_SCALE = 2.0
"""The default factor of post's sigmoid."""

ANY_WIDTH = WIDTH_MULTIPLE
"""The width given to an op that has none."""


def project(x: torch.Tensor, phi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z = x̄ · phiᵀ and s = Σ x̄², accumulated in float32.

    x [..., n, C], phi [N, K] float32 -> z [..., N], s [...], float32.
    """
    n, width = stream_shape(x)

    def check() -> None:
        expect("phi", phi, (n * n + 2 * n, n * width), torch.float32, x.device)

    return call("project", (x, phi), (n, width, ROUNDS), check)


def coefficients(
    z: torch.Tensor,
    s: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *,
    streams: int,
    width: int,
    rounds: int = ROUNDS,
    eps: float = EPS,
    hc_eps: float = 0.0,
    post_scale: float = POST_SCALE,
    out: Out = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pre = σ(h_pre) + hc_eps, post = post_scale σ(h_post), res = Sinkhorn(h_res), where h = alpha∘z·rsqrt(s/K +
    eps) + bias; hc_eps is also that of `sinkhorn`. The paper has hc_eps = 0, DeepSeek-V4 and GLM-5.3 have 1e-6.

    z [..., N], s [...], alpha [3] (pre, post, res), bias [N], all float32
    -> pre [..., n], post [..., n], res [..., n, n], float32. Rows of res sum to one.
    """
    check_problem(streams, width)
    check_scalars(hc_eps, post_scale)

    def check() -> None:
        outputs = streams * streams + 2 * streams
        expect("s", s, s.shape, torch.float32, z.device)
        expect("z", z, (*s.shape, outputs), torch.float32, z.device)
        expect("alpha", alpha, (3,), torch.float32, z.device)
        expect("bias", bias, (outputs,), torch.float32, z.device)

    tensors, settings = (z, s, alpha, bias), (eps, hc_eps, post_scale, streams, width, rounds)
    if out is not None:
        check()
        return write_results("coefficients", tensors, settings, s.shape, out)
    return call("coefficients", tensors, settings, check)


def sinkhorn(logits: torch.Tensor, rounds: int = ROUNDS, *, hc_eps: float = 0.0) -> torch.Tensor:
    """Sinkhorn-Knopp: exp(logits), divided `rounds` times by its column sums and then by its row sums.

    hc_eps is added to the quotients of the first columns (a softmax), and to all sums that divide after that, as
    DeepSeek-V4 does. logits [..., n, n] float32 -> res [..., n, n] float32; rows sum to one for hc_eps = 0.
    """
    check_scalars(hc_eps)
    if logits.dim() < 2:
        raise BadInput(f"logits must be [..., n, n], got {tuple(logits.shape)}: pass square matrices")
    n = logits.shape[-1]
    check_problem(n)

    def check() -> None:
        expect("logits", logits, (*logits.shape[:-2], n, n), torch.float32, logits.device)

    return call("sinkhorn", (logits,), (hc_eps, n, ANY_WIDTH, rounds), check)


def aggregate(x: torch.Tensor, pre: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return u = Σ_i pre_i x_i, the sublayer's input.

    x [..., n, C], pre [..., n] float32 -> u [..., C] in x's dtype.
    """
    n, width = stream_shape(x)
    settings = (n, width, ROUNDS)

    def check() -> None:
        expect("pre", pre, (*x.shape[:-2], n), torch.float32, x.device)

    if out is not None:
        check()
        return write_results("aggregate", (x, pre), settings, x.shape[:-2], out)
    return call("aggregate", (x, pre), settings, check)


def merge(
    x: torch.Tensor, f: torch.Tensor, res: torch.Tensor | None, post: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x'_i = Σ_j res_ij x_j + post_i f, the streams after a sublayer with output f.

    x [..., n, C], f [..., C] in x's dtype, res [..., n, n] (None: the identity) and post [..., n] float32 -> x' like x.
    """
    n, width = stream_shape(x)

    def check() -> None:
        _check_merge(x, f, res, post)

    op, tensors, settings = _op("merge", res is not None), (x, f, *_given(res), post), (n, width, ROUNDS)
    if out is not None:
        check()
        return write_results(op, tensors, settings, x.shape[:-2], out)
    return call(op, tensors, settings, check)


def _check_merge(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor | None, post: torch.Tensor) -> None:
    *leading, n, width = x.shape
    expect("f", f, (*leading, width), x.dtype, x.device)
    if res is not None:
        expect("res", res, (*leading, n, n), torch.float32, x.device)
    expect("post", post, (*leading, n), torch.float32, x.device)


def _op(base_op: str, mixes: bool) -> str:
    return base_op if mixes else base_op + IDENTITY


def _given(res: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if res is None else (res,)


def pre(
    x: torch.Tensor,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *,
    rounds: int = ROUNDS,
    eps: float = EPS,
    hc_eps: float = 0.0,
    post_scale: float = POST_SCALE,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = NORM_EPS,
    out: Out = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Project, coefficients and aggregate, fused into one pass over x: everything before a sublayer.

    eps, hc_eps and post_scale are those of `coefficients`.
    x [..., n, C], phi [N, K], alpha [3], bias [N] -> u [..., C] in x's dtype, post [..., n], res [..., n, n] float32;
    with phi [2n, K], alpha [2] and bias [2n], res is None: the identity.

    With norm_weight [C], u comes out normalised, as by `torch.nn.functional.rms_norm`: u·rsqrt(mean(u²) + norm_eps)·
    norm_weight, without a pass of its own over u on a CPU. On CUDA, and where a kernel was tuned for the op without a
    norm and none for the op with it, torch's rms_norm follows the kernel, which moves 2C elements a token more, and u
    is saved for the backward.
    """
    n, width = stream_shape(x)

    def check() -> None:
        check_pre(x, phi, alpha, bias)

    check_scalars(hc_eps, post_scale)
    norm = sublayer_norm(op_of_pre(n, phi), x, norm_weight, norm_eps, rounds)
    tensors = (x, phi, alpha, bias, *norm.weight)
    settings = (eps, hc_eps, post_scale, *norm.eps, n, width, rounds)
    if out is not None:
        check()
        return norm.write(write_results(norm.op, tensors, settings, x.shape[:-2], out), 0)
    u, post, *res = call(norm.op, tensors, settings, check)
    return norm.apply(u), post, res[0] if res else None


def op_of_pre(streams: int, phi: torch.Tensor) -> str:
    """The op, by whether there are logits of res."""
    return _op("pre", phi.shape[:1] != (2 * streams,))


def check_pre(x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor) -> None:
    """Raise `BadInput` unless the parameters fit x."""
    n, width = x.shape[-2:]
    mixes = op_of_pre(n, phi) == "pre"
    outputs = 2 * n + (n * n if mixes else 0)
    expect("phi", phi, (outputs, n * width), torch.float32, x.device)
    expect("alpha", alpha, (3 if mixes else 2,), torch.float32, x.device)
    expect("bias", bias, (outputs,), torch.float32, x.device)


def _check_boundary(
    x: torch.Tensor,
    f: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor | None,
    parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Raise `BadInput` unless all fit x."""
    check_pre(x, *parameters)
    if (op_of_pre(x.shape[-2], parameters[0]) == "pre") != (res is not None):
        rows = tuple(parameters[0].shape)
        raise BadInput(
            f"res must be None, the identity, on both sides of a boundary or on none, got {_described(res)} and phi "
            f"{rows}: pass res, or merge and pre one after the other"
        )
    _check_merge(x, f, res, post)


def _described(res: torch.Tensor | None) -> str:
    return "None" if res is None else str(tuple(res.shape))


def step(
    x: torch.Tensor,
    f: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor | None,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *,
    rounds: int = ROUNDS,
    eps: float = EPS,
    hc_eps: float = 0.0,
    post_scale: float = POST_SCALE,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = NORM_EPS,
    out: Out = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Merge with post and res, then `pre` of the next sublayer, fused into one pass over the streams.

    x [..., n, C], f [..., C], post [..., n], res [..., n, n]; phi [N, K], alpha [3] and bias [N] of the next sublayer
    -> x' like x, u' [..., C] in x's dtype, post' [..., n], res' [..., n, n] float32; res and res' are None together.
    The backward recomputes x' from x and f. With norm_weight [C], the next sublayer's, u' comes out normalised, as u of
    `pre` does.
    """
    n, width = stream_shape(x)

    def check() -> None:
        _check_boundary(x, f, post, res, (phi, alpha, bias))

    check_scalars(hc_eps, post_scale)
    norm = sublayer_norm(_op("step", res is not None), x, norm_weight, norm_eps, rounds)
    tensors = (x, f, post, *_given(res), phi, alpha, bias, *norm.weight)
    settings = (eps, hc_eps, post_scale, *norm.eps, n, width, rounds)
    if out is not None:
        check()
        return norm.write(write_results(norm.op, tensors, settings, x.shape[:-2], out), 1)
    x_next, u, post_next, *res_next = call(norm.op, tensors, settings, check)
    return x_next, norm.apply(u), post_next, res_next[0] if res_next else None


def single_pass(
    x: torch.Tensor,
    f: torch.Tensor,
    pre: torch.Tensor,
    post: torch.Tensor,
    res: torch.Tensor | None,
    phi: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *,
    rounds: int = ROUNDS,
    eps: float = EPS,
    hc_eps: float = 0.0,
    post_scale: float = POST_SCALE,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = NORM_EPS,
    out: Out = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A boundary of single-pass mHC (DeepSeek-V4.1's report, equation 6): merge with post and res, u' = Σ_i pre_i x'_i,
    and the maps of x', in one pass over the streams.

    pre, post and res come from the same maps, those of x; the next sublayer is fed through this pre, and the one after
    it through pre'. x [..., n, C], f [..., C], pre and post [..., n], res [..., n, n]; phi [N, K], alpha [3] and bias
    [N] of the next sublayer -> x' like x, u' [..., C] in x's dtype, pre' and post' [..., n], res' [..., n, n] float32;
    res and res' are None together. The backward recomputes x' from x and f. With norm_weight [C], the next sublayer's,
    u' comes out normalised, as u of `pre` does.
    """
    n, width = stream_shape(x)

    def check() -> None:
        _check_boundary(x, f, post, res, (phi, alpha, bias))
        expect("pre", pre, (*x.shape[:-2], n), torch.float32, x.device)

    check_scalars(hc_eps, post_scale)
    norm = sublayer_norm(_op("single_pass", res is not None), x, norm_weight, norm_eps, rounds)
    tensors = (x, f, pre, post, *_given(res), phi, alpha, bias, *norm.weight)
    settings = (eps, hc_eps, post_scale, *norm.eps, n, width, rounds)
    if out is not None:
        check()
        return norm.write(write_results(norm.op, tensors, settings, x.shape[:-2], out), 1)
    x_next, u, pre_next, post_next, *res_next = call(norm.op, tensors, settings, check)
    return x_next, norm.apply(u), pre_next, post_next, res_next[0] if res_next else None
