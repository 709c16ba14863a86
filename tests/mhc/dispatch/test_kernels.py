"""The order of look-up, its log messages, and that it runs once."""

import contextlib
import threading
from dataclasses import replace

import pytest
import torch
from fake_kernels import HERE, PRE, X, answer, fakes, only_row, put

import mhc
import mhc.dispatch.resolve
import tiles.compiler.compile
from mhc import functional
from tiles.cache.cache import KernelCache
from tiles.compiler.compile import Artifact, CompileError

__all__ = ["fakes"]
pytestmark = pytest.mark.usefixtures("fakes")


def test_exact_match_comes_first(tmp_path, caplog):
    put(tmp_path, 1)
    put(tmp_path, 2, tokens=8)
    kernels = mhc.Kernels.from_path(tmp_path)
    assert answer(kernels, 4) == 1
    assert answer(kernels, 3) == 1, "3 tokens are in the bucket of 4"
    assert answer(kernels, 8) == 2
    assert [row.runs for row in kernels.report()] == ["tuned", "tuned"]
    assert "exact" in kernels.report()[0].why
    assert not caplog.records


def test_nearest_bucket_is_next(tmp_path):
    put(tmp_path, 1, tokens=16)
    put(tmp_path, 2, tokens=1024)
    kernels = mhc.Kernels.from_path(tmp_path)
    assert answer(kernels) == 1
    assert "nearest bucket" in only_row(kernels).why


def test_sibling_device_is_said_once(tmp_path, caplog):
    put(tmp_path, 1, device=replace(HERE, name="Another CPU"))
    kernels = mhc.Kernels.from_path(tmp_path)
    assert answer(kernels) == answer(kernels, 16) == 1
    assert all("Another CPU" in row.why for row in kernels.report())
    assert len(caplog.records) == 1
    assert "Another CPU" in caplog.text


def test_default_schedule_is_compiled_once_for_this_and_later_processes(tmp_path, caplog, monkeypatch):
    kernels = mhc.Kernels.from_default_folder()
    assert answer(kernels) == ord("c")
    assert only_row(kernels).runs == "default"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "mhc-tune tune --streams 2 --width 8 --tokens 4 --dtype float32" in caplog.text

    def never(*_):
        raise AssertionError("compiled before")

    monkeypatch.setattr(tiles.compiler.compile, "compile_kernel", never)
    later = mhc.Kernels.from_default_folder()
    assert answer(later) == ord("c")
    assert answer(later, 8) == ord("c"), "the default schedule of another bucket serves as well"
    assert not KernelCache(tmp_path / "default").records(), "what is not tuned stays apart from what is"


def test_tuned_kernels_are_no_defaults(tmp_path):
    put(tmp_path / "default", 1)
    assert answer(mhc.Kernels.from_default_folder()) == 1
    assert answer(mhc.Kernels.defaults()) == ord("c")


@pytest.mark.parametrize(
    "error", [CompileError("g++ failed"), OSError("disk full"), ImportError("broken")], ids=lambda e: type(e).__name__
)
def test_a_failed_compile_falls_back_to_the_reference(monkeypatch, caplog, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(tiles.compiler.compile, "compile_kernel", fail)
    kernels = mhc.Kernels.defaults()
    with mhc.using(kernels):
        torch.testing.assert_close(functional.aggregate(X, PRE), torch.einsum("ti,tic->tc", PRE, X))
        functional.aggregate(X[:1], PRE[:1])
    assert {row.runs for row in kernels.report()} == {"reference"}
    assert str(error) in kernels.report()[0].why
    assert sum(str(error) in record.message for record in caplog.records) == 1, "said once"


def test_no_compiler_falls_back_to_the_reference(monkeypatch, caplog):
    monkeypatch.setattr(
        tiles.compiler.compile, "why_no_compiler", lambda target: "no C++ compiler is on PATH: install g++"
    )
    kernels = mhc.Kernels.defaults()
    with mhc.using(kernels):
        functional.aggregate(X, PRE)
        functional.aggregate(X[:1], PRE[:1])
    assert {row.runs for row in kernels.report()} == {"reference"}
    assert [record.message.count("install g++") for record in caplog.records] == [1]


def test_a_kernel_that_does_not_load_is_skipped(tmp_path, caplog):
    put(tmp_path, 0)
    put(tmp_path, 7, tokens=64)
    kernels = mhc.Kernels.from_path(tmp_path)
    assert answer(kernels) == 7
    assert "wrong ELF class" in caplog.text


def test_a_corrupt_kernel_is_skipped_and_said(tmp_path, caplog):
    record = put(tmp_path, 1)
    put(tmp_path, 7, tokens=64)
    KernelCache(tmp_path).binary_path(record).write_bytes(b"x")
    kernels = mhc.Kernels.from_path(tmp_path)
    assert answer(kernels) == 7
    assert "SHA-256" in caplog.text


def test_the_look_up_is_walked_once(tmp_path, monkeypatch):
    put(tmp_path, 1)
    kernels = mhc.Kernels.from_path(tmp_path)
    assert answer(kernels) == 1

    def never(*_):
        raise AssertionError("looked up again")

    monkeypatch.setattr(mhc.dispatch.resolve, "stored_candidates", never)
    assert answer(kernels) == 1
    answer(kernels, 64)
    assert "looked up again" in kernels.report()[-1].why, "another bucket is looked up by itself"


def test_threads_share_one_look_up(monkeypatch):
    compiled = []

    def compile_slowly(problem, *_):
        compiled.append(problem)
        gate.wait(timeout=0.2)
        return Artifact(HERE.target, "source", b"c")

    gate = threading.Event()
    monkeypatch.setattr(tiles.compiler.compile, "compile_kernel", compile_slowly)
    kernels, answers = mhc.Kernels.defaults(), []
    threads = [
        threading.Thread(target=lambda: answers.append(kernels.run("aggregate", "forward", 2, 8, 20, [X, PRE])))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(compiled) == 1


def test_tensors_of_other_devices_run_the_reference_and_the_report_says_so(caplog):
    kernels = mhc.Kernels.defaults()
    kernels._resolve(("aggregate", "forward", 2, 8, 20, torch.float32, torch.device("xpu:1"), 4))
    row = only_row(kernels)
    assert (row.runs, row.device) == ("reference", "xpu:1")
    assert "no kernels for xpu tensors" in row.why
    assert "no kernels for xpu tensors" in caplog.text


def test_using_restores_what_ran_before():
    before, other = mhc.active(), mhc.Kernels.reference()
    with contextlib.suppress(KeyError), mhc.using(other):
        assert mhc.active() is other
        raise KeyError
    assert mhc.active() is before


def test_load_kernels_is_for_the_process(tmp_path):
    put(tmp_path, 5)
    with mhc.using(mhc.Kernels.reference()):
        loaded = mhc.load_kernels(tmp_path)
        assert mhc.active() is loaded
        assert functional.aggregate(X, PRE)[0, 0] == 5
        assert mhc.kernel_report()[0].runs == "tuned"


def test_the_report_prints_as_a_table():
    assert "no mhc op" in str(mhc.kernel_report())
    functional.aggregate(X, PRE)
    header, row = str(mhc.kernel_report()).splitlines()
    assert header.split()[:3] == ["op", "direction", "streams"]
    assert row.split()[:9] == ["aggregate", "forward", "2", "8", "float32", "4", "20", "cpu", "reference"]
    assert "asked for" in row


def test_the_reference_says_nothing(caplog):
    functional.aggregate(X, PRE)
    assert not caplog.records
