"""How wide the copies of a merged backward's tiles are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tiles.compiler.compile import planned
from tiles.kernels.fused.chain_schedule import tiled
from tiles.kernels.fused.merged_schedule import copies_streams_together
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Target

HOPPER = Target("cuda", "sm_90a")


def default(problem):
    return kernel_spec(problem.op, problem.direction).default(problem, HOPPER)


def test_streams_are_one_tile_only_where_that_makes_whole_vectors():
    four, three = (Problem("step", "backward", n, 2560, "bfloat16", tokens=4096) for n in (4, 3))
    tiles = tiled(default(four))
    assert copies_streams_together(four, tiles)
    # Half of the threads have a whole vector of each stream; sixteen times as many have none of all of them.
    assert not copies_streams_together(four, replace(tiles, threads=tiles.threads // 2))
    assert not copies_streams_together(four, replace(tiles, threads=16 * tiles.threads))
    assert not copies_streams_together(three, replace(tiles, block_width=192))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("op", ["step", "single_pass"])
def test_streams_are_copied_sixteen_bytes_at_a_time(op, arch):
    problem = Problem(op, "backward", 4, 256, "bfloat16", tokens=4096)
    source, _ = planned(kernel_spec(op, "backward"), problem, default(problem), Target("cuda", arch))
    widths = re.findall(r"cp_async_gs(?:_conditional)?<(\d+)>\(.*?\(&\((x|dx_next)\[", source)
    assert {name for _, name in widths} == {"x", "dx_next"}
    assert {width for width, _ in widths} == {"16"}
