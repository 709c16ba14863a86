"""The schedules of merge and aggregate: how many thread blocks of a CUDA multiprocessor registers are held down for."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest

from tiles.compiler.compile import generate_source
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Target

GPU, CPU = Target("cuda", "sm_90a"), Target("cpu", "x86-64-v4")


def test_a_default_leaves_registers_to_the_compiler():
    """At 64 registers, with which three blocks of merge's forward at n = 4 would fit, it spills."""
    for (op, direction), target in product((("merge", "forward"), ("aggregate", "backward")), (GPU, CPU)):
        problem = Problem(op, direction, 4, 2560, "bfloat16", tokens=4096)
        assert kernel_spec(op, direction).default(problem, target).min_blocks_per_sm == 1


@pytest.mark.parametrize("width", [1280, 2560, 4096, 7168])
def test_the_default_of_merges_backward_holds_four_streams_down_to_128_registers(width):
    spec = kernel_spec("merge", "backward")
    for tokens, held in ((4096, True), (64, False)):
        problem = Problem("merge", "backward", 4, width, "bfloat16", tokens=tokens)
        schedule = spec.default(problem, GPU)
        assert schedule.min_blocks_per_sm * schedule.threads == (512 if held else schedule.threads)
        assert schedule.min_blocks_per_sm in spec.space(problem, GPU)["min_blocks_per_sm"]
    for op, n in (("merge", 2), ("merge", 8), ("merge_identity", 16), ("aggregate", 4)):
        problem = Problem(op, "backward", n, width, "bfloat16", tokens=4096)
        assert kernel_spec(op, "backward").default(problem, GPU).min_blocks_per_sm == 1


def test_a_cpu_walks_a_row_in_few_columns_where_vectors_divide_it():
    spec = kernel_spec("merge", "forward")
    for width, block in ((1280, 64), (96, 32), (72, 72)):
        assert spec.default(Problem("merge", "forward", 4, width, "bfloat16", tokens=64), CPU).block_width == block


@pytest.mark.parametrize(("op", "direction"), [("merge", "forward"), ("aggregate", "backward")])
def test_a_cpu_brings_in_what_the_next_token_has_in_the_same_columns(op, direction):
    """Of every row that it reads."""
    spec, problem = kernel_spec(op, direction), Problem(op, direction, 4, 128, "float32", tokens=64)
    source = generate_source(spec, problem, spec.default(problem, CPU), CPU)
    places = re.findall(r"mhc_prefetch_l1_float32\(\(&\((\w+)\[(.+)\]\)\), 64\);", source)
    read = [(name, place) for token, chunk in ((6, 0), (6, 1)) for name, place in brought_in(places, token, chunk)]
    rows = {"x": 4 * 128, {"merge": "f", "aggregate": "du"}[op]: 128}
    assert sorted(read) == sorted((name, 7 * row + at) for name, row in rows.items() for at in range(0, row, 64))


def brought_in(places, token, chunk):
    """The tensor and the place of every prefetch, for these values of the loops."""
    for name, place in places:
        yield name, eval(place.replace("(int64_t)", ""), {"token": token, "row": token, "chunk": chunk})


def test_more_blocks_than_registers_serve_are_refused_in_one_line():
    problem, spec = Problem("merge", "forward", 4, 2560, "bfloat16", tokens=4096), kernel_spec("merge", "forward")
    six, many = (replace(spec.default(problem, GPU), min_blocks_per_sm=count) for count in (6, 17))
    assert spec.why_invalid(problem, six, GPU) == (
        "min_blocks_per_sm must leave a thread 44 registers, got 34 with 6 blocks of 320 threads: choose fewer"
    )
    assert spec.why_invalid(problem, many, GPU) == "min_blocks_per_sm must be in 1..16 on cuda:sm_90a, got 17: choose 1"


def test_a_record_from_before_leaves_registers_to_the_compiler():
    old = kernel_spec("merge", "forward").schedule_from({"block_width": 2560, "threads": 320, "nontemporal": 0})
    assert old.min_blocks_per_sm == 1
