"""Records of other versions, machines and owners: schedules are used, binaries are not, and it is logged."""

from dataclasses import replace

import pytest
import torch
from fake_kernels import COMPILED, HERE, PRE, PROBLEM, REFUSED, SCHEDULE, X, answer, fakes, only_row, put

import mhc
import mhc.dispatch.resolve
import tiles.compiler.compile
from mhc import functional
from tiles.cache.cache import KernelCache, Key
from tiles.cache.shipped import ShippedRecord
from tiles.compiler.compile import Artifact
from tiles.errors import BadInput
from tiles.pack.pack import write_pack
from tiles.target import Device

__all__ = ["fakes"]
pytestmark = pytest.mark.usefixtures("fakes")

NO_COMPILER = "no C++ compiler is on PATH: install g++ or set CXX"
STALE = {"toolchain": {"toolchain": "0.1.14"}, "sources": {"sources": "0" * 16}}


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(tiles.compiler.compile, "why_no_compiler", lambda target: NO_COMPILER)


@pytest.fixture
def compiled(monkeypatch):
    """The schedules that were compiled, as plain data."""
    seen = []

    def compile_kernel(problem, schedule, target):
        seen.append((problem, schedule))
        return Artifact(target, "source", bytes([COMPILED]))

    monkeypatch.setattr(tiles.compiler.compile, "compile_kernel", compile_kernel)
    return seen


def test_a_default_that_is_asked_for_lacks_no_tuned_kernel(caplog, compiled):
    assert answer(mhc.Kernels.defaults()) == COMPILED
    (said,) = [record.message for record in caplog.records]
    assert said == f"compiling default schedules, some seconds each, once: {PROBLEM.describe()}"
    caplog.clear()
    assert answer(mhc.Kernels.from_default_folder()) == COMPILED
    assert caplog.records[0].message.startswith(f"no tuned kernel for {PROBLEM.describe()}: it runs the default")


@pytest.mark.parametrize("changes", STALE.values(), ids=STALE)
def test_a_schedule_of_another_version_is_compiled_here_once(tmp_path, caplog, compiled, changes):
    other = SCHEDULE | {"block_width": 8}
    put(tmp_path, 1, schedule=other, **changes)
    kernels = mhc.Kernels.from_path(tmp_path)
    assert answer(kernels) == COMPILED
    row = only_row(kernels)
    assert row.runs == "recompiled"
    assert "exact: tuned for 4 tokens on this device" in row.why
    assert "compiled by this process, as it was made" in row.why
    assert [schedule.block_width for _, schedule in compiled] == [8]
    assert len(caplog.records) == 1
    assert "compiling stored schedules" in caplog.text
    assert "as it was made" in caplog.text

    later = mhc.Kernels.from_path(tmp_path)
    assert answer(later) == COMPILED
    assert "compiled earlier" in only_row(later).why
    assert len(compiled) == 1, "the next process finds it"
    assert len(KernelCache(tmp_path).records()) == 1, "the tuned record stays as it is"


def test_another_schedule_is_not_taken_for_it(tmp_path, compiled):
    put(tmp_path / "a", 1, schedule=SCHEDULE | {"block_width": 8}, sources="0" * 16)
    put(tmp_path / "b", 1, schedule=SCHEDULE | {"block_width": 4}, sources="1" * 16)
    assert answer(mhc.Kernels.from_path(tmp_path / "a")) == COMPILED
    assert answer(mhc.Kernels.from_path(tmp_path / "b")) == COMPILED
    assert [schedule.block_width for _, schedule in compiled] == [8, 4]


def test_without_a_compiler_a_stale_schedule_gives_way_and_it_is_said_once(tmp_path, caplog, no_compiler):
    put(tmp_path, 1, toolchain="0.1.14")
    kernels = mhc.Kernels.from_path(tmp_path)
    with mhc.using(kernels):
        torch.testing.assert_close(functional.aggregate(X, PRE), torch.einsum("ti,tic->tc", PRE, X))
        functional.aggregate(X[:1], PRE[:1])
    assert {row.runs for row in kernels.report()} == {"reference"}
    assert all("TileLang 0.1.14" in row.why and "install g++" in row.why for row in kernels.report())
    (said,) = (record.message for record in caplog.records)
    assert "runs the slow torch reference: it was made with TileLang 0.1.14" in said
    assert said.endswith(f"mhc-tune tune --streams 2 --width 8 --tokens 4 --dtype float32 --cache {tmp_path}")


def test_ready_code_of_another_bucket_goes_before_a_stale_exact_schedule(tmp_path, compiled):
    put(tmp_path, 1, toolchain="0.1.14")
    put(tmp_path, 2, tokens=4096)
    assert answer(mhc.Kernels.from_path(tmp_path)) == 2
    assert compiled == []


@pytest.mark.parametrize("schedule", [{"block": 1}, SCHEDULE | {"block_width": 3}], ids=["fields", "rule"])
def test_a_schedule_that_todays_rules_refuse_is_skipped_and_said_once(tmp_path, caplog, schedule):
    put(tmp_path, 1, schedule=schedule, sources="0" * 16)
    kernels = mhc.Kernels.from_path(tmp_path)
    assert answer(kernels) == answer(kernels, 1) == COMPILED
    assert {row.runs for row in kernels.report()} == {"default"}
    assert sum("a stored kernel is skipped" in record.message for record in caplog.records) == 1


