"""Kernels of pre, step and single_pass on CUDA besides passes over rows, as macros, and how those passes share the
tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.apply.aggregate import Aggregate
from tiles.kernels.coefficients import gates
from tiles.kernels.fused.chain_schedule import (
    ChainSchedule,
    coefficient_threads,
    dots_of_streams,
    split_sums,
    staged,
    tiled,
)
from tiles.kernels.fused.token_rows import TokenRows
from tiles.kernels.project.presplit_phi import PresplitPhi
from tiles.kernels.project.tensor_core_programs import gradients
from tiles.kernels.project.tensor_core_schedule import column_groups, streams_of_tile
from tiles.kernels.spec import Argument, Problem
from tiles.lang.dialect import Cuda
from tiles.lang.program import Parameters, program
from tiles.lang.tensor_cores import TensorCores
from tiles.lang.values import Buffer, Expr, as_value, variable

LOADS_AHEAD = 100
"""Loads of a thread that are under way at a time where sums over splits are added up."""

SUM_ROWS, JOIN_THREADS = 32, 256
"""Rows that are summed side by side where the sums of all blocks of tokens are joined, and threads of that kernel."""


def gradients_of_streams(problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> tuple[Any, int]:
    """`gradients`, whose tiles have the same columns of several streams, as du is among what they copy; and how many
    tiles there are."""
    tiles = tiled(schedule)
    streams = streams_of_tile(problem, tiles, staged(problem))
    return gradients(problem, tiles, dialect, streams), column_groups(problem, tiles, streams)


class Rows:
    """How a pass over rows hands out its tokens: one to each thread block, or all to a grid of `row_blocks`."""

    def __init__(self, schedule: ChainSchedule) -> None:
        self._blocks = schedule.row_blocks

    def blocks(self, tokens: Expr) -> Expr:
        """The grid."""
        return self._blocks or tokens

    def turns(self, block: Expr, tokens: Expr) -> Expr:
        """How many tokens a thread block takes."""
        return T.ceildiv(tokens - block, self._blocks) if self._blocks else 1

    def token(self, block: Expr, turn: Expr) -> Expr:
        """The token of a turn: neighbours go to neighbouring blocks at the same time."""
        return variable(block + turn * self._blocks)


class _Sums(NamedTuple):
    """A block's sums [tokens · (N + 1)] as if they were all tokens' [T, N] or, where `column` is given, [T]."""

    sums: Buffer
    start: Expr
    outputs: int
    column: int | None

    def __getitem__(self, index: Any) -> Expr:
        token, column = index if self.column is None else (index, self.column)
        return self.sums[(token - self.start) * (self.outputs + 1) + column]


class Forward:
    """What the forwards share: the workspace, and the kernels that follow project."""

    def __init__(self, problem: Problem, schedule: ChainSchedule, dialect: Cuda, presplit: PresplitPhi) -> None:
        block, outputs, splits = schedule.coefficient_tokens, problem.outputs, schedule.splits
        threads = coefficient_threads(problem, schedule)
        maps, tiles, rows = gates.Forward(problem, threads, dialect), TensorCores(dialect), Rows(schedule)
        apply = Aggregate(problem, schedule.row_width, dialect, schedule.row_threads)
        turns, elements = split_sums(problem, schedule)
        turn, ahead = threads * elements, min(splits, max(1, LOADS_AHEAD // elements))
        of_res = TokenRows(dialect, block, problem.streams, problem.streams)
        self._problem, self._schedule, self._dialect, self._presplit = problem, schedule, dialect, presplit

        @T.macro
        def coefficients(p: Any, group: Expr, last: Expr) -> None:
            """The splits' sums in order, then all that comes from them, for a block of tokens."""
            start, end = variable(group * block), variable(T.min(group * block + block, last))
            held, smem_sums = maps.scratch(), dialect.scratch(turns * turn)
            results = p
            if problem.mixes:
                smem_res = of_res.scratch()
                results = Parameters(**(vars(p) | {"res": of_res.of(smem_res, start)}))
            for at in T.serial(turns):
                total = tiles.accumulator(1, turn)
                for split in T.unroll(splits, unroll_factor=ahead):
                    for _, e in dialect.parallel(1, turn):
                        total[0, e] += p.parts[split, start * (outputs + 1) + at * turn + e]
                for _, e in dialect.parallel(1, turn):
                    smem_sums[at * turn + e] = total[0, e]
            for t, k in dialect.parallel(block, outputs):
                if start + t < end:
                    p.z[start + t, k] = smem_sums[t * (outputs + 1) + k]
            for t in dialect.parallel(block):
                if start + t < end:
                    p.s[start + t] = smem_sums[t * (outputs + 1) + outputs]
            dialect.barrier()
            sums = _Sums(smem_sums, start, outputs, None), _Sums(smem_sums, start, outputs, outputs)
            maps.run(held, *sums, p, start, end)
            maps.store(held, results, p.pre, start, end)
            if problem.mixes:
                dialect.barrier()
                of_res.save(smem_res, p.res, start, end)

        @T.macro
        def launch_coefficients(p: Any) -> None:
            """From project's sums: pre, post, res, z and s, a thread for each token."""
            with dialect.kernel(T.ceildiv(p.tokens, block), threads=threads) as group:
                dialect.pdl_wait(schedule.use_pdl)
                coefficients(p, group, as_value(p.tokens))

        @T.macro
        def after_project_fused(p: Any) -> None:
            """The coefficients, then u from x, of each block of tokens."""
            with dialect.kernel(T.ceildiv(p.tokens, block), threads=threads) as group:
                dialect.pdl_wait(schedule.use_pdl)
                coefficients(p, group, as_value(p.tokens))
                dialect.barrier()
                for t in T.serial(T.min(block, p.tokens - group * block)):
                    token = variable(group * block + t)
                    apply.aggregate(p.x, p.u, token, apply.gates(p.pre, token))

        @T.macro
        def after_project(p: Any) -> None:
            """The coefficients of all tokens, then u from x."""
            launch_coefficients(p)
            with dialect.kernel(rows.blocks(p.tokens), threads=schedule.row_threads) as group:
                dialect.pdl_wait(schedule.use_pdl)
                for turn in T.serial(rows.turns(group, p.tokens)):
                    token = rows.token(group, turn)
                    apply.aggregate(p.x, p.u, token, apply.gates(p.pre, token))

        self.launch_coefficients = launch_coefficients
        self.after_project = after_project_fused if schedule.fuse_aggregate else after_project

    def groups(self, tokens: Expr) -> Expr:
        """Tiles of tokens of project."""
        return T.ceildiv(tokens, self._schedule.block_tokens)

    def program(self, arguments: tuple[Argument, ...]) -> Callable[[Callable[[Any], None]], Any]:
        """The decorator of a program with these arguments and the workspace parts, phi_hi_lo and, where it is not an
        argument, pre."""
        problem, schedule, presplit = self._problem, self._schedule, self._presplit

        def workspace(tokens: Expr) -> dict[str, Any]:
            made = {
                "parts": T.Tensor((schedule.splits, tokens * (problem.outputs + 1)), "float32"),
                "pre": T.Tensor((tokens, problem.streams), "float32"),
                "phi_hi_lo": T.Tensor(presplit.shape, presplit.dtype),
            }
            return {name: made[name] for name in made if name not in {argument.name for argument in arguments}}

        plan = {"chunk_tokens": schedule.chunk_tokens, "use_pdl": schedule.use_pdl}
        return program(arguments, self._dialect, workspace, checked=1, **plan)


