"""phi cut into bfloat16 parts once, by a kernel of its own, where thread blocks would all cut what they stage of it."""

from collections.abc import Callable
from typing import Any

import tilelang.language as T

from tiles.kernels.project.matmul_schedule import TiledSchedule, padded_outputs
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.tensor_cores import PART, part
from tiles.lang.values import Buffer, Expr, bind

COLUMNS, THREADS = 1024, 128
"""Columns and threads of a thread block that cuts them."""


class Halves:
    """The parts of phi [N, K], one under the other and zeros below: [rows, columns] of workspace.

    `origin` tells of each of its columns which one of phi is there, or one past all: that is zero.
    """

    def __init__(
        self, problem: Problem, schedule: TiledSchedule, dialect: Dialect, columns: int, origin: Callable[[Expr], Expr]
    ) -> None:
        outputs, rows = problem.outputs, padded_outputs(problem, schedule)
        self.shape = (rows, columns) if schedule.halved else (1, 1)
        self.dtype = dialect.storage(PART)
        self.blocks, self.rows = -(-columns // COLUMNS), rows - outputs

        @T.macro
        def fill(phi: Buffer, halves: Buffer, block: Expr, k: Expr) -> None:
            """One block of columns of one row of phi and its second part; or of zeros."""
            for lane in dialect.lanes(COLUMNS):
                at = block * COLUMNS + lane
                if at < columns:
                    if k < outputs:
                        value = bind(phi[k, origin(at)])
                        halves[k, at] = part(dialect, value, 0)
                        halves[outputs + k, at] = part(dialect, value, 1)
                    else:
                        halves[outputs + k, at] = dialect.store(T.float32(0), PART)

        self.fill: Any = fill
