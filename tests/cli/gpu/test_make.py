"""`make gpu`: what the command gets from the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cli.gpu.process import ROOT


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not on PATH")
@pytest.mark.parametrize("given", ["/packages/site", ""])
def test_packages_that_lie_on_pythonpath_are_found(tmp_path: Path, given: str) -> None:
    """A GPU host without a package registry has them in a folder of its own."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$PYTHONPATH"\necho "$@"\n', encoding="utf-8")
    stub.chmod(0o755)
    command = ["make", "--silent", "gpu", f"GPU_PYTHON={stub}", "GPU_SECONDS=5"]
    environment = {"PATH": os.environ["PATH"], **({"PYTHONPATH": given} if given else {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    path, arguments = done.stdout.splitlines()
    assert path.split(":") == [str(ROOT), *([given] if given else [])]
    assert arguments == "-m cli.main gpu --seconds 5"
