"""Tiles of tokens × columns of all streams, as macros of single_pass on a CPU.

Streams are flattened, x [T, nC]: stream i of a token begins at column i·C.
"""

from collections.abc import Sequence
from typing import Any

import tilelang.language as T

from tiles.kernels.apply.merge import Matrix, merged, merged_back, weighted
from tiles.kernels.fused.norm import Norm, NormScratch
from tiles.kernels.limits import divisors, token_lanes
from tiles.kernels.project.programs import output_groups, prefetch_of
from tiles.kernels.single_pass.schedule import SinglePassSchedule, tile_row
from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.lang.columns import Columns
from tiles.lang.dialect import Cpu, View
from tiles.lang.rows import SourceRow
from tiles.lang.streams import row_dots
from tiles.lang.values import Buffer, Expr, bind, variable

DOTS_WIDTH = 640
"""Most columns of a register block of dot products: what they read stays in an L1 cache."""


MERGED_BYTES = 256
"""Most bytes of a stream that the forward merges at a time, while it brings in as many of the next token."""


class _Tile:
    """What both passes share; `columns` of each stream are merged at a time. `staged` has x' of tokens, rounded as
    streams are, in rows of n · block_width columns."""

    def __init__(self, problem: Problem, schedule: SinglePassSchedule, dialect: Cpu, columns: Columns) -> None:
        n, dtype, width = problem.streams, problem.dtype, schedule.block_width
        self.streams = streams = tuple(range(n))
        self.groups = output_groups(problem.outputs, schedule.register_outputs)

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
                dialect.prefetch(tuple(streams_of), (token, place(i, column + width)), width)
            dialect.prefetch(tuple(rows_of), (token, column + width), width)

        self.columns, self.place, self.load, self.x_next = columns, place, load, x_next
        self.prefetch, self._mixes = prefetch, problem.mixes

    def weights(self, p: Any, token: Expr) -> tuple[list[Expr], list[Expr], Matrix]:
        """pre, post and res of a token."""
        pre, post = ([bind(gate[token, i]) for i in self.streams] for gate in (p.pre, p.post))
        if not self._mixes:
            return pre, post, None
        return pre, post, [[bind(p.res[token, i, j]) for j in self.streams] for i in self.streams]


