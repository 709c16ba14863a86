"""Items of `mhc-tune gpu`: how they survive child processes that crash, hang or break the GPU, and what they keep."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from cli.gpu import items as gpu_items
from cli.gpu import process as gpu_process
from cli.gpu.plan import MAIN_SHAPE, Item, Timing

OPS = ("layer", "merge", "pre")
BENCH = Item("bench", MAIN_SHAPE, timings=tuple(Timing(op, ("forward",), ("tuned", "liger")) for op in OPS))
ROWS = {"rows": [{"impl": "tuned"}], "skipped": []}


class Children:
    """Stands in for processes: each call plays the next part, which may write results, and says how it ended."""

    def __init__(self, *parts: tuple[dict[str, Any] | None, int | None]) -> None:
        self.parts, self.tasks, self.seconds = list(parts), [], []

    def __call__(self, command: list[str], seconds: float, log: Path, environment: Any, stdout: Any = None) -> Any:
        task = json.loads(Path(command[-1]).read_text())
        self.tasks.append(task)
        self.seconds.append(seconds)
        written, code = self.parts.pop(0)
        if written is not None:
            Path(task["out"]).write_text(json.dumps({"ops": {}, "doing": None, "without": {}} | written))
        return code


def children(monkeypatch: pytest.MonkeyPatch, *parts: tuple[dict[str, Any] | None, int | None]) -> Children:
    made = Children(*parts)
    monkeypatch.setattr(gpu_items.process, "run", made)
    return made


def all_of(*ops: str) -> dict[str, Any]:
    return {"ops": dict.fromkeys(ops, ROWS)}


def measured(folder: Path, seconds: float = 100.0, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
    return gpu_items.run_measurements(BENCH, "cuda", folder, seconds, earlier or {})


def test_all_that_is_measured_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = children(monkeypatch, (all_of(*OPS) | {"roofline": {"copy_gb_per_s": 3000.0}}, 0))
    found = measured(tmp_path)
    assert found == {
        "status": "done",
        "ops": dict.fromkeys(OPS, ROWS),
        "without": {},
        "roofline": {"copy_gb_per_s": 3000.0},
    }
    (task,) = made.tasks
    assert (task["kind"], task["target"], tuple(task["shape"])) == ("bench", "cuda", MAIN_SHAPE)
    assert [timing["op"] for timing in task["timings"]] == list(OPS)


def test_an_op_that_crashes_its_process_fails_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = children(monkeypatch, (all_of("layer") | {"doing": "merge"}, -11), (all_of("pre"), 0))
    found = measured(tmp_path)
    assert [task["ops"] for task in made.tasks] == [list(OPS), ["pre"]]
    assert found["status"] == "failed"
    assert "merge: the process ended with exit code -11" in found["why"]
    assert found["ops"]["pre"] == ROWS


def test_who_breaks_the_gpu_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = {"doing": "layer", "without": {"liger": "illegal memory access"}}
    made = children(monkeypatch, (broken, 3), (all_of(*OPS), 0))
    found = measured(tmp_path)
    assert made.tasks[1]["without"] == {"liger": "illegal memory access"}
    assert made.tasks[1]["ops"] == list(OPS)
    assert (found["status"], found["without"]) == ("done", broken["without"])


@pytest.mark.parametrize(("given", "status"), [(30.0, "partial"), (BENCH.max_seconds, "failed")])
def test_time_that_is_up_leaves_the_rest_for_the_next_call(
    given: float, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An op for which an item's whole time is too short fails; what had less time than that is begun again."""
    children(monkeypatch, (all_of("layer") | {"doing": "merge"}, None))
    found = measured(tmp_path, given)
    assert found["status"] == status
    assert "merge took longer" in found["why"]
    made = children(monkeypatch, (all_of("merge", "pre"), 0))
    assert measured(tmp_path, earlier=found)["status"] == "done"
    assert made.tasks[0]["ops"] == ["merge", "pre"]


def test_failed_ops_are_tried_again_by_the_next_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    earlier = {"ops": {"layer": ROWS, "merge": {"failed": "out of memory"}, "pre": ROWS}}
    made = children(monkeypatch, (all_of("merge"), 0))
    assert measured(tmp_path, earlier=earlier)["status"] == "done"
    assert made.tasks[0]["ops"] == ["merge"]


