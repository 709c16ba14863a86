"""The whole path on a tiny shape with real kernels: tune, export, inspect, import, verify, load, bench; and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import mhc_tune, write_config

import mhc
from cli.bench import command as bench
from cli.bench.cases import DIRECTIONS, OPS
from cli.bench.torch_composites import COMPOSITES
from mhc.dispatch.kernels import using
from tiles.cache.cache import KernelCache
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import NORM
from tiles.pack.pack import write_pack

SHAPE = ["--target", "cpu", "--streams", "2", "--width", "64", "--tokens", "32", "--dtype", "bfloat16"]


@dataclass(frozen=True)
class Tuned:
    """A cache that the real tuner filled with the kernels of `ops`, what it printed as JSON, and a pack of it."""

    ops: tuple[str, ...]
    folder: Path
    printed: dict[str, Any]
    pack: Path

    @property
    def kernels(self) -> set[tuple[str, str]]:
        return {kernel for kernel in kernel_specs() if kernel[0] in self.ops}


EVERY_OP = tuple(dict.fromkeys(op for op, _ in kernel_specs() if NORM not in op or op == "pre_norm"))


@pytest.fixture(
    scope="module",
    params=[("aggregate",), pytest.param(EVERY_OP, marks=pytest.mark.slow)],
    ids=["aggregate", "all ops"],
)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("tuned")
    chosen = [word for op in request.param for word in ("--op", op)]
    result = mhc_tune("tune", *SHAPE, *chosen, "--trials", "2", "--cache", folder, "--json")
    assert result.exit_code == 0, result.stderr
    pack = folder.parent / f"{folder.name}.mhcpack"
    assert mhc_tune("export", pack, "--cache", folder).exit_code == 0
    return Tuned(request.param, folder, json.loads(result.stdout), pack)


def test_every_kernel_is_tuned_and_stored(tuned: Tuned) -> None:
    assert {(row["op"], row["direction"]) for row in tuned.printed["results"]} == tuned.kernels
    assert len(KernelCache(tuned.folder).records()) == len(tuned.kernels)
    assert tuned.printed["device"]["kind"] == "cpu"
    assert tuned.printed["copy_gb_per_s"] > 0
    assert not tuned.printed["interrupted"]
    for row in tuned.printed["results"]:
        assert row["record"]["measurement"]["ratio"] >= 1 or row["record"]["measurement"]["default_kept"]


def test_a_models_config_names_the_same_kernels(tuned: Tuned, tmp_path: Path) -> None:
    """They are tuned already: nothing is searched again, and explain finds them."""
    write_config(tmp_path, torch_dtype="bfloat16")
    given = ["--model", tmp_path, "--tokens", "32", "--cache", tuned.folder, "--op", "aggregate", "--json"]
    again = mhc_tune("tune", "--target", "cpu", "--trials", "2", *given)
    assert again.exit_code == 0, again.stderr
    rows = json.loads(again.stdout)["results"]
    before = {row["direction"]: row for row in tuned.printed["results"] if row["op"] == "aggregate"}
    assert {row["direction"]: row["record"] for row in rows} == {way: row["record"] for way, row in before.items()}
    assert {row["stopped"] for row in rows} == {"finished before"}
    assert json.loads(mhc_tune("explain", *given).stdout)["runs"] == "tuned"


@pytest.mark.slow
def test_training_code_runs_what_was_tuned_for_a_model(tmp_path: Path) -> None:
    """Single pass, and other rounds than the paper's."""
    write_config(tmp_path, model_type="deepseek_v41", hc_sinkhorn_iters=7)
    given, pack = ["--model", tmp_path, "--cache", tmp_path / "cache"], tmp_path / "model.mhcpack"
    tuned = mhc_tune("tune", "--target", "cpu", *given, "--tokens", "32", "--trials", "1")
    assert tuned.exit_code == 0, tuned.stderr
    assert mhc_tune("export", pack, *given).exit_code == 0
    settings: dict[str, Any] = {"rounds": 7, "hc_eps": 1e-6}
    blocks = [mhc.HyperConnection(64, 2, torch.nn.Linear(64, 64), **settings) for _ in range(2)]
    kernels = mhc.load_kernels(pack)
    with using(kernels):
        stack = mhc.HyperConnectionStack(blocks, single_pass=True)
        stack(torch.randn(32, 2, 64, requires_grad=True)).sum().backward()
    ran = {(row.op, row.runs) for row in kernels.report()}
    assert ran >= {(op, "tuned") for op in ("project", "coefficients", "aggregate", "merge")}
    assert {runs for _, runs in ran} == {"tuned"}


