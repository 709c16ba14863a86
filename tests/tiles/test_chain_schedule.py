"""The schedules of pre and step on CUDA: what few tokens and many streams change."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from tiles.family import Problem
from tiles.fused import chain_schedule
from tiles.fused.chain_schedule import lanes, split_sums
from tiles.registry import kernel_spec
from tiles.target import Target

HOPPER = Target("cuda", "sm_90a")


def problem(direction: str, tokens: int, streams: int = 4, width: int = 2560) -> Problem:
    return Problem("pre", direction, streams, width, "bfloat16", tokens)


def test_few_tokens_have_no_chunks_and_no_fixed_grid_to_choose():
    for direction in ("forward", "backward"):
        space = chain_schedule.space(problem(direction, 64), HOPPER)
        assert space["row_blocks"] == space["chunk_tokens"] == (0,)
        many = chain_schedule.space(problem(direction, 4096), HOPPER)
        assert many["row_blocks"] == (0, 528)
        assert many["chunk_tokens"] == (0, 1024, 2048)


def test_one_token_gets_more_threads_for_its_row_than_one_of_many():
    one, many = (chain_schedule.default(problem("forward", tokens), HOPPER) for tokens in (1, 4096))
    assert (one.row_threads, one.lane_tokens) == (160, 1)
    assert (many.row_threads, many.lane_tokens) == (64, 8)


@pytest.mark.parametrize("streams", range(1, 17))
def test_the_threads_of_a_block_add_up_every_sum_of_its_tokens(streams):
    for tokens in (1, 3, 8):
        at_hand = problem("forward", tokens, streams)
        schedule = replace(chain_schedule.default(at_hand, HOPPER), lane_tokens=tokens)
        turns, elements = split_sums(at_hand, schedule)
        assert elements <= chain_schedule.SUM_ELEMENTS
        wanted = tokens * (at_hand.outputs + 1)
        assert wanted <= turns * elements * lanes(at_hand) < wanted + (turns + 1) * lanes(at_hand)


def test_a_backwards_default_splits_fill_the_turns_of_a_hopper_gpu():
    """80 tiles of columns: three splits are 240 thread blocks, of 264 that run at a time; four would take two turns."""
    schedule = chain_schedule.default(problem("backward", 4096), HOPPER)
    assert (schedule.block_width, schedule.resident, schedule.splits) == (128, 2, 3)
    assert chain_schedule.default(problem("backward", 64), HOPPER).splits == 1


@pytest.mark.parametrize("streams", (1, 2, 4, 8, 12, 16))
@pytest.mark.parametrize("arch", ("sm_80", "sm_86", "sm_90a", "sm_100a"))
def test_defaults_are_valid_and_in_their_own_space(arch, streams):
    target = Target("cuda", arch)
    for direction, op, tokens, width in product(
        ("forward", "backward"), ("pre", "step"), (1, 64, 4096), (8, 1280, 7168)
    ):
        at_hand = replace(problem(direction, tokens, streams, width), op=op)
        schedule = chain_schedule.default(at_hand, target)
        assert chain_schedule.why_invalid(at_hand, schedule, target) is None
        space = chain_schedule.space(at_hand, target)
        assert all(getattr(schedule, name) in values for name, values in space.items())


@pytest.mark.parametrize("op", ("project", "pre", "step"))
def test_kernels_may_overlap_on_hopper_and_newer(op):
    spec, at_hand = kernel_spec(op, "backward"), replace(problem("backward", 4096), op=op)
    for arch in ("sm_80", "sm_89", "sm_90", "sm_90a", "sm_100a", "sm_121a"):
        target = Target("cuda", arch)
        overlapping = replace(spec.default(at_hand, target), overlap=1)
        assert spec.space(at_hand, target)["overlap"] == ((0,) if arch in ("sm_80", "sm_89") else (0, 1))
        assert (spec.why_invalid(at_hand, overlapping, target) is None) == (arch not in ("sm_80", "sm_89"))
    why = spec.why_invalid(at_hand, replace(overlapping, overlap=2), HOPPER)
    assert why == "overlap must be 0, or 1 on sm_90 and newer, got 2 on cuda:sm_90a: choose 0"


def test_one_kernel_has_nothing_to_overlap_with():
    spec, at_hand = kernel_spec("project", "forward"), replace(problem("forward", 4096), op="project")
    one = replace(spec.default(at_hand, HOPPER), splits=1, overlap=1)
    assert spec.why_invalid(at_hand, one, HOPPER).startswith(
        "overlap must be 0 where one split makes one kernel, got 1"
    )
    assert spec.why_invalid(at_hand, replace(one, splits=2), HOPPER) is None