def test_code_for_a_newer_isa_is_skipped_and_said_once(tmp_path, caplog):
    newer = Device("cpu", "Newer CPU", "x86-64-v9")
    put(tmp_path, 1, device=newer)
    put(tmp_path, 1, device=newer, tokens=64)
    kernels = mhc.Kernels.from_path(tmp_path)
    assert answer(kernels) == answer(kernels, 64) == COMPILED
    said = f"built for x86-64-v9, this CPU offers {HERE.arch}"
    assert all(row.runs == "default" and said in row.why for row in kernels.report())
    assert sum(said in record.message for record in caplog.records) == 1


def test_what_a_nearer_kernel_makes_needless_is_not_said(tmp_path, caplog):
    put(tmp_path, 1, device=Device("cpu", "Newer CPU", "x86-64-v9"))
    put(tmp_path, 2)
    assert answer(mhc.Kernels.from_path(tmp_path)) == 2
    assert not caplog.records


# Packs and folders of others


@pytest.fixture
def unsigned(tmp_path):
    """A pack that nobody signed, of one kernel that answers 1."""
    put(tmp_path / "made", 1)
    write_pack(KernelCache(tmp_path / "made"), tmp_path / "unsigned.mhcpack", signed=False)
    return tmp_path / "unsigned.mhcpack"


def test_an_unsigned_packs_schedules_are_compiled(unsigned, caplog):
    kernels = mhc.load_kernels(unsigned)
    assert answer(kernels) == COMPILED
    assert only_row(kernels).runs == "recompiled"
    assert "it is not signed" in only_row(kernels).why
    assert "trust_binaries=True" in caplog.text


def test_an_unsigned_packs_code_runs_where_it_is_trusted(unsigned, caplog):
    kernels = mhc.load_kernels(unsigned, trust_binaries=True)
    assert answer(kernels) == 1
    assert only_row(kernels).runs == "tuned"
    assert not caplog.records


def test_an_unsigned_pack_without_compiler_says_what_helps(unsigned, caplog, no_compiler):
    kernels = mhc.load_kernels(unsigned)
    answer(kernels)
    assert only_row(kernels).runs == "reference"
    assert "trust_binaries=True" in caplog.records[0].message
    assert "install g++" in caplog.records[0].message


def test_ones_own_pack_runs_as_it_is(unsigned, tmp_path):
    write_pack(KernelCache(tmp_path / "made"), tmp_path / "signed.mhcpack")
    assert answer(mhc.load_kernels(tmp_path / "signed.mhcpack")) == 1


def test_a_folder_that_everybody_may_write_to_is_data(tmp_path):
    put(tmp_path / "open", 1)
    (tmp_path / "open").chmod(0o777)
    kernels = mhc.load_kernels(tmp_path / "open")
    assert answer(kernels) == COMPILED
    assert "everybody may change" in only_row(kernels).why


# Shipped schedules


def ship(monkeypatch, *, tokens=4, device=HERE, measurement=None, schedule=SCHEDULE):
    key = Key.of(replace(PROBLEM, tokens=tokens), device)
    shipped = ShippedRecord(key, schedule, measurement or {}, {})
    monkeypatch.setattr(mhc.dispatch.resolve, "shipped_records", lambda: (shipped,))


def test_a_shipped_schedule_goes_before_the_default_one(monkeypatch, compiled):
    ship(monkeypatch, tokens=1024, schedule=SCHEDULE | {"block_width": 8})
    kernels = mhc.Kernels.from_default_folder()
    assert answer(kernels) == COMPILED
    row = only_row(kernels)
    assert row.runs == "shipped"
    assert row.why.startswith("shipped schedule, nearest bucket: measured for 1024 tokens on this device")
    assert [schedule.block_width for _, schedule in compiled] == [8]


def test_what_was_tuned_goes_before_what_was_shipped(monkeypatch, tmp_path):
    ship(monkeypatch)
    put(tmp_path, 1, tokens=2**20, device=replace(HERE, name="Another CPU"))
    assert answer(mhc.Kernels.from_path(tmp_path)) == 1


def test_default_schedules_are_no_shipped_ones(monkeypatch):
    ship(monkeypatch)
    kernels = mhc.Kernels.defaults()
    assert answer(kernels) == COMPILED
    assert only_row(kernels).runs == "default"


def test_a_shipped_schedule_of_a_newer_isa_does_not_serve(monkeypatch, caplog):
    ship(monkeypatch, device=Device("cpu", "Newer CPU", "x86-64-v9"))
    kernels = mhc.Kernels.from_default_folder()
    assert answer(kernels) == COMPILED
    assert only_row(kernels).runs == "default"
    assert "a stored kernel" not in caplog.text


# Folders, failures, and what is said


