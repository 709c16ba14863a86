"""merge inside of project's tiles: a tile has the same columns of all streams, so that x' is made where it is needed.

Streams are flattened, x̄ [T, nC]; a tile's columns are those of stream 0, then of stream 1, and so on.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.fused.merged_schedule import columns_of, groups
from tiles.kernels.fused.patches import Patch, Weights
from tiles.kernels.project.halves import Halves
from tiles.kernels.project.matmul_programs import factors_of, or_past, settling
from tiles.kernels.project.matmul_schedule import TiledSchedule, padded_outputs, padded_products
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.tensor_cores import PART, part, tiles_for
from tiles.lang.values import Buffer, Expr, bind, token_range

FINISH_THREADS = 256
"""Threads of a block that adds up shares."""


class Merged(NamedTuple):
    """What is linear in x' [n, T], made of the same for x and f, [n + 1, T]: Σ_j res_ij along_j + post_i along_n."""

    along: Buffer
    res: Buffer
    post: Buffer

    def __getitem__(self, index: Any) -> Expr:
        i, token = index
        n = int(self.post.shape[1])
        mixed = sum(self.res[token, i, j] * self.along[j, token] for j in range(n))
        return mixed + self.post[token, i] * self.along[n, token]


def merged_projection(problem: Problem, schedule: TiledSchedule, dialect: Dialect) -> Any:
    """The macro that merges a tile of tokens over one split's columns, and projects what comes out. `phi` is in its
    parts (`merged_halves`) where the schedule has that done before."""
    n, width, outputs, dtype = problem.streams, problem.width, problem.outputs, problem.dtype
    block, across, streams = schedule.block_tokens, schedule.block_width, tuple(range(problem.streams))
    tiles, patch = tiles_for(dialect), Patch(problem, schedule, dialect)
    columns, rows, given = columns_of(problem, schedule), padded_outputs(problem, schedule), (*streams, n)
    vector = patch.vector
    steps, weights_of = -(-width // (schedule.splits * columns)), Weights(problem, schedule, dialect)
    settle = settling(problem, schedule, dialect)

    @T.macro
    def project(
        x: Buffer,
        f: Buffer,
        post: Buffer,
        res: Buffer,
        phi: Buffer,
        x_next: Buffer,
        group: Expr,
        split: Expr,
        tokens: Expr,
        into: Any,
    ) -> None:
        tiles.resident(schedule.resident)
        staged = [tiles.operand(block, columns, dtype) for _ in given]
        upper = tiles.operand(block, across, dtype)
        factors = [upper] if dtype == PART else [tiles.operand(block, across, PART) for _ in range(2)]
        halves = tiles.operand(rows, across, PART)
        products, squares = tiles.sums(block, rows), patch.sums()
        near, own = weights_of.tile(), weights_of.own()
        taken, mixed = patch.own(n + 1, dtype), patch.own(n, dtype)
        start = bind(group * block)
        weights_of.gather(post, res, start, near)
        if not schedule.halved:
            weights = [tiles.operand(outputs, columns, "float32") for _ in streams]
            if rows > 2 * outputs:
                for k, c in dialect.lanes(rows - 2 * outputs, across):
                    halves[2 * outputs + k, c] = dialect.store(T.float32(0), PART)
        for step in tiles.steps(steps, schedule.stages):
            column = (split * steps + step) * columns
            for i in streams:
                tiles.stage(x, start, i * width + column, staged[i])
            tiles.stage(f, start, column, staged[n])
            if schedule.halved:
                tiles.stage(phi, 0, (split * steps + step) * across, halves)
            else:
                for i in streams:
                    tiles.stage(phi, 0, i * width + column, weights[i])
            for t, lane in patch.lanes():
                weights_of.fetch(near, t, own)
                patch.fetch(staged, (), t, lane, width - column, taken)
                for at in patch.steps():
                    values = [bind(dialect.load(taken[j * vector + at], dtype)) for j in given]
                    for i in streams:
                        total = own[i] * values[n] + sum(own[n + i * n + j] * values[j] for j in streams)
                        mixed[i * vector + at] = dialect.store(total, dtype)
                        rounded = bind(dialect.load(mixed[i * vector + at], dtype))
                        squares[t, lane] += rounded * rounded
                for i in streams:
                    patch.write(mixed, i, upper, t, patch.place(i, lane * vector))
                if start + t < tokens and lane * vector < width - column:
                    for i in streams:
                        patch.write(mixed, i, x_next, start + t, i * width + column + lane * vector)
            if dtype != PART:
                for t, c in dialect.lanes(block, across):
                    for p in (0, 1):
                        factors[p][t, c] = part(dialect, dialect.load(upper[t, c], dtype), p)
            if not schedule.halved:
                for k, c in dialect.lanes(outputs, columns):
                    for i in streams:
                        for p in (0, 1):
                            halves[p * outputs + k, patch.place(i, c)] = part(dialect, weights[i][k, c], p)
            for factor in factors:
                tiles.multiply(factor, halves, products, turn_b=True)
        settle(products, squares, start, tokens, into)

    return project


def merged_halves(problem: Problem, schedule: TiledSchedule, dialect: Dialect) -> Halves:
    """The parts of phi, tile by tile."""
    patch, columns, across = Patch(problem, schedule, dialect), columns_of(problem, schedule), schedule.block_width

    def origin(place: Expr) -> Expr:
        stream, within = patch.origin(place % across)
        column = place // across * columns + within
        return T.if_then_else(column < problem.width, stream * problem.width + column, problem.fan_in)

    return Halves(problem, schedule, dialect, groups(problem, schedule) * across, origin)


def merged_gradients(problem: Problem, schedule: TiledSchedule, dialect: Dialect) -> Any:
    """The macro for a tile of columns of all streams, over one split's tokens:

    x'_i = Σ_j res_ij x_j + post_i f;  g_i = dx'_i + pre_i du + dz·phi_i + 2 ds x'_i;  dphi_i = dzᵀ·x'_i;
    dx_j = Σ_i res_ij g_i;  df = Σ_i post_i g_i;  and of dpost_i = ⟨g_i, f⟩ and dres_ij = ⟨g_i, x_j⟩ this tile's share.

    Kernels before this one make dz, ds and pre; they are waited for once phi is laid out.
    """
    n, width, outputs, dtype = problem.streams, problem.width, problem.outputs, problem.dtype
    block, across, streams = schedule.block_tokens, schedule.block_width, tuple(range(problem.streams))
    tiles, patch = tiles_for(dialect), Patch(problem, schedule, dialect)
    columns, vector = columns_of(problem, schedule), patch.vector
    inner, sides, given = padded_products(problem), padded_outputs(problem, schedule), (*streams, n)
    lay_out, cut = factors_of(problem, schedule, dialect)
    count, four = n * n + n, min(4, vector)
    weights_of, stages, copied = Weights(problem, schedule, dialect), schedule.stages, (*given, *given)

    @T.macro
    def begin(
        x: Buffer, f: Buffer, dx_next: Buffer, du: Buffer, row: Expr, column: Expr, staged: Any, slot: Expr
    ) -> None:
        for i in streams:
            tiles.fetch(x, row, i * width + column, staged[i], slot)
            tiles.fetch(dx_next, row, i * width + column, staged[n + 1 + i], slot)
        tiles.fetch(f, row, column, staged[n], slot)
        tiles.fetch(du, row, column, staged[2 * n + 1], slot)

    @T.macro
    def fetch_products(near: Buffer, t: Expr, lane: Expr, own: Buffer) -> None:
        for i in streams:
            for quad in T.unroll(vector // four):
                for at in tiles.elements(four):
                    own[i * vector + quad * four + at] = near[t, i * columns + lane * vector + quad * four + at]

    @T.macro
    def spread(
        x: Buffer,
        f: Buffer,
        post: Buffer,
        res: Buffer,
        phi: Buffer,
        dz: Buffer,
        ds: Buffer,
        pre: Buffer,
        du: Buffer,
        dx_next: Buffer,
        dx: Buffer,
        df: Buffer,
        dphi: Buffer,
        shares: Buffer,
        group: Expr,
        split: Expr,
        tokens: Expr,
        splits: Expr,
    ) -> None:
        tiles.resident(schedule.resident)
        left, right = tiles.operand(block, inner, PART), tiles.operand(block, sides, PART)
        weights, near = tiles.operand(inner, across, PART), tiles.operand(max(block, sides), across, "float32")
        upper, settling = tiles.operand(block, across, dtype), tiles.operand(block, count, "float32")
        factors = [upper] if dtype == PART else [tiles.operand(block, across, PART) for _ in range(2)]
        tiles.pad(near)
        grads, sums = tiles.sums(block, across), tiles.sums(across, sides)
        staged = [tiles.slots(stages, block, columns, dtype) for _ in copied]
        parts, totals = patch.held(count, "float32"), tiles.totals(block, count)
        taken, mixed, spreading = patch.own(2 * (n + 1), dtype), patch.own(n, dtype), patch.own(n + 1, dtype)
        products, shares_of = patch.own(n, "float32"), T.alloc_local((count,), "float32")
        mixes, own = weights_of.tile(), weights_of.own()
        column = bind(group * columns)
        lay_out(phi, weights, left, right, [(i * columns, i * width + column) for i in streams], columns)
        dialect.await_last(schedule.overlap)
        first, last, blocks = token_range(tokens, split, splits, block)
        for step in T.serial(stages - 1):
            begin(x, f, dx_next, du, or_past(first[0] + step * block, last[0], tokens), column, staged, step)
        for step in T.serial(blocks[0]):
            start = bind(first[0] + step * block)
            if stages == 1:
                begin(x, f, dx_next, du, start, column, staged, 0)
            cut(dz, left, right, start)
            for t, c in dialect.lanes(block, across):
                grads[t, c] = T.float32(0)
            tiles.multiply(left, weights, grads)
            for t, c in dialect.lanes(block, across):
                near[t, c] = grads[t, c]
            weights_of.gather(post, res, start, mixes)
            weights_of.add(pre, start, mixes)
            tiles.arrived(max(0, stages - 2) * len(copied))
            if stages > 1:
                ahead = bind(step + stages - 1)
                row = bind(or_past(first[0] + ahead * block, last[0], tokens))
                begin(x, f, dx_next, du, row, column, staged, ahead % stages)
            for t, lane in patch.lanes():
                patch.fetch(staged, (step % stages,), t, lane, width - column, taken)
                fetch_products(near, t, lane, products)
                weights_of.fetch(mixes, t, own)
                length = bind(2 * ds[start + t])
                for k in T.unroll(count):
                    shares_of[k] = T.float32(0)
                for at in patch.steps():
                    values = [bind(dialect.load(taken[j * vector + at], dtype)) for j in given]
                    uppers = [bind(dialect.load(taken[(n + 1 + i) * vector + at], dtype)) for i in given]
                    for i in streams:
                        total = own[i] * values[n] + sum(own[n + i * n + j] * values[j] for j in streams)
                        mixed[i * vector + at] = dialect.store(total, dtype)
                        beside = uppers[i] + own[count + i] * uppers[n]
                        rounded = dialect.load(mixed[i * vector + at], dtype)
                        products[i * vector + at] += beside + length * rounded
                    lower = [bind(products[i * vector + at]) for i in streams]
                    for j in streams:
                        total = sum(own[n + i * n + j] * lower[i] for i in streams)
                        spreading[j * vector + at] = dialect.store(total, dtype)
                    spreading[n * vector + at] = dialect.store(sum(own[i] * lower[i] for i in streams), dtype)
                    for i in streams:
                        shares_of[i] += lower[i] * values[n]
                        for j in streams:
                            shares_of[n + i * n + j] += lower[i] * values[j]
                for i in streams:
                    patch.write(mixed, i, upper, t, patch.place(i, lane * vector))
                for k in T.unroll(count):
                    parts[t, lane, k] = shares_of[k]
                if start + t < last[0] and lane * vector < width - column:
                    for i in streams:
                        patch.write(spreading, i, dx, start + t, i * width + column + lane * vector)
                    patch.write(spreading, n, df, start + t, column + lane * vector)
            tiles.lane_totals(parts, totals)
            for t, k in dialect.lanes(block, count):
                settling[t, k] = totals[t, k]
            for t, k in dialect.lanes(block, count):
                if start + t < last[0]:
                    shares[group, (start + t) * count + k] = bind(settling[t, k])
            if dtype != PART:
                for t, c in dialect.lanes(block, across):
                    for p in (0, 1):
                        factors[p][t, c] = part(dialect, dialect.load(upper[t, c], dtype), p)
            for factor in factors:
                tiles.multiply(factor, right, sums, turn_a=True)
        for c, k in dialect.lanes(across, sides):
            near[k, c] = sums[c, k]
        for k, c in dialect.lanes(outputs, columns):
            if column + c < width:
                for i in streams:
                    both = near[k, patch.place(i, c)] + near[outputs + k, patch.place(i, c)]
                    dphi[split, k, i * width + column + c] = both

    return spread


def finishing(problem: Problem, parts: int, dialect: Dialect) -> Any:
    """The macro that adds up the shares of dpost and dres of all tiles, in their order."""
    n, count = problem.streams, problem.streams**2 + problem.streams

    @T.macro
    def finish(shares: Buffer, dpost: Buffer, dres: Buffer, block: Expr, tokens: Expr) -> None:
        for lane in dialect.lanes(FINISH_THREADS):
            if block * FINISH_THREADS + lane < tokens * count:
                total = T.alloc_var("float32", init=0.0)
                for group in T.unroll(parts, unroll_factor=16):
                    total += shares[group, block * FINISH_THREADS + lane]
                token, k = (block * FINISH_THREADS + lane) // count, (block * FINISH_THREADS + lane) % count
                if k < n:
                    dpost[token, k] = total
                else:
                    dres[token, (k - n) // n, (k - n) % n] = total

    return finish
