"""Peers on a GPU: the kernels of DeepSeek's TileKernels and of Liger, called as their users call them.

Parameters are stored as each of them expects, and gradients are checked in that layout: see `Implementation.adapt`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch

from cli.bench.cases import BenchCase
from cli.bench.implementation import Implementation
from cli.bench.torch_composites import composite, single_pass, step
from cli.bench.torch_ops import EPS, ROUNDS, OpFunction

COEFFICIENT_RESULTS = {"pre": 2, "step": 3, "single_pass": 4}
"""Index of res among the results of the ops that return it."""


def implementation(name: str, case: BenchCase, directions: Sequence[str]) -> Implementation | str:
    """The peer's implementation, not checked yet, or why there is none. Raises what importing the peer raises."""
    if case.op == "coefficients" or (case.op == "project" and name == "liger"):
        return "divides the work between these ops differently; see pre"
    if case.op == "stack":
        return "is compared in the layer"
    return {"tile-kernels": _tile_kernels, "liger": _liger}[name](case, directions)


# TileKernels: streams [batch, T, 4, C] in bfloat16; comb = resᵀ, so that the res block of phi and bias is transposed.


class TileKernels(NamedTuple):
    """The modules of the mHC part of TileKernels."""

    functional: ModuleType
    ops: ModuleType
    kernels: ModuleType


@cache
def tile_kernels() -> TileKernels | str:
    """The mHC part. The top package imports parts that need another tilelang, so an empty module replaces it."""
    package = importlib.util.find_spec("tile_kernels")
    if package is None or not package.submodule_search_locations:
        return "not installed: pip install tile-kernels==1.0.0"
    stand_in = ModuleType("tile_kernels")
    stand_in.__path__ = list(package.submodule_search_locations)
    sys.modules["tile_kernels"] = stand_in
    names = ("modeling.mhc.functional", "modeling.mhc.ops", "mhc.norm_fn_kernel")
    return TileKernels(*(importlib.import_module(f"tile_kernels.{name}") for name in names))


def _tile_kernels(case: BenchCase, directions: Sequence[str]) -> Implementation | str:
    if case.streams != 4 or case.dtype != "bfloat16":
        return "has kernels for n = 4 in bfloat16 only"
    modules = tile_kernels()
    if isinstance(modules, str):
        return modules
    maps, aggregate, merge, pre = (partial(part, modules) for part in (_maps, _aggregate, _merge, _pre))
    made: dict[str, OpFunction] = {
        "project": partial(_project, modules),
        "aggregate": aggregate,
        "merge": merge,
        "pre": pre,
        "step": step(pre, merge),
        "single_pass": single_pass(maps, aggregate, merge),
        "layer": partial(_layer, modules),
    }
    return Implementation("tile-kernels", made[case.op], "kernels", directions, adapt=transpose_res)


