"""The child process: its results after each op, failures, and a broken GPU context."""

from pathlib import Path
from typing import Any

import pytest

from cli.gpu import child as gpu_child


def test_a_child_keeps_each_op_and_why_one_failed(tmp_path: Path) -> None:
    results = gpu_child.TaskResults(tmp_path / "out.json")

    def breaks() -> dict[str, Any]:
        raise ValueError("too large\nby far")

    results.run_op("a", lambda: {"rows": []}, context_broken=lambda: False)
    results.run_op("b", breaks, context_broken=lambda: False)
    assert results.values["ops"] == {"a": {"rows": []}, "b": {"failed": "ValueError: too large"}}
    with pytest.raises(SystemExit) as ended:
        results.run_op("c", lambda: {"rows": []}, context_broken=lambda: True)
    assert ended.value.code == gpu_child.CONTEXT_BROKEN
    assert '"c": {"rows": []}' in (tmp_path / "out.json").read_text()


def test_a_child_names_who_broke_the_gpu(tmp_path: Path) -> None:
    results = gpu_child.TaskResults(tmp_path / "out.json")

    def breaks() -> dict[str, Any]:
        raise gpu_child.bench.ContextBroken("liger", "illegal memory access")

    with pytest.raises(SystemExit):
        results.run_op("layer", breaks, context_broken=lambda: False)
    assert '"without": {"liger": "illegal memory access"}' in (tmp_path / "out.json").read_text()
