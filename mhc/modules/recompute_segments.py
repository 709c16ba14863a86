"""Into which segments blocks are cut when their streams are recomputed (`mhc.recompute`).

With segments of m blocks, L blocks hold, in widths C a token, n·⌈L/m⌉: the streams before each segment; and
(n + 2)·m - n while a segment is walked back: of each of its blocks the streams (those before the first are there
already), the sublayer's input, and that input normalised. The least is near L* = √(nL/(n + 2)) (arXiv 2512.24880,
section 4.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from mhc.checks import check_problem
from tiles.errors import BadInput


def widths_held(layers: int, streams: int, segment: int) -> int:
    """n·⌈L/m⌉ + (n + 2)·m - n: the elements a token that recomputation holds at its peak, divided by the width, beside
    what the sublayers keep and their outputs."""
    return streams * -(-layers // segment) + (streams + 2) * segment - streams


def segment_length(layers: int, streams: int) -> int:
    """The blocks a segment for which L blocks hold least; near √(nL/(n + 2)), and exactly the least over integers.

    Raises `BadInput` for no layers, or a stream count that no kernel takes.
    """
    check_problem(streams)
    if layers < 1:
        raise BadInput(f"layers must be 1 or more, got {layers}: give the number of blocks")
    return min(range(1, layers + 1), key=lambda segment: widths_held(layers, streams, segment))


def cut(layers: int, streams: int, segment: int | Sequence[int] | None, stages: Sequence[int] | None) -> list[int]:
    """The number of blocks in each segment, none of which lies in two of the stages, which have so many blocks each.

    `segment` is the most blocks a segment may have, or the length of every segment, or None for the least memory.
    Raises `BadInput` where lengths are not positive, do not add up to L, or cross the end of a stage.
    """
    stages = [layers] if stages is None else list(stages)
    _check_sum("stages", stages, layers)
    if segment is None or isinstance(segment, int):
        if segment is not None and segment < 1:
            raise BadInput(f"segment must be 1 or more, got {segment}: leave it out for the least memory")
        return [length for blocks in stages for length in _evenly(blocks, segment or segment_length(blocks, streams))]
    lengths = list(segment)
    _check_sum("segment", lengths, layers)
    ends = set(accumulate(lengths))
    crossed = [end for end in accumulate(stages) if end not in ends]
    if crossed:
        raise BadInput(
            f"segments must not cross a stage, got segments of {lengths} blocks and stages of {list(stages)}: "
            f"end a segment after block {crossed[0]}"
        )
    return lengths


def _check_sum(name: str, lengths: list[int], layers: int) -> None:
    if min(lengths, default=0) < 1 or sum(lengths) != layers:
        raise BadInput(f"{name} must be positive numbers of blocks that add up to {layers}, got {lengths}: count them")


def _evenly(blocks: int, longest: int) -> list[int]:
    """As few lengths of at most `longest` as there can be, as equal as they can be, the longer ones first: the last
    segment is walked back first, while all the others' streams are held."""
    count = -(-blocks // longest)
    length, more = divmod(blocks, count)
    return [length + 1] * more + [length] * (count - more)