def transpose_res(case: BenchCase) -> BenchCase:
    """The case with the res block of every parameter, input and result transposed; project has no such block."""
    if case.op == "project":
        return case
    n = case.streams
    order = torch.tensor([*range(2 * n), *(2 * n + i * n + j for j in range(n) for i in range(n))])

    def transpose(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in ("phi", "bias"):
            return tensor[order.to(tensor.device)]
        return tensor.mT.contiguous() if name == "res" else tensor

    index_of_res = COEFFICIENT_RESULTS.get(case.op)
    results = ["res" if index == index_of_res else "" for index in range(len(case.grad_outputs))]
    return replace(
        case,
        inputs=tuple(
            transpose(name, tensor.detach()).requires_grad_()
            for name, tensor in zip(case.names, case.inputs, strict=True)
        ),
        grad_outputs=tuple(map(transpose, results, case.grad_outputs)),
        expected=tuple(map(transpose, (*results, *case.names), case.expected)),
    )


def _project(modules: TileKernels, x: torch.Tensor, phi: torch.Tensor) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = _Project.apply(modules, x, phi)  # type: ignore[no-untyped-call]
    return found


class _Project(torch.autograd.Function):
    """z and s from the kernels inside its norm, as it has no public function for them."""

    @staticmethod
    def forward(
        ctx: Any, modules: TileKernels, x: torch.Tensor, phi: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, columns = phi.shape
        phi = modules.kernels.round_to_tf32(phi)
        z, s = x.new_empty(len(x), outputs, dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)
        kernel = modules.kernels._mhc_pre_norm_fn_fwd_mul(outputs, 1, columns)
        kernel(x.view(-1, columns), phi, z.view(-1, 1, outputs), s.view(-1, 1))
        ctx.save_for_backward(x, phi)
        ctx.kernels = modules.kernels
        return z, s

    @staticmethod
    def backward(ctx: Any, dz: torch.Tensor, ds: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        x, phi = ctx.saved_tensors
        outputs, columns = phi.shape
        dx, dphi = torch.zeros_like(x), torch.empty_like(phi)
        kernel = ctx.kernels._mhc_pre_norm_fn_bwd_mul(outputs, 1, columns)
        rounded = ctx.kernels.round_to_tf32(dz.contiguous()).view(-1, 1, outputs)
        kernel(rounded, ds.contiguous().view(-1, 1), x.view(-1, columns), phi, dx.view(-1, columns), dphi)
        return None, dx, dphi


def _aggregate(modules: TileKernels, x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (modules.ops.mhc_pre_apply_mix(x[None], pre[None, ..., None])[0],)


def _merge(
    modules: TileKernels, x: torch.Tensor, f: torch.Tensor, comb: torch.Tensor, post: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return (modules.ops.mhc_post(f[None], x[None], post[None, ..., None], comb[None])[0],)


PAPER = {"post_mult_value": 2.0, "pre_eps": 0.0, "sinkhorn_eps": 0.0, "sinkhorn_repeat": ROUNDS, "norm_eps": EPS}
"""Arguments with which its maths is the paper's."""


def _pre(
    modules: TileKernels, x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Its fused kernel without gradients; with them its single ops."""
    if torch.is_grad_enabled():
        weights, post, comb = _maps(modules, x, phi, alpha, bias)
        return (*_aggregate(modules, x, weights), post, comb)
    u, (post, comb) = modules.functional.mhc_pre(x[None], phi, alpha, bias, **PAPER)
    return u[0], post[0, ..., 0], comb[0]


def _maps(
    modules: TileKernels, x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Its single ops, without a merge whose gradient to add to."""
    ops = modules.ops
    mixes = ops.mhc_pre_norm_fn(x[None], phi, None, EPS, fuse_grad_acc=False)
    weights, post, comb = ops.mhc_pre_split_mixes(mixes, alpha, bias, x.shape[1], 2.0, 0.0)
    comb = ops.sinkhorn_normalize(comb, repeat=ROUNDS, eps=0.0)
    return weights.squeeze((0, -1)), post.squeeze((0, -1)), comb.squeeze(0)


def _layer(
    modules: TileKernels, x: torch.Tensor, phi: torch.Tensor, alpha: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """As in a network: the gradients of pre are added to those of merge in index_of_res."""
    streams = x[None]
    u, (post, comb) = modules.functional.mhc_pre(streams, phi, alpha, bias, **PAPER)
    return (modules.ops.mhc_post(u, streams, post, comb)[0],)


# Liger: phi [K, N], best stored in half precision, and one alpha per group. Its Sinkhorn begins with the rows; after 20
# rounds the difference is below rounding.


@cache
def liger() -> ModuleType | str:
    """The functional interface of Liger."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "not installed: pip install liger-kernel==0.8.5"
    return importlib.import_module("liger_kernel.transformers.functional")


def _liger(case: BenchCase, directions: Sequence[str]) -> Implementation | str:
    if case.streams not in (2, 4, 8, 16) or case.dtype == "float32":
        return "has kernels for n = 2, 4, 8 or 16 in half precision only"
    module = liger()
    if isinstance(module, str):
        return module

    def aggregate(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.liger_mhc_pre(x, pre),)

    def merge(x: torch.Tensor, f: torch.Tensor, res: torch.Tensor, post: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (module.liger_mhc_post_res(x, f, post, res),)

    def maps(
        x: torch.Tensor, phi: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        settings = {"tmax": ROUNDS, "rms_eps": EPS, "sinkhorn_eps": 0.0}
        found: tuple[torch.Tensor, ...] = module.liger_mhc_coeffs(x, phi, bias, a, b, c, **settings)
        return found

    parts: dict[str, OpFunction] = {"aggregate": aggregate, "merge": merge}
    found = parts[case.op] if case.op in parts else composite(case.op, maps, aggregate, merge)
    label = "kernels, phi in half precision" if "phi" in case.names else "kernels"
    return Implementation("liger", found, label, directions, adapt=split_parameters)


def split_parameters(case: BenchCase) -> BenchCase:
    """The case with phi transposed and in the streams' dtype, and alpha as three numbers."""

    def split(name: str, tensor: torch.Tensor, transpose: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        return list(tensor.unbind()) if name == "alpha" else [transpose(tensor) if name == "phi" else tensor]

    x, results = case.inputs[0], len(case.grad_outputs)
    named = list(zip(case.names, case.inputs, case.expected[results:], strict=True))
    given = [part for name, tensor, _ in named for part in split(name, tensor, lambda phi: phi.T.to(x.dtype))]
    wanted = [part for name, _, tensor in named for part in split(name, tensor, lambda phi: phi.T)]
    return replace(
        case,
        inputs=tuple(tensor.detach().contiguous().clone().requires_grad_() for tensor in given),
        names=tuple(part for name in case.names for part in ([name] * 3 if name == "alpha" else [name])),
        expected=(*case.expected[:results], *wanted),
    )
