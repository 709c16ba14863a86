"""step on CUDA with merge inside of project's tiles: x' is written once and not read back before its sublayer's u; the
backward makes it again from x and f, and never writes it.

Otherwise as in `chain_programs`. Streams are flattened, x [T, nC]: stream i of a token begins at column i·C.
"""

from typing import Any

import tilelang.language as T

from tiles.kernels.apply.aggregate import Aggregate
from tiles.kernels.fused import merged_schedule, signature
from tiles.kernels.fused.chain_macros import Backward, Forward, Rows
from tiles.kernels.fused.chain_schedule import ChainSchedule, tiled
from tiles.kernels.fused.merged_macros import (
    JOIN_TILES_THREADS,
    MergedDots,
    merged_gradients,
    merged_projection,
    presplit_merged,
    tile_sums_joined,
)
from tiles.kernels.project.split_sums import SplitSums
from tiles.kernels.project.tensor_core_programs import begin_after_presplit
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cuda
from tiles.lang.values import as_value


def step_forward(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    """x'_ic = Σ_j res_ij x_jc + post_i f_c, then pre of x'."""
    presplit = presplit_merged(problem, tiled(schedule), dialect)
    forward, outputs = Forward(problem, schedule, dialect, presplit), problem.outputs
    project = merged_projection(problem, tiled(schedule), dialect)

    @forward.program(signature.step(problem))
    def step_forward(p: Any) -> None:
        presplit.launch(p.phi, p.phi_hi_lo)
        with dialect.kernel(forward.groups(p.tokens), schedule.splits, threads=schedule.threads) as (group, split):
            begin_after_presplit(dialect, schedule)
            project(p, presplit.chosen(p), group, split, as_value(p.tokens), SplitSums(p.parts, split, outputs))
        forward.after_project(p.renamed(x="x_next", **signature.next_maps(problem)))

    return step_forward


def step_backward(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> Any:
    """dpre_i = Σ_j res_ij ⟨du, x_j⟩ + post_i ⟨du, f⟩; all else while x' is made again, tile by tile."""
    n, tiles, count = problem.streams, tiled(schedule), merged_schedule.summed(problem)
    groups, rows = merged_schedule.groups(problem, tiles), Rows(schedule)
    backward = Backward(problem, schedule, dialect)
    apply = Aggregate(problem, schedule.row_width, dialect, schedule.row_threads)
    dx_dphi_tile, join_tiles = merged_gradients(problem, tiles, dialect), tile_sums_joined(problem, groups, dialect)

    def workspace(tokens: Any) -> dict[str, Any]:
        return {
            "stream_dots": T.Tensor((n + 1, tokens), "float32"),
            "tile_sums": T.Tensor((groups, tokens * count), "float32"),
        }

    @backward.program(signature.step(problem), workspace)
    def step_backward(p: Any) -> None:
        with dialect.kernel(rows.blocks(p.tokens), threads=schedule.row_threads) as block:
            dialect.pdl_trigger(schedule.use_pdl)
            for turn in T.serial(rows.turns(block, p.tokens)):
                token = rows.token(block, turn)
                apply.stream_dots(p.x, p.f, p.du, token, p.stream_dots)
        dpre = MergedDots(p.stream_dots, p.res if problem.mixes else None, p.post)
        backward.launch_coefficients(p.renamed(**signature.next_maps(problem, "d")), dpre)
        with dialect.kernel(groups, p.splits, threads=schedule.threads) as (group, split):
            dx_dphi_tile(p, group, split, as_value(p.tokens), as_value(p.splits))
        with dialect.kernel(T.ceildiv(p.tokens * count, JOIN_TILES_THREADS), threads=JOIN_TILES_THREADS) as block:
            dialect.pdl_wait(schedule.use_pdl)
            join_tiles(p, block, as_value(p.tokens))
        backward.launch_join(p)

    return step_backward
