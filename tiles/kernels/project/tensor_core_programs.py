"""project on tensor cores: tiles of tokens × columns, copied while the ones before are multiplied.

phi [N, K] is float32 and goes in as two bfloat16 parts (`tiles.lang.tensor_cores`), one under the other, so that a tile
of the streams is read once for both; streams that are not bfloat16 are split into two parts too. Streams are flattened,
x̄ [T, K].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.project.presplit_phi import PresplitPhi
from tiles.kernels.project.signature import arguments
from tiles.kernels.project.split_sums import SplitSums, Whole
from tiles.kernels.project.tensor_core_schedule import (
    TiledSchedule,
    column_groups,
    gates_row,
    padded_outputs,
    padded_products,
    smem_stride,
    smem_stride_transposed,
)
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cuda
from tiles.lang.program import program
from tiles.lang.tensor_cores import OPERAND, TensorCores, split_bf16x2
from tiles.lang.values import Buffer, Expr, as_value, bind, token_range, variable

SUM_TOKENS, SUM_THREADS = 16, 128
"""Tokens and threads of a block that sums over splits."""


def forward(problem: Problem, schedule: TiledSchedule, dialect: Cuda) -> Any:
    """z_tk = Σ_c x̄_tc phi_kc;  s_t = Σ_c x̄_tc²: `schedule.splits` sums over parts of the columns, added in order."""
    outputs, splits, block = problem.outputs, schedule.splits, schedule.block_tokens
    project, presplit = projection(problem, schedule, dialect), presplit_columns(problem, schedule, dialect)

    def workspace(tokens: Expr) -> dict[str, Any]:
        return {
            "phi_hi_lo": T.Tensor(presplit.shape, presplit.dtype),
            "parts": T.Tensor((splits, tokens * (outputs + 1)) if splits > 1 else (1, 1), "float32"),
        }

    @program(arguments(problem), dialect, workspace, checked=1, use_pdl=schedule.use_pdl)
    def project_forward(p: Any) -> None:
        presplit.launch(p.phi, p.phi_hi_lo)
        with dialect.kernel(T.ceildiv(p.tokens, block), splits, threads=schedule.threads) as (group, split):
            begin_after_presplit(dialect, schedule)
            into = Whole(p.z, p.s) if splits == 1 else SplitSums(p.parts, split, outputs)
            project(p.x, presplit.chosen(p), group, split, as_value(p.tokens), into)
        if splits > 1:
            with dialect.kernel(T.ceildiv(p.tokens, SUM_TOKENS), threads=SUM_THREADS) as group:
                dialect.pdl_wait(schedule.use_pdl)
                for t, k in dialect.parallel(SUM_TOKENS, outputs + 1):
                    if group * SUM_TOKENS + t < p.tokens:
                        total = T.alloc_var("float32", init=0.0)
                        for split in T.serial(splits):
                            total += p.parts[split, (group * SUM_TOKENS + t) * (outputs + 1) + k]
                        if k < outputs:
                            p.z[group * SUM_TOKENS + t, k] = total
                        else:
                            p.s[group * SUM_TOKENS + t] = total

    return project_forward


def begin_after_presplit(dialect: Cuda, schedule: Any) -> Any:
    """Begin the kernel that multiplies by phi: after the one that splits phi, or first of all."""
    if schedule.presplit_phi:
        return dialect.pdl_wait(schedule.use_pdl)
    return dialect.pdl_trigger(schedule.use_pdl)


def presplit_columns(problem: Problem, schedule: Any, dialect: Cuda) -> PresplitPhi:
    """The parts of phi, column by column."""
    return PresplitPhi(problem, schedule, dialect, problem.fan_in, lambda column: column)


def projection(problem: Problem, schedule: Any, dialect: Cuda) -> Any:
    """The macro that projects one tile of tokens over one split's columns and gives its sums to `into`. `phi` is in its
    parts (`presplit_phi.PresplitPhi`) where the schedule has that done before."""
    outputs, dtype, n = problem.outputs, problem.dtype, schedule.block_tokens
    width, rows, tiles = schedule.block_width, padded_outputs(problem, schedule), TensorCores(dialect)
    steps, epilogue_store = (
        -(-problem.fan_in // (schedule.splits * width)),
        epilogue_store_of(problem, schedule, dialect),
    )

    @T.macro
    def project(x: Buffer, phi: Buffer, group: Expr, split: Expr, tokens: Expr, into: Any) -> None:
        tiles.min_blocks_per_sm(schedule.min_blocks_per_sm)
        state = tiles.smem(n, width, dtype)
        factors = [state] if dtype == OPERAND else [tiles.smem(n, width, OPERAND) for _ in range(2)]
        phi_tile = tiles.smem(rows, width, OPERAND)
        squares, products = tiles.accumulator(n, width), tiles.accumulator(n, rows)
        if not schedule.presplit_phi:
            weights = tiles.smem(outputs, width, "float32")
            if rows > 2 * outputs:
                for k, c in dialect.parallel(rows - 2 * outputs, width):
                    phi_tile[2 * outputs + k, c] = dialect.store(T.float32(0), OPERAND)
        for step in tiles.pipelined(steps, schedule.stages):
            tiles.copy_g2s(x, group * n, (split * steps + step) * width, state)
            tiles.copy_g2s(phi, 0, (split * steps + step) * width, phi_tile if schedule.presplit_phi else weights)
            for t, c in dialect.parallel(n, width):
                value = bind(dialect.load(state[t, c], dtype))
                squares[t, c] += value * value
                if dtype != OPERAND:
                    for p in (0, 1):
                        factors[p][t, c] = split_bf16x2(dialect, value, p)
            if not schedule.presplit_phi:
                for k, c in dialect.parallel(outputs, width):
                    for p in (0, 1):
                        phi_tile[p * outputs + k, c] = split_bf16x2(dialect, weights[k, c], p)
            if schedule.presplit_phi and dtype == OPERAND:
                tiles.fence_proxy_async()
            for factor in factors:
                tiles.gemm(factor, phi_tile, products, transpose_b=True)
        epilogue_store(products, squares, group * n, tokens, into)

    return project


def epilogue_store_of(problem: Problem, schedule: Any, dialect: Cuda) -> Any:
    """The macro that gives `into` a tile of tokens' sums for z, of both parts of phi, and the totals of `squares`."""
    outputs, block, tiles = problem.outputs, schedule.block_tokens, TensorCores(dialect)
    rows = padded_outputs(problem, schedule)

    @T.macro
    def epilogue_store(products: Buffer, squares: Buffer, start: Expr, tokens: Expr, into: Any) -> None:
        smem_sums, lengths = tiles.smem(block, smem_stride(rows), "float32"), tiles.reduced(block)
        for t, k in dialect.parallel(block, rows):
            smem_sums[t, k] = products[t, k]
        tiles.sum_over_axis_1(squares, lengths)
        for t, k in dialect.parallel(block, outputs):
            if start + t < tokens:
                into.product(start + t, k, smem_sums[t, k] + smem_sums[t, outputs + k])
        for t in dialect.parallel(block):
            if start + t < tokens:
                into.length(start + t, lengths[t])

    return epilogue_store