class ForwardTile(_Tile):
    """The macro `run` for a register block of tokens, start..start + register_tokens as far as below `last`."""

    def __init__(self, problem: Problem, schedule: SinglePassSchedule, dialect: Cpu) -> None:
        width, how = schedule.block_width, {"nontemporal": bool(schedule.nontemporal), "prefetched": True}
        merged = divisors(width, 8, MERGED_BYTES // DTYPE_BYTES[problem.dtype])[-1]
        super().__init__(problem, schedule, dialect, Columns(merged, problem.dtype, dialect, **how))
        streams, groups = self.streams, self.groups
        rows, dots_width = schedule.register_tokens, divisors(width, 8, DOTS_WIDTH)[-1]
        parts, columns, norm = width // dots_width, self.columns, Norm(problem, width, dialect)
        prefetch = prefetch_of(problem, dots_width, groups, dialect)
        sums_squares = problem.dtype == "float32"  # what is rounded, NaN aside, takes an instruction more to be added

        def total_of_columns() -> Any:
            """For u'² of a token's columns, where u' is normalised."""
            return dialect.accumulator(width) if problem.normalises else None

        def total_of_rows() -> Any:
            """The same for the rows of a register block."""
            return dialect.scratch(rows) if problem.normalises else None

        @T.macro
        def merge(
            p: Any, staged: Buffer, squares: Buffer, squares_of_u: Any, token: Expr, column: Expr, row: Expr
        ) -> None:
            """x' and u' of a token's columns, x' into `staged` as well; x'² is added to squares[row], and u'², where u'
            will be normalised, to squares_of_u[row]."""
            pre, post, res = self.weights(p, token)
            total_of_u, totals = total_of_columns(), [dialect.accumulator(width) for _ in streams if sums_squares]
            mixed, gathered = [columns.result(p.x_next) for _ in streams], columns.result(p.u)
            for part in T.serial(width // merged):
                first, within = bind(column + part * merged), bind(part * merged)
                given = self.load(p, token, first)
                for i in streams:
                    mixed[i].store_at(token, self.place(i, first))
                gathered.store_at(token, first)
                for outer in columns.outer():
                    for inner in columns.inner():
                        values = self.x_next(given, res, post, columns.index(outer, inner))
                        for i in streams:
                            mixed[i].put(columns.index(outer, inner), values[i], rounded=True)
                            staged[row, i * width + within + columns.place(outer, inner)] = values[i]
                            if sums_squares:
                                totals[i][0] += values[i] * values[i]  # one sum of all would wait for each addition
                        u = bind(weighted(pre, values))
                        if problem.normalises:
                            total_of_u[0] += u * u
                        gathered.put(columns.index(outer, inner), u)
                for result in (*mixed, gathered):
                    result.flush()
            if sums_squares:
                squares[row] = squares[row] + sum(total[0] for total in totals)
            else:
                squares[row] = squares[row] + dialect.squares(staged, (row, 0), problem.streams * width)
            if problem.normalises:
                squares_of_u[row] = squares_of_u[row] + total_of_u[0]

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
            squares_of_u = total_of_rows()
            dots = dialect.dot_sums(rows, problem.outputs)
            for t in T.serial(rows):
                squares[t] = T.float32(0)
                if problem.normalises:
                    squares_of_u[t] = T.float32(0)
            for chunk in T.serial(problem.width // width):
                for t in T.serial(rows):
                    merge(p, staged, squares, squares_of_u, variable(T.min(start + t, last - 1)), chunk * width, t)
                project(p, staged, dots, start, chunk * width)
            for t in T.serial(T.min(rows, last - start)):
                if problem.normalises:
                    norm.scale_row(p, variable(start + t), squares_of_u[t])
                p.s[start + t] = squares[t]
                for k in dialect.parallel(problem.outputs):
                    p.z[start + t, k] = dialect.dot_sum(dots, t, k)

        self.run = run


class BackwardTile(_Tile):
    """The macros of the backward. `sums` [block_tokens, N] are of dpre, dpost and dres, stream by stream of x."""

    def __init__(self, problem: Problem, schedule: SinglePassSchedule, dialect: Cpu) -> None:
        columns = Columns(schedule.block_width, problem.dtype, dialect, nontemporal=bool(schedule.nontemporal))
        super().__init__(problem, schedule, dialect, columns)
        streams, groups, width, dtype = self.streams, self.groups, schedule.block_width, problem.dtype
        n, block, rows = problem.streams, schedule.block_tokens, schedule.register_tokens
        lanes = token_lanes(block)
        columns, norm = self.columns, Norm(problem, width, dialect)

        @T.macro
        def add_dots(sums: Buffer, rows: Buffer, of: View, of_dtype: str, row: Expr, first: Expr) -> None:
            """Add ⟨rows_i, of⟩, of a token's columns, to n of its sums from `first` on."""
            row_dots(View(sums, (row, first), (0, 1)), View(rows, (row, 0), (0, 1)), of, n, of_dtype, width)

        def grad_of_u(normed: Any, row: Expr, index: Expr, du: Expr) -> Expr:
            """The gradient of u' from that of the sublayer's input."""
            return normed.of_u[row, index] if problem.normalises else du

        @T.macro
        def norm_factors(p: Any, normed: Any, token: Expr, row: Expr) -> None:
            """r and slope of a token. Its u' is Σ_j (Σ_i pre_i res_ij) x_j + (Σ_i pre_i post_i) f: x' is not made for
            it."""
            pre, post, res = self.weights(p, token)
            of_f = bind(weighted(pre, post))
            of_x = pre if res is None else [bind(merged_back(res, pre, j)) for j in streams]
            squares, product, upper = dialect.accumulator(width), dialect.accumulator(width), columns.row(p.du)
            for chunk in T.serial(problem.width // width):
                given = self.load(p, token, chunk * width)
                upper.load(token, chunk * width)
                for outer in columns.outer():
                    for inner in columns.inner():
                        index = columns.index(outer, inner)
                        values = [state.get(index) for state in given[0]]
                        u = bind(weighted(of_x, values) + of_f * given[1].get(index))
                        weight = p.norm_weight[chunk * width + columns.place(outer, inner)]
                        squares[0] += u * u
                        product[0] += u * (weight * upper.get(index))
            norm.store_factors(p, normed, row, squares[0], product[0])

        @T.macro
        def load_grads(held: Any, p: Any, start: Expr, last: Expr) -> None:
            """Gradients of the next maps, of a block of tokens."""
            for i in T.serial(n):
                for index in dialect.parallel(lanes):
                    held.dpre[i, index] = p.dpre_next[T.min(start + index, last - 1), i]
                    held.dpost[i, index] = p.dpost_next[T.min(start + index, last - 1), i]
            if problem.mixes:
                for i, j in T.grid(n, n):
                    for index in dialect.parallel(lanes):
                        held.dres[i, j, index] = p.dres_next[T.min(start + index, last - 1), i, j]

        @T.macro
        def merge_again(
            p: Any, staged: Buffer, sums: Buffer, normed: Any, split: Expr, token: Expr, column: Expr, row: Expr
        ) -> None:
            """x' of a token's columns, into `staged`, and their part of dpre; with a norm, also the gradient of u' and
            the token's part of the norm weight's."""
            pre, post, res = self.weights(p, token)
            self.prefetch((p.x, p.dx_next), (p.f, p.du), token, column)
            given, upper = self.load(p, token, column), columns.row(p.du)
            upper.load(token, column)
            for outer in columns.outer():
                for inner in columns.inner():
                    values = self.x_next(given, res, post, columns.index(outer, inner))
                    if problem.normalises:
                        u, grad = weighted(pre, values), upper.get(columns.index(outer, inner))
                        norm.through(p, normed, split, column, row, columns.place(outer, inner), grad, u)
                    for i in streams:
                        staged[row, i * width + columns.place(outer, inner)] = values[i]
            if problem.normalises:
                add_dots(sums, staged, View(normed.of_u, (row, 0), (0, 1)), "float32", row, 0)
            else:
                add_dots(sums, staged, View(p.du, (token, column), (0, 1)), dtype, row, 0)

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
            """dphi += dzᵀ·x' of the staged tokens. Its rows lie too far apart for a processor to foresee them."""
            for i in T.serial(n):
                for g in T.serial(groups.whole):
                    for k in range(groups.size):
                        dialect.prefetch((dphi,), (split, (g + 1) * groups.size + k, self.place(i, column)), width)
                    add_group(dphi, staged, dz, split, i, column, g * groups.size, groups.size, count)
                if groups.rest > 0:
                    add_group(dphi, staged, dz, split, i, column, groups.whole * groups.size, groups.rest, count)

        @T.macro
        def start_grads(p: Any, staged: Buffer, held: Any, normed: Any, start: Expr, column: Expr, row: Expr) -> None:
            """dx' + pre·du' + 2x'·ds' of a token of a block, in the place of its x'."""
            token, slope = variable(start + row), bind(2 * held.ds[row])
            for i in T.serial(n):
                gate = bind(p.pre[token, i])
                for index in dialect.parallel(width):
                    of_u = grad_of_u(normed, row, index, dialect.load(p.du[token, column + index], dtype))
                    of_x_next = dialect.load(p.dx_next[token, self.place(i, column + index)], dtype)
                    of_s = slope * staged[row, i * width + index]
                    staged[row, i * width + index] = of_x_next + gate * of_u + of_s

        @T.macro
        def add_through_z(phi: Buffer, grads: Buffer, held: Any, column: Expr, count: Expr) -> None:
            """g += dz'·phi of a block, stream by stream: phi's columns of one stay in a near cache."""
            for i, r in T.grid(n, T.ceildiv(count, rows)):
                out, of_outputs = View(grads, (r * rows, i * width), (0, 1)), View(held.dz, (0, r * rows), (1, 0))
                of_phi = View(phi, (0, self.place(i, column)), (0, 1))
                dialect.add_product(out, of_outputs, of_phi, rows, problem.outputs, width)

        @T.macro
        def merge_back(p: Any, grads: Buffer, sums: Buffer, token: Expr, column: Expr, row: Expr) -> None:
            """dx and df of a token's columns, and their part of dpost and dres, from its row of g."""
            _pre, post, res = self.weights(p, token)
            add_dots(sums, grads, View(p.f, (token, column), (0, 1)), dtype, row, n)
            if problem.mixes:
                for j in streams:
                    of_x = View(p.x, (token, self.place(j, column)), (0, 1))
                    add_dots(sums, grads, of_x, dtype, row, (2 + j) * n)
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
                    p.dres[token, i, j] = sums[row, (2 + j) * n + i]

        self.load_grads, self.merge_again, self.add_dphi = load_grads, merge_again, add_dphi
        self.start_grads, self.add_through_z = start_grads, add_through_z
        self.merge_back, self.store_sums = merge_back, store_sums
        self.norm_factors = norm_factors

        def norm_scratch() -> NormScratch | None:
            """What a norm keeps; call it inside the kernel."""
            return norm.scratch(block, width) if problem.normalises else None

        self.norm_scratch = norm_scratch
