"""single_pass as TileLang programs (DeepSeek-V4.1's report, equation 6): all that the streams are multiplied with at a
boundary is known before they are read, so a tile of tokens × columns of all streams is done when it is loaded. Here are
those for a CPU; `cuda_programs` has those for CUDA.

Streams are flattened, x [T, nC]: stream i of a token begins at column i·C.
"""

from typing import Any

import tilelang.language as T

from tiles.kernels.coefficients import gates
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.fused.signature import next_maps
from tiles.kernels.limits import token_lanes
from tiles.kernels.single_pass import cuda_programs, signature
from tiles.kernels.single_pass.schedule import Schedule, tile_row
from tiles.kernels.single_pass.tile_macros import BackwardTile, ForwardTile
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cpu, Cuda, Dialect
from tiles.lang.program import program
from tiles.lang.values import as_value, token_range, variable


def forward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """x'_ic = Σ_j res_ij x_jc + post_i f_c;  u'_c = Σ_i pre_i x'_ic;  z', s' of x', and the next maps from them."""
    if isinstance(schedule, ChainSchedule):
        assert isinstance(dialect, Cuda)
        return cuda_programs.forward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    block, rows = schedule.block_tokens, schedule.register_tokens
    tile, maps = ForwardTile(problem, schedule, dialect), gates.Forward(problem, token_lanes(block), dialect)

    @program(signature.single_pass(problem), dialect)
    def single_pass_forward(p: Any) -> None:
        with dialect.kernel(T.ceildiv(p.tokens, block), threads=0) as step:
            start, last = variable(step * block), as_value(p.tokens)
            count, held = variable(T.min(block, last - start)), maps.scratch()
            for r in T.serial(T.ceildiv(count, rows)):
                tile.run(p, start + r * rows, last)
            maps.run(held, p.z, p.s, p, start, start + count)
            maps.store(held, p.renamed(**next_maps(problem)), p.pre_next, start, start + count)

    return single_pass_forward


def backward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """x' again;  g = dx' + pre·du' + dz'·phi + 2x'·ds';  dpre_i = ⟨du', x'_i⟩;  dphi = dz'ᵀ·x';  merge's backward of g.

    dz' and ds' come from dpre', dpost' and dres' alone, a block of tokens ahead of its streams.
    """
    if isinstance(schedule, ChainSchedule):
        assert isinstance(dialect, Cuda)
        return cuda_programs.backward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    outputs, fan_in = problem.outputs, problem.fan_in
    block, width = schedule.block_tokens, schedule.block_width
    tile, maps = BackwardTile(problem, schedule, dialect), gates.Backward(problem, token_lanes(block), dialect)
    row = tile_row(problem, schedule)

    @program(signature.single_pass(problem), dialect)
    def single_pass_backward(p: Any) -> None:
        with dialect.kernel(p.splits, threads=0) as split:
            held, sums, normed = maps.scratch(), dialect.scratch(block, outputs), tile.norm_scratch()
            staged = dialect.scratch(block, row)
            maps.clear(held)
            for k in T.serial(outputs):
                for index in dialect.parallel(fan_in):
                    p.dphi[split, k, index] = T.float32(0)
            if problem.normalises:
                for index in dialect.parallel(problem.width):
                    p.dnorm_weight[split, index] = T.float32(0)
            first, last, blocks = token_range(p.tokens, split, p.splits, block)
            for step in T.serial(blocks[0]):
                start = variable(first[0] + step * block)
                count = variable(T.min(block, last[0] - start))
                tile.load_grads(held, p, start, start + count)
                maps.run(held, p.z, p.s, p, start, start + count)
                for t in T.serial(count):
                    for k in dialect.parallel(outputs):
                        sums[t, k] = T.float32(0)
                if problem.normalises:
                    for t in T.serial(count):
                        tile.norm_factors(p, normed, variable(start + t), t)
                for chunk in T.serial(problem.width // width):
                    for t in T.serial(count):
                        tile.merge_again(p, staged, sums, normed, split, variable(start + t), chunk * width, t)
                    tile.add_dphi(p.dphi, staged, held.dz, split, chunk * width, count)
                    for t in T.serial(count):
                        tile.start_grads(p, staged, held, normed, start, chunk * width, t)
                    tile.add_through_z(p.phi, staged, held, chunk * width, count)
                    for t in T.serial(count):
                        tile.merge_back(p, staged, sums, variable(start + t), chunk * width, t)
                for t in T.serial(count):
                    tile.store_sums(p, sums, variable(start + t), t)
            maps.store(held, p.dalpha, p.dbias, split)

    return single_pass_backward