def test_inspect_shows_the_same_of_folder_and_pack(tuned: Tuned) -> None:
    folder = json.loads(mhc_tune("inspect", tuned.folder, "--json").stdout)
    packed = json.loads(mhc_tune("inspect", tuned.pack, "--json").stdout)
    assert folder["records"] == packed["records"]
    assert "aggregate" in mhc_tune("inspect", tuned.pack).stdout


def test_verify_finds_folder_and_pack_right(tuned: Tuned) -> None:
    for path in (tuned.folder, tuned.pack):
        result = mhc_tune("verify", path)
        assert result.exit_code == 0, result.stderr
        assert result.stderr.count(": right") == len(tuned.kernels)


def test_a_loaded_pack_runs_in_training_code(tuned: Tuned) -> None:
    kernels = mhc.load_kernels(tuned.pack)
    x = torch.randn(32, 2, 64, dtype=torch.bfloat16, requires_grad=True)
    with using(kernels):
        mhc.functional.aggregate(x, torch.rand(32, 2)).float().sum().backward()
    assert {(row.op, row.direction, row.runs) for row in kernels.report()} == {
        ("aggregate", direction, "tuned") for direction in ("forward", "backward")
    }


def test_import_copies_trusted_binaries(tuned: Tuned, tmp_path: Path) -> None:
    result = mhc_tune("import", tuned.pack, "--cache", tmp_path, "--trust-binaries")
    assert result.exit_code == 0
    assert result.stderr.count(": copied") == len(tuned.kernels)
    again = mhc_tune("import", tuned.pack, "--cache", tmp_path)
    assert again.stderr.count(": kept") == len(tuned.kernels)


@pytest.mark.slow  # test_packs.py imports with a stand-in of the compiler, test_pack_selection.py compiles
def test_import_compiles_what_is_not_trusted(tuned: Tuned, tmp_path: Path) -> None:
    source = KernelCache(tuned.folder)
    unsigned = tmp_path / "unsigned.mhcpack"
    write_pack(source, unsigned, [record for record in source.records() if record.key.op == "aggregate"], signed=False)
    result = mhc_tune("import", unsigned, "--cache", tmp_path / "cache")
    assert result.exit_code == 0
    assert result.stderr.count(": recompiled") == 2
    assert len(KernelCache(tmp_path / "cache").records()) == 2


def test_a_truncated_pack_is_bad_input(tuned: Tuned, tmp_path: Path) -> None:
    path = tmp_path / "cut.mhcpack"
    path.write_bytes(tuned.pack.read_bytes()[:-100])
    for command in ("inspect", "verify", "import"):
        result = mhc_tune(command, str(path))
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)


def test_a_pack_of_another_format_is_bad_input(tuned: Tuned, tmp_path: Path) -> None:
    path = tmp_path / "future.mhcpack"
    with zipfile.ZipFile(tuned.pack) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename == "manifest.json":
                content = json.dumps(json.loads(content) | {"format": 99}).encode()
            new.writestr(info, content)
    result = mhc_tune("inspect", str(path))
    assert result.exit_code == 2
    assert "format must be 1 or 2, got 99" in result.stderr


@pytest.mark.slow  # tests/cli/bench has the command
def test_bench_compares_implementations(tuned: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path))  # default schedules are compiled into it
    monkeypatch.setattr(bench, "IMPLS", ("tuned", "separate", "default", "eager", "tile-kernels"))
    ops = OPS if tuned.ops == EVERY_OP else tuned.ops
    chosen = [word for op in ops for word in ("--op", op)]
    result = mhc_tune("bench", *SHAPE, *chosen, "--cache", tuned.folder, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert {"device", "threads", "copy_gb_per_s", "gflops_peak", "results"} <= set(printed)
    rows = printed["results"]
    timed = {(row["op"], row["direction"], row["impl"]) for row in rows}
    for op in ops:
        for direction in DIRECTIONS:
            assert {(op, direction, impl) for impl in ("tuned", "default", "eager")} <= timed
            assert ((op, direction, "separate") in timed) == (op in COMPOSITES)
    assert (ops[-1], "both", "tile-kernels") in timed
    for row in rows:
        assert {"streams", "width", "tokens", "dtype", "median_ms", "bytes", "gb_per_s"} <= set(row)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
    assert "wrong" not in " ".join(printed["skipped"])


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    # A test run that was started in the background ignores Ctrl-C, and so would what it starts.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{heed}; from cli.main import app; app()"]
    tuning = subprocess.Popen(
        [*command, "tune", *SHAPE, "--op", "aggregate", "--op", "sinkhorn", "--trials", "1", "--cache", str(tmp_path)],
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
    assert 1 <= kept < 4
    assert f"interrupted: {kept} of" in said
    assert "Traceback" not in said
