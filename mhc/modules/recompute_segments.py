"""Segments of blocks for recomputation (`mhc.recompute`), of the length that holds least memory.

With segments of m blocks, L blocks hold, in elements per token divided by C, n·⌈L/m⌉: the streams before each segment;
and (n + 2)·m - n in the backward of a segment: for each of its blocks the streams (those before the first are held
already), the sublayer's input, and that input normalised. The minimum is near L* = √(nL/(n + 2)) (arXiv 2512.24880,
section 4.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from mhc.checks import check_problem
from tiles.errors import BadInput


def peak_widths(layers: int, streams: int, segment: int) -> int:
    """n·⌈L/m⌉ + (n + 2)·m - n: the peak of the elements per token that recomputation holds, over C, without the
    sublayers' outputs and what they save."""
    return streams * -(-layers // segment) + (streams + 2) * segment - streams


def segment_length(layers: int, streams: int) -> int:
    """The number of blocks per segment for which L blocks hold least memory, near √(nL/(n + 2)).

    Raises `BadInput` for no layers, or an unsupported stream count.
    """
    check_problem(streams)
    if layers < 1:
        raise BadInput(f"layers must be 1 or more, got {layers}: give the number of blocks")
    return min(range(1, layers + 1), key=lambda segment: peak_widths(layers, streams, segment))


def segment_lengths(
    layers: int, streams: int, segment: int | Sequence[int] | None, stages: Sequence[int] | None
) -> list[int]:
    """The number of blocks in each segment; no segment crosses the end of a pipeline stage.

    Args:
        layers: L.
        streams: n.
        segment: the longest segment in blocks, or the length of every segment, or None for the least memory.
        stages: the number of blocks in each stage; None for one stage.

    Raises `BadInput` where lengths are not positive, do not add up to L, or cross the end of a stage.
    """
    stages = [layers] if stages is None else list(stages)
    _check_sum("stages", stages, layers)
    if segment is None or isinstance(segment, int):
        if segment is not None and segment < 1:
            raise BadInput(f"segment must be 1 or more, got {segment}: leave it out for the least memory")
        lengths = []
        for blocks in stages:
            longest = segment or segment_length(blocks, streams)
            lengths += even_counts(blocks, -(-blocks // longest))
        return lengths
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


def even_counts(blocks: int, parts: int) -> list[int]:
    """The number of blocks in each part: they differ by one at most, the larger first. In recomputation the backward of
    the last segment runs first, while the streams before all others are held."""
    least, more = divmod(blocks, parts)
    return [least + (part < more) for part in range(parts)]
