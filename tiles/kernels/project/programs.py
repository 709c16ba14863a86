"""project as TileLang programs (docs/design.md, "The maths"): a tall, thin matmul and the squared norm, with x read
once. Here are those for a CPU, in register blocks; `matmul_programs` has those for tensor cores.

`projection` and `gradients` make the macros that the fused passes share. Streams are flattened, x̄ [T, K]: stream i of
a token begins at column i·C. Tokens past the end are clamped to the last one and never stored.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tilelang.language as T

from tiles.kernels.project import matmul_programs
from tiles.kernels.project.matmul_schedule import TiledSchedule
from tiles.kernels.project.schedule import BackwardSchedule, ForwardSchedule, Schedule
from tiles.kernels.spec import Problem
from tiles.lang.dialect import Cpu, Dialect, View
from tiles.lang.values import Buffer, Expr, as_value, bind, token_range, variable


def forward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """z_tk = Σ_c x̄_tc phi_kc;  s_t = Σ_c x̄_tc²."""
    if isinstance(schedule, TiledSchedule):
        return matmul_programs.forward(problem, schedule, dialect)
    assert isinstance(schedule, ForwardSchedule)
    assert isinstance(dialect, Cpu)
    fan_in, outputs = problem.fan_in, problem.outputs
    project = projection(problem, schedule, dialect)
    tokens = T.dynamic("tokens")

    @T.prim_func
    def project_forward(
        x: T.Tensor((tokens, fan_in), dialect.storage(problem.dtype)),
        phi: T.Tensor((outputs, fan_in), "float32"),
        z: T.Tensor((tokens, outputs), "float32"),
        s: T.Tensor((tokens,), "float32"),
    ):
        with dialect.kernel(T.ceildiv(tokens, schedule.register_tokens), threads=schedule.threads) as block:
            project(x, phi, z, s, block * schedule.register_tokens, as_value(tokens))

    return project_forward


def projection(problem: Problem, schedule: Any, dialect: Cpu) -> Any:
    """The macro that projects one register block of tokens, start..start + register_tokens as far as below `last`."""
    fan_in, outputs, width = problem.fan_in, problem.outputs, schedule.block_width
    rows = tuple(range(schedule.register_tokens))
    groups = output_groups(outputs, schedule.register_outputs)

    @T.macro
    def add_group(dots: Buffer, staged: Buffer, phi: Buffer, chunk: Expr, k: Expr, size: int) -> None:
        weights = View(phi, (k, chunk * width), (0, 1))
        dialect.add_dots(dots, k, View(staged, (0, 0), (0, 1)), weights, len(rows), size, width)

    @T.macro
    def project(x: Buffer, phi: Buffer, z: Buffer, s: Buffer, start: Expr, last: Expr) -> None:
        token = [variable(T.min(start + t, last - 1)) for t in rows]
        staged = dialect.scratch(len(rows), width)
        squares = [dialect.accumulator(width) for _ in rows]
        dots = dialect.dot_sums(len(rows), outputs)
        for chunk in T.serial(fan_in // width):
            for lane in dialect.lanes(width):
                at = dialect.lane(lane)
                for t in rows:
                    value = bind(dialect.load(x[token[t], chunk * width + lane], problem.dtype))
                    staged[t, lane] = value
                    squares[t][at] += value * value
            for g in T.serial(groups.whole):
                add_group(dots, staged, phi, chunk, g * groups.size, groups.size)
            if groups.rest > 0:
                add_group(dots, staged, phi, chunk, groups.whole * groups.size, groups.rest)
        for t in rows:
            if start + t < last:
                s[token[t]] = squares[t][0]
                for k in dialect.lanes(outputs):
                    z[token[t], k] = dialect.dot_sum(dots, t, k)

    return project


def backward(problem: Problem, schedule: Schedule, dialect: Dialect) -> Any:
    """dx̄_tc = Σ_k dz_tk phi_kc + 2 ds_t x̄_tc;  dphi_kc = Σ_t dz_tk x̄_tc, one partial sum per split of the tokens."""
    if isinstance(schedule, TiledSchedule):
        return matmul_programs.backward(problem, schedule, dialect)
    assert isinstance(schedule, BackwardSchedule)
    assert isinstance(dialect, Cpu)
    fan_in, outputs, block, width = problem.fan_in, problem.outputs, schedule.block_tokens, schedule.block_width
    stored, columns = dialect.storage(problem.dtype), fan_in // schedule.column_groups
    spread = gradients(problem, schedule, dialect)
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
        with dialect.kernel(schedule.column_groups, splits, threads=schedule.threads) as (group, split):
            factors, slope = dialect.scratch(outputs, block), dialect.scratch(block)
            for k in T.serial(outputs):
                for lane in dialect.lanes(columns):
                    dphi[split, k, group * columns + lane] = T.float32(0)
            first, last, blocks = token_range(tokens, split, splits, block)
            for step in T.serial(blocks[0]):
                start = bind(first[0] + step * block)
                for lane in dialect.lanes(block):
                    token = T.min(start + lane, last[0] - 1)
                    slope[lane] = ds[token]
                    for k in T.serial(outputs):
                        factors[k, lane] = dz[token, k]
                for part in T.serial(columns // width):
                    column = bind(group * columns + part * width)
                    spread(x, phi, dx, dphi, factors, slope, split, start, last[0], column, None, ())

    return project_backward


def gradients(problem: Problem, schedule: Any, dialect: Cpu) -> Any:
    """The macro for a block of tokens and columns: dphi += dzᵀ·x̄ and dx̄ = dz·phi + 2 x̄ ds + others.

    dz comes as `factors` [N, block_tokens], ds as `slope` [block_tokens]. `others`, where given, makes an expression
    from (token in the block, token, lane).
    """
    outputs, width, dtype = problem.outputs, schedule.block_width, problem.dtype
    rows = tuple(range(schedule.register_tokens))
    groups = output_groups(outputs, schedule.register_outputs)

    @T.macro
    def add_group(
        dphi: Buffer, factors: Buffer, staged: Buffer, split: Expr, column: Expr, k: Expr, size: int, count: Expr
    ) -> None:
        out, of_tokens = View(dphi, (split, k, column), (1, 2)), View(factors, (k, 0), (0, 1))
        dialect.add_product(out, of_tokens, View(staged, (0, 0), (0, 1)), size, count, width)

    @T.macro
    def spread(
        x: Buffer,
        phi: Buffer,
        dx: Buffer,
        dphi: Buffer,
        factors: Buffer,
        slope: Buffer,
        split: Expr,
        start: Expr,
        last: Expr,
        column: Expr,
        others: Callable[[Expr, Expr, Expr], Expr] | None,
        also: tuple[Buffer, ...],
    ) -> None:
        staged, grads = dialect.scratch(schedule.block_tokens, width), dialect.scratch(len(rows), width)
        count = variable(T.min(schedule.block_tokens, last - start))
        for t in T.serial(count):
            dialect.prefetch((x, dx, *also), start + t, column + width, width)
            for lane in dialect.lanes(width):
                staged[t, lane] = dialect.load(x[start + t, column + lane], dtype)
        for g in T.serial(groups.whole):
            add_group(dphi, factors, staged, split, column, g * groups.size, groups.size, count)
        if groups.rest > 0:
            add_group(dphi, factors, staged, split, column, groups.whole * groups.size, groups.rest, count)
        for r in T.serial(T.ceildiv(count, len(rows))):
            near = [variable(T.min(r * len(rows) + t, count - 1)) for t in rows]
            for t in rows:
                for lane in dialect.lanes(width):
                    more = T.float32(0) if others is None else others(near[t], start + near[t], lane)
                    grads[t, lane] = 2 * slope[near[t]] * staged[near[t], lane] + more
            of_outputs = View(factors, (0, r * len(rows)), (1, 0))
            dialect.add_product(
                View(grads, (0, 0), (0, 1)), of_outputs, View(phi, (0, column), (0, 1)), len(rows), outputs, width
            )
            for t in rows:
                if r * len(rows) + t < count:
                    for lane in dialect.lanes(width):
                        dx[start + near[t], column + lane] = dialect.store(grads[t, lane], dtype)

    return spread


class Groups(NamedTuple):
    """Outputs cut into register blocks: how many whole ones of `size`, and the outputs that are left."""

    size: int
    whole: int
    rest: int


def output_groups(outputs: int, size: int) -> Groups:
    """Cut `outputs` into blocks of `size`."""
    return Groups(size, outputs // size, outputs % size)
