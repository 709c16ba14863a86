"""The whole way on a tiny shape with real kernels: tune, export, inspect, import, verify, bench; and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.bench import command as bench
from cli.bench.cases import DIRECTIONS, OPS
from cli.bench.torch_composites import COMPOSED
from cli.main import app
from tiles.cache.cache import KernelCache
from tiles.compiler.cpu_launcher import ENTRY
from tiles.kernels.registry import kernel_specs

SHAPE = ["--target", "cpu", "--streams", "2", "--width", "64", "--tokens", "32", "--dtype", "bfloat16"]


def mhc_tune(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A cache that the real tuner filled, and what it printed as JSON."""
    folder = tmp_path_factory.mktemp("tuned")
    result = mhc_tune("tune", *SHAPE, "--trials", "2", "--cache", str(folder), "--json")
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)


@pytest.fixture(scope="module")
def pack(tuned: tuple[Path, dict[str, Any]]) -> Path:
    path = tuned[0].parent / "kernels.mhcpack"
    assert mhc_tune("export", str(path), "--cache", str(tuned[0])).exit_code == 0
    return path


def test_every_kernel_is_tuned_and_stored(tuned: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = tuned
    assert {(row["op"], row["direction"]) for row in printed["results"]} == set(kernel_specs())
    assert len(KernelCache(folder).records()) == len(kernel_specs())
    assert printed["device"]["kind"] == "cpu"
    assert printed["copy_gb_per_s"] > 0
    assert not printed["interrupted"]
    for row in printed["results"]:
        assert row["record"]["measurement"]["ratio"] >= 1 or row["record"]["measurement"]["default_kept"]


def test_inspect_shows_the_same_of_folder_and_pack(tuned: tuple[Path, dict[str, Any]], pack: Path) -> None:
    folder = json.loads(mhc_tune("inspect", str(tuned[0]), "--json").stdout)
    packed = json.loads(mhc_tune("inspect", str(pack), "--json").stdout)
    assert folder["records"] == packed["records"]
    assert "merge" in mhc_tune("inspect", str(pack)).stdout


def test_verify_finds_folder_and_pack_right(tuned: tuple[Path, dict[str, Any]], pack: Path) -> None:
    for path in (tuned[0], pack):
        result = mhc_tune("verify", str(path))
        assert result.exit_code == 0, result.stderr
        assert result.stderr.count(": right") == len(kernel_specs())


def test_verify_fails_on_a_binary_that_computes_nothing(pack: Path, tmp_path: Path) -> None:
    assert mhc_tune("import", str(pack), "--cache", str(tmp_path), "--trust-binaries").exit_code == 0
    text, library = tmp_path / "idle.cpp", tmp_path / "idle.so"
    text.write_text(f'extern "C" int {ENTRY}(void **, const float *, long, int) {{ return 0; }}', encoding="utf-8")
    subprocess.run(["g++", "-shared", "-fPIC", str(text), "-o", str(library)], check=True)
    cache = KernelCache(tmp_path)
    victim = next(record for record in cache.records() if record.key.op == "aggregate")
    cache.put(victim.key, victim.schedule, library.read_bytes(), "", victim.measurement, victim.provenance)
    result = mhc_tune("verify", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.count("FAILED") == 1
    assert f"{victim.key.problem.describe()}: FAILED" in result.stderr


def test_verify_fails_on_a_damaged_binary(pack: Path, tmp_path: Path) -> None:
    assert mhc_tune("import", str(pack), "--cache", str(tmp_path), "--trust-binaries").exit_code == 0
    victim = next(tmp_path.glob("*.so"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    result = mhc_tune("verify", str(tmp_path))
    assert result.exit_code == 1
    assert "1 failed" in result.stderr


def test_import_copies_trusted_binaries(pack: Path, tmp_path: Path) -> None:
    result = mhc_tune("import", str(pack), "--cache", str(tmp_path), "--trust-binaries")
    assert result.exit_code == 0
    assert result.stderr.count(": copied") == len(kernel_specs())
    again = mhc_tune("import", str(pack), "--cache", str(tmp_path))
    assert again.stderr.count(": kept") == len(kernel_specs())


def test_import_compiles_what_is_not_trusted(pack: Path, tuned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from tiles.pack.pack import write_pack

    source = KernelCache(tuned[0])
    small = tmp_path / "small.mhcpack"
    chosen = [record for record in source.records() if record.key.op == "aggregate"]
    write_pack(source, small, chosen, signed=False)
    result = mhc_tune("import", str(small), "--cache", str(tmp_path / "cache"))
    assert result.exit_code == 0
    assert result.stderr.count(": recompiled") == 2
    assert len(KernelCache(tmp_path / "cache").records()) == 2


def test_a_truncated_pack_is_bad_input(pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mhcpack"
    path.write_bytes(pack.read_bytes()[:-100])
    for command in ("inspect", "verify", "import"):
        result = mhc_tune(command, str(path))
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)


def test_a_pack_of_another_format_is_bad_input(pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "future.mhcpack"
    with zipfile.ZipFile(pack) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename == "manifest.json":
                content = json.dumps(json.loads(content) | {"format": 99}).encode()
            new.writestr(info, content)
    result = mhc_tune("inspect", str(path))
    assert result.exit_code == 2
    assert "format must be 1 or 2, got 99" in result.stderr


def test_bench_compares_implementations(
    tuned: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path))  # default schedules are compiled into it
    monkeypatch.setattr(bench, "IMPLS", ("tuned", "separate", "default", "eager", "tile-kernels"))  # see test_choice
    result = mhc_tune("bench", *SHAPE, "--cache", str(tuned[0]), "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert {"device", "threads", "copy_gb_per_s", "gflops_peak", "results"} <= set(printed)
    rows = printed["results"]
    timed = {(row["op"], row["direction"], row["impl"]) for row in rows}
    for op in OPS:
        for direction in DIRECTIONS:
            assert {(op, direction, impl) for impl in ("tuned", "default", "eager")} <= timed
            assert ((op, direction, "separate") in timed) == (op in COMPOSED)
    assert ("layer", "both", "tile-kernels") in timed
    for row in rows:
        assert {"streams", "width", "tokens", "dtype", "median_ms", "bytes", "gb_per_s"} <= set(row)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
    assert "wrong" not in " ".join(printed["skipped"])


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    # A test run that was started in the background ignores Ctrl-C, and so would what it starts.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heed}; from cli.main import app; app()"]
    tuning = subprocess.Popen(
        [*command, "tune", *SHAPE, "--trials", "2", "--cache", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert tuning.stderr
    said = ""
    for line in tuning.stderr:
        if "of copy bandwidth" in line and "of copy bandwidth" not in said:
            os.killpg(tuning.pid, signal.SIGINT)
        said += line
    tuning.stderr.close()
    assert tuning.wait(60) == 130, said
    kept = len(KernelCache(tmp_path).records())
    assert 1 <= kept < len(kernel_specs())
    assert f"interrupted: {kept} of" in said
    assert "Traceback" not in said
