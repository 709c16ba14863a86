"""The shootout: kernels that fail in it are left out, but the default must not fail."""

import pytest

from autotune.decision.shootout import shootout
from autotune.processes.worker import TaskFailed
from tiles.kernels.spec import Problem

PROBLEM = Problem("merge", "forward", 2, 64)
BINARIES = {"default": b"0", "a": b"1", "b": b"2", "c": b"3"}


class Workers:
    """Kernels in `bad` fail wherever they are; the first `stumbles` comparisons fail whoever is in them."""

    def __init__(self, *bad, stumbles=0):
        self.bad, self.stumbles, self.compared = set(bad), stumbles, []

    def compare(self, problem, binaries, unverified, seed):
        assert set(unverified) <= set(binaries)
        self.compared.append((list(binaries), list(unverified)))
        if self.bad & set(binaries) or len(self.compared) <= self.stumbles:
            raise TaskFailed("compare ended its process: SIGSEGV")
        return {name: [1.0] for name in binaries}


def test_all_are_compared_once_where_none_fails():
    workers = Workers()
    assert set(shootout(PROBLEM, BINARIES, "default", ["a"], workers, 1)) == set(BINARIES)
    assert workers.compared == [(list(BINARIES), ["a"])]


def test_those_that_fail_are_left_out():
    workers = Workers("b")
    assert set(shootout(PROBLEM, BINARIES, "default", ["b", "c"], workers, 1)) == {"default", "a", "c"}
    assert workers.compared == [
        (list(BINARIES), ["b", "c"]),
        *((["default", name], [name]) for name in "abc"),
        (["default", "a", "c"], ["c"]),
    ]


def test_a_failure_that_does_not_come_back_leaves_nobody_out():
    assert set(shootout(PROBLEM, BINARIES, "default", [], Workers(stumbles=1), 1)) == set(BINARIES)


def test_a_default_that_fails_is_raised():
    with pytest.raises(TaskFailed, match="SIGSEGV"):
        shootout(PROBLEM, BINARIES, "default", [], Workers("default"), 1)
