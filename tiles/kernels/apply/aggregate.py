"""aggregate: u = Σ_i pre_i x_i, and its backward, as TileLang programs for CPU and CUDA.

`Aggregate` makes the macros for one token, which the fused kernels share. Streams are flattened, x [T, nC]: stream i of
a token begins at column i·C.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tilelang.language as T

from tiles.kernels.apply.schedule import ApplySchedule
from tiles.kernels.apply.signature import aggregate_arguments
from tiles.kernels.spec import Problem
from tiles.lang.columns import Columns
from tiles.lang.dialect import Dialect
from tiles.lang.program import program
from tiles.lang.values import Buffer, Expr, quads_of, values_of


class Aggregate:
    """The macros for one token, walked in blocks of `block` columns.

    With `threads`, each of so many CUDA threads has neighbouring columns to itself (`columns.Columns`).
    """

    def __init__(
        self,
        problem: Problem,
        block: int,
        dialect: Dialect,
        threads: int = 0,
        *,
        nontemporal: bool = False,
        prefetched: bool = False,
    ) -> None:
        n, width = problem.streams, problem.width
        self.streams = streams = tuple(range(n))
        self._values = quads_of if threads else values_of
        columns = Columns(block, problem.dtype, dialect, threads, nontemporal=nontemporal, prefetched=prefetched)

        @T.macro
        def aggregate(x: Buffer, u: Buffer, token: Expr, pre: Sequence[Expr]) -> None:
            """u_c = Σ_i pre_i x_ic."""
            state, mixed = [columns.row(x) for _ in streams], columns.result(u)
            for chunk in T.serial(width // block):
                for i in streams:
                    state[i].load(token, i * width + chunk * block)
                mixed.store_at(token, chunk * block)
                for outer in columns.outer():
                    for inner in columns.inner():
                        column = columns.index(outer, inner)
                        mixed.put(column, sum(pre[i] * state[i].get(column) for i in streams))
                mixed.flush()

        @T.macro
        def dots(
            x: Buffer, f: Any, du: Buffer, token: Expr, put: Callable[[Expr, Expr], Any], dx: Any, pre: Sequence[Expr]
        ) -> None:
            """Σ_c du_c x_ic for every stream and, where f is given, at last Σ_c du_c f_c; dx_ic = pre_i du_c where dx
            is given."""
            state, upper = [columns.row(x) for _ in streams], columns.row(du)
            more = [] if f is None else [columns.row(f)]
            state_grads = [] if dx is None else [columns.result(dx) for _ in streams]
            sums = [columns.sums() for _ in (*state, *more)]
            for chunk in T.serial(width // block):
                for i in streams:
                    state[i].load(token, i * width + chunk * block)
                for row in more:
                    row.load(token, chunk * block)
                upper.load(token, chunk * block)
                for i, result in enumerate(state_grads):
                    result.store_at(token, i * width + chunk * block)
                for outer in columns.outer():
                    for inner in columns.inner():
                        at, column = dialect.partial_index(outer), columns.index(outer, inner)
                        grad = upper.get(column)
                        for i, row in enumerate((*state, *more)):
                            sums[i][at] += grad * row.get(column)
                            if dx is not None:
                                state_grads[i].put(column, pre[i] * grad)
                for result in state_grads:
                    result.flush()
            dialect.totals(sums, put)

        @T.macro
        def dpre_dot(x: Buffer, du: Buffer, token: Expr, dpre: Buffer, column: Expr) -> None:
            """dpre_i = Σ_c du_c x_ic, into a column of dpre [n, tokens of a block]."""
            dots(x, None, du, token, partial(put_column, dpre, column), None, ())

        @T.macro
        def stream_dots(x: Buffer, f: Buffer, du: Buffer, token: Expr, into: Buffer) -> None:
            """Σ_c du_c x_ic for every stream, and at last Σ_c du_c f_c, into [n + 1, T]."""
            dots(x, f, du, token, partial(put_column, into, token), None, ())

        @T.macro
        def aggregate_back(x: Buffer, du: Buffer, dx: Buffer, dpre: Buffer, token: Expr, pre: Sequence[Expr]) -> None:
            """dx_ic = pre_i du_c;  dpre_i = Σ_c du_c x_ic."""
            dots(x, None, du, token, partial(_put_row, dpre, token), dx, pre)

        self.aggregate, self.aggregate_back = aggregate, aggregate_back
        self.dpre_dot, self.stream_dots = dpre_dot, stream_dots

    def gates(self, weights: Buffer, token: Expr) -> list[Expr]:
        """The n values of one token of weights [T, n]."""
        return self._values(weights, (token, 0), len(self.streams))


@T.macro
def _put_row(tensor: Buffer, row: Expr, column: Expr, value: Expr) -> None:
    tensor[row, column] = value


@T.macro
def put_column(tensor: Buffer, column: Expr, row: Expr, value: Expr) -> None:
    """tensor[row, column] = value, for sums that come by their number."""
    tensor[row, column] = value


def aggregate_of(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Aggregate:
    """The macros for a schedule."""
    how = {"nontemporal": bool(schedule.nontemporal), "prefetched": True}
    return Aggregate(problem, schedule.block_width, dialect, schedule.threads, **how)


def aggregate_forward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """u_c = Σ_i pre_i x_ic."""
    macros = aggregate_of(problem, schedule, dialect)

    @program(aggregate_arguments(problem), dialect)
    def aggregate_forward(p: Any) -> None:
        with dialect.kernel(p.tokens, threads=schedule.threads) as token:
            dialect.min_blocks_per_sm(schedule.min_blocks_per_sm)
            macros.aggregate(p.x, p.u, token, macros.gates(p.pre, token))

    return aggregate_forward


def aggregate_backward(problem: Problem, schedule: ApplySchedule, dialect: Dialect) -> Any:
    """dx_ic = pre_i du_c;  dpre_i = Σ_c du_c x_ic."""
    macros = aggregate_of(problem, schedule, dialect)

    @program(aggregate_arguments(problem), dialect)
    def aggregate_backward(p: Any) -> None:
        with dialect.kernel(p.tokens, threads=schedule.threads) as token:
            dialect.min_blocks_per_sm(schedule.min_blocks_per_sm)
            macros.aggregate_back(p.x, p.du, p.dx, p.dpre, token, macros.gates(p.pre, token))

    return aggregate_backward
