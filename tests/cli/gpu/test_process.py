"""Child processes: their end with all that they started, and their environment."""

import sys
import time
from pathlib import Path

import pytest

from cli.gpu import process as gpu_process


def test_a_process_that_hangs_ends_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_process, "GRACE", 0.2)
    grandchild = tmp_path / "pid"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '1000']);"
        f"open({str(grandchild)!r}, 'w').write(str(child.pid)); print('begun', flush=True); time.sleep(1000)"
    )
    log = tmp_path / "log"
    assert gpu_process.run([sys.executable, "-c", code], 2.0, log, {}) is None
    assert log.read_text() == "begun\n"
    ended = Path("/proc") / grandchild.read_text() / "stat"
    deadline = time.monotonic() + 5
    while ended.exists() and ended.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not ended.exists() or ended.read_text().split()[2] == "Z"


def test_a_process_finds_the_checkout_and_what_it_is_given(tmp_path: Path) -> None:
    code = "import cli.gpu.plan, os, sys; print(os.environ['GIVEN']); print('aside', file=sys.stderr); sys.exit(3)"
    out, log = tmp_path / "out", tmp_path / "log"
    command = gpu_process.python("-P", "-c", code) if sys.version_info >= (3, 11) else gpu_process.python("-c", code)
    assert gpu_process.run(command, 60.0, log, {"GIVEN": "x"}, out) == 3
    assert (out.read_text(), log.read_text()) == ("x\n", "aside\n")
