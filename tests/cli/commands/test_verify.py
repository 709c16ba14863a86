"""The command verify: its verdicts, and what it runs and does not run."""

import json
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autotune.processes.worker import Worker
from cli.main import app
from tiles.cache.cache import KernelCache, Record
from tiles.cache.record import Key
from tiles.compiler.compile import compile_kernel
from tiles.compiler.cpu_launcher import ENTRY
from tiles.compiler.toolchain import TILELANG
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.pack import write_pack
from tiles.target import Device, detect_device

HERE = detect_device("cpu")
PROBLEM = Problem("aggregate", "forward", 2, 64, tokens=16)
SCHEDULE = kernel_spec("aggregate", "forward").default(PROBLEM, HERE.target)


@pytest.fixture(scope="module")
def binary() -> bytes:
    """A kernel that is right."""
    return compile_kernel(PROBLEM, SCHEDULE, HERE.target).binary


def put(folder: Path, binary: bytes, device: Device = HERE, **changes: Any) -> Record:
    key = replace(Key.of(PROBLEM, device), **changes)
    return KernelCache(folder).put(key, asdict(SCHEDULE), binary, "source", {}, {})


def verify(*arguments: str) -> Any:
    result = CliRunner().invoke(app, ["verify", *arguments])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


def verdicts(result: Any) -> dict[str, Any]:
    printed = json.loads(result.stdout)
    return {one["digest"]: (one["verdict"], one["why"]) for one in printed["kernels"]} | {
        "counts": [printed[name] for name in ("right", "not run", "failed")]
    }


def test_each_kernel_gets_its_verdict(tmp_path: Path, binary: bytes) -> None:
    right = put(tmp_path, binary)
    elsewhere = put(tmp_path, b"x", Device("cpu", "Newer CPU", "x86-64-v9"))
    gpu = put(tmp_path, b"x", Device("cuda", "NVIDIA H200", "sm_90a"))
    stale = put(tmp_path, b"x", toolchain="0.1.14")
    broken = put(tmp_path, b"no library", tokens=64)
    result = verify(str(tmp_path), "--json")
    assert result.exit_code == 1
    found = verdicts(result)
    assert found["counts"] == [1, 3, 1]
    assert found[right.key.digest] == ("right", None)
    assert found[elsewhere.key.digest] == ("not run", f"built for x86-64-v9, this CPU offers {HERE.arch}")
    assert found[gpu.key.digest] == ("not run", "no NVIDIA GPU is visible")
    assert found[stale.key.digest] == (
        "not run",
        f"it was made with TileLang 0.1.14, this version uses {TILELANG}; tune it again",
    )
    assert found[broken.key.digest][0] == "failed"
    assert "does not load" in found[broken.key.digest][1]


def test_the_folder_may_be_the_current_one(tmp_path: Path, binary: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, binary)
    monkeypatch.chdir(tmp_path)
    assert "1 right" in verify(".").stderr


def test_what_kernels_do_to_their_process_harms_nothing_else(tmp_path: Path, binary: bytes) -> None:
    for tokens, does in ((1, "*(volatile int *)0 = 0;"), (2, "return 0;")):
        text, library = tmp_path / "bad.cpp", tmp_path / "bad.so"
        text.write_text(f'extern "C" int {ENTRY}(void **, const float *, long, int) {{ {does} return 0; }}', "utf-8")
        subprocess.run(["g++", "-shared", "-fPIC", str(text), "-o", str(library)], check=True)
        put(tmp_path / "cache", library.read_bytes(), tokens=tokens)
    put(tmp_path / "cache", binary)
    result = verify(str(tmp_path / "cache"))
    assert result.exit_code == 1
    assert "3 kernels: 1 right, 0 not run, 2 failed" in result.stderr
    failed = [line for line in result.stderr.splitlines() if "FAILED" in line]  # in the order of their digests
    assert len(failed) == 2
    assert any("SIGSEGV" in line and "T=1" in line for line in failed)
    assert any("WrongResult" in line and "T=2" in line for line in failed)


def test_a_strangers_code_is_not_run_unasked(tmp_path: Path, binary: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "made", binary)
    pack = tmp_path / "unsigned.mhcpack"
    write_pack(KernelCache(tmp_path / "made"), pack, signed=False)
    assert "1 right, 0 not run, 0 failed" in verify(str(pack), "--trust-binaries").stderr

    def never(*_: Any) -> None:
        raise AssertionError("ran a stranger's code")

    monkeypatch.setattr(Worker, "call", never)
    result = verify(str(pack))
    assert result.exit_code == 0
    assert "checksum right, not run: it is not signed; to run it, say --trust-binaries" in result.stderr


def test_a_corrupt_entry_fails(tmp_path: Path, binary: bytes) -> None:
    record = put(tmp_path, binary)
    KernelCache(tmp_path).binary_path(record).write_bytes(b"x")
    result = verify(str(tmp_path), "--json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert (printed["failed"], printed["kernels"]) == (1, [])
    assert "SHA-256" in printed["corrupt"][0]
