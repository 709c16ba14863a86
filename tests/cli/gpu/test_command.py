"""The command gpu: its order, its time budget, how it continues, and what it writes. Its items are stand-ins."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import Clock
from typer.testing import CliRunner

from cli.gpu import command as gpu
from cli.gpu import items as gpu_items
from cli.gpu.plan import Item, Timing
from cli.gpu.store import Store
from cli.main import app
from tiles.errors import BadInput
from tiles.target import Device, detect_device

DEVICE = Device("cuda", "NVIDIA H100 80GB HBM3", "sm_90a", 132, 50 * 2**20)
FIRST, SECOND, THIRD = Item("numerics", ops=("merge",)), Item("tests"), Item("block")


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What was done with how many seconds; each item takes 100 of them."""
    done: list[tuple[str, float]] = []
    clock = Clock()

    def stand_in(item: Item, target: str, folder: Path, seconds: float, earlier: dict[str, Any]) -> dict[str, Any]:
        done.append((item.kind, seconds))
        clock.now += 100
        if item.kind == "tests" and len(done) < 4:
            raise RuntimeError("a test broke the machine")
        return {"status": "partial", "why": "the time was up"} if item.kind == "block" else {"status": "done"}

    monkeypatch.setattr(gpu_items, "RUNNERS", dict.fromkeys(gpu_items.RUNNERS, stand_in))
    monkeypatch.setattr(gpu, "plan", lambda: [FIRST, SECOND, THIRD])
    monkeypatch.setattr(gpu.time, "monotonic", clock)
    return done


def run(folder: Path, seconds: float) -> Store:
    store = Store(folder / gpu.RESULTS, DEVICE)
    gpu.run(DEVICE, "cuda", store, gpu.time.monotonic() + seconds)
    return Store(folder / gpu.RESULTS, DEVICE)


def test_the_budget_is_kept_and_what_no_longer_fits_is_left(doing: list[tuple[str, float]], tmp_path: Path) -> None:
    store = run(tmp_path, 135)
    assert doing == [("numerics", 120)]
    assert store.get(FIRST.name)["status"] == "done"
    assert store.get(SECOND.name) == {}
    assert doing[0][1] <= FIRST.max_seconds


def test_an_item_gets_no_more_than_what_is_left(doing: list[tuple[str, float]], tmp_path: Path) -> None:
    run(tmp_path, 80)
    assert doing == [("numerics", 70)]


def test_an_item_that_fails_stops_no_other_and_is_tried_again_last(
    doing: list[tuple[str, float]], tmp_path: Path
) -> None:
    store = run(tmp_path, 1000)
    assert [kind for kind, _ in doing] == ["numerics", "tests", "block"]
    assert store.get("tests") == {
        "status": "failed",
        "why": "RuntimeError: a test broke the machine",
        "seconds": 100.0,
    }
    doing.clear()
    doing += [("earlier", 0)] * 3
    store = run(tmp_path, 1000)
    assert [kind for kind, _ in doing[3:]] == ["block", "tests"]
    assert store.get("tests")["status"] == "done"
    assert store.get("block")["seconds"] == 200.0


def test_results_are_on_disk_after_every_item(
    doing: list[tuple[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def looks(item: Item, *more: Any) -> dict[str, Any]:
        seen.append(list(json.loads((tmp_path / gpu.RESULTS).read_text())["items"]))
        return {"status": "done"}

    monkeypatch.setattr(gpu_items, "RUNNERS", dict.fromkeys(gpu_items.RUNNERS, looks))
    run(tmp_path, 1000)
    assert seen == [[], [FIRST.name], [FIRST.name, SECOND.name]]


def test_ctrl_c_keeps_what_is_done(
    doing: list[tuple[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(item: Item, *more: Any) -> dict[str, Any]:
        if item.kind == "tests":
            raise KeyboardInterrupt
        return {"status": "done"}

    monkeypatch.setattr(gpu_items, "RUNNERS", dict.fromkeys(gpu_items.RUNNERS, interrupted))
    store = run(tmp_path, 1000)
    assert list(store.values["items"]) == [FIRST.name]
    assert (tmp_path / "results.md").read_text().startswith("# NVIDIA H100 80GB HBM3 (sm_90a)")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1, "device": {"name": "another"}}'])
def test_a_file_of_something_else_is_not_written_over(content: str, tmp_path: Path) -> None:
    path = tmp_path / gpu.RESULTS
    path.write_text(content)
    with pytest.raises(BadInput, match=str(path)):
        Store(path, DEVICE)
    assert path.read_text() == content


def test_the_file_says_what_was_measured_on_what(doing: list[tuple[str, float]], tmp_path: Path) -> None:
    values = run(tmp_path, 1000).values
    assert set(values) == {"format", "device", "about", "items"}
    assert values["device"] == DEVICE.as_dict()
    assert values["about"]["torch"]
    assert values["about"]["liger-kernel"] == "not installed" or values["about"]["liger-kernel"][0].isdigit()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    result = CliRunner().invoke(app, ["gpu"])
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert "needs a visible NVIDIA GPU" in result.stderr


def test_a_folder_is_named_after_the_device() -> None:
    assert gpu.folder_name(DEVICE) == "nvidia-h100-80gb-hbm3"


@pytest.mark.slow
def test_the_command_runs_an_item_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine's CPU, through a process of its own; plain torch alone, as compiling kernels takes long."""
    small = Item("bench", (2, 16, 8), timings=(Timing("aggregate", ("forward",), ("eager", "liger", "copy")),))
    monkeypatch.setattr(gpu, "plan", lambda: [small])
    arguments = ["gpu", "--target", "cpu", "--seconds", "120", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    values = json.loads((tmp_path / gpu.RESULTS).read_text())
    found = values["items"]["bench n=2 C=16 T=8"]
    assert found["status"] == "done", found
    assert values["device"] == detect_device("cpu").as_dict()
    assert [row["impl"] for row in found["ops"]["aggregate"]["rows"]] == ["eager", "copy"]
    assert "liger aggregate" in found["ops"]["aggregate"]["skipped"][0]
    assert found["roofline"]["copy_gb_per_s"] > 0
    assert "its kernels need a GPU" in (tmp_path / "results.md").read_text()
    assert "1 of 1 items are done, in" in result.stderr
    assert (tmp_path / "work" / ".gitignore").read_text() == "*\n"
    again = CliRunner().invoke(app, arguments)
    assert "0 of 1 items to do" in again.stderr


@pytest.mark.parametrize(("kind", "code"), [("numerics", 1), ("tests", 1), ("sanitizer", 1), ("bench", 0), ("tune", 0)])
def test_a_check_that_fails_is_the_commands_exit_code(
    kind: Any, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "plan", lambda: [Item(kind)])
    monkeypatch.setattr(gpu_items, "RUNNERS", {kind: lambda *_: {"status": "failed", "why": "it is wrong"}})
    result = CliRunner().invoke(app, ["gpu", "--target", "cpu", "--seconds", "400", "--out", str(tmp_path)])
    assert result.exit_code == code
