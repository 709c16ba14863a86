"""The schedules of pre and step on CUDA: what few tokens and many streams change."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from tiles.kernels.fused import chain_schedule
from tiles.kernels.fused.chain_schedule import coefficient_threads, split_sums, tiled
from tiles.kernels.fused.merged_schedule import frees_early
from tiles.kernels.project.tensor_core_schedule import streams_of_tile
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
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
        assert many["chunk_tokens"] == (0, 1024)
        assert chain_schedule.space(problem(direction, 16384, streams=8), HOPPER)["chunk_tokens"] == (0, 512)


def test_one_token_gets_more_threads_for_its_row_than_one_of_many():
    one, many = (chain_schedule.default(problem("forward", tokens), HOPPER) for tokens in (1, 4096))
    assert (one.row_threads, one.coefficient_tokens) == (160, 1)
    assert (many.row_threads, many.coefficient_tokens) == (64, 8)


def test_few_tokens_are_aggregated_by_the_block_that_has_their_coefficients():
    for op, streams, tokens, fused in (
        ("pre", 4, 1, 1),
        ("pre", 8, 64, 1),
        ("step", 4, 64, 1),
        ("step_identity", 4, 1, 1),
        ("pre", 4, 65, 0),
        ("pre", 9, 1, 0),
        ("single_pass", 4, 1, 0),
    ):
        at_hand = replace(problem("forward", tokens, streams), op=op)
        schedule = chain_schedule.default(at_hand, HOPPER)
        assert schedule.fuse_aggregate == fused, (op, streams, tokens)
        assert chain_schedule.space(at_hand, HOPPER)["fuse_aggregate"] == ((0, 1) if fused else (0,))
        assert not fused or schedule.coefficient_tokens == 1, "a block each"


@pytest.mark.parametrize(
    ("op", "direction", "streams"), [("pre", "backward", 4), ("single_pass", "forward", 4), ("step", "forward", 9)]
)
def test_what_has_no_pass_that_aggregates_cannot_fuse_it(op, direction, streams):
    at_hand = replace(problem(direction, 1, streams), op=op)
    schedule = replace(chain_schedule.default(at_hand, HOPPER), fuse_aggregate=1)
    assert kernel_spec(op, direction).why_invalid(at_hand, schedule, HOPPER) == (
        "fuse_aggregate must be 0 but in the forward of pre and step of up to 8 streams, got 1 for "
        f"{op} {direction} of {streams}: choose 0"
    )
    why = kernel_spec(op, direction).why_invalid(at_hand, replace(schedule, fuse_aggregate=2), HOPPER)
    assert why == "fuse_aggregate must be 0 or 1, got 2: choose 0"


@pytest.mark.parametrize("streams", range(1, 17))
def test_the_threads_of_a_block_add_up_every_sum_of_its_tokens(streams):
    for tokens in (1, 3, 8):
        at_hand = problem("forward", tokens, streams)
        schedule = replace(chain_schedule.default(at_hand, HOPPER), coefficient_tokens=tokens)
        turns, elements = split_sums(at_hand, schedule)
        assert elements <= chain_schedule.SUM_ELEMENTS
        wanted = tokens * (at_hand.outputs + 1)
        threads = coefficient_threads(at_hand, schedule)
        assert wanted <= turns * elements * threads < wanted + (turns + 1) * threads


def test_a_backwards_default_splits_fill_the_turns_of_a_hopper_gpu():
    """80 tiles of columns: three splits are 240 thread blocks, of 264 that run at a time; four would take two turns."""
    schedule = chain_schedule.default(problem("backward", 4096), HOPPER)
    assert (schedule.block_width, schedule.min_blocks_per_sm, schedule.splits) == (128, 2, 3)
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
        overlapping = replace(spec.default(at_hand, target), use_pdl=1)
        assert spec.space(at_hand, target)["use_pdl"] == ((0,) if arch in ("sm_80", "sm_89") else (0, 1))
        assert (spec.why_invalid(at_hand, overlapping, target) is None) == (arch not in ("sm_80", "sm_89"))
    why = spec.why_invalid(at_hand, replace(overlapping, use_pdl=2), HOPPER)
    assert why == "use_pdl must be 0, or 1 on sm_90 and newer, got 2 on cuda:sm_90a: choose 0"


def test_a_step_merges_inside_of_tiles_where_that_saves_more_than_it_costs():
    for direction in ("forward", "backward"):
        for streams in (1, 2, 3, 4, 8, 12, 16):
            step = replace(problem(direction, 4096, streams), op="step")
            assert chain_schedule.default(step, HOPPER).merged == int(streams <= 4)
            assert chain_schedule.space(step, HOPPER)["merged"] == ((0, 1) if streams <= 8 else (0,))
            assert chain_schedule.space(replace(step, op="pre"), HOPPER)["merged"] == (0,)


def test_passes_of_their_own_take_tiles_that_tilelang_has_layouts_for():
    of = replace(problem("forward", 4096, 3), op="single_pass")
    schedule = replace(chain_schedule.default(of, HOPPER), merged=0, block_width=96)
    why = "block_width must be a power of two where merged is 0, got 96: choose 64"
    assert chain_schedule.why_invalid(of, schedule, HOPPER) == why
    assert chain_schedule.why_invalid(of, replace(schedule, block_width=64), HOPPER) != why


@pytest.mark.parametrize(
    ("op", "streams", "change", "why"),
    [
        ("pre", 4, {}, "merged must be 0 for pre, which does not merge, got 1: choose 0"),
        ("step", 9, {}, "merged must be 0 where a token has more than 72 weights, got 1 for n = 9: choose 0"),
        ("step", 3, {"block_width": 64}, "block_width must be a multiple of 24 where merged is 1, got 64: choose 48"),
        ("step", 4, {"stages": 4}, "stages must be in 1..3 for bfloat16, got 4: choose 1"),
        ("step", 4, {"merged": 2}, "merged must be 0 or 1, got 2: choose 0"),
        (
            "step",
            4,
            {"presplit_phi": 1},
            "presplit_phi must be 0 in the backward, which copies phi once, got 1: choose 0",
        ),
    ],
)
def test_rules_of_a_step_that_merges_inside_of_tiles(op, streams, change, why):
    at_hand = replace(problem("backward", 4096, streams), op=op)
    schedule = replace(chain_schedule.default(at_hand, HOPPER), **({"merged": 1} | change))
    assert kernel_spec(op, "backward").why_invalid(at_hand, schedule, HOPPER) == why


def test_phi_is_cut_once_where_there_is_much_of_it():
    for op in ("project", "pre", "step"):
        for streams, tokens, presplit_phi in ((4, 4096, 0), (8, 4096, 1), (8, 64, 0), (16, 4096, 1)):
            at_hand = replace(problem("forward", tokens, streams), op=op)
            assert kernel_spec(op, "forward").default(at_hand, HOPPER).presplit_phi == presplit_phi


def test_one_kernel_has_nothing_to_overlap_with():
    spec, at_hand = kernel_spec("project", "forward"), replace(problem("forward", 4096), op="project")
    one = replace(spec.default(at_hand, HOPPER), splits=1, use_pdl=1)
    assert spec.why_invalid(at_hand, one, HOPPER).startswith(
        "use_pdl must be 0 where one split makes one kernel, got 1"
    )
    assert spec.why_invalid(at_hand, replace(one, splits=2), HOPPER) is None


def test_a_backward_frees_the_stage_of_a_tile_where_threads_have_one_vector_of_each_row():
    for op, (n, early) in product(("step", "single_pass", "step_identity"), ((1, False), (2, False), (4, True))):
        at_hand = replace(problem("backward", 4096, n), op=op)
        assert frees_early(at_hand, tiled(chain_schedule.default(at_hand, HOPPER))) == early, (op, n)


@pytest.mark.parametrize("op", ["step", "step_identity"])
def test_a_forward_of_four_streams_has_two_blocks_of_a_warpgroup_a_multiprocessor(op):
    """Where a multiprocessor has more than one of them to run, and tiles of parts take no registers."""
    for tokens, dtype, blocks, threads in (
        (4096, "bfloat16", 2, 128),
        (512, "bfloat16", 2, 128),
        (256, "bfloat16", 1, 256),
        (4096, "float16", 1, 256),
    ):
        schedule = chain_schedule.default(replace(problem("forward", tokens), op=op, dtype=dtype), HOPPER)
        assert schedule.merged
        assert (schedule.min_blocks_per_sm, schedule.threads) == (blocks, threads), (tokens, dtype)
        assert schedule.block_tokens == 64


@pytest.mark.parametrize("op", ["step", "single_pass", "step_identity"])
def test_a_backward_of_four_streams_and_many_tokens_has_tiles_of_all_warps_of_a_multiprocessor(op):
    for tokens, width, blocks, threads in ((4096, 256, 1, 512), (2048, 128, 2, 256)):
        schedule = chain_schedule.default(replace(problem("backward", tokens), op=op), HOPPER)
        chosen = schedule.block_width, schedule.min_blocks_per_sm, schedule.threads
        assert schedule.merged
        assert chosen == (width, blocks, threads), tokens


def test_the_tiles_of_a_backward_that_reads_du_have_whole_sectors_of_several_streams():
    for streams, width, together in ((1, 128, 1), (2, 128, 2), (3, 128, 1), (4, 128, 4), (6, 64, 2), (16, 128, 8)):
        tiles = tiled(replace(chain_schedule.default(problem("backward", 4096, streams), HOPPER), block_width=width))
        assert streams_of_tile(problem("backward", 4096, streams), tiles, staged=3) == together
        assert streams_of_tile(problem("backward", 4096, streams), tiles, staged=1) == 1
        assert streams_of_tile(problem("backward", 4096, streams), replace(tiles, stages=2), staged=3) == 1


def test_one_stream_in_one_pass_has_narrow_tiles_and_more_of_them_on_their_way():
    for op, width, stages in (("single_pass", 64, 4), ("step", 128, 2)):
        schedule = chain_schedule.default(replace(problem("forward", 4096, 1), op=op), HOPPER)
        assert (schedule.block_width, schedule.stages, schedule.min_blocks_per_sm) == (width, stages, 2), op
