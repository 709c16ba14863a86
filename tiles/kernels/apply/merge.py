"""merge: x'_i = Σ_j res_ij x_j + post_i f, and its backward, as TileLang programs for CPU and CUDA.

`Merge` makes the macros for one token, which the fused kernels share. Streams are flattened, x [T, nC]: stream i of a
token begins at column i·C.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.apply.aggregate import put_column
from tiles.kernels.apply.schedule import GROUP, ApplySchedule, in_groups
from tiles.kernels.apply.signature import merge_arguments
from tiles.kernels.spec import Problem
from tiles.lang.columns import Columns
from tiles.lang.dialect import Dialect
from tiles.lang.program import program
from tiles.lang.rows import ResultRow, SourceRow
from tiles.lang.values import Buffer, Expr, bind, quads_of, values_of

Matrix = Sequence[Sequence[Expr]] | None
"""res of a token; None is the identity."""


def merged(res: Matrix, x: Sequence[Expr], post: Sequence[Expr], f: Expr, i: int) -> Expr:
    """x'_i; `x` and f are the values of one column."""
    return post[i] * f + (x[i] if res is None else weighted(res[i], x))


def merged_back(res: Matrix, g: Sequence[Expr], j: int) -> Expr:
    """dx_j of g = dx', the values of one column."""
    return g[j] if res is None else weighted([row[j] for row in res], g)


def weighted(weights: Iterable[Expr], values: Iterable[Expr]) -> Expr:
    """Σ_i w_i v_i: u with pre, and df of g = dx' with post."""
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


