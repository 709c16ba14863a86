"""The command explain: every candidate in order, and why it runs or not."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import write_config
from typer.testing import CliRunner

import tiles.compiler.compile
from cli.main import app
from mhc.dispatch.kernels import Kernels
from tiles.cache.cache import KernelCache
from tiles.cache.record import Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.pack import write_pack
from tiles.target import Device, detect_device

HERE = detect_device("cpu")
PROBLEM = Problem("merge", "forward", 2, 64, "bfloat16", tokens=1024)
SHAPE = ["--op", "merge", "--streams", "2", "--width", "64", "--tokens", "1000", "--dtype", "bfloat16"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_TUNE_CACHE", str(tmp_path / "default"))
    monkeypatch.setattr(tiles.compiler.compile, "why_no_compiler", lambda target: None)


def put(folder: Path, device: Device = HERE, **changes: Any) -> None:
    schedule = asdict(kernel_spec("merge", "forward").default(PROBLEM, HERE.target))
    key = replace(Key.of(PROBLEM, device), **changes)
    KernelCache(folder).put(key, schedule, b"no library", "source", {"ratio": 2.0}, {})


def explain(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["explain", *arguments, *SHAPE])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


def test_every_candidate_is_named_with_its_fate(tmp_path: Path) -> None:
    put(tmp_path, Device("cpu", "Newer CPU", "x86-64-v9"))
    put(tmp_path, toolchain="0.1.14")
    put(tmp_path)  # its binary is no library
    printed = json.loads(explain(str(tmp_path), "--json").stdout)
    assert printed["runs"] == "recompiled"
    kinds = [(one["kind"], one["runs"]) for one in printed["candidates"]]
    assert kinds[:3] == [("tuned", False), ("recompiled", True), ("tuned", False)]
    assert kinds[-2:] == [("default", False), ("reference", False)]
    broken, stale, newer = printed["candidates"][:3]
    assert "does not load" in broken["verdict"]
    assert stale["verdict"].startswith("runs; compiled when it is first used, as it was made with TileLang 0.1.14")
    assert stale["why"] == f"exact: tuned for 1024 tokens on this device, {HERE.name}"
    assert "Newer CPU" in newer["why"]
    assert set(stale["schedule"]) == {"block_width", "threads", "nontemporal", "min_blocks_per_sm"}


def test_people_read_one_line_that_is_marked(tmp_path: Path) -> None:
    put(tmp_path, toolchain="0.1.14")
    lines = explain("--cache", str(tmp_path)).stdout.splitlines()
    assert lines[0].startswith("merge forward n=2 C=64 bfloat16 T=1024 on ")
    assert [line for line in lines if line.startswith("->")] == [
        f"-> 1. recompiled exact: tuned for 1024 tokens on this device, {HERE.name}"
    ]


def test_an_untuned_problem_gets_the_default_and_the_command_that_tunes_it(tmp_path: Path) -> None:
    result = explain()
    assert "-> 1. default" in result.stdout
    assert "mhc-tune tune --streams 2 --width 64 --tokens 1024 --dtype bfloat16" in result.stderr
    assert not (tmp_path / "default").exists(), "nothing is compiled, nothing is written"


def test_a_pack_of_others_is_explained_with_and_without_trust(tmp_path: Path) -> None:
    put(tmp_path)
    pack = tmp_path / "unsigned.mhcpack"
    write_pack(KernelCache(tmp_path), pack, signed=False)
    untrusted = json.loads(explain(str(pack), "--json").stdout)["candidates"][0]
    assert (untrusted["kind"], untrusted["runs"]) == ("recompiled", True)
    assert "it is not signed" in untrusted["verdict"]
    trusted = json.loads(explain(str(pack), "--trust-binaries", "--json").stdout)["candidates"][0]
    assert trusted["kind"] == "tuned"


def test_it_agrees_with_what_training_code_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles.compiler.compile, "why_no_compiler", lambda target: "no C++ compiler is on PATH")
    put(tmp_path)
    printed = json.loads(explain(str(tmp_path), "--json").stdout)
    kernels = Kernels.from_path(tmp_path)
    inputs = list(kernel_spec("merge", "forward").inputs(PROBLEM, 1000, 0).values())
    kernels.run("merge", "forward", 2, 64, 20, inputs)
    (row,) = kernels.report()
    assert printed["runs"] == row.runs == "reference"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "pool"], "op must be one of"),
        (["--direction", "sideways"], "direction must be one of forward, backward, got sideways"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--width", "7"], "width must be a positive multiple of 8, got 7"),
        (["--tokens", "-4"], "tokens"),
        (["/nowhere"], "a pack must be a readable file, got /nowhere"),
        (["--cache", "/nowhere"], "the kernel cache must hold tuned kernels, found none in /nowhere"),
        (["/nowhere", "--cache", "/tmp"], "takes PATH or --cache"),
        (["--model", "glm-5.3-flash", "--width", "64"], "--width must be 4096, which glm-5.3-flash has, got 64"),
        (["--model", "glm-5.3-flash", "--op", "single_pass"], "op must be one of"),
        (["--model", "nowhere"], "--model must be a config.json"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr


@pytest.mark.parametrize(("model_type", "op"), [("deepseek_v4", "step"), ("deepseek_v41", "single_pass")])
def test_a_models_boundary_is_explained(tmp_path: Path, model_type: str, op: str) -> None:
    write_config(tmp_path, model_type=model_type)
    done = CliRunner().invoke(app, ["explain", "--model", str(tmp_path), "--tokens", "100"])
    assert done.stdout.startswith(f"{op} forward n=2 C=64 float32 T=128 on ")
    chosen = CliRunner().invoke(app, ["explain", "--model", str(tmp_path), "--tokens", "100", "--op", "merge"])
    assert chosen.stdout.startswith("merge forward n=2 C=64 float32 T=128 on ")


def test_a_models_rounds_are_explained(tmp_path: Path) -> None:
    """The kernels of 20 rounds serve no other."""
    problem = Problem("step", "forward", 2, 64, "float32", 1024)
    schedule = asdict(kernel_spec("step", "forward").default(problem, HERE.target))
    KernelCache(tmp_path / "cache").put(Key.of(problem, HERE), schedule, b"no library", "source", {"ratio": 2.0}, {})
    seen = []
    for rounds in (20, 10):
        write_config(tmp_path, hc_sinkhorn_iters=rounds)
        given = ["--model", str(tmp_path), "--tokens", "1000", "--cache", str(tmp_path / "cache"), "--json"]
        seen.append(
            [one["kind"] for one in json.loads(CliRunner().invoke(app, ["explain", *given]).stdout)["candidates"]]
        )
    assert "tuned" in seen[0]
    assert "tuned" not in seen[1]
