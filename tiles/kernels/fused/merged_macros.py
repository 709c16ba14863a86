"""Macros of step and single_pass with merge inside of project's tiles: a tile has the same columns of all streams, so
that x' is made where it is used.

Streams are flattened, x̄ [T, nC]; a tile's columns are those of stream 0, then of stream 1, and so on.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.apply.merge import merged, merged_back, weighted
from tiles.kernels.fused.merged_schedule import columns_of, frees_early, groups, summed
from tiles.kernels.fused.staged_tiles import StagedTiles
from tiles.kernels.fused.thread_tile import ThreadTile, Weights
from tiles.kernels.project.presplit_phi import PresplitPhi
from tiles.kernels.project.tensor_core_programs import epilogue_store_of, factors_of, or_past
from tiles.kernels.project.tensor_core_schedule import TiledSchedule, padded_outputs, padded_products
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cuda
from tiles.lang.tensor_cores import OPERAND, TensorCores, split_bf16x2
from tiles.lang.values import Buffer, Expr, bind, token_range

JOIN_TILES_THREADS = 256
"""Threads of a block that adds up the sums of all tiles."""


class MergedDots(NamedTuple):
    """⟨du, x'_i⟩ as [n, T], from `stream_dots` [n + 1, T], the same of x and at last f: the dot is linear in x'."""

    stream_dots: Buffer
    res: Buffer | None
    post: Buffer

    def __getitem__(self, index: Any) -> Expr:
        i, token = index
        n, res = int(self.post.shape[1]), self.res
        of_f = self.post[token, i] * self.stream_dots[n, token]
        if res is None:
            return self.stream_dots[i, token] + of_f
        return weighted([res[token, i, j] for j in range(n)], [self.stream_dots[j, token] for j in range(n)]) + of_f


def merged_projection(problem: Problem, schedule: TiledSchedule, dialect: Cuda) -> Any:
    """The macro that merges a tile of tokens over one split's columns, and projects what comes out; where one pass does
    all, it also weighs it with `pre`, which makes u. `phi` is in its parts (`presplit_merged`) where the schedule has
    that done before."""
    n, width, outputs, dtype = problem.streams, problem.width, problem.outputs, problem.dtype
    block, across, streams = schedule.block_tokens, schedule.block_width, tuple(range(problem.streams))
    tiles, patch = TensorCores(dialect), ThreadTile(problem, schedule, dialect)
    columns, rows, given = columns_of(problem, schedule), padded_outputs(problem, schedule), (*streams, n)
    vector, aggregates = patch.vector, problem.base_op == "single_pass"
    steps, weights_of = -(-width // (schedule.splits * columns)), Weights(problem, schedule, dialect)
    epilogue_store = epilogue_store_of(problem, schedule, dialect)

    @T.macro
    def project(p: Any, phi: Buffer, group: Expr, split: Expr, tokens: Expr, into: Any) -> None:
        tiles.min_blocks_per_sm(schedule.min_blocks_per_sm)
        staged = [tiles.smem(block, columns, dtype) for _ in given]
        upper = tiles.smem(block, across, dtype)
        factors = [upper] if dtype == OPERAND else [tiles.smem(block, across, OPERAND) for _ in range(2)]
        phi_tile = tiles.smem(rows, across, OPERAND)
        products, squares = tiles.accumulator(block, rows), patch.sums()
        smem_weights, held = weights_of.tile(), weights_of.registers()
        taken, mixed = patch.registers(n + 1, dtype), patch.registers(n, dtype)
        if aggregates:
            gathered = patch.registers(1, dtype)
        start = bind(group * block)
        weights_of.gather(p, start, smem_weights)
        if aggregates:
            weights_of.add(p.pre, start, smem_weights)
        if not schedule.presplit_phi:
            weights = [tiles.smem(outputs, columns, "float32") for _ in streams]
            if rows > 2 * outputs:
                for k, c in dialect.parallel(rows - 2 * outputs, across):
                    phi_tile[2 * outputs + k, c] = dialect.store(T.float32(0), OPERAND)
        for step in tiles.pipelined(steps, schedule.stages):
            column = (split * steps + step) * columns
            for i in streams:
                tiles.copy_g2s(p.x, start, i * width + column, staged[i])
            tiles.copy_g2s(p.f, start, column, staged[n])
            if schedule.presplit_phi:
                tiles.copy_g2s(phi, 0, (split * steps + step) * across, phi_tile)
            else:
                for i in streams:
                    tiles.copy_g2s(phi, 0, i * width + column, weights[i])
            for t, thread in patch.threads():
                weights_of.load(smem_weights, t, held)
                patch.load(staged, t, thread, width - column, taken)
                for at in patch.steps():
                    values = [bind(dialect.load(taken[j * vector + at], dtype)) for j in given]
                    for i in streams:
                        total = merged(weights_of.res(held), values[:n], weights_of.gates(held), values[n], i)
                        mixed[i * vector + at] = dialect.store(total, dtype)
                        rounded = bind(dialect.load(mixed[i * vector + at], dtype))
                        squares[t, thread] += rounded * rounded
                    if aggregates:
                        merged_values = [bind(dialect.load(mixed[i * vector + at], dtype)) for i in streams]
                        total_u = weighted([held[problem.weights + i] for i in streams], merged_values)
                        gathered[at] = dialect.store(total_u, dtype)
                for i in streams:
                    patch.write(mixed, i, upper, t, patch.swizzled(i, thread * vector))
                if start + t < tokens and thread * vector < width - column:
                    for i in streams:
                        patch.write(mixed, i, p.x_next, start + t, i * width + column + thread * vector)
                    if aggregates:
                        patch.write(gathered, 0, p.u, start + t, column + thread * vector)
            if dtype != OPERAND:
                for t, c in dialect.parallel(block, across):
                    for which in (0, 1):
                        factors[which][t, c] = split_bf16x2(dialect, dialect.load(upper[t, c], dtype), which)
            if not schedule.presplit_phi:
                for k, c in dialect.parallel(outputs, columns):
                    for i in streams:
                        for which in (0, 1):
                            phi_tile[which * outputs + k, patch.swizzled(i, c)] = split_bf16x2(
                                dialect, weights[i][k, c], which
                            )
            for factor in factors:
                tiles.gemm(factor, phi_tile, products, transpose_b=True)
        epilogue_store(products, squares, start, tokens, into)

    return project


def presplit_merged(problem: Problem, schedule: TiledSchedule, dialect: Cuda) -> PresplitPhi:
    """The parts of phi, tile by tile."""
    patch, columns, across = ThreadTile(problem, schedule, dialect), columns_of(problem, schedule), schedule.block_width

    def origin(place: Expr) -> Expr:
        stream, within = patch.origin(place % across)
        column = place // across * columns + within
        return T.if_then_else(column < problem.width, stream * problem.width + column, problem.fan_in)

    return PresplitPhi(problem, schedule, dialect, groups(problem, schedule) * across, origin)


def merged_gradients(problem: Problem, schedule: TiledSchedule, dialect: Cuda) -> Any:
    """The macro for a tile of columns of all streams, over one split's tokens:

    x'_i = Σ_j res_ij x_j + post_i f;  g_i = dx'_i + pre_i du + dz·phi_i + 2 ds x'_i;  dphi_i = dzᵀ·x'_i;
    dx_j = Σ_i res_ij g_i;  df = Σ_i post_i g_i;  and of dpost_i = ⟨g_i, f⟩, dres_ij = ⟨g_i, x_j⟩ where res is not the
    identity, and dpre_i = ⟨du, x'_i⟩ where one pass does all, this tile's share.

    Kernels before this one make dz, ds and, in step, pre; they are waited for once phi is in shared memory.
    """
    n, width, outputs, dtype = problem.streams, problem.width, problem.outputs, problem.dtype
    block, across, streams = schedule.block_tokens, schedule.block_width, tuple(range(problem.streams))
    tiles, patch = TensorCores(dialect), ThreadTile(problem, schedule, dialect)
    columns, vector = columns_of(problem, schedule), patch.vector
    inner, sides, given = padded_products(problem), padded_outputs(problem, schedule), (*streams, n)
    load_phi, split_dz = factors_of(problem, schedule, dialect)
    matrix, count, four = problem.weights, summed(problem), min(4, vector)
    weights_of, stages, copied = Weights(problem, schedule, dialect), schedule.stages, (*given, *given)
    ahead_of_turn = StagedTiles(problem, schedule, dialect)
    begin = ahead_of_turn.begin
    early = frees_early(problem, schedule)
    under_way = stages if early else stages - 1

    def element(taken: Any, number: int, t: Expr, thread: Expr, at: Expr) -> Expr:
        """What a thread has taken of one of the tiles."""
        return bind(dialect.load(taken[number][t, thread, at] if early else taken[number * vector + at], dtype))

    @T.macro
    def load_products(smem_products: Buffer, t: Expr, thread: Expr, into: Buffer) -> None:
        for i in streams:
            for quad in T.unroll(vector // four):
                for at in tiles.vectorized(four):
                    into[i * vector + quad * four + at] = smem_products[
                        t, i * columns + thread * vector + quad * four + at
                    ]

    @T.macro
    def dx_dphi_tile(p: Any, group: Expr, split: Expr, tokens: Expr, splits: Expr) -> None:
        tiles.min_blocks_per_sm(schedule.min_blocks_per_sm)
        left, right = tiles.smem(block, inner, OPERAND), tiles.smem(block, sides, OPERAND)
        weights, smem_products = tiles.smem(inner, across, OPERAND), tiles.smem(block, across, "float32")
        upper, smem_sums = tiles.smem(block, across, dtype), tiles.smem(block, count, "float32")
        factors = [upper] if dtype == OPERAND else [tiles.smem(block, across, OPERAND) for _ in range(2)]
        smem_gradients = tiles.smem(sides, across, "float32")
        tiles.pad_rows(smem_products, smem_gradients)
        grads, sums = tiles.accumulator(block, across), tiles.accumulator(across, sides)
        staged = ahead_of_turn.allocate()
        parts, totals = patch.fragment(count, "float32"), tiles.reduced(block, count)
        mixed = patch.registers(n, dtype)
        taken = [patch.fragment(vector, dtype) for _ in copied] if early else patch.registers(len(copied), dtype)
        results = patch.registers(n + 1, dtype)
        products, dots = patch.registers(n, "float32"), T.alloc_local((count,), "float32")
        smem_weights, held = weights_of.tile(), weights_of.registers()
        column = bind(group * columns)
        load_phi(p.phi, weights, left, right, lambda c: c // columns * width + column + c % columns)
        dialect.pdl_wait(schedule.use_pdl)
        first, last, blocks = token_range(tokens, split, splits, block)
        for step in T.serial(under_way):
            begin(p, or_past(first[0] + step * block, last[0], tokens), column, staged, step)
        for step in T.serial(blocks[0]):
            start = bind(first[0] + step * block)
            if under_way == 0:
                begin(p, start, column, staged, 0)
            split_dz(p.dz, left, right, start)
            for t, c in dialect.parallel(block, across):
                grads[t, c] = T.float32(0)
            tiles.gemm(left, weights, grads)
            for t, c in dialect.parallel(block, across):
                smem_products[t, c] = grads[t, c]
            weights_of.gather(p, start, smem_weights)
            weights_of.add(p.pre, start, smem_weights)
            tiles.cp_async_wait_group(max(0, under_way - 1) * ahead_of_turn.count)
            if early:
                for t, thread in patch.threads():
                    patch.hold(ahead_of_turn.of(staged, step % stages), t, thread, width - column, taken)
            if under_way > 0:
                ahead = bind(step + under_way)
                row = bind(or_past(first[0] + ahead * block, last[0], tokens))
                begin(p, row, column, staged, ahead % stages)
            for t, thread in patch.threads():
                if not early:
                    patch.load(ahead_of_turn.of(staged, step % stages), t, thread, width - column, taken)
                load_products(smem_products, t, thread, products)
                weights_of.load(smem_weights, t, held)
                length = bind(2 * p.ds[start + t])
                for k in T.unroll(count):
                    dots[k] = T.float32(0)
                for at in patch.steps():
                    values = [element(taken, j, t, thread, at) for j in given]
                    uppers = [element(taken, n + 1 + i, t, thread, at) for i in given]
                    for i in streams:
                        total = merged(weights_of.res(held), values[:n], weights_of.gates(held), values[n], i)
                        mixed[i * vector + at] = dialect.store(total, dtype)
                        extra_grad = uppers[i] + held[matrix + i] * uppers[n]
                        rounded = bind(dialect.load(mixed[i * vector + at], dtype))
                        if count > matrix:
                            dots[matrix + i] += uppers[n] * rounded
                        products[i * vector + at] += extra_grad + length * rounded
                    lower = [bind(products[i * vector + at]) for i in streams]
                    for j in streams:
                        results[j * vector + at] = dialect.store(merged_back(weights_of.res(held), lower, j), dtype)
                    results[n * vector + at] = dialect.store(weighted(weights_of.gates(held), lower), dtype)
                    for i in streams:
                        dots[i] += lower[i] * values[n]
                        if problem.mixes:
                            for j in streams:
                                dots[n + i * n + j] += lower[i] * values[j]
                for i in streams:
                    patch.write(mixed, i, upper, t, patch.swizzled(i, thread * vector))
                for k in T.unroll(count):
                    parts[t, thread, k] = dots[k]
                if start + t < last[0] and thread * vector < width - column:
                    for i in streams:
                        patch.write(results, i, p.dx, start + t, i * width + column + thread * vector)
                    patch.write(results, n, p.df, start + t, column + thread * vector)
            tiles.sum_over_axis_1(parts, totals)
            for t, k in dialect.parallel(block, count):
                smem_sums[t, k] = totals[t, k]
            for t, k in dialect.parallel(block, count):
                if start + t < last[0]:
                    p.tile_sums[group, (start + t) * count + k] = bind(smem_sums[t, k])
            if dtype != OPERAND:
                for t, c in dialect.parallel(block, across):
                    for which in (0, 1):
                        factors[which][t, c] = split_bf16x2(dialect, dialect.load(upper[t, c], dtype), which)
            for factor in factors:
                tiles.gemm(factor, right, sums, transpose_a=True)
        tiles.cp_async_wait_group(0)  # the sums may lie where stages do, to which zeros of no token are still copied
        for c, k in dialect.parallel(across, sides):
            smem_gradients[k, c] = sums[c, k]
        for k, c in dialect.parallel(outputs, columns):
            if column + c < width:
                for i in streams:
                    # Bound to a name outside of loops, what is read would be kept in memory of its own all through
                    # the kernel (TileLang 0.1.15).
                    p.dphi[split, k, i * width + column + c] = (
                        smem_gradients[k, patch.swizzled(i, c)] + smem_gradients[outputs + k, patch.swizzled(i, c)]
                    )

    return dx_dphi_tile


def tile_sums_joined(problem: Problem, parts: int, dialect: Cuda) -> Any:
    """The macro that adds up the parts of dpost, dres and dpre of all tiles, in their order."""
    n, matrix, count = problem.streams, problem.weights, summed(problem)

    @T.macro
    def put_dpre(p: Any, token: Expr, i: Expr, total: Expr) -> None:
        if count > matrix:
            p.dpre[token, i] = total

    @T.macro
    def join_tiles(p: Any, block: Expr, tokens: Expr) -> None:
        for thread in dialect.parallel(JOIN_TILES_THREADS):
            if block * JOIN_TILES_THREADS + thread < tokens * count:
                total = T.alloc_var("float32", init=0.0)
                for group in T.unroll(parts, unroll_factor=16):
                    total += p.tile_sums[group, block * JOIN_TILES_THREADS + thread]
                token = (block * JOIN_TILES_THREADS + thread) // count
                k = (block * JOIN_TILES_THREADS + thread) % count
                if k < n:
                    p.dpost[token, k] = total
                else:
                    if problem.mixes:
                        if k < matrix:
                            p.dres[token, (k - n) // n, (k - n) % n] = total
                        else:
                            put_dpre(p, token, k - matrix, total)
                    else:
                        put_dpre(p, token, k - matrix, total)

    return join_tiles
