"""Results that CPU kernels store past the caches: the same bits, wherever they lie and however their lines are cut."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from building import build

from tiles.compiler.compile import generate_source
from tiles.kernels.limits import PAST_CACHES
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import DTYPE_BYTES, Problem
from tiles.runtime.loaded_kernel import is_given, is_result
from tiles.target import Target, parse_target

TOKENS, SLICES = 21, 2
SENTINEL = -7.0
STREAMED = ("out", "u", "x_next", "dx", "df")
"""What goes past the caches. A C compiler may add up sums beside it in another order in the other kernel."""
FAST = [
    ("merge", "forward", "bfloat16"),
    ("merge", "backward", "float32"),
    ("aggregate", "backward", "float16"),
]
SLOW = [
    ("project", "backward", "bfloat16"),
    ("aggregate", "forward", "bfloat16"),
    ("merge", "backward", "bfloat16"),
    ("merge_identity", "forward", "float32"),
    ("single_pass", "forward", "bfloat16"),
    ("single_pass", "forward", "float32"),
    ("single_pass", "backward", "bfloat16"),
    ("single_pass_identity", "backward", "float32"),
]


@pytest.mark.parametrize(
    ("op", "direction", "dtype"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_the_bits_are_those_of_usual_stores_at_any_address(op, direction, dtype, tmp_path):
    """Rows of 72 columns begin and end within cache lines, and no result begins at one."""
    problem, target, spec = (
        Problem(op, direction, 3, 72, dtype, TOKENS),
        parse_target("cpu"),
        kernel_spec(op, direction),
    )
    default = spec.default(problem, target)
    usual, past = (build(tmp_path / f"{at}.so", problem, replace(default, nontemporal=at)) for at in (0, 1))
    inputs = spec.inputs(problem, TOKENS, seed=3)
    given = {part.name: inputs[part.name] for part in usual.arguments if is_given(part)}
    wanted, shifted = ({part.name: _memory(part) for part in usual.arguments if is_result(part)} for _ in range(2))
    usual.launch(given, {name: around[:-2].view(shape) for name, (around, shape) in wanted.items()}, TOKENS, SLICES)
    past.launch(given, {name: around[1:-1].view(shape) for name, (around, shape) in shifted.items()}, TOKENS, SLICES)
    for name, (around, _shape) in shifted.items():
        found, usually = around[1:-1], wanted[name][0][:-2]
        if name in STREAMED:
            assert torch.equal(found, usually), name
        else:
            torch.testing.assert_close(found, usually, rtol=1e-5, atol=1e-5, msg=name)
        assert around[0] == SENTINEL == around[-1], name


def _memory(part):
    """Memory with room for a result as torch places it and one element later; the result's shape."""
    shape = (SLICES, *part.shape) if part.role == "partial" else part.sized(TOKENS)
    return torch.full((math.prod(shape) + 2,), SENTINEL, dtype=getattr(torch, part.dtype)), shape


def test_results_beyond_the_caches_take_that_way_unless_told_otherwise():
    cpu = Target("cpu", "x86-64-v3")
    for dtype in ("float32", "bfloat16"):
        tokens = PAST_CACHES // (4 * 1280 * DTYPE_BYTES[dtype])
        for count, wanted, offered in ((tokens - 1, 0, (0,)), (tokens + 1, 1, (0, 1))):
            spec, problem = kernel_spec("merge", "forward"), Problem("merge", "forward", 4, 1280, dtype, count)
            assert spec.default(problem, cpu).nontemporal == wanted
            assert spec.space(problem, cpu)["nontemporal"] == offered


def test_what_went_past_the_caches_is_fenced_for_other_threads():
    problem, cpu, spec = (
        Problem("merge", "forward", 2, 64, "float32"),
        parse_target("cpu"),
        kernel_spec("merge", "forward"),
    )
    source = generate_source(spec, problem, replace(spec.default(problem, cpu), nontemporal=1), cpu)
    kernel, launcher = source.rsplit("mhc_launch", 1)
    assert kernel.count("mhc_stream_float32((&(") == 2
    assert launcher.index("_mm_sfence") > launcher.index("failed |=")


@pytest.mark.parametrize(("target", "nontemporal"), [(Target("cpu", "x86-64-v3"), 2), (Target("cuda", "sm_90a"), 1)])
def test_other_choices_are_refused_in_a_line(target, nontemporal):
    spec = kernel_spec("merge", "forward")
    problem = Problem("merge", "forward", 4, 1280)
    assert {field.name for field in fields(spec.default(problem, target))} >= {"nontemporal"}
    why = spec.why_invalid(problem, replace(spec.default(problem, target), nontemporal=nontemporal), target)
    assert why == f"nontemporal must be 0, or 1 on a CPU, got {nontemporal} on {target}: choose 0"
