"""project on tensor cores: tiles of tokens × columns, staged while the ones before are multiplied.

phi [N, K] is float32 and goes in as two bfloat16 parts (`tiles.lang.tensor_cores`), one under the other, so that a
tile of the
streams is read once for both; streams that are not bfloat16 are cut into two parts too. Streams are flattened,
x̄ [T, K].
"""

from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.project.halves import THREADS, Halves
from tiles.kernels.project.matmul_schedule import (
    TiledSchedule,
    padded_outputs,
    padded_products,
    settled_row,
    turned_row,
)
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.program_attrs import checked
from tiles.lang.tensor_cores import PART, part, tiles_for
from tiles.lang.values import Buffer, Expr, as_value, bind, token_range

SUM_TOKENS, SUM_THREADS = 16, 128
"""Tokens and threads of a block that sums over splits."""


def forward(problem: Problem, schedule: TiledSchedule, dialect: Dialect) -> Any:
    """z_tk = Σ_c x̄_tc phi_kc;  s_t = Σ_c x̄_tc²: `schedule.splits` sums over parts of the columns, added in order."""
    fan_in, outputs, splits = problem.fan_in, problem.outputs, schedule.splits
    stored, block = dialect.storage(problem.dtype), schedule.block_tokens
    project, cut = projection(problem, schedule, dialect), whole_halves(problem, schedule, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def project_forward(
        x: T.Tensor((tokens, fan_in), stored),
        phi: T.Tensor((outputs, fan_in), "float32"),
        z: T.Tensor((tokens, outputs), "float32"),
        s: T.Tensor((tokens,), "float32"),
        halves: T.Tensor(cut.shape, cut.dtype),
        parts: T.Tensor((splits, tokens * (outputs + 1)) if splits > 1 else (1, 1), "float32"),
    ):
        if schedule.halved:
            with dialect.kernel(cut.blocks, cut.rows, threads=THREADS) as (group, k):
                dialect.let_next_start(schedule.overlap)
                cut.fill(phi, halves, group, k)
        with dialect.kernel(T.ceildiv(tokens, block), splits, threads=schedule.threads) as (group, split):
            start_after(dialect, schedule)
            into = _Whole(z, s) if splits == 1 else SplitSums(parts, split, outputs)
            project(x, halves if schedule.halved else phi, group, split, as_value(tokens), into)
        if splits > 1:
            with dialect.kernel(T.ceildiv(tokens, SUM_TOKENS), threads=SUM_THREADS) as group:
                dialect.await_last(schedule.overlap)
                for t, k in dialect.lanes(SUM_TOKENS, outputs + 1):
                    if group * SUM_TOKENS + t < tokens:
                        total = T.alloc_var("float32", init=0.0)
                        for split in T.serial(splits):
                            total += parts[split, (group * SUM_TOKENS + t) * (outputs + 1) + k]
                        if k < outputs:
                            z[group * SUM_TOKENS + t, k] = total
                        else:
                            s[group * SUM_TOKENS + t] = total

    return checked(project_forward, overlap=schedule.overlap)


def start_after(dialect: Dialect, schedule: Any) -> Any:
    """The beginning of the kernel that multiplies by phi: after the one that cuts phi, or first of all."""
    if schedule.halved:
        return dialect.await_last(schedule.overlap)
    return dialect.let_next_start(schedule.overlap)


def whole_halves(problem: Problem, schedule: Any, dialect: Dialect) -> Halves:
    """The parts of phi, column by column."""

    def origin(column: Expr) -> Expr:
        return column

    return Halves(problem, schedule, dialect, problem.fan_in, origin)


def projection(problem: Problem, schedule: Any, dialect: Dialect) -> Any:
    """The macro that projects one tile of tokens over one split's columns and gives its sums to `into`. `phi` is in its
    parts (`halves.Halves`) where the schedule has that done before."""
    outputs, dtype, n = problem.outputs, problem.dtype, schedule.block_tokens
    width, rows, tiles = schedule.block_width, padded_outputs(problem, schedule), tiles_for(dialect)
    steps, settle = -(-problem.fan_in // (schedule.splits * width)), settling(problem, schedule, dialect)

    @T.macro
    def project(x: Buffer, phi: Buffer, group: Expr, split: Expr, tokens: Expr, into: Any) -> None:
        tiles.resident(schedule.resident)
        state = tiles.operand(n, width, dtype)
        factors = [state] if dtype == PART else [tiles.operand(n, width, PART) for _ in range(2)]
        halves = tiles.operand(rows, width, PART)
        squares, products = tiles.sums(n, width), tiles.sums(n, rows)
        if not schedule.halved:
            weights = tiles.operand(outputs, width, "float32")
            if rows > 2 * outputs:
                for k, c in dialect.lanes(rows - 2 * outputs, width):
                    halves[2 * outputs + k, c] = dialect.store(T.float32(0), PART)
        for step in tiles.steps(steps, schedule.stages):
            tiles.stage(x, group * n, (split * steps + step) * width, state)
            tiles.stage(phi, 0, (split * steps + step) * width, halves if schedule.halved else weights)
            for t, c in dialect.lanes(n, width):
                value = bind(dialect.load(state[t, c], dtype))
                squares[t, c] += value * value
                if dtype != PART:
                    for p in (0, 1):
                        factors[p][t, c] = part(dialect, value, p)
            if not schedule.halved:
                for k, c in dialect.lanes(outputs, width):
                    for p in (0, 1):
                        halves[p * outputs + k, c] = part(dialect, weights[k, c], p)
            if schedule.halved and dtype == PART:
                tiles.show()
            for factor in factors:
                tiles.multiply(factor, halves, products, turn_b=True)
        settle(products, squares, group * n, tokens, into)

    return project


def settling(problem: Problem, schedule: Any, dialect: Dialect) -> Any:
    """The macro that gives `into` a tile of tokens' sums for z, of both parts of phi, and the totals of `squares`."""
    outputs, block, tiles = problem.outputs, schedule.block_tokens, tiles_for(dialect)
    rows = padded_outputs(problem, schedule)

    @T.macro
    def settle(products: Buffer, squares: Buffer, start: Expr, tokens: Expr, into: Any) -> None:
        settled, lengths = tiles.operand(block, settled_row(rows), "float32"), tiles.totals(block)
        for t, k in dialect.lanes(block, rows):
            settled[t, k] = products[t, k]
        tiles.row_totals(squares, lengths)
        for t, k in dialect.lanes(block, outputs):
            if start + t < tokens:
                into.product(start + t, k, settled[t, k] + settled[t, outputs + k])
        for t in dialect.lanes(block):
            if start + t < tokens:
                into.length(start + t, lengths[t])

    return settle


def backward(problem: Problem, schedule: TiledSchedule, dialect: Dialect) -> Any:
    """dx̄_tc = Σ_k dz_tk phi_kc + 2 ds_t x̄_tc;  dphi_kc = Σ_t dz_tk x̄_tc, one partial sum per split of the tokens."""
    fan_in, outputs, stored = problem.fan_in, problem.outputs, dialect.storage(problem.dtype)
    spread, groups = gradients(problem, schedule, dialect), column_groups(problem, schedule)
    tokens, splits = T.dynamic("tokens"), T.dynamic("splits")

    @T.prim_func
    def project_backward(
        x: T.Tensor((tokens, fan_in), stored),
        phi: T.Tensor((outputs, fan_in), "float32"),
        dz: T.Tensor((tokens, outputs), "float32"),
        ds: T.Tensor((tokens,), "float32"),
        dx: T.Tensor((tokens, fan_in), stored),
        dphi: T.Tensor((splits, outputs, fan_in), "float32"),
    ):
        with dialect.kernel(groups, splits, threads=schedule.threads) as (group, split):
            dialect.let_next_start(schedule.overlap)
            spread(x, phi, dz, ds, dx, dphi, group, split, as_value(tokens), as_value(splits), None)

    planned = {"most_splits": schedule.splits, "split_tokens": schedule.block_tokens, "overlap": schedule.overlap}
    return checked(project_backward, **planned)


def factors_of(problem: Problem, schedule: Any, dialect: Dialect) -> tuple[Any, Any]:
    """The macros that fill the factors of both gradients: `lay_out` phi once, `cut` the dz of a block of tokens."""
    outputs, block, zero = problem.outputs, schedule.block_tokens, T.float32(0)
    inner, columns = padded_products(problem), padded_outputs(problem, schedule)
    unit = outputs if outputs % 8 else 8  # columns that swizzled tiles keep together: a warp meets all banks

    @T.macro
    def lay_out(phi: Buffer, weights: Buffer, left: Buffer, right: Buffer, places: Any, count: int) -> None:
        """phi's parts, and zeros where tiles are padded. `places`: of every `count` columns in the tile and in phi."""
        for k, c in dialect.lanes(outputs, count):
            for within, column in places:
                value = bind(phi[k, column + c])
                for at, p in ((0, 0), (1, 0), (2, 1)):
                    weights[at * outputs + k, within + c] = part(dialect, value, p)
        if inner > 3 * outputs:
            for k, c in dialect.lanes(inner - 3 * outputs, schedule.block_width):
                weights[3 * outputs + k, c] = dialect.store(zero, PART)
            for t, k in dialect.lanes(block, inner - 3 * outputs):
                left[t, 3 * outputs + k] = dialect.store(zero, PART)
        if columns > 2 * outputs:
            for t, k in dialect.lanes(block, columns - 2 * outputs):
                right[t, 2 * outputs + k] = dialect.store(zero, PART)

    @T.macro
    def cut(dz: Buffer, left: Buffer, right: Buffer, start: Expr) -> None:
        """A token block's dz in parts."""
        for chunk, t, within in dialect.lanes(outputs // unit, block, unit):
            k = chunk * unit + within
            value = bind(dz[start + t, k])  # else TileLang makes an asynchronous copy of this that it cannot place
            for at, p in ((0, 0), (1, 1), (2, 0)):
                left[t, at * outputs + k] = part(dialect, value, p)
            for p in (0, 1):
                right[t, p * outputs + k] = part(dialect, value, p)

    return lay_out, cut


def column_groups(problem: Problem, schedule: Any) -> int:
    """Tiles of columns that cover all streams, each within one stream."""
    return problem.streams * -(-problem.width // schedule.block_width)


def gradients(problem: Problem, schedule: Any, dialect: Dialect) -> Any:
    """The macro for a tile of columns: dphi = dzᵀ·x̄ and dx̄ = dz·phi + 2 x̄ ds + what comes beside, over one split's
    tokens. dx may be x itself.

    Of dz·phi the three larger products of parts are taken: dz₀·phi₀ + dz₁·phi₀ + dz₀·phi₁, as one product of
    [dz₀ | dz₁ | dz₀] and [phi₀ ; phi₀ ; phi₁]. Where a tile reaches past its stream, columns of the next one are
    carried along: no result of a column depends on another, and they are not written.

    `beside`, where given, is (du [T, C], more [T, nC], pre [T, n]): pre_i du + more is added to dx. Then kernels
    before this one make dz, ds and pre; they are waited for once phi is laid out.
    """
    n, outputs, dtype = problem.streams, problem.outputs, problem.dtype
    block, width, parts = schedule.block_tokens, schedule.block_width, column_groups(problem, schedule) // n
    inner, columns = padded_products(problem), padded_outputs(problem, schedule)
    tiles = tiles_for(dialect)
    lay_out, cut = factors_of(problem, schedule, dialect)
    stages = schedule.stages

    @T.macro
    def begin(x: Buffer, beside: Any, row: Expr, column: Expr, within: Expr, slots: Any, slot: Expr) -> None:
        """Copy a block of tokens ahead of its turn: TileLang 0.1.15 pipelines no loop of unknown length that stages x
        and what comes beside."""
        tiles.fetch(beside[0], row, within, slots[0], slot)
        tiles.fetch(beside[1], row, column, slots[1], slot)
        tiles.fetch(x, row, column, slots[2], slot)

    @T.macro
    def write(out: Buffer, dx: Buffer, start: Expr, column: Expr, room: Expr) -> None:
        if problem.width % width == 0:
            tiles.write(out, dx, start, column)
        else:
            for t, c in dialect.lanes(block, width):
                if c < room:
                    dx[start + t, column + c] = out[t, c]

    @T.macro
    def spread(
        x: Buffer,
        phi: Buffer,
        dz: Buffer,
        ds: Buffer,
        dx: Buffer,
        dphi: Buffer,
        group: Expr,
        split: Expr,
        tokens: Expr,
        splits: Expr,
        beside: Any,
    ) -> None:
        tiles.resident(schedule.resident)
        ahead, others, out = beside is not None and stages > 1, [], tiles.operand(block, width, dtype)
        if dtype == PART or not ahead:
            state = tiles.operand(block, width, dtype)
        factors = [state] if dtype == PART else [tiles.operand(block, width, PART) for _ in range(2)]
        left, right = tiles.operand(block, inner, PART), tiles.operand(block, columns, PART)
        weights = tiles.operand(inner, width, PART)
        if ahead:
            others = [tiles.slots(stages, block, width, dtype) for _ in range(3)]
        elif beside is not None:
            others = [tiles.operand(block, width, dtype) for _ in range(2)]
        tiles.pad(out, *others, *([] if dtype == PART or ahead else [state]))
        grads, sums = tiles.sums(block, width), tiles.sums(width, columns)
        stream, within = bind(group // parts), bind(group % parts * width)
        column = bind(stream * problem.width + within)
        lay_out(phi, weights, left, right, [(0, column)], width)
        if beside is not None:
            dialect.await_last(schedule.overlap)
        first, last, blocks = token_range(tokens, split, splits, block)
        if ahead:
            for step in T.serial(stages - 1):
                row = bind(or_past(first[0] + step * block, last[0], tokens))
                begin(x, beside, row, column, within, others, step)
        for step in T.serial(blocks[0]) if ahead else tiles.steps(blocks[0], stages):
            if ahead:
                tiles.arrived(3 * (stages - 2))
                row = bind(or_past(first[0] + (step + stages - 1) * block, last[0], tokens))
                begin(x, beside, row, column, within, others, (step + stages - 1) % stages)
                if dtype == PART:
                    for t, c in dialect.lanes(block, width):
                        state[t, c] = others[2][step % stages, t, c]
            else:
                tiles.stage(x, first[0] + step * block, column, state)
                if beside is not None:
                    tiles.stage(beside[0], first[0] + step * block, within, others[0])
                    tiles.stage(beside[1], first[0] + step * block, column, others[1])
            cut(dz, left, right, first[0] + step * block)
            for t, c in dialect.lanes(block, width):
                token = T.min(first[0] + step * block + t, tokens - 1)
                value = bind(dialect.load(others[2][step % stages, t, c] if ahead else state[t, c], dtype))
                if dtype != PART:
                    for p in (0, 1):
                        factors[p][t, c] = part(dialect, value, p)
                at = (step % stages, t, c) if ahead else (t, c)
                grads[t, c] = 2 * ds[token] * value + _joined(dialect, dtype, beside, others, token, stream, at)
            tiles.multiply(left, weights, grads)
            for t, c in dialect.lanes(block, width):
                out[t, c] = dialect.store(grads[t, c], dtype)
            write(out, dx, first[0] + step * block, column, problem.width - within)
            # Last, as TileLang 0.1.15 pipelines a loop of unknown length only if it ends with a use of what it stages.
            for factor in factors:
                tiles.multiply(factor, right, sums, turn_a=True)
        settled = tiles.operand(columns, turned_row(schedule), "float32")
        for c, k in dialect.lanes(width, columns):
            settled[k, c] = sums[c, k]
        for k, c in dialect.lanes(outputs, width):
            if within + c < problem.width:
                dphi[split, k, column + c] = settled[k, c] + settled[outputs + k, c]

    return spread


def _joined(
    dialect: Dialect, dtype: str, beside: Any, others: list[Buffer], token: Expr, stream: Expr, at: tuple[Expr, ...]
) -> Expr:
    """pre_i du_c and the gradient that x gets from elsewhere."""
    if beside is None:
        return T.float32(0)
    return beside[2][token, stream] * dialect.load(others[0][at], dtype) + dialect.load(others[1][at], dtype)


def or_past(row: Expr, last: Expr, tokens: Expr) -> Expr:
    """A row before `last`, or one past all, of which nothing is copied."""
    return T.if_then_else(row < last, row, tokens)


class _Whole(NamedTuple):
    """Where the sums over all columns go."""

    z: Buffer
    s: Buffer

    def product(self, token: Expr, k: Expr, value: Expr) -> None:
        _store(self.z, (token, k), value)

    def length(self, token: Expr, value: Expr) -> None:
        _store(self.s, (token,), value)


class SplitSums(NamedTuple):
    """Where one split's sums go: [splits, T · (N + 1)], for every token N of z and the one of s."""

    parts: Buffer
    split: Expr
    outputs: int

    def product(self, token: Expr, k: Expr, value: Expr) -> None:
        """A token's part of z_k."""
        _store(self.parts, (self.split, token * (self.outputs + 1) + k), value)

    def length(self, token: Expr, value: Expr) -> None:
        """A token's part of s."""
        self.product(token, self.outputs, value)


@T.macro
def _store(tensor: Buffer, index: Any, value: Expr) -> None:
    tensor[index] = value