def test_where_the_cache_cannot_be_written_kernels_serve_this_process(monkeypatch, caplog, compiled):
    put_for_real = KernelCache.put

    def put(self, *entry):
        if "mhc-tune-" in self.folder.name:
            return put_for_real(self, *entry)
        raise BadInput(f"the cache folder must be writable, got {self.folder} (Read-only file system): choose another")

    monkeypatch.setattr(KernelCache, "put", put)
    kernels = mhc.Kernels.from_default_folder()
    assert answer(kernels) == answer(kernels, 64) == COMPILED
    assert len(compiled) == 1, "the second bucket finds what the first one compiled"
    assert {row.runs for row in kernels.report()} == {"default"}
    assert sum("serve this process alone" in record.message for record in caplog.records) == 1


def test_a_read_only_folder_is_read(tmp_path):
    put(tmp_path / "cache", 1)
    (tmp_path / "cache").chmod(0o555)
    assert answer(mhc.Kernels.from_path(tmp_path / "cache")) == 1


def test_code_that_the_driver_refuses_gives_way_and_it_is_said(tmp_path, caplog):
    """It is loaded when it is resolved, not at its first launch, which could only fail."""
    put(tmp_path, REFUSED)
    put(tmp_path, 2, tokens=4096)
    assert answer(mhc.Kernels.from_path(tmp_path)) == 2
    assert "a stored kernel is skipped: CUDA error 209 on cpu" in caplog.text


@pytest.mark.parametrize(
    ("where", "error"),
    [("stored_candidates", RuntimeError("odd")), ("find_compiled", PermissionError(13, "denied"))],
    ids=["look-up", "folder"],
)
def test_nothing_that_goes_wrong_ends_a_training_run(monkeypatch, caplog, tmp_path, where, error):
    def fail(*_):
        raise error

    put(tmp_path, 0)  # does not load, so that the walk goes on
    monkeypatch.setattr(mhc.dispatch.resolve, where, fail)
    kernels = mhc.Kernels.from_path(tmp_path)
    with mhc.using(kernels):
        torch.testing.assert_close(functional.aggregate(X, PRE), torch.einsum("ti,tic->tc", PRE, X))
        functional.aggregate(X[:1], PRE[:1])
    assert {row.runs for row in kernels.report()} == {"reference"}
    assert all(type(error).__name__ in row.why for row in kernels.report())
    assert sum("slow torch reference" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("place", ["default folder", "other folder", "pack"])
def test_the_remedy_is_a_command_that_mends_it(tmp_path, caplog, place):
    device = replace(HERE, name="Another CPU")
    folder = tmp_path / ("default" if place == "default folder" else "other folder")
    put(folder, 1, device=device)
    if place == "pack":
        write_pack(KernelCache(folder), tmp_path / "a.mhcpack")
    kernels = mhc.load_kernels(tmp_path / "a.mhcpack" if place == "pack" else folder)
    assert answer(kernels, 16) == 1
    command = "mhc-tune tune --streams 2 --width 8 --tokens 16 --dtype float32"
    ends = {"default folder": "", "other folder": f" --cache '{folder}'", "pack": ", and export it again"}
    assert caplog.records[0].message.endswith(command + ends[place])


def test_kernels_are_found_after_a_change_of_directory(tmp_path, monkeypatch):
    put(tmp_path / "cache", 1)
    monkeypatch.chdir(tmp_path)
    kernels = mhc.load_kernels("cache")
    monkeypatch.chdir("/")
    assert answer(kernels) == 1


def test_every_bucket_gets_its_own_kernel(tmp_path):
    put(tmp_path, 1, tokens=1)
    put(tmp_path, 2, tokens=4096)
    kernels = mhc.Kernels.from_path(tmp_path)
    assert [answer(kernels, tokens) for tokens in (1, 4096, 1)] == [1, 2, 1]


def test_an_explanation_names_every_option_and_compiles_nothing(tmp_path, compiled):
    put(tmp_path, 1, device=Device("cpu", "Newer CPU", "x86-64-v9"))
    put(tmp_path, 0)
    put(tmp_path, 2, tokens=64)
    put(tmp_path, 3, toolchain="0.1.14")
    found = mhc.Kernels.from_path(tmp_path).resolver.explain(PROBLEM, torch.device("cpu"))
    assert [(one.candidate.runs, one.runs) for one in found] == [
        ("tuned", False),
        ("tuned", True),
        ("recompiled", False),
        ("tuned", False),
        ("default", False),
        ("reference", False),
    ]
    assert "wrong ELF class" in found[0].verdict
    assert found[1].verdict == "runs"
    assert {one.verdict for one in found[2:]} == {"not needed, as a nearer one runs"}
    assert compiled == []


def test_an_explanation_and_a_run_agree(tmp_path, compiled):
    put(tmp_path, 3, toolchain="0.1.14")
    for expected in ("compiled when it is first used", "compiled earlier"):
        kernels = mhc.Kernels.from_path(tmp_path)
        chosen = next(one for one in kernels.resolver.explain(PROBLEM, torch.device("cpu")) if one.runs)
        assert expected in chosen.verdict
        answer(kernels)
        assert only_row(kernels).runs == chosen.candidate.runs
