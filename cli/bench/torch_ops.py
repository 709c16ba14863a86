"""The mHC ops in plain torch, in the variants that a PyTorch user would write: the baselines of `mhc-tune bench`.

Shapes and maths are those of `mhc.functional` on flat tokens (x [T, n, C]). All variants accumulate coefficients in
float32. "native" multiplies streams in their own dtype with coefficients cast to it, as under autocast; "float32"
casts the streams up first. For float32 streams the two are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

OpFunction = Callable[..., tuple[Any, ...]]

ROUNDS, EPS = 20, 1e-6

FUSIBLE = {
    "project": ("matmul, native", "matmul, float32"),
    "coefficients": ("divide loop", "scaling vectors"),
    "aggregate": ("broadcast, float32",),
    "merge": ("broadcast, float32", "unrolled, float32"),
}
"""The variants that torch.compile fuses best: it is tried on these and on the fastest eager one."""


def project(x: torch.Tensor, phi: torch.Tensor, *, cast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """z = x̄·phiᵀ and s = Σ x̄², both float32."""
    rows = x.flatten(1)
    wide = rows.float()
    factor = wide if cast else rows
    return (factor @ phi.to(factor.dtype).T).float(), wide.square().sum(1)


def project_norm(x: torch.Tensor, phi: torch.Tensor, *, cast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with s from torch's vector norm, which allocates no tensor of squares."""
    rows = x.flatten(1)
    factor = rows.float() if cast else rows
    s = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square()
    return (factor @ phi.to(factor.dtype).T).float(), s


def sinkhorn_divide(logits: torch.Tensor) -> torch.Tensor:
    """20 times: divide by column sums, then by row sums."""
    m = (logits - logits.amax(-2, keepdim=True)).exp()
    for _ in range(ROUNDS):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def sinkhorn_scale(logits: torch.Tensor) -> torch.Tensor:
    """The same map with M fixed and only the factors of its rows and columns updated."""
    m = (logits - logits.amax(-2, keepdim=True)).exp()
    rows = torch.ones_like(m[..., :1])
    for _ in range(ROUNDS):
        columns = 1 / (m * rows).sum(-2, keepdim=True)
        rows = 1 / (m * columns).sum(-1, keepdim=True)
    return m * rows * columns


def coefficients(
    z: torch.Tensor,
    s: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    *,
    streams: int,
    width: int,
    sinkhorn: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pre = σ(h_pre), post = 2σ(h_post), res = Sinkhorn(h_res)."""
    n = streams
    r = torch.rsqrt(s / (n * width) + EPS)[:, None]
    z_pre, z_post, z_res = (z * r).split((n, n, n * n), 1)
    bias_pre, bias_post, bias_res = bias.split((n, n, n * n))
    pre = (alpha[0] * z_pre + bias_pre).sigmoid()
    post = 2 * (alpha[1] * z_post + bias_post).sigmoid()
    return pre, post, sinkhorn((alpha[2] * z_res + bias_res).unflatten(1, (n, n)))


def aggregate_einsum(x: torch.Tensor, pre: torch.Tensor, *, cast: bool) -> tuple[torch.Tensor]:
    """u = Σ_i pre_i x_i, as an einsum."""
    x_, pre = _same_dtype(x, pre, cast=cast)
    return (torch.einsum("tn,tnc->tc", pre, x_).to(x.dtype),)


def aggregate_matmul(x: torch.Tensor, pre: torch.Tensor, *, cast: bool) -> tuple[torch.Tensor]:
    """u = pre·x, as a batched matrix product."""
    x_, pre = _same_dtype(x, pre, cast=cast)
    return ((pre[:, None] @ x_)[:, 0].to(x.dtype),)


def aggregate_broadcast(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor]:
    """u = Σ_i pre_i x_i, multiplied and summed."""
    return ((pre[:, :, None] * x).sum(1).to(x.dtype),)


def merge_einsum(
    x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor, *, cast: bool
) -> tuple[torch.Tensor]:
    """x'_i = Σ_j res_ij x_j + post_i f, as an einsum and a product."""
    x_, f, res, post = _same_dtype(x, f, res, post, cast=cast)
    return ((torch.einsum("tij,tjc->tic", res, x_) + post[:, :, None] * f[:, None]).to(x.dtype),)


def merge_matmul(
    x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor, *, cast: bool
) -> tuple[torch.Tensor]:
    """x' = [res post]·[x; f], with post·f added by the batched matrix product itself."""
    x_, f, res, post = _same_dtype(x, f, res, post, cast=cast)
    return (torch.baddbmm(post[:, :, None] * f[:, None], res, x_).to(x.dtype),)


def merge_broadcast(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor]:
    """x'_i = Σ_j res_ij x_j + post_i f, multiplied and summed."""
    return (((res[..., None] * x[:, None]).sum(2) + post[:, :, None] * f[:, None]).to(x.dtype),)


def merge_unrolled(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor]:
    """The same with an unrolled sum over input streams: no tensor is larger than x'."""
    out = post[:, :, None] * f[:, None]
    for j in range(x.shape[1]):
        out = out + res[:, :, j, None] * x[:, None, j]
    return (out.to(x.dtype),)


def variants(op: str, streams: int, width: int, dtype: str) -> dict[str, OpFunction]:
    """The variants of an op by name."""
    known: Mapping[str, dict[str, OpFunction]] = {
        "project": _native_and_float32("matmul", project) | _native_and_float32("matmul and norm", project_norm),
        "coefficients": {
            name: partial(coefficients, streams=streams, width=width, sinkhorn=sinkhorn)
            for name, sinkhorn in (("divide loop", sinkhorn_divide), ("scaling vectors", sinkhorn_scale))
        },
        "aggregate": {
            **_native_and_float32("einsum", aggregate_einsum),
            **_native_and_float32("bmm", aggregate_matmul),
            "broadcast, float32": aggregate_broadcast,
        },
        "merge": {
            **_native_and_float32("einsum", merge_einsum),
            **_native_and_float32("baddbmm", merge_matmul),
            "broadcast, float32": merge_broadcast,
            "unrolled, float32": merge_unrolled,
        },
    }
    return {
        name: function for name, function in known[op].items() if not (dtype == "float32" and name.endswith("native"))
    }


def _native_and_float32(name: str, function: Callable[..., tuple[torch.Tensor, ...]]) -> dict[str, OpFunction]:
    return {f"{name}, native": partial(function, cast=False), f"{name}, float32": partial(function, cast=True)}


def _same_dtype(x: torch.Tensor, *others: torch.Tensor, cast: bool) -> tuple[torch.Tensor, ...]:
    """All in float32, or all in x's dtype."""
    dtype = torch.float32 if cast else x.dtype
    return tuple(tensor.to(dtype) for tensor in (x, *others))
