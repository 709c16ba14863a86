"""single_pass as TileLang programs (DeepSeek-V4.1's report, equation 6): all that the streams are multiplied with at a
boundary is known before they are read, so a tile of tokens × columns of all streams is done when it is loaded. Here are
those for a CPU; `cuda_programs` has those for CUDA.

Streams are flattened, x [T, nC]: stream i of a token begins at column i·C.
"""

from collections.abc import Sequence
from typing import Any

import tilelang.language as T

from tiles.kernels.apply.merge import Matrix, merged, merged_back, weighted
from tiles.kernels.coefficients import gates
from tiles.kernels.fused.chain_schedule import ChainSchedule
from tiles.kernels.fused.signature import next_maps
from tiles.kernels.limits import divisors
from tiles.kernels.project.programs import output_groups, prefetch_of
from tiles.kernels.single_pass import cuda_programs, signature
from tiles.kernels.single_pass.schedule import Schedule, SinglePassSchedule, tile_row
from tiles.kernels.spec import Problem
from tiles.lang.columns import Columns
from tiles.lang.dialect import Cpu, Cuda, Dialect, View
from tiles.lang.program import program
from tiles.lang.rows import SourceRow
from tiles.lang.values import Buffer, Expr, as_value, bind, token_range, variable

DOTS_WIDTH = 640
"""Most columns of a register block of dot products: what they read stays in an L1 cache."""


