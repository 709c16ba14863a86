"""Compilation in the environments that users have."""

import os
import subprocess
import sys

from tiles.compiler.compile import compile_kernel, why_no_compiler
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import detect_device


def test_cxx_may_hold_arguments(monkeypatch):
    spec, problem = kernel_spec("aggregate", "forward"), Problem("aggregate", "forward", 2, 16)
    target = detect_device("cpu").target
    monkeypatch.setenv("CXX", "env LC_ALL=C g++ -O1")
    assert compile_kernel(problem, spec.default(problem, target), target).binary
    for wrong in ("no-such-compiler -O1", " "):
        monkeypatch.setenv("CXX", wrong)
        assert "install g++ or set CXX" in (why_no_compiler(target) or "")


def test_tilelangs_import_leaves_home_and_environment_alone(tmp_path):
    """A user's own TileLang code in the same process keeps its cache folder."""
    code = (
        "import os; from tiles.compiler.compile import import_tilelang; before = dict(os.environ); import_tilelang();"
        "import tilelang; assert os.environ == before; print(tilelang.env.TILELANG_CACHE_DIR)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("TILELANG_CACHE_DIR",)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / ".tilelang" / "cache")
    assert list(tmp_path.iterdir()) == []
