"""project as TileLang programs (DESIGN, the maths): a tall, thin matmul and the squared norm, with x read once.

Tokens and outputs are unrolled into register blocks when the program is built; lanes run over the columns of the
flattened stream state x̄ [T, K]. Tokens past the end are clamped to the last one and never stored.
"""

from typing import Any

import tilelang.language as T

from tiles.dialect import Dialect, bind, multiply_add, token_range
from tiles.family import Problem
from tiles.project.schedule import BackwardSchedule, ForwardSchedule


def forward(problem: Problem, schedule: ForwardSchedule, dialect: Dialect) -> Any:
    """z_tk = Σ_c x̄_tc phi_kc;  s_t = Σ_c x̄_tc²."""
    fan_in, outputs, dtype = problem.fan_in, problem.outputs, problem.dtype
    block_tokens, block_width, block_outputs = schedule.block_tokens, schedule.block_width, schedule.block_outputs
    rows, whole, group, rest = _register_blocks(block_tokens, block_outputs, outputs)
    tokens = T.dynamic("tokens")

    @T.macro
    def dots(phi: Any, staged: Any, z_sums: Any, chunk: Any, ks: Any):
        sums = [[dialect.accumulator(block_width) for _ in ks] for _ in rows]
        for lane in dialect.lanes(block_width):
            at = dialect.lane(lane)
            weights = [bind(phi[k, chunk * block_width + lane]) for k in ks]
            for t in rows:
                for j, weight in enumerate(weights):
                    sums[t][j][at] += staged[t][lane] * weight
        for t in rows:
            for j, k in enumerate(ks):
                z_sums[t, k] += dialect.total(sums[t][j])[0]

    @T.prim_func
    def project_forward(
        x: T.Tensor((tokens, fan_in), dialect.storage(dtype)),
        phi: T.Tensor((outputs, fan_in), "float32"),
        z: T.Tensor((tokens, outputs), "float32"),
        s: T.Tensor((tokens,), "float32"),
    ):
        with dialect.kernel(T.ceildiv(tokens, block_tokens), threads=schedule.threads) as block:
            token = [bind(T.min(block * block_tokens + t, tokens - 1)) for t in rows]
            staged = [dialect.tile(block_width) for _ in rows]
            squares = [dialect.accumulator(block_width) for _ in rows]
            z_sums = dialect.scratch(block_tokens, outputs)
            for t in rows:
                for k in dialect.lanes(outputs):
                    z_sums[t, k] = T.float32(0)
            for chunk in T.serial(fan_in // block_width):
                for lane in dialect.lanes(block_width):
                    at = dialect.lane(lane)
                    for t in rows:
                        value = bind(dialect.load(x[token[t], chunk * block_width + lane], dtype))
                        staged[t][lane] = value
                        squares[t][at] += value * value
                for g in T.serial(whole):
                    dots(phi, staged, z_sums, chunk, [g * block_outputs + j for j in group])
                if len(rest) > 0:
                    dots(phi, staged, z_sums, chunk, rest)
            for t in rows:
                if block * block_tokens + t < tokens:
                    s[token[t]] = dialect.total(squares[t])[0]
                    for k in dialect.lanes(outputs):
                        z[token[t], k] = z_sums[t, k]

    return project_forward


def backward(problem: Problem, schedule: BackwardSchedule, dialect: Dialect) -> Any:
    """dx̄_tc = Σ_k dz_tk phi_kc + 2 ds_t x̄_tc;  dphi_kc = Σ_t dz_tk x̄_tc, one partial sum per split of the tokens."""
    fan_in, outputs, dtype = problem.fan_in, problem.outputs, problem.dtype
    block_tokens, block_width, block_outputs = schedule.block_tokens, schedule.block_width, schedule.block_outputs
    rows, whole, group, rest = _register_blocks(block_tokens, block_outputs, outputs)
    tokens, splits = T.dynamic("tokens"), T.dynamic("splits")

    @T.macro
    def accumulate(phi: Any, dz: Any, token: Any, there: Any, staged: Any, grads: Any, sums: Any, c: Any, ks: Any):
        factors = [[bind(T.if_then_else(there[t], dz[token[t], k], T.float32(0))) for t in rows] for k in ks]
        for lane in dialect.lanes(block_width):
            values = [bind(staged[t][lane]) for t in rows]
            weights = [bind(phi[k, c + lane]) for k in ks]
            for j, k in enumerate(ks):
                sums[k, lane] = multiply_add(sums[k, lane], factors[j], values)
            for t in rows:
                grads[t][lane] = multiply_add(grads[t][lane], [of_k[t] for of_k in factors], weights)

    @T.prim_func
    def project_backward(
        x: T.Tensor((tokens, fan_in), dialect.storage(dtype)),
        phi: T.Tensor((outputs, fan_in), "float32"),
        dz: T.Tensor((tokens, outputs), "float32"),
        ds: T.Tensor((tokens,), "float32"),
        dx: T.Tensor((tokens, fan_in), dialect.storage(dtype)),
        dphi: T.Tensor((splits, outputs, fan_in), "float32"),
    ):
        with dialect.kernel(fan_in // block_width, splits, threads=schedule.threads) as (chunk, split):
            staged = [dialect.tile(block_width) for _ in rows]
            grads = [dialect.tile(block_width) for _ in rows]
            sums = dialect.scratch(outputs, block_width)
            for k in T.serial(outputs):
                for lane in dialect.lanes(block_width):
                    sums[k, lane] = T.float32(0)
            first, last, blocks = token_range(tokens, split, splits, block_tokens)
            for block in T.serial(blocks[0]):
                start = bind(first[0] + block * block_tokens)
                token = [bind(T.min(start + t, last[0] - 1)) for t in rows]
                there = [start + t < last[0] for t in rows]
                norm = [bind(2 * ds[token[t]]) for t in rows]
                for lane in dialect.lanes(block_width):
                    for t in rows:
                        value = bind(dialect.load(x[token[t], chunk * block_width + lane], dtype))
                        staged[t][lane] = value
                        grads[t][lane] = norm[t] * value
                for g in T.serial(whole):
                    ks = [g * block_outputs + j for j in group]
                    accumulate(phi, dz, token, there, staged, grads, sums, chunk * block_width, ks)
                if len(rest) > 0:
                    accumulate(phi, dz, token, there, staged, grads, sums, chunk * block_width, rest)
                for t in rows:
                    if there[t]:
                        for lane in dialect.lanes(block_width):
                            dx[token[t], chunk * block_width + lane] = dialect.store(grads[t][lane], dtype)
            for k in T.serial(outputs):
                for lane in dialect.lanes(block_width):
                    dphi[split, k, chunk * block_width + lane] = sums[k, lane]

    return project_backward


def _register_blocks(block_tokens: int, block_outputs: int, outputs: int) -> tuple[Any, int, Any, Any]:
    """Rows of a token block, the number of whole output blocks, offsets in one, and the outputs that are left."""
    whole = outputs // block_outputs
    return tuple(range(block_tokens)), whole, tuple(range(block_outputs)), tuple(range(whole * block_outputs, outputs))