def backward(problem: Problem, schedule: TiledSchedule, dialect: Cuda) -> Any:
    """dx̄_tc = Σ_k dz_tk phi_kc + 2 ds_t x̄_tc;  dphi_kc = Σ_t dz_tk x̄_tc, one partial sum per split of the tokens."""
    dx_dphi_tile, groups = gradients(problem, schedule, dialect), column_groups(problem, schedule, 1)
    plan = {"most_splits": schedule.splits, "split_tokens": schedule.block_tokens, "use_pdl": schedule.use_pdl}

    @program(arguments(problem), dialect, None, checked=1, **plan)
    def project_backward(p: Any) -> None:
        with dialect.kernel(groups, p.splits, threads=schedule.threads) as (group, split):
            dialect.pdl_trigger(schedule.use_pdl)
            dx_dphi_tile(p, group, split, as_value(p.tokens), as_value(p.splits), None)

    return project_backward


def factors_of(problem: Problem, schedule: Any, dialect: Cuda) -> tuple[Any, Any]:
    """The macros that fill the factors of both gradients: `load_phi` once, `split_dz` for every block of tokens."""
    outputs, block, zero = problem.outputs, schedule.block_tokens, T.float32(0)
    inner, columns = padded_products(problem), padded_outputs(problem, schedule)
    unit = outputs if outputs % 8 else 8  # columns that swizzled tiles keep together: a warp meets all banks

    @T.macro
    def load_phi(phi: Buffer, weights: Buffer, left: Buffer, right: Buffer, column_of: Callable[[Expr], Expr]) -> None:
        """phi's parts, and zeros where tiles are padded. `column_of` tells which of phi's columns a tile's is."""
        for k, c in dialect.parallel(outputs, schedule.block_width):
            value = bind(phi[k, column_of(c)])
            for at, p in ((0, 0), (1, 0), (2, 1)):
                weights[at * outputs + k, c] = split_bf16x2(dialect, value, p)
        if inner > 3 * outputs:
            for k, c in dialect.parallel(inner - 3 * outputs, schedule.block_width):
                weights[3 * outputs + k, c] = dialect.store(zero, OPERAND)
            for t, k in dialect.parallel(block, inner - 3 * outputs):
                left[t, 3 * outputs + k] = dialect.store(zero, OPERAND)
        if columns > 2 * outputs:
            for t, k in dialect.parallel(block, columns - 2 * outputs):
                right[t, 2 * outputs + k] = dialect.store(zero, OPERAND)

    @T.macro
    def split_dz(dz: Buffer, left: Buffer, right: Buffer, start: Expr) -> None:
        """A token block's dz in parts."""
        for chunk, t, within in dialect.parallel(outputs // unit, block, unit):
            k = chunk * unit + within
            value = bind(dz[start + t, k])  # else TileLang makes an asynchronous copy of this that it cannot place
            for at, p in ((0, 0), (1, 1), (2, 0)):
                left[t, at * outputs + k] = split_bf16x2(dialect, value, p)
            for p in (0, 1):
                right[t, p * outputs + k] = split_bf16x2(dialect, value, p)

    return load_phi, split_dz


def gradients(problem: Problem, schedule: Any, dialect: Cuda, streams: int = 1) -> Any:
    """The macro for a tile of columns: dphi = dzᵀ·x̄ and dx̄ = dz·phi + 2 x̄ ds + extra gradients, over one split's
    tokens. Its parameters are x, phi, dz, ds, dx and dphi; dx may be x itself.

    Of dz·phi the three larger products of parts are taken: dz₀·phi₀ + dz₁·phi₀ + dz₀·phi₁, as one product of
    [dz₀ | dz₁ | dz₀] and [phi₀ ; phi₀ ; phi₁]. A tile has the same columns of so many `streams`, one after the other;
    of one where it is copied ahead. Where it reaches past a stream, columns of the next one are carried along: no
    result of a column depends on another, and they are not written.

    `extra_grads`, where given, is (du [T, C], more [T, nC], pre [T, n], more_is_given): pre_i du, and more where that
    is 1 and not 0, are added to dx. Then kernels before this one make dz, ds and pre; they are waited for once phi is
    in shared memory.
    """
    outputs, dtype, block, width = problem.outputs, problem.dtype, schedule.block_tokens, schedule.block_width
    row, of_tile, parts = width // streams, tuple(range(streams)), -(-problem.width // (width // streams))
    inner, columns = padded_products(problem), padded_outputs(problem, schedule)
    tiles = TensorCores(dialect)
    load_phi, split_dz = factors_of(problem, schedule, dialect)
    stages = schedule.stages

    @T.macro
    def begin(x: Buffer, extra_grads: Any, at: Expr, more_row: Expr, places: Any, slots: Any, slot: Expr) -> None:
        """Copy a block of tokens ahead of its turn: TileLang 0.1.15 pipelines no loop of unknown length that copies x
        and the extra gradients."""
        tiles.async_copy_g2s(extra_grads[0], at, places.within, slots[0], slot)
        tiles.async_copy_g2s(extra_grads[1], more_row + at, places.column(0), slots[1], slot)
        tiles.async_copy_g2s(x, at, places.column(0), slots[2], slot)

    @T.macro
    def write(out: Buffer, dx: Buffer, start: Expr, places: Any) -> None:
        for t, c in dialect.parallel(block, width):
            if problem.width % row == 0 or places.within + c % row < problem.width:
                dx[start + t, places.column(c)] = out[t, c]

    def tile_of_gates(extra_grads: Any) -> Any:
        """For pre of a block of tokens, where extra gradients are weighed with it."""
        return None if extra_grads is None else tiles.smem(block, gates_row(streams), "float32")

    @T.macro
    def load_scales(p: Any, extra_grads: Any, lengths: Buffer, gates: Any, start: Expr, stream: Expr) -> None:
        """2 ds and, of the tile's streams, pre of a block of tokens."""
        for t in dialect.parallel(block):
            lengths[t] = bind(2 * p.ds[start + t])
        if extra_grads is not None:
            for t, i in dialect.parallel(block, streams):
                gates[t, i] = bind(extra_grads[2][start + t, stream + i])

    @T.macro
    def dx_dphi_tile(p: Any, group: Expr, split: Expr, tokens: Expr, splits: Expr, extra_grads: Any) -> None:
        tiles.min_blocks_per_sm(schedule.min_blocks_per_sm)
        ahead, others, out = extra_grads is not None and stages > 1, [], tiles.smem(block, width, dtype)
        if dtype == OPERAND or not ahead:
            state = tiles.smem(block, width, dtype)
        factors = [state] if dtype == OPERAND else [tiles.smem(block, width, OPERAND) for _ in range(2)]
        left, right = tiles.smem(block, inner, OPERAND), tiles.smem(block, columns, OPERAND)
        weights, lengths = tiles.smem(inner, width, OPERAND), dialect.scratch(block)
        gates = tile_of_gates(extra_grads)
        if ahead:
            others = [tiles.multistage_smem(stages, block, size, dtype) for size in (row, width, width)]
        elif extra_grads is not None:
            others = [tiles.smem(block, size, dtype) for size in (row, width)]
        tiles.pad_rows(out, *others, *([] if dtype == OPERAND or ahead else [state]))
        grads, sums = tiles.accumulator(block, width), tiles.accumulator(width, columns)
        stream, within = bind(group // parts * streams), bind(group % parts * row)
        places = _Places(problem.width, row, stream, within)
        load_phi(p.phi, weights, left, right, places.column)
        more_row = _row_of_more(extra_grads, tokens)
        if extra_grads is not None:
            dialect.pdl_wait(schedule.use_pdl)
        first, last, blocks = token_range(tokens, split, splits, block)
        if ahead:
            for step in T.serial(stages - 1):
                soon = or_past(first[0] + step * block, last[0], tokens)
                begin(p.x, extra_grads, soon, more_row, places, others, step)
        for step in T.serial(blocks[0]) if ahead else tiles.pipelined(blocks[0], stages):
            start = first[0] + step * block
            if ahead:
                tiles.cp_async_wait_group(3 * (stages - 2))
                after = bind(or_past(start + (stages - 1) * block, last[0], tokens))
                begin(p.x, extra_grads, after, more_row, places, others, (step + stages - 1) % stages)
                if dtype == OPERAND:
                    for t, c in dialect.parallel(block, width):
                        state[t, c] = others[2][step % stages, t, c]
            else:
                if extra_grads is not None:
                    tiles.copy_g2s(extra_grads[0], start, within, others[0])
                    for t, c in dialect.parallel(block, width):
                        others[1][t, c] = extra_grads[1][more_row + start + t, places.column(c)]
                for t, c in dialect.parallel(block, width):
                    state[t, c] = p.x[start + t, places.column(c)]
            split_dz(p.dz, left, right, start)
            load_scales(p, extra_grads, lengths, gates, start, stream)
            for t, c in dialect.parallel(block, width):
                grads[t, c] = T.float32(0)
            if dtype != OPERAND:
                for t, c in dialect.parallel(block, width):
                    for which in (0, 1):
                        value = dialect.load(others[2][step % stages, t, c] if ahead else state[t, c], dtype)
                        factors[which][t, c] = split_bf16x2(dialect, value, which)
            tiles.gemm(left, weights, grads)
            for t, c in dialect.parallel(block, width):
                value = bind(dialect.load(others[2][step % stages, t, c] if ahead else state[t, c], dtype))
                slot = (step % stages,) if ahead else ()
                more = _extra_grad(dialect, dtype, others, gates, (t, c // row), (*slot, t, c % row), (*slot, t, c))
                grads[t, c] += lengths[t] * value + more
            for t, c in dialect.parallel(block, width):
                out[t, c] = dialect.store(grads[t, c], dtype)
            write(out, p.dx, start, places)
            # Last, as TileLang 0.1.15 pipelines a loop of unknown length only if it ends with a use of what it copies.
            for factor in factors:
                tiles.gemm(factor, right, sums, transpose_a=True)
        if ahead:
            tiles.cp_async_wait_group(0)  # the sums may lie in stages, to which zeros of no token are still copied
        smem_sums = tiles.smem(columns, smem_stride_transposed(schedule), "float32")
        for c, k in dialect.parallel(width, columns):
            smem_sums[k, c] = sums[c, k]
        for i in of_tile:
            for k, c in dialect.parallel(outputs, row):
                if within + c < problem.width:
                    # Bound to a name outside of loops, what is read would be kept in memory of its own all through
                    # the kernel (TileLang 0.1.15).
                    p.dphi[split, k, places.column(i * row + c)] = (
                        smem_sums[k, i * row + c] + smem_sums[outputs + k, i * row + c]
                    )

    return dx_dphi_tile


class _Places(NamedTuple):
    """What a tile's columns are: `row` of each stream, from its first `stream` on, that begin at `within` of it."""

    width: int
    row: int
    stream: Expr
    within: Expr

    def column(self, c: Expr) -> Expr:
        """The column of x̄ that the tile's column `c` is."""
        return (self.stream + c // self.row) * self.width + self.within + c % self.row


def _extra_grad(
    dialect: Cuda,
    dtype: str,
    others: list[Buffer],
    gates: Any,
    of_gate: tuple[Expr, ...],
    of_du: tuple[Expr, ...],
    of_more: tuple[Expr, ...],
) -> Expr:
    """pre_i du_c and the gradient that x gets from elsewhere, where there are any."""
    if not others:
        return T.float32(0)
    return gates[of_gate] * dialect.load(others[0][of_du], dtype) + dialect.load(others[1][of_more], dtype)


def _row_of_more(extra_grads: Any, tokens: Expr) -> Any:
    """The row at which the gradient of x from elsewhere begins: the first, or one past all where there is none, of
    which nothing is copied. Where it is made for every tile, values of threads spill on sm_100a."""
    return None if extra_grads is None else variable(T.Select(extra_grads[3] > 0, 0, tokens))


def or_past(row: Expr, last: Expr, tokens: Expr) -> Expr:
    """A row before `last`, or one past all, of which nothing is copied."""
    return T.if_then_else(row < last, row, tokens)
