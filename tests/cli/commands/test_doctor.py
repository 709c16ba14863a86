"""The command doctor."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def test_doctor_reports_what_is_here() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    for what in ("Python", "torch", "TileLang", "CPU", "threads", "compiler", "cache folder"):
        assert what in result.stdout


def test_doctor_names_the_remedy_for_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "install g++ or set CXX" in result.stdout


def test_doctor_names_the_remedy_for_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "set MHC_TUNE_CACHE" in result.stdout
