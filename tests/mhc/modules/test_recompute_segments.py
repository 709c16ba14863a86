"""Segments of blocks: the length that holds least memory, and no segment in two stages."""

from itertools import accumulate
from math import sqrt

import pytest

import mhc
from mhc.modules.recompute_segments import even_counts, peak_widths, segment_length, segment_lengths


def walked(lengths, streams):
    """The most that is held while the segments are walked back, counted block by block: the last segment first."""
    starts, most = [streams] * len(lengths), 0
    for length in reversed(lengths):
        blocks = [2 * [1]] + [[streams, 1, 1] for _ in range(length - 1)]  # the first block's streams are its start
        most = max(most, sum(starts) + sum(sum(block) for block in blocks))
        starts.pop()
    return most


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 8, 16])
def test_the_length_is_the_best_of_all(streams):
    for layers in range(1, 65):
        held = {
            m: walked(segment_lengths(layers, streams, [m] * (layers // m), None), streams) for m in divisors(layers)
        }
        assert all(peak_widths(layers, streams, m) == count for m, count in held.items())
        best = segment_length(layers, streams)
        assert peak_widths(layers, streams, best) == min(peak_widths(layers, streams, m) for m in range(1, layers + 1))
        assert peak_widths(layers, streams, best) <= min(held.values())


def divisors(number):
    return [m for m in range(1, number + 1) if number % m == 0]


@pytest.mark.parametrize("streams", range(1, 17))
def test_the_papers_formula_is_close_to_the_best(streams):
    """L* = √(nL/(n + 2)) is the least of nL/m + (n + 2)m; rounding the number of segments up moves it a little."""
    for layers in range(1, 301):
        best, star = segment_length(layers, streams), sqrt(streams * layers / (streams + 2))
        assert abs(best - star) < 3
        rounded = min(layers, max(1, round(star)))
        ratio = (peak_widths(layers, streams, rounded) + streams) / (peak_widths(layers, streams, best) + streams)
        assert 1 <= ratio < 1.08


def test_known_lengths():
    assert [segment_length(layers, 4) for layers in (1, 6, 60, 120)] == [1, 2, 6, 8]


@pytest.mark.parametrize("stages", [None, [60], [20, 20, 20], [1, 30, 29], [59, 1], [7] * 8 + [4]])
@pytest.mark.parametrize("segment", [None, 1, 4, 7, 100])
def test_segments_are_even_and_lie_in_one_stage(segment, stages):
    lengths = segment_lengths(60, 4, segment, stages)
    assert sum(lengths) == 60
    ends = list(accumulate(lengths, initial=0))
    for first, blocks in zip(accumulate(stages or [60], initial=0), stages or [60], strict=False):
        inside = [length for length, start in zip(lengths, ends, strict=False) if first <= start < first + blocks]
        assert sum(inside) == blocks, "the stage is whole segments"
        assert max(inside) - min(inside) <= 1
        assert inside == sorted(inside, reverse=True)
        longest = segment or segment_length(blocks, 4)
        assert max(inside) <= longest
        assert len(inside) == -(-blocks // longest)


def test_lengths_that_are_given_are_taken():
    assert segment_lengths(6, 4, [1, 3, 2], [4, 2]) == [1, 3, 2]


@pytest.mark.parametrize(("blocks", "parts", "counts"), [(6, 4, [2, 2, 1, 1]), (4, 4, [1] * 4), (3, 1, [3])])
def test_blocks_are_split_evenly(blocks, parts, counts):
    assert even_counts(blocks, parts) == counts


CASES = {
    "crossing": (
        lambda: segment_lengths(6, 4, [2, 3, 1], [4, 2]),
        "must not cross a stage",
        "[2, 3, 1]",
        "after block 4",
    ),
    "too few": (lambda: segment_lengths(6, 4, [2, 3], None), "add up to 6", "[2, 3]", "count them"),
    "an empty one": (lambda: segment_lengths(6, 4, [6, 0], None), "positive", "[6, 0]", "count them"),
    "none at all": (lambda: segment_lengths(6, 4, [], None), "positive", "[]", "count them"),
    "stages": (lambda: segment_lengths(6, 4, None, [4, 4]), "stages must be positive", "[4, 4]", "count them"),
    "no blocks in one": (lambda: segment_lengths(6, 4, 0, None), "1 or more", "0", "leave it out"),
    "layers": (lambda: segment_length(0, 4), "1 or more", "0", "number of blocks"),
    "streams": (lambda: segment_length(6, 17), "1..16", "17", "choose"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_lengths_are_refused_in_one_line(case):
    call, rule, received, remedy = CASES[case]
    with pytest.raises(mhc.BadInput) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in (rule, received, remedy)), text