def forward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """x'_ic = Σ_j res_ij x_jc + post_i f_c;  u'_c = Σ_i pre_i x'_ic;  z', s' of x', and the next maps from them."""
    if isinstance(schedule, ChainSchedule):
        assert isinstance(dialect, Cuda)
        return cuda_programs.forward(problem, schedule, dialect)
    assert isinstance(dialect, Cpu)
    block, rows = schedule.block_tokens, schedule.register_tokens
    tile, maps = _Forward(problem, schedule, dialect), gates.Forward(problem, block, dialect)

    @program(signature.single_pass(problem), dialect)
    def single_pass_forward(p: Any) -> None:
        with dialect.kernel(T.ceildiv(p.tokens, block), threads=0) as step:
            start, last = variable(step * block), as_value(p.tokens)
            count, held = variable(T.min(block, last - start)), maps.scratch()
            for r in T.serial(T.ceildiv(count, rows)):
                tile.run(p, start + r * rows, last)
            maps.run(held, p.z, p.s, p, start, last)
            maps.store(held, p.renamed(**next_maps(problem)), p.pre_next, start, last)

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
    block, rows, width = schedule.block_tokens, schedule.register_tokens, schedule.block_width
    tile, maps = _Backward(problem, schedule, dialect), gates.Backward(problem, block, dialect)
    row = tile_row(problem, schedule)

    @program(signature.single_pass(problem), dialect)
    def single_pass_backward(p: Any) -> None:
        with dialect.kernel(p.splits, threads=0) as split:
            held, sums = maps.scratch(), dialect.scratch(block, outputs)
            staged, grads, phi = (dialect.scratch(count, row) for count in (block, rows, outputs))
            maps.clear(held)
            for k in T.serial(outputs):
                for index in dialect.parallel(fan_in):
                    p.dphi[split, k, index] = T.float32(0)
            first, last, blocks = token_range(p.tokens, split, p.splits, block)
            for step in T.serial(blocks[0]):
                start = variable(first[0] + step * block)
                count = variable(T.min(block, last[0] - start))
                tile.load_grads(held, p, start, last[0])
                maps.run(held, p.z, p.s, p, start, last[0])
                for t in T.serial(count):
                    for k in dialect.parallel(outputs):
                        sums[t, k] = T.float32(0)
                for chunk in T.serial(problem.width // width):
                    tile.load_phi(p.phi, phi, chunk * width)
                    for t in T.serial(count):
                        tile.merge_again(p, staged, sums, variable(start + t), chunk * width, t)
                    tile.add_dphi(p.dphi, staged, held.dz, split, chunk * width, count)
                    for r in T.serial(T.ceildiv(count, rows)):
                        tile.add_dx_next(p, phi, staged, grads, held, start, chunk * width, r * rows, count)
                        for t in T.serial(T.min(rows, count - r * rows)):
                            tile.merge_back(
                                p, grads, sums, variable(start + r * rows + t), chunk * width, t, r * rows + t
                            )
                for t in T.serial(count):
                    tile.store_sums(p, sums, variable(start + t), t)
            maps.store(held, p.dalpha, p.dbias, split)

    return single_pass_backward


class _Tile:
    """What both passes share. `staged` has x' of tokens, rounded as streams are, in rows of n · block_width columns."""

    def __init__(self, problem: Problem, schedule: SinglePassSchedule, dialect: Cpu) -> None:
        n, dtype, width = problem.streams, problem.dtype, schedule.block_width
        self.streams = streams = tuple(range(n))
        self.groups = output_groups(problem.outputs, schedule.register_outputs)
        columns = Columns(width, dtype, dialect, nontemporal=bool(schedule.nontemporal))

        def place(i: Expr, column: Expr) -> Expr:
            return i * problem.width + column

        def load(p: Any, token: Expr, column: Expr) -> tuple[list[SourceRow], SourceRow]:
            """The rows of x and f, from a token's column on."""
            state, sublayer = [columns.row(p.x) for _ in streams], columns.row(p.f)
            for i in streams:
                state[i].load(token, place(i, column))
            sublayer.load(token, column)
            return state, sublayer

        def x_next(given: tuple[list[SourceRow], SourceRow], res: Any, post: Any, index: Any) -> list[Expr]:
            """x' of one column of a token, rounded to the streams' dtype."""
            state, sublayer = given
            values, added = [row.get(index) for row in state], sublayer.get(index)
            return [bind(dialect.rounded(merged(res, values, post, added, i), dtype)) for i in streams]

        @T.macro
        def prefetch(streams_of: Sequence[Buffer], rows_of: Sequence[Buffer], token: Expr, column: Expr) -> None:
            """Say that a token's next block of columns is needed soon."""
            for i in streams:
                dialect.prefetch(tuple(streams_of), token, place(i, column + width), width)
            dialect.prefetch(tuple(rows_of), token, column + width, width)

        self.columns, self.place, self.load, self.x_next = columns, place, load, x_next
        self.prefetch, self._mixes = prefetch, problem.mixes

    def weights(self, p: Any, token: Expr) -> tuple[list[Expr], list[Expr], Matrix]:
        """pre, post and res of a token."""
        pre, post = ([bind(gate[token, i]) for i in self.streams] for gate in (p.pre, p.post))
        if not self._mixes:
            return pre, post, None
        return pre, post, [[bind(p.res[token, i, j]) for j in self.streams] for i in self.streams]


class _Forward(_Tile):
    """The macro `run` for a register block of tokens, start..start + register_tokens as far as below `last`."""

    def __init__(self, problem: Problem, schedule: SinglePassSchedule, dialect: Cpu) -> None:
        super().__init__(problem, schedule, dialect)
        streams, groups, width = self.streams, self.groups, schedule.block_width
        rows, dots_width = schedule.register_tokens, divisors(width, 8, DOTS_WIDTH)[-1]
        parts, columns = width // dots_width, self.columns
        prefetch = prefetch_of(problem, dots_width, groups, dialect)

        @T.macro
        def merge(p: Any, staged: Buffer, squares: Buffer, token: Expr, column: Expr, row: Expr) -> None:
            """x' and u' of a token's columns, into `staged` as well; their squares are added to squares[row]."""
            pre, post, res = self.weights(p, token)
            total, given = dialect.accumulator(width), self.load(p, token, column)
            mixed, gathered = [columns.result(p.x_next) for _ in streams], columns.row(p.u)
            for i in streams:
                mixed[i].store_at(token, self.place(i, column))
            gathered.store_at(token, column)
            for outer in columns.outer():
                for inner in columns.inner():
                    values = self.x_next(given, res, post, columns.index(outer, inner))
                    for i in streams:
                        mixed[i].put(columns.index(outer, inner), values[i], rounded=True)
                        staged[row, i * width + columns.place(outer, inner)] = values[i]
                        total[0] += values[i] * values[i]
                    gathered.put(columns.index(outer, inner), weighted(pre, values))
            for i in streams:
                mixed[i].flush()
            squares[row] = squares[row] + total[0]

        @T.macro
        def add_group(
            dots: Buffer, staged: Buffer, phi: Buffer, within: Expr, column: Expr, k: Expr, size: int
        ) -> None:
            sums, values = View(dots, (0, k, 0), (0, 1)), View(staged, (0, within), (0, 1))
            dialect.add_dots(sums, values, View(phi, (k, column), (0, 1)), rows, size, dots_width)

        @T.macro
        def project(p: Any, staged: Buffer, dots: Buffer, start: Expr, column: Expr) -> None:
            """Add the staged columns' products with phi to the sums, and bring in those of the next tokens."""
            for part in T.serial(problem.streams * parts):
                within, at = part * dots_width, self.place(part // parts, column) + part % parts * dots_width
                for g in T.serial(groups.whole):
                    prefetch((p.x, p.f), [start + rows + t for t in range(rows)], at, g)
                    add_group(dots, staged, p.phi, within, at, g * groups.size, groups.size)
                if groups.rest > 0:
                    prefetch((p.x, p.f), [start + rows + t for t in range(rows)], at, groups.whole)
                    add_group(dots, staged, p.phi, within, at, groups.whole * groups.size, groups.rest)

        @T.macro
        def run(p: Any, start: Expr, last: Expr) -> None:
            staged, squares = dialect.scratch(rows, tile_row(problem, schedule)), dialect.scratch(rows)
            dots = dialect.dot_sums(rows, problem.outputs)
            for t in T.serial(rows):
                squares[t] = T.float32(0)
            for chunk in T.serial(problem.width // width):
                for t in T.serial(rows):
                    merge(p, staged, squares, variable(T.min(start + t, last - 1)), chunk * width, t)
                project(p, staged, dots, start, chunk * width)
            for t in T.serial(T.min(rows, last - start)):
                p.s[start + t] = squares[t]
                for k in dialect.parallel(problem.outputs):
                    p.z[start + t, k] = dialect.dot_sum(dots, t, k)

        self.run = run


class _Backward(_Tile):
    """The macros of the backward. `sums` [block_tokens, N] are of dpre, dpost and dres, in this order."""

    def __init__(self, problem: Problem, schedule: SinglePassSchedule, dialect: Cpu) -> None:
        super().__init__(problem, schedule, dialect)
        streams, groups, width, dtype = self.streams, self.groups, schedule.block_width, problem.dtype
        n, block, rows = problem.streams, schedule.block_tokens, schedule.register_tokens
        columns = self.columns

        @T.macro
        def load_grads(held: Any, p: Any, start: Expr, last: Expr) -> None:
            """Gradients of the next maps, of a block of tokens."""
            for i in T.serial(n):
                for index in dialect.parallel(block):
                    held.dpre[i, index] = p.dpre_next[T.min(start + index, last - 1), i]
                    held.dpost[i, index] = p.dpost_next[T.min(start + index, last - 1), i]
            if problem.mixes:
                for i, j in T.grid(n, n):
                    for index in dialect.parallel(block):
                        held.dres[i, j, index] = p.dres_next[T.min(start + index, last - 1), i, j]

        @T.macro
        def load_phi(phi: Buffer, into: Buffer, column: Expr) -> None:
            """The block's columns of phi, side by side: rows of phi itself may all begin in one set of a cache."""
            for k, i in T.grid(problem.outputs, n):
                for index in dialect.parallel(width):
                    into[k, i * width + index] = phi[k, self.place(i, column) + index]

        @T.macro
        def merge_again(p: Any, staged: Buffer, sums: Buffer, token: Expr, column: Expr, row: Expr) -> None:
            """x' of a token's columns, into `staged`, and their part of dpre."""
            _pre, post, res = self.weights(p, token)
            self.prefetch((p.x, p.dx_next), (p.f, p.du), token, column)
            totals, given, upper = (
                [dialect.accumulator(width) for _ in streams],
                self.load(p, token, column),
                columns.row(p.du),
            )
            upper.load(token, column)
            for outer in columns.outer():
                for inner in columns.inner():
                    values, grad = (
                        self.x_next(given, res, post, columns.index(outer, inner)),
                        upper.get(columns.index(outer, inner)),
                    )
                    for i in streams:
                        staged[row, i * width + columns.place(outer, inner)] = values[i]
                        totals[i][0] += grad * values[i]
            for i in streams:
                sums[row, i] = sums[row, i] + totals[i][0]

        @T.macro
        def add_group(
            dphi: Buffer,
            staged: Buffer,
            dz: Buffer,
            split: Expr,
            i: Expr,
            column: Expr,
            k: Expr,
            size: int,
            count: Expr,
        ) -> None:
            out, of_tokens = View(dphi, (split, k, self.place(i, column)), (1, 2)), View(dz, (k, 0), (0, 1))
            dialect.add_product(out, of_tokens, View(staged, (0, i * width), (0, 1)), size, count, width)

        @T.macro
        def add_dphi(dphi: Buffer, staged: Buffer, dz: Buffer, split: Expr, column: Expr, count: Expr) -> None:
            """dphi += dzᵀ·x' of the staged tokens."""
            for i in T.serial(n):
                for g in T.serial(groups.whole):
                    add_group(dphi, staged, dz, split, i, column, g * groups.size, groups.size, count)
                if groups.rest > 0:
                    add_group(dphi, staged, dz, split, i, column, groups.whole * groups.size, groups.rest, count)

        @T.macro
        def add_dx_next(
            p: Any,
            phi: Buffer,
            staged: Buffer,
            grads: Buffer,
            held: Any,
            start: Expr,
            column: Expr,
            first: Expr,
            count: Expr,
        ) -> None:
            """g of the tokens first .. first + register_tokens of a block: dx' + pre·du' + dz'·phi + 2x'·ds'."""
            for t in T.serial(rows):
                at = variable(T.min(first + t, count - 1))
                token = variable(start + at)
                slope = bind(2 * held.ds[at])
                for i in T.serial(n):
                    gate = bind(p.pre[token, i])
                    for index in dialect.parallel(width):
                        of_u = dialect.load(p.du[token, column + index], dtype)
                        of_x_next = dialect.load(p.dx_next[token, self.place(i, column + index)], dtype)
                        of_s = slope * staged[at, i * width + index]
                        grads[t, i * width + index] = of_x_next + gate * of_u + of_s
            for i in T.serial(n):
                out, of_outputs = View(grads, (0, i * width), (0, 1)), View(held.dz, (0, first), (1, 0))
                dialect.add_product(out, of_outputs, View(phi, (0, i * width), (0, 1)), rows, problem.outputs, width)

        @T.macro
        def add_dots(
            of: Buffer,
            column: Expr,
            grads: Buffer,
            sums: Buffer,
            token: Expr,
            row: Expr,
            place: Expr,
            first: Expr,
            step: int,
        ) -> None:
            """Add ⟨g_i, of⟩ over a token's columns to every `step`-th sum from `first` on."""
            totals = [dialect.accumulator(width) for _ in streams]
            for index in dialect.parallel(width):
                value = bind(dialect.load(of[token, column + index], dtype))
                for i in streams:
                    totals[i][0] += grads[row, i * width + index] * value
            for i in streams:
                sums[place, first + i * step] = sums[place, first + i * step] + totals[i][0]

        @T.macro
        def merge_back(p: Any, grads: Buffer, sums: Buffer, token: Expr, column: Expr, row: Expr, place: Expr) -> None:
            """dx and df of a token's columns, and their part of dpost and dres, from its row of g. Sums have loops of
            their own: those of all streams would not fit the registers."""
            _pre, post, res = self.weights(p, token)
            add_dots(p.f, column, grads, sums, token, row, place, n, 1)
            if problem.mixes:
                for j in streams:
                    add_dots(p.x, self.place(j, column), grads, sums, token, row, place, 2 * n + j, n)
            state_grads, sublayer_grads = [columns.result(p.dx) for _ in streams], columns.result(p.df)
            for j in streams:
                state_grads[j].store_at(token, self.place(j, column))
            sublayer_grads.store_at(token, column)
            for outer in columns.outer():
                for inner in columns.inner():
                    at = columns.place(outer, inner)
                    upper = [bind(grads[row, i * width + at]) for i in streams]
                    sublayer_grads.put(columns.index(outer, inner), weighted(post, upper))
                    for j in streams:
                        state_grads[j].put(columns.index(outer, inner), merged_back(res, upper, j))
            for result in (*state_grads, sublayer_grads):
                result.flush()

        @T.macro
        def store_sums(p: Any, sums: Buffer, token: Expr, row: Expr) -> None:
            """dpre, dpost and dres of a token."""
            for i in T.serial(n):
                p.dpre[token, i] = sums[row, i]
                p.dpost[token, i] = sums[row, n + i]
            if problem.mixes:
                for i, j in T.grid(n, n):
                    p.dres[token, i, j] = sums[row, 2 * n + i * n + j]

        self.load_grads, self.load_phi, self.merge_again, self.add_dphi = load_grads, load_phi, merge_again, add_dphi
        self.add_dx_next, self.merge_back, self.store_sums = add_dx_next, merge_back, store_sums
