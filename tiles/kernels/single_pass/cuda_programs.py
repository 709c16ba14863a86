"""single_pass on CUDA: project's tiles with the same columns of all streams, which merge, aggregate and project what
they copy; then a kernel for the coefficients. The backward has them the other way round.

Where a token's weights do not fit a thread (`merged` is 0), passes over rows of tokens merge and aggregate. The
launcher takes a chunk of tokens through all kernels before it touches the next one. Streams are flattened, x [T, nC]:
stream i of a token begins at column i·C.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.apply.aggregate import Aggregate
from tiles.kernels.apply.merge import merge_of
from tiles.kernels.apply.schedule import ApplySchedule, in_groups
from tiles.kernels.fused import merged_schedule
from tiles.kernels.fused.chain_macros import Backward, Forward, Rows, gradients_of_streams
from tiles.kernels.fused.chain_schedule import ChainSchedule, tiled
from tiles.kernels.fused.merged_macros import (
    JOIN_TILES_THREADS,
    merged_gradients,
    merged_projection,
    presplit_merged,
    tile_sums_joined,
)
from tiles.kernels.fused.signature import next_maps
from tiles.kernels.project.split_sums import SplitSums
from tiles.kernels.project.tensor_core_programs import (
    begin_after_presplit,
    presplit_columns,
    projection,
)
from tiles.kernels.single_pass.signature import single_pass
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cuda
from tiles.lang.values import Buffer, Expr, as_value


class _Transposed(NamedTuple):
    """A tensor [T, n] as [n, T]."""

    tensor: Buffer

    def __getitem__(self, index: Any) -> Expr:
        i, token = index
        return self.tensor[token, i]

    def __setitem__(self, index: Any, value: Expr) -> None:
        i, token = index
        _put(self.tensor, token, i, value)


@T.macro
def _put(tensor: Buffer, row: Expr, column: Expr, value: Expr) -> None:
    tensor[row, column] = value


def forward(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    """x', u', and the sums for z' and s', by tiles or by rows; then the next maps."""
    return (_forward_by_tiles if schedule.merged else _forward_by_rows)(problem, schedule, dialect)


def backward(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    """dz' and ds' from the next maps' gradients; then x' again and all gradients, by tiles or by rows."""
    return (_backward_by_tiles if schedule.merged else _backward_by_rows)(problem, schedule, dialect)


def _forward_by_tiles(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    presplit = presplit_merged(problem, tiled(schedule), dialect)
    after, outputs = Forward(problem, schedule, dialect, presplit), problem.outputs
    project = merged_projection(problem, tiled(schedule), dialect)

    @after.program(single_pass(problem))
    def single_pass_forward(p: Any) -> None:
        presplit.launch(p.phi, p.phi_hi_lo)
        with dialect.kernel(after.groups(p.tokens), schedule.splits, threads=schedule.threads) as (group, split):
            begin_after_presplit(dialect, schedule)
            project(p, presplit.chosen(p), group, split, as_value(p.tokens), SplitSums(p.parts, split, outputs))
        after.launch_coefficients(p.renamed(pre="pre_next", **next_maps(problem)))

    return single_pass_forward


def _forward_by_rows(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    presplit, project = presplit_columns(problem, schedule, dialect), projection(problem, tiled(schedule), dialect)
    after, outputs, rows = Forward(problem, schedule, dialect, presplit), problem.outputs, Rows(schedule)
    mixed = merge_of(problem, ApplySchedule(schedule.row_width, schedule.row_threads), dialect)
    apply = Aggregate(problem, schedule.row_width, dialect, schedule.row_threads)

    @after.program(single_pass(problem))
    def single_pass_forward(p: Any) -> None:
        presplit.launch(p.phi, p.phi_hi_lo)
        with dialect.kernel(rows.blocks(p.tokens), threads=schedule.row_threads) as block:
            begin_after_presplit(dialect, schedule)
            for turn in T.serial(rows.turns(block, p.tokens)):
                token = rows.token(block, turn)
                mixed.merge(p.x, p.f, p.x_next, token, mixed.weights(p, token))
                dialect.barrier()
                apply.aggregate(p.x_next, p.u, token, apply.gates(p.pre, token))
        with dialect.kernel(after.groups(p.tokens), schedule.splits, threads=schedule.threads) as (group, split):
            dialect.pdl_wait(schedule.use_pdl)
            into = SplitSums(p.parts, split, outputs)
            project(p.x_next, presplit.chosen(p), group, split, as_value(p.tokens), into)
        after.launch_coefficients(p.renamed(pre="pre_next", **next_maps(problem)))

    return single_pass_forward


def _backward_by_tiles(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    tiles, count = tiled(schedule), merged_schedule.summed(problem)
    groups, before = merged_schedule.groups(problem, tiles), Backward(problem, schedule, dialect)
    dx_dphi_tile, join_tiles = merged_gradients(problem, tiles, dialect), tile_sums_joined(problem, groups, dialect)

    @before.program(single_pass(problem), lambda tokens: {"tile_sums": T.Tensor((groups, tokens * count), "float32")})
    def single_pass_backward(p: Any) -> None:
        before.launch_coefficients(p.renamed(**next_maps(problem, "d")), _Transposed(p.dpre_next))
        with dialect.kernel(groups, p.splits, threads=schedule.threads) as (group, split):
            dx_dphi_tile(p, group, split, as_value(p.tokens), as_value(p.splits))
        with dialect.kernel(T.ceildiv(p.tokens * count, JOIN_TILES_THREADS), threads=JOIN_TILES_THREADS) as block:
            dialect.pdl_wait(schedule.use_pdl)
            join_tiles(p, block, as_value(p.tokens))
        before.launch_join(p)

    return single_pass_backward


def _backward_by_rows(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    before, rows = Backward(problem, schedule, dialect), Rows(schedule)
    apply = Aggregate(problem, schedule.row_width, dialect, schedule.row_threads)
    walk = ApplySchedule(schedule.row_width, schedule.row_threads)
    mixed, grouped = merge_of(problem, walk, dialect), in_groups(problem, walk)
    dx_dphi_tile, groups = gradients_of_streams(problem, schedule, dialect)
    g = "x_next_workspace" if problem.mixes else "dx"

    @before.program(
        single_pass(problem),
        lambda tokens: {"x_next_workspace": T.Tensor((tokens, problem.fan_in), dialect.storage(problem.dtype))},
    )
    def single_pass_backward(p: Any) -> None:
        before.launch_coefficients(p.renamed(**next_maps(problem, "d")), _Transposed(p.dpre_next))
        with dialect.kernel(rows.blocks(p.tokens), threads=schedule.row_threads) as block:
            dialect.pdl_wait(schedule.use_pdl)
            for turn in T.serial(rows.turns(block, p.tokens)):
                token, dpre = rows.token(block, turn), _Transposed(p.dpre)
                if grouped:
                    mixed.merge(p.x, p.f, p.x_next_workspace, token, mixed.weights(p, token))
                    dialect.barrier()
                    apply.dpre_dot(p.x_next_workspace, p.du, token, dpre, token)
                else:
                    weights = mixed.weights(p, token)
                    mixed.merge_and_dot(p.x, p.f, p.du, p.x_next_workspace, token, weights, dpre)
        with dialect.kernel(groups, p.splits, threads=schedule.threads) as (group, split):
            of_x_next, extra_grads = p.renamed(x="x_next_workspace", dx=g), (p.du, p.dx_next, p.pre, T.float32(1))
            dx_dphi_tile(of_x_next, group, split, as_value(p.tokens), as_value(p.splits), extra_grads)
        with dialect.kernel(rows.blocks(p.tokens), threads=schedule.row_threads) as block:
            dialect.pdl_wait(schedule.use_pdl)
            for turn in T.serial(rows.turns(block, p.tokens)):
                token = rows.token(block, turn)
                mixed.merge_back(p.renamed(g=g), token, mixed.weights(p, token))
        before.launch_join(p)

    return single_pass_backward