class Merge:
    """The macros for one token, walked in blocks of `block` columns.

    With `threads`, each of so many CUDA threads has neighbouring columns to itself (`columns.Columns`). With `group`
    below n, the token's n² weights do not fit a thread's registers: they are read where they are needed, the forward
    writes one output stream at a time, and the backward takes `group` input streams at a time and reads g again for
    each group, from a cache. Members of a group past the last stream repeat it; their sums are dropped.

    Where res is the identity, g is dx, so that the backward has nothing to do with x and dx.
    """

    def __init__(
        self,
        problem: Problem,
        block: int,
        dialect: Dialect,
        threads: int = 0,
        group: int | None = None,
        *,
        nontemporal: bool = False,
        prefetched: bool = False,
    ) -> None:
        n, width = problem.streams, problem.width
        streams, self._held, self._mixes = tuple(range(n)), group is None, problem.mixes
        columns = Columns(block, problem.dtype, dialect, threads, nontemporal=nontemporal, prefetched=prefetched)
        outputs, members, held = (1, tuple(range(min(group, n))), False) if group else (n, streams, True)
        members = members if problem.mixes else ()

        def rows(buffer: Buffer, count: int = n, copied: bool = False) -> list[SourceRow]:
            return [columns.row(buffer, copied=copied) for _ in range(count)]

        def results(buffer: Buffer, count: int = n) -> list[ResultRow]:
            return [columns.result(buffer) for _ in range(count)]

        def walked(tensors: Any, count: int) -> tuple[list[SourceRow], list[ResultRow]]:
            """So many streams of x and dx."""
            return (rows(tensors.x, count), results(tensors.dx, count)) if count else ([], [])

        def load(parts: Sequence[SourceRow], of: Sequence[Expr], token: Expr, column: Expr) -> None:
            for part, i in zip(parts, of, strict=True):
                part.load(token, i * width + column)

        @T.macro
        def merge(x: Buffer, f: Buffer, out: Buffer, token: Expr, weights: Any) -> None:
            """out_i of one token."""
            state, sublayer, mixed = rows(x), columns.row(f), results(out, outputs)
            for chunk in T.serial(width // block):
                load(state, streams, token, chunk * block)
                sublayer.load(token, chunk * block)
                for first in (0,) if held else T.serial(n):
                    for i, row in enumerate(mixed):
                        row.store_at(token, (first + i) * width + chunk * block)
                    post, res = weights.outputs(first, outputs)
                    for outer in columns.outer():
                        for inner in columns.inner():
                            column = columns.index(outer, inner)
                            added, values = sublayer.get(column), [state[j].get(column) for j in streams]
                            for i, row in enumerate(mixed):
                                row.put(column, merged(res, values, post, added, i))
                    for row in mixed:
                        row.flush()

        @T.macro
        def merge_and_dot(
            x: Buffer, f: Buffer, du: Buffer, out: Buffer, token: Expr, weights: Any, dpre: Buffer
        ) -> None:
            """out_i of one token, and in the same pass dpre_i = Σ_c du_c out_ic, into dpre [n, T]."""
            sums = [columns.sums() for _ in streams]
            state, sublayer, upper, mixed = rows(x), columns.row(f), columns.row(du), results(out)
            post, res = weights.outputs(0, n)
            for chunk in T.serial(width // block):
                load(state, streams, token, chunk * block)
                sublayer.load(token, chunk * block)
                upper.load(token, chunk * block)
                for i in streams:
                    mixed[i].store_at(token, i * width + chunk * block)
                for outer in columns.outer():
                    for inner in columns.inner():
                        at, column = dialect.partial_index(outer), columns.index(outer, inner)
                        added, grad = sublayer.get(column), upper.get(column)
                        values = [state[j].get(column) for j in streams]
                        for i in streams:
                            mixed[i].put(column, merged(res, values, post, added, i))
                            sums[i][at] += grad * mixed[i].get(column)
                for i in streams:
                    mixed[i].flush()
            dialect.totals(sums, partial(put_column, dpre, token))

        @T.macro
        def put_sums(
            dpost: Buffer, dres: Buffer, token: Expr, first: Expr, gates: int, count: int, number: Expr, value: Expr
        ) -> None:
            """One of the sums of a pass: `gates` of dpost, then n rows of `count` columns of dres from `first` on."""
            if number < gates:
                dpost[token, number] = value
            else:
                if first + (number - gates) % count < n:
                    dres[token, (number - gates) // count, first + (number - gates) % count] = value

        @T.macro
        def put_gate(dpost: Buffer, token: Expr, number: Expr, value: Expr) -> None:
            dpost[token, number] = value

        @T.macro
        def back(tensors: Any, token: Expr, weights: Any, first: Expr, of_f: bool, members: Sequence[int]) -> None:
            """Gradients of the input streams first + `members` and their weights, and of f and post where `of_f`."""
            res_sums = [[columns.sums() for _ in members] for _ in streams]
            post_sums = [columns.sums() for _ in streams] if of_f else []
            upper, (state, state_grads) = rows(tensors.g, copied=problem.mixes), walked(tensors, len(members))
            if of_f:
                sublayer, sublayer_grads, post = columns.row(tensors.f), columns.result(tensors.df), weights.gates()
            group, res = weights.inputs(first, members)
            for chunk in T.serial(width // block):
                load(upper, streams, token, chunk * block)
                load(state, group, token, chunk * block)
                if of_f:
                    sublayer.load(token, chunk * block)
                    sublayer_grads.store_at(token, chunk * block)
                for member in members:
                    state_grads[member].store_at(token, group[member] * width + chunk * block)
                for outer in columns.outer():
                    for inner in columns.inner():
                        at, column = dialect.partial_index(outer), columns.index(outer, inner)
                        grads = [upper[i].get(column) for i in streams]
                        if of_f:
                            added = sublayer.get(column)
                            sublayer_grads.put(column, weighted(post, grads))
                        for member in members:
                            value = state[member].get(column)
                            state_grads[member].put(column, merged_back(res, grads, member))
                            for i in streams:
                                res_sums[i][member][at] += grads[i] * value
                        if of_f:
                            for i in streams:
                                post_sums[i][at] += grads[i] * added
                for member in members:
                    state_grads[member].flush()
                if of_f:
                    sublayer_grads.flush()
            if problem.mixes:
                count = max(1, len(members))
                put = partial(put_sums, tensors.dpost, tensors.dres, token, first, len(post_sums), count)
            else:
                put = partial(put_gate, tensors.dpost, token)
            dialect.totals([*post_sums, *(sums for row_sums in res_sums for sums in row_sums)], put)

        @T.macro
        def merge_back(tensors: Any, token: Expr, weights: Any) -> None:
            """dx_j = Σ_i res_ij g_i;  df = Σ_i post_i g_i;  dres_ij = ⟨g_i, x_j⟩;  dpost_i = ⟨g_i, f⟩.

            `tensors` has x, f, g, dx, df, dres and dpost. g may be dx itself, but not where streams come in groups:
            then it is read after a part of dx is written.
            """
            if held:
                back(tensors, token, weights, 0, True, members)
            else:
                back(tensors, token, weights, 0, True, ())
                for group in T.serial(T.ceildiv(n, len(members))):
                    back(tensors, token, weights, group * len(members), False, members)

        self.merge, self.merge_and_dot, self.merge_back = merge, merge_and_dot, merge_back
        self._streams, self._values = streams, quads_of if threads else values_of

    def weights(self, tensors: Any, token: Expr) -> Any:
        """The token's weights for the macros, of `tensors` post and res: read now, or where they are needed."""
        n = len(self._streams)
        if self._mixes and not self._held:
            return _Unread(tensors.res, tensors.post, token, self._streams)
        res = [self._values(tensors.res, (token, i, 0), n) for i in self._streams] if self._mixes else None
        return _Held(res, self._values(tensors.post, (token, 0), n))


class _Held(NamedTuple):
    """A token's weights as values."""

    res: Matrix
    post: list[Expr]

    def outputs(self, first: int, count: int) -> tuple[list[Expr], Matrix]:
        """post_i and row i of res, of `count` output streams."""
        return self.post, self.res

    def inputs(self, first: int, members: Sequence[int]) -> tuple[Sequence[Expr], Matrix]:
        """The input streams first + `members`, and for every output stream their weights."""
        return members, self.res

    def gates(self) -> list[Expr]:
        """post_i."""
        return self.post


class _Unread(NamedTuple):
    """A token's weights in the tensors, each read when it is asked for."""

    res: Buffer
    post: Buffer
    token: Expr
    streams: Sequence[int]

    def outputs(self, first: Expr, count: int) -> tuple[list[Expr], list[list[Expr]]]:
        """See `_Held`."""
        chosen = [first + i for i in range(count)]
        post = [bind(self.post[self.token, i]) for i in chosen]
        return post, [[bind(self.res[self.token, i, j]) for j in self.streams] for i in chosen]

    def inputs(self, first: Expr, members: Sequence[int]) -> tuple[Sequence[Expr], list[list[Expr]]]:
        """See `_Held`."""
        last = len(self.streams) - 1
        group = members if len(members) > last else [bind(T.min(first + member, last)) for member in members]
        return group, [[bind(self.res[self.token, i, j]) for j in group] for i in self.streams]

    def gates(self) -> list[Expr]:
        """See `_Held`."""
        return [bind(self.post[self.token, i]) for i in self.streams]


def merge_of(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Merge:
    """The macros for a schedule: in groups where a CUDA thread could not hold n² weights."""
    group = GROUP if in_groups(problem, schedule) else None
    how = {"nontemporal": bool(schedule.nontemporal), "prefetched": True}
    return Merge(problem, schedule.block_width, dialect, schedule.threads, group, **how)


def merge_forward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """out_ic = Σ_j res_ij x_jc + post_i f_c."""
    macros = merge_of(problem, schedule, dialect)

    @program(merge_arguments(problem), dialect)
    def merge_forward(p: Any) -> None:
        with dialect.kernel(p.tokens, threads=schedule.threads) as token:
            dialect.min_blocks_per_sm(schedule.min_blocks_per_sm)
            macros.merge(p.x, p.f, p.out, token, macros.weights(p, token))

    return merge_forward


def merge_backward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """dx_jc = Σ_i res_ij g_ic;  df_c = Σ_i post_i g_ic;  dres_ij = Σ_c g_ic x_jc;  dpost_i = Σ_c g_ic f_c.

    The first and the third where res is not the identity.
    """
    macros = merge_of(problem, schedule, dialect)

    @program(merge_arguments(problem), dialect)
    def merge_backward(p: Any) -> None:
        with dialect.kernel(p.tokens, threads=schedule.threads) as token:
            dialect.min_blocks_per_sm(schedule.min_blocks_per_sm)
            macros.merge_back(p, token, macros.weights(p, token))

    return merge_backward
