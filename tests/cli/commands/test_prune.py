"""The command prune; `tests/tiles/cache/test_prune.py` has the rules."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from tiles.cache.cache import KernelCache
from tiles.cache.record import Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import detect_device

PROBLEM = Problem("merge", "forward", 2, 64)


def prune(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["prune", *arguments])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with one superseded kernel, two hours old."""
    here = detect_device("cpu")
    schedule = asdict(kernel_spec("merge", "forward").default(PROBLEM, here.target))
    for binary in (b"x" * 2048, b"new"):
        KernelCache(tmp_path / "cache").put(Key.of(PROBLEM, here), schedule, binary, "source", {}, {})
    for path in (tmp_path / "cache").iterdir():
        os.utime(path, (time.time() - 7200,) * 2)
    return tmp_path / "cache"


def test_a_dry_run_and_then_a_real_one(cache: Path) -> None:
    before = sorted(cache.iterdir())
    planned = prune("--cache", str(cache), "--dry-run")
    assert "would free 2 KiB in 2 files" in planned.stderr
    assert sorted(cache.iterdir()) == before
    done = prune("--cache", str(cache))
    assert "freed 2 KiB in 2 files" in done.stderr
    assert done.stderr.count("superseded by a newer kernel") == 2
    assert len(list(cache.iterdir())) == 3
    assert len(KernelCache(cache).records()) == 1


def test_json_names_every_file(cache: Path) -> None:
    printed = json.loads(prune("--cache", str(cache), "--json").stdout)
    assert (printed["bytes"], printed["dry_run"]) == (2048 + len("source"), False)
    assert {file["why"] for file in printed["files"]} == {"superseded by a newer kernel"}
    assert not [file for file in printed["files"] if Path(file["path"]).exists()]


def test_the_default_cache_is_that_of_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_TUNE_CACHE", str(cache))
    assert "freed 2 KiB" in prune().stderr


def test_no_folder_is_bad_input(tmp_path: Path) -> None:
    result = prune("--cache", str(tmp_path / "none"))
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "must be a folder, found none" in result.stderr
