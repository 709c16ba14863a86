"""The command doctor: it tries what it vouches for."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli.commands import doctor as command
from cli.main import app
from tiles.runtime import loaded_kernel


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def outcome() -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor"])
    return result.exit_code, result.stdout


def test_a_machine_that_works_is_ready() -> None:
    code, said = outcome()
    assert code == 0
    for what in ("Python", "torch", "TileLang", "CPU", "threads", "compiler", "cache folder", "signing key"):
        assert what in said
    assert "aggregate forward n=2 C=16 float32 T=3, right" in said
    assert "a pack, written and read" in said
    assert "A GPU host needs also" in said or "NVIDIA" in said
    assert said.splitlines()[-1].startswith("ready")


def test_a_missing_compiler_is_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, said = outcome()
    assert code == 1
    assert said.splitlines()[-1].startswith("next: ")
    assert "install g++ or set CXX" in said.splitlines()[-1]


def test_a_kernel_that_does_not_load_or_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "run_reference", lambda problem, *inputs: (torch.full((3, 16), 7.0),))
    code, said = outcome()
    assert code == 1
    assert "its result is wrong" in said
    monkeypatch.setattr(loaded_kernel, "ENTRY", "no_such_entry")
    code, said = outcome()
    assert code == 1
    assert "it fails" in said
    assert "does not load" in said.splitlines()[-1]


def test_a_cache_that_cannot_be_made_or_is_open_to_all_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "file" / "cache"))
    code, said = outcome()
    assert code == 1
    assert "set MHC_TUNE_CACHE" in said.splitlines()[-1]
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "open"))
    assert "chmod o-w" in outcome()[1]
    monkeypatch.setenv("MHC_TUNE_CACHE", "~nobody-of-this-name/cache")
    assert "give an absolute path" in outcome()[1].splitlines()[-1]


def test_without_a_place_for_keys_it_is_ready_and_says_how_to_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "keys_folder", lambda: None)
    code, said = outcome()
    assert code == 0
    assert "export with --unsigned" in said


def test_more_threads_than_the_quota_allows_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    code, said = outcome()
    assert code == 0
    assert "with a quota of 1.5 CPUs" in said
    assert "export OMP_NUM_THREADS=1" in said


def test_it_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    for folder in (home, temporary):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert outcome()[0] == 0
    assert [*home.rglob("*"), *temporary.rglob("*")] == []
