"""pre and step on CUDA: project's tiles and passes over rows of tokens, one kernel after the other.

The launcher takes a chunk of tokens through all kernels before it touches the next one, so that streams read a second
time come from the L2 cache. The coefficients are a kernel of their own, a thread for each token. Streams are flattened,
x [T, nC]: stream i of a token begins at column i·C.
"""

from typing import Any

import tilelang.language as T

from tiles.kernels.apply.aggregate import Aggregate
from tiles.kernels.apply.merge import merge_of
from tiles.kernels.apply.schedule import ApplySchedule, in_groups
from tiles.kernels.fused import signature
from tiles.kernels.fused.chain_macros import Backward, Forward, Rows, gradients_of_streams
from tiles.kernels.fused.chain_schedule import ChainSchedule, tiled
from tiles.kernels.project.split_sums import SplitSums
from tiles.kernels.project.tensor_core_programs import (
    begin_after_presplit,
    presplit_columns,
    projection,
)
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cuda
from tiles.lang.values import as_value


def pre_forward(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    """z, s from x;  pre, post, res from z, s;  u_c = Σ_i pre_i x_ic."""
    presplit, project = presplit_columns(problem, schedule, dialect), projection(problem, tiled(schedule), dialect)
    forward, outputs = Forward(problem, schedule, dialect, presplit), problem.outputs

    @forward.program(signature.pre(problem))
    def pre_forward(p: Any) -> None:
        presplit.launch(p.phi, p.phi_hi_lo)
        with dialect.kernel(forward.groups(p.tokens), schedule.splits, threads=schedule.threads) as (group, split):
            begin_after_presplit(dialect, schedule)
            into = SplitSums(p.parts, split, outputs)
            project(p.x, presplit.chosen(p), group, split, as_value(p.tokens), into)
        forward.after_project(p)

    return pre_forward


def step_forward(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    """x'_ic = Σ_j res_ij x_jc + post_i f_c, then pre of x'."""
    presplit, project = presplit_columns(problem, schedule, dialect), projection(problem, tiled(schedule), dialect)
    forward, outputs = Forward(problem, schedule, dialect, presplit), problem.outputs
    mixed = merge_of(problem, ApplySchedule(schedule.row_width, schedule.row_threads), dialect)
    rows = Rows(schedule)

    @forward.program(signature.step(problem))
    def step_forward(p: Any) -> None:
        presplit.launch(p.phi, p.phi_hi_lo)
        with dialect.kernel(rows.blocks(p.tokens), threads=schedule.row_threads) as block:
            begin_after_presplit(dialect, schedule)
            for turn in T.serial(rows.turns(block, p.tokens)):
                token = rows.token(block, turn)
                mixed.merge(p.x, p.f, p.x_next, token, mixed.weights(p, token))
        with dialect.kernel(forward.groups(p.tokens), schedule.splits, threads=schedule.threads) as (group, split):
            dialect.pdl_wait(schedule.use_pdl)
            into = SplitSums(p.parts, split, outputs)
            project(p.x_next, presplit.chosen(p), group, split, as_value(p.tokens), into)
        forward.after_project(p.renamed(x="x_next", **signature.next_maps(problem)))

    return step_forward


def pre_backward(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    """dx̄ (+)= dz·phi + 2 x̄ ds + pre·du, with dz and ds from du, dpost and dres; dphi, dalpha and dbias."""
    backward, rows = Backward(problem, schedule, dialect), Rows(schedule)
    apply = Aggregate(problem, schedule.row_width, dialect, schedule.row_threads)
    dx_dphi_tile, groups = gradients_of_streams(problem, schedule, dialect)

    @backward.program(signature.pre(problem), lambda tokens: {"dpre": T.Tensor((problem.streams, tokens), "float32")})
    def pre_backward(p: Any) -> None:
        with dialect.kernel(rows.blocks(p.tokens), threads=schedule.row_threads) as block:
            dialect.pdl_trigger(schedule.use_pdl)
            for turn in T.serial(rows.turns(block, p.tokens)):
                token = rows.token(block, turn)
                apply.dpre_dot(p.x, p.du, token, p.dpre, token)
        backward.launch_coefficients(p, p.dpre)
        with dialect.kernel(groups, p.splits, threads=schedule.threads) as (group, split):
            dx_dphi_tile(p, group, split, as_value(p.tokens), as_value(p.splits), (p.du, p.dx, p.pre, p.dx_is_given))
        backward.launch_join(p)

    return pre_backward


def step_backward(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    """x' again from x and f, and dpre;  in its place, or that of dx where it is that, g = dx' + what pre's backward
    adds;  then merge's backward."""
    backward, rows = Backward(problem, schedule, dialect), Rows(schedule)
    apply = Aggregate(problem, schedule.row_width, dialect, schedule.row_threads)
    walk = ApplySchedule(schedule.row_width, schedule.row_threads)
    mixed, grouped = merge_of(problem, walk, dialect), in_groups(problem, walk)
    dx_dphi_tile, groups = gradients_of_streams(problem, schedule, dialect)

    g = "x_next_workspace" if problem.mixes else "dx"

    def workspace(tokens: Any) -> dict[str, Any]:
        return {
            "dpre": T.Tensor((problem.streams, tokens), "float32"),
            "x_next_workspace": T.Tensor((tokens, problem.fan_in), dialect.storage(problem.dtype)),
        }

    @backward.program(signature.step(problem), workspace)
    def step_backward(p: Any) -> None:
        with dialect.kernel(rows.blocks(p.tokens), threads=schedule.row_threads) as block:
            dialect.pdl_trigger(schedule.use_pdl)
            for turn in T.serial(rows.turns(block, p.tokens)):
                token = rows.token(block, turn)
                if grouped:
                    mixed.merge(p.x, p.f, p.x_next_workspace, token, mixed.weights(p, token))
                    dialect.barrier()
                    apply.dpre_dot(p.x_next_workspace, p.du, token, p.dpre, token)
                else:
                    weights = mixed.weights(p, token)
                    mixed.merge_and_dot(p.x, p.f, p.du, p.x_next_workspace, token, weights, p.dpre)
        backward.launch_coefficients(p.renamed(**signature.next_maps(problem, "d")), p.dpre)
        with dialect.kernel(groups, p.splits, threads=schedule.threads) as (group, split):
            of_x_next, extra_grads = p.renamed(x="x_next_workspace", dx=g), (p.du, p.dx_next, p.pre, T.float32(1))
            dx_dphi_tile(of_x_next, group, split, as_value(p.tokens), as_value(p.splits), extra_grads)
        with dialect.kernel(rows.blocks(p.tokens), threads=schedule.row_threads) as block:
            dialect.pdl_wait(schedule.use_pdl)
            for turn in T.serial(rows.turns(block, p.tokens)):
                token = rows.token(block, turn)
                mixed.merge_back(p.renamed(g=g), token, mixed.weights(p, token))
        backward.launch_join(p)

    return step_backward