class Backward:
    """What the backwards share: the workspace, and the kernels of the coefficients."""

    def __init__(self, problem: Problem, schedule: ChainSchedule, dialect: Cuda) -> None:
        n, outputs, block, unrolled = problem.streams, problem.outputs, schedule.coefficient_tokens, dialect.unrolled
        count = coefficient_threads(problem)
        maps, weighs_again = gates.Backward(problem, count, dialect), problem.base_op != "single_pass"
        of_outputs, of_res = TokenRows(dialect, block, outputs), TokenRows(dialect, block, n, n)
        weighs_dots = dots_of_streams(problem, schedule) and problem.mixes

        def dpre_of(dpre: Any, smem_res: Any, start: Expr) -> Any:
            """dpre, with the rows of res that the block has where they weigh dot products."""
            return dpre._replace(res=of_res.of(smem_res, start)) if weighs_dots else dpre

        self._problem, self._schedule, self._dialect = problem, schedule, dialect

        @T.macro
        def coefficients(p: Any, dpre: Any, group: Expr, last: Expr) -> None:
            """dz and ds of a block of tokens, pre again where x' was weighed with it, and the block's sums for dalpha
            and dbias."""
            start, end = variable(group * block), variable(T.min(group * block + block, last))
            held, smem_outputs = maps.scratch(), of_outputs.scratch()
            logits = of_outputs.of(smem_outputs, start)  # z, and in its place dz
            of_outputs.load(p.z, smem_outputs, start, end)
            if problem.mixes:
                smem_dres = of_res.scratch()
                dres = of_res.of(smem_dres, start)
                of_res.load(p.dres, smem_dres, start, end)
            smem_res = of_res.scratch() if weighs_dots else None
            if weighs_dots:
                of_res.load(p.res, smem_res, start, end)
            maps.clear(held)
            dialect.barrier()
            for i in unrolled(n):
                for thread in dialect.thread_loop(count):
                    held.dpre[i, thread] = dpre_of(dpre, smem_res, start)[i, T.min(start + thread, end - 1)]
                    held.dpost[i, thread] = p.dpost[T.min(start + thread, end - 1), i]
                if problem.mixes:
                    for j in unrolled(n):
                        for thread in dialect.thread_loop(count):
                            held.dres[i, j, thread] = dres[T.min(start + thread, end - 1), i, j]
            maps.run(held, logits, p.s, p, start, end)
            maps.store_logits(held, logits, p.ds, start, end)
            dialect.barrier()
            of_outputs.save(smem_outputs, p.dz, start, end)
            if weighs_again:
                for i in unrolled(n):
                    for thread in dialect.thread_loop(count):
                        p.pre[T.min(start + thread, end - 1), i] = held.forward.pre[i, thread]
            maps.store(held, p.dalpha_blocks, p.dbias_blocks, group)

        @T.macro
        def launch_coefficients(p: Any, dpre: Any) -> None:
            """dz, ds and, but for single_pass, pre, a thread for each token, from dpre [n, T], dpost and dres."""
            with dialect.kernel(T.ceildiv(p.tokens, block), threads=count) as group:
                dialect.pdl_wait(schedule.use_pdl)
                coefficients(p, dpre, group, as_value(p.tokens))

        @T.macro
        def join_columns(sums: Buffer, total: Buffer, split: Expr, first: Expr, last: Expr, columns: int) -> None:
            joined = dialect.scratch(SUM_ROWS, columns)
            for r, k in dialect.parallel(SUM_ROWS, columns):
                part = T.alloc_var("float32", init=0.0)
                for step in T.serial(T.ceildiv(last - first, SUM_ROWS)):
                    if first + step * SUM_ROWS + r < last:
                        part += sums[first + step * SUM_ROWS + r, k]
                joined[r, k] = part
            dialect.barrier()
            for k in dialect.parallel(columns):
                whole = T.alloc_var("float32", init=0.0)
                for r in T.serial(SUM_ROWS):
                    whole += joined[r, k]
                total[split, k] = whole

        @T.macro
        def join(p: Any, split: Expr, tokens: Expr, splits: Expr) -> None:
            """One split's part of the blocks' sums."""
            share = variable(T.ceildiv(T.ceildiv(tokens, block), splits))
            first = variable(split * share)
            last = variable(T.min(first + share, T.ceildiv(tokens, block)))
            join_columns(p.dalpha_blocks, p.dalpha, split, first, last, problem.maps)
            join_columns(p.dbias_blocks, p.dbias, split, first, last, outputs)

        @T.macro
        def launch_join(p: Any) -> None:
            """dalpha and dbias, a partial sum for each split."""
            with dialect.kernel(p.splits, threads=JOIN_THREADS) as split:
                dialect.pdl_wait(schedule.use_pdl)
                join(p, split, as_value(p.tokens), as_value(p.splits))

        self.launch_coefficients, self.launch_join = launch_coefficients, launch_join

    def program(
        self, arguments: tuple[Argument, ...], more: Callable[[Expr], dict[str, Any]]
    ) -> Callable[[Callable[[Any], None]], Any]:
        """The decorator of a program with these arguments, the workspace of the coefficients and `more`."""
        n, outputs, schedule = self._problem.streams, self._problem.outputs, self._schedule

        def workspace(tokens: Expr) -> dict[str, Any]:
            made = {
                "dz": T.Tensor((tokens, outputs), "float32"),
                "ds": T.Tensor((tokens,), "float32"),
                "pre": T.Tensor((tokens, n), "float32"),
                **more(tokens),
                "dalpha_blocks": T.Tensor((tokens, self._problem.maps), "float32"),
                "dbias_blocks": T.Tensor((tokens, outputs), "float32"),
            }
            return {name: made[name] for name in made if name not in {argument.name for argument in arguments}}

        tiles = tiled(schedule)
        plan = {"most_splits": tiles.splits, "split_tokens": tiles.block_tokens, "use_pdl": tiles.use_pdl}
        return program(arguments, self._dialect, workspace, checked=1, chunk_tokens=schedule.chunk_tokens, **plan)
