"""The kinds of failure."""

import pytest

from autotune.processes.reasons import by_kind, kind_of


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("CompileError: merge forward: g++ failed: error: no", "does not compile"),
        ("compile_kernel ended its process: SIGSEGV", "does not compile"),
        ("WrongResult: y at 131 tokens in 3 slices: wrote outside of the result", "wrong result"),
        ("assess ended its process: SIGSEGV", "crashed"),
        ("assess closed its connection and was killed", "crashed"),
        ("assess took longer than 60 s and was killed", "took too long"),
        ("assess did not start within 300 s and was killed", "took too long"),
        ("out of memory: assess ended its process: SIGABRT - bad_alloc", "out of memory"),
        ("MemoryError: ", "out of memory"),
        ("LoadError: x.so does not load: undefined symbol", "other errors"),
    ],
)
def test_reasons_have_kinds(reason, kind):
    assert kind_of(reason) == kind


def test_kinds_are_counted_most_frequent_first():
    reasons = ["WrongResult: y", "assess ended its process: SIGSEGV", "assess ended its process: SIGABRT"]
    assert list(by_kind(reasons).items()) == [("crashed", 2), ("wrong result", 1)]
