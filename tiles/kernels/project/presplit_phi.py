"""phi split into bfloat16 parts by a kernel of its own, where all thread blocks would split what they copy of it."""

from collections.abc import Callable
from typing import Any

import tilelang.language as T

from tiles.kernels.project.tensor_core_schedule import padded_outputs
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Dialect
from tiles.lang.tensor_cores import OPERAND, split_bf16x2
from tiles.lang.values import Buffer, Expr, bind

COLUMNS, THREADS = 1024, 128
"""Columns and threads of a thread block that splits them."""


class PresplitPhi:
    """The parts of phi [N, K], one under the other and zeros below: [rows, columns] of workspace.

    `origin` tells of each of its columns which one of phi is there, or one past all: that is zero.
    """

    def __init__(
        self, problem: Problem, schedule: Any, dialect: Dialect, columns: int, origin: Callable[[Expr], Expr]
    ) -> None:
        outputs, rows = problem.outputs, padded_outputs(problem, schedule)
        self._used = bool(schedule.presplit_phi)
        self.shape = (rows, columns) if self._used else (1, 1)
        self.dtype = dialect.storage(OPERAND)
        grid = -(-columns // COLUMNS), rows - outputs

        @T.macro
        def fill(phi: Buffer, phi_hi_lo: Buffer, block: Expr, k: Expr) -> None:
            """One block of columns of one row of phi and its second part; or of zeros."""
            for thread in dialect.parallel(COLUMNS):
                at = block * COLUMNS + thread
                if at < columns:
                    if k < outputs:
                        value = bind(phi[k, origin(at)])
                        phi_hi_lo[k, at] = split_bf16x2(dialect, value, 0)
                        phi_hi_lo[outputs + k, at] = split_bf16x2(dialect, value, 1)
                    else:
                        phi_hi_lo[outputs + k, at] = dialect.store(T.float32(0), OPERAND)

        @T.macro
        def launch(phi: Buffer, phi_hi_lo: Buffer) -> None:
            """The kernel that fills the workspace, where the schedule asks for it."""
            if schedule.presplit_phi:
                with dialect.kernel(*grid, threads=THREADS) as (group, k):
                    dialect.pdl_trigger(schedule.use_pdl)
                    fill(phi, phi_hi_lo, group, k)

        self.launch: Any = launch

    def chosen(self, p: Any) -> Buffer:
        """What project multiplies by: the workspace `phi_hi_lo` or, where the schedule splits nothing before, `phi`."""
        return p.phi_hi_lo if self._used else p.phi
