"""What all tests share: the folder of this run, where everything is compiled once; a signing key of this run; tests
marked `gpu` are skipped where no GPU is visible."""

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

COMPILERS = ("g++", "c++", "clang++", "nvcc")
COMPILE_ONCE = Path(__file__).with_name("compile_once.py")


def pytest_configure(config: pytest.Config) -> None:
    """In the first process, before others start: what they and their children compile is kept in one new folder."""
    if hasattr(config, "workerinput"):
        return
    folder = Path(tempfile.mkdtemp(prefix="mhc-tune-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.stash[RUN] = folder
    for name in ("bin", "compiled"):
        (folder / name).mkdir()
    for name in COMPILERS:
        if compiler := shutil.which(name):
            command = shlex.join([sys.executable, "-IS", str(COMPILE_ONCE), str(folder / "compiled"), compiler])
            (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (folder / "bin" / name).chmod(0o755)
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes have a core each


RUN = pytest.StashKey[Path]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    log = config.stash[RUN] / "compiled" / "log"
    if log.is_file():
        lines = [line.split() for line in log.read_text().splitlines()]
        found = [float(took) - float(waited) for what, took, waited in lines if what == "found"]
        said = f"compilers: {len(lines)} calls, {len(found)} answered by an earlier one, which saved {sum(found):.0f} s"
        terminalreporter.write_line(said)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are named by their argument: their own text may hold a time, and processes must collect the same names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU is visible to torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _own_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Packs are signed with a key that is made for this run; the user's own is not touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHC_TUNE_KEYS", str(tmp_path_factory.mktemp("keys") / "mhc-tune"))
        yield