@pytest.mark.parametrize("part", [(None, 1), ({}, 1), ({}, 0)])
def test_a_process_that_brings_nothing_is_not_started_for_ever(
    part: tuple[dict[str, Any] | None, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    children(monkeypatch, part)
    found = measured(tmp_path)
    assert found["status"] == "partial"
    assert f"exit code {part[1]}" in found["why"]


@pytest.mark.parametrize(
    ("wrong", "said"), [({"within": False}, "beyond its limits"), ({"repeats": False}, "does not repeat")]
)
def test_numerics_that_are_wrong_are_failures(
    wrong: dict[str, bool], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = {"errors": {}, "within": True, "repeats": True}
    children(monkeypatch, ({"ops": {"merge": right, "pre": right | wrong}}, 0))
    found = gpu_items.run_measurements(
        Item("numerics", MAIN_SHAPE, ("merge", "pre"), "default"), "cuda", tmp_path, 100.0, {}
    )
    assert found["status"] == "failed"
    assert found["why"].startswith(f"pre: {said}")


def test_numerics_of_what_is_not_tuned_yet_wait_for_a_later_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    item = Item("numerics", MAIN_SHAPE, ("merge", "pre"), "tuned")
    right, untuned = {"errors": {}, "within": True, "repeats": True}, {"skipped": ["tuned pre: not tuned"]}
    children(monkeypatch, ({"ops": {"merge": right, "pre": untuned}}, 0))
    found = gpu_items.run_measurements(item, "cuda", tmp_path, 100.0, {})
    assert (found["status"], found["why"]) == ("partial", "tuned pre: not tuned")
    made = children(monkeypatch, ({"ops": {"pre": right}}, 0))
    assert gpu_items.run_measurements(item, "cuda", tmp_path, 100.0, found)["status"] == "done"
    assert made.tasks[0]["ops"] == ["pre"]


def test_tuning_tells_what_was_found_and_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = {"schedule": {"threads": 128}, "measurement": {"tuned_ms": 1.0}, "key": {}}
    one = {"op": "merge", "direction": "forward", "stopped": "trials", "failed_trials": 2, "record": record}
    said: dict[str, Any] = {"results": [one, one | {"direction": "backward"}], "failed": {}, "interrupted": False}
    commands = []

    def tune(command: list[str], seconds: float, log: Path, environment: Any, stdout: Path) -> int:
        commands.append(command)
        stdout.write_text(json.dumps(said))
        assert environment["MHC_TUNE_CACHE"] == str(tmp_path / "work" / "cache")
        return 0

    monkeypatch.setattr(gpu_items.process, "run", tune)
    item = Item("tune", MAIN_SHAPE, ops=("merge",))
    found = gpu_items.run_tune(item, "cuda", tmp_path, 60.0, {})
    assert found["status"] == "done"
    assert found["kernels"][0]["schedule"] == {"threads": 128}
    assert " ".join(commands[0][2:]).startswith("cli.main tune --target cuda")
    assert commands[0][commands[0].index("--seconds") + 1] == "45.0"
    said["results"].pop()
    assert gpu_items.run_tune(item, "cuda", tmp_path, 60.0, {})["status"] == "partial"
    said["failed"] = {"merge": "does not compile"}
    assert gpu_items.run_tune(item, "cuda", tmp_path, 60.0, {})["why"] == "merge: does not compile"


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a GPU test that passes, one that fails until `mended` is there, and a test for any machine."""
    tests = tmp_path / "checkout" / "tests"
    tests.mkdir(parents=True)
    (tests.parent / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gpu: needs one']\n")
    (tests / "test_one.py").write_text(
        "from pathlib import Path\n\nimport pytest\n\n@pytest.mark.gpu\ndef test_passes(): pass\n\n"
        "@pytest.mark.gpu\ndef test_mended(): assert Path(__file__).with_name('mended').exists()\n\n"
        "def test_anywhere(): raise AssertionError\n"
    )
    (tests / "test_other.py").write_text("import no_such_package\n")
    monkeypatch.setattr(gpu_items, "ROOT", tests.parent)
    monkeypatch.setattr(gpu_process, "ROOT", tests.parent)
    return tests


def test_only_gpu_tests_run_and_those_that_passed_do_not_run_again(suite: Path, tmp_path: Path) -> None:
    first = gpu_items.run_tests(Item("tests"), "cuda", tmp_path, 60.0, {})
    assert first["status"] == "failed", first
    assert first["counts"] == {"PASSED": 1, "FAILED": 1}
    assert "test_mended" in first["why"]
    (suite / "mended").touch()
    again = gpu_items.run_tests(Item("tests"), "cuda", tmp_path, 60.0, first)
    assert (again["status"], again["counts"]) == ("done", {"PASSED": 2})
    assert "test_passes" not in (tmp_path / "work" / "tests.txt").read_text()


def test_without_pytest_the_tests_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_items.util, "find_spec", lambda name: None)
    assert "not installed" in gpu_items.run_tests(Item("tests"), "cuda", tmp_path, 60.0, {})["why"]


def sanitizer(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "status", "errors"),
    [
        ('echo "$@"; echo "========= ERROR SUMMARY: 0 errors"', "done", 0),
        ('echo "========= ERROR SUMMARY: 2 errors"; echo "========= ERROR SUMMARY: 1 error"; exit 9', "failed", 3),
    ],
)
def test_the_memory_checkers_verdict_is_read(
    script: str, status: str, errors: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert gpu_items.run_sanitizer(Item("sanitizer"), "cuda", tmp_path, 60.0, {})["status"] == "skipped"
    sanitizer(tmp_path, script, monkeypatch)
    cache = tmp_path / "work" / "cache"
    cache.mkdir(parents=True)
    (cache / "kernel.json").touch()
    found = gpu_items.run_sanitizer(Item("sanitizer"), "cuda", tmp_path, 60.0, {})
    assert (found["status"], found["errors"]) == (status, errors)
    if status == "done":
        assert f"-m cli.main verify {cache}" in (tmp_path / "work" / "sanitizer.txt").read_text()


def test_kernels_are_packed_and_taken_from_the_pack_where_the_cache_has_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(gpu_items.process, "run", lambda command, *more: commands.append(command))
    gpu_items.save_kernels(tmp_path)
    gpu_items.restore_kernels(tmp_path)
    assert commands == []
    (tmp_path / gpu_items.PACK).touch()
    gpu_items.restore_kernels(tmp_path)
    (tmp_path / "work" / "cache").mkdir()
    (tmp_path / "work" / "cache" / "kernel.json").touch()
    gpu_items.restore_kernels(tmp_path)
    gpu_items.save_kernels(tmp_path)
    assert [command[3] for command in commands] == ["import", "export"]
    assert not any("--trust-binaries" in command for command in commands)
