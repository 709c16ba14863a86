"""The two ranks themselves: an error of a rank is shown, and nothing waits for ever."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from two_ranks import RankFailed


def total(start):
    value = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(value)
    return value.item()


def test_a_function_runs_on_both(ranks):
    assert ranks.run(total, 10) == [21, 21]
    assert ranks.run(total, 20) == [41, 41]


def one_raises():
    if dist.get_rank() == 1:
        raise ValueError("odd number of eggs")
    total(0)


def one_dies_and_the_other_sleeps():
    if dist.get_rank() == 1:
        os._exit(3)
    time.sleep(600)


@pytest.mark.slow  # both start fresh processes
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (one_raises, r"rank 1: Traceback(.|\n)*ValueError: odd number of eggs"),
        (one_dies_and_the_other_sleeps, r"rank 0: no answer within 120 s\nrank 1: the process died"),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_function_runs(ranks, function, said):
    before = time.monotonic()
    with pytest.raises(RankFailed, match=said):
        ranks.run(function)
    assert time.monotonic() - before < 100, "it has waited for the rank that sleeps"
    assert ranks.run(total, 1) == [3, 3]
