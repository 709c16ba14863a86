"""Launches read back from what the launcher's text says, for several token counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autotune.sass.launches import Launch, launches
from tiles.compiler.cuda_launcher import SUM_KERNEL, Plan, with_cuda_launcher
from tiles.compiler.cuda_launcher import Launch as Planned
from tiles.kernels.spec import TOKENS, Argument

ARGUMENTS = (Argument("x", (TOKENS, 8), "bfloat16", "input"), Argument("out", (300,), "float32", "partial"))
ROWS = Planned("rows", ("x", "tokens"), ("((tokens + INT64_C(15)) / INT64_C(16))", "INT64_C(3)", "1"), (64, 2, 1), 0)
SUMS = Planned("sums", ("out", "x", "splits", "tokens"), ("(splits * INT64_C(2))", "1", "1"), (128, 1, 1), 100 * 1024)
PLAN = Plan((ROWS, SUMS), most_splits=4, split_tokens=32)


def read(plan: Plan, tokens: int) -> list[Launch]:
    return launches(with_cuda_launcher("no CUDA here", plan, ARGUMENTS), tokens)


def test_blocks_follow_the_tokens_and_their_splits():
    total = Launch(SUM_KERNEL, 2, 256, 0)
    assert read(PLAN, 33) == [Launch("rows", 9, 128, 0), Launch("sums", 2, 128, 100 * 1024)]
    assert read(PLAN, 64) == [Launch("rows", 12, 128, 0), Launch("sums", 4, 128, 100 * 1024), total]
    assert read(PLAN, 1000) == [Launch("rows", 189, 128, 0), Launch("sums", 8, 128, 100 * 1024), total]


def test_a_chunk_is_what_one_launch_gets():
    chunked = replace(PLAN, chunk_tokens=40, use_pdl=1)
    assert [(launch.kernel, launch.blocks) for launch in read(chunked, 1000)] == [
        ("rows", 9),
        ("sums", 2),
        (SUM_KERNEL, 2),
    ]
    assert [launch.blocks for launch in read(chunked, 16)] == [3, 2]


def test_a_program_that_sums_nothing_has_its_own_kernels_alone():
    assert read(Plan((ROWS,)), 1000) == [Launch("rows", 189, 128, 0)]


def test_an_extent_that_is_no_arithmetic_is_refused():
    with pytest.raises(ValueError, match=r"over tokens and splits, got .*exit\(1\)"):
        read(Plan((replace(ROWS, grid=("exit(1)", "1", "1")),)), 1)
