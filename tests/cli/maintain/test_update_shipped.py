"""The maker of the shipped schedules: the newest of each problem, and what today's kernels do not take is left out."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cli.maintain.update_shipped import update_shipped
from tiles.cache import shipped
from tiles.cache.record import Key, Record, record_dict
from tiles.cache.shipped import ShippedRecord, shipped_records
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import Device


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "kernels.json"


def inspected(*records: dict[str, Any]) -> str:
    """What `mhc-tune inspect --json` prints."""
    return json.dumps({"path": "cache", "records": [{**record, "digest": "0" * 32} for record in records]})


def measured(tokens: int, tuned_ms: float, date: str, **changes: Any) -> dict[str, Any]:
    """A record of merge, of an older version of the sources, as JSON holds it."""
    device = Device("cpu", "A CPU", "x86-64-v3")
    problem = Problem("merge", "forward", 4, 64, "float32", tokens)
    schedule = dataclasses.asdict(kernel_spec("merge", "forward").default(problem, device.target)) | changes
    key = dataclasses.replace(Key.of(problem, device), sources="0123abcd")
    measurement = {"tuned_ms": tuned_ms, "default_ms": 2.0, "ratio": 2.0 / tuned_ms, "bytes": 12345}
    return record_dict(Record(key, schedule, "0" * 64, 1, measurement, {"date": f"{date}T10:00:00+00:00", "host": "a"}))


def shipped_from(out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ShippedRecord, ...]:
    monkeypatch.setattr(shipped, "FILE", out)
    return shipped_records.__wrapped__()


def test_the_newest_of_each_problem_is_shipped_under_todays_key(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, older = measured(128, 1.23456789, "2026-11-02"), measured(128, 0.5, "2026-11-01")
    file.write_text(inspected(newer, older, measured(512, 1.0, "2026-11-01")))
    update_shipped([file], tmp_path / "out.json")
    found = {record.key.tokens: record for record in shipped_from(tmp_path / "out.json", monkeypatch)}
    assert set(found) == {128, 512}
    assert found[128].measurement == {"default_ms": 2.0, "ratio": 1.62, "tuned_ms": 1.235}
    assert found[128].provenance == {"date": "2026-11-02", "file": file.as_posix(), "commit": ""}
    assert found[128].key.current
    assert found[128].schedule == newer["schedule"]


def test_it_is_the_same_whatever_the_order(file: Path, tmp_path: Path) -> None:
    records = [measured(2**power, 1.0, "2026-11-01") for power in range(5)]
    texts = []
    for order in (records, records[::-1]):
        file.write_text(inspected(*order))
        update_shipped([file], tmp_path / "out.json")
        texts.append((tmp_path / "out.json").read_bytes())
    assert texts[0] == texts[1]


def test_a_schedule_that_todays_kernel_refuses_is_left_out_and_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(
        inspected(
            measured(128, 1.0, "2026-11-01", block_width=-1),
            measured(256, 1.0, "2026-11-01", gone=3),
            measured(512, 1.0, "2026-11-01"),
        )
    )
    update_shipped([file], tmp_path / "out.json")
    assert [record.key.tokens for record in shipped_from(tmp_path / "out.json", monkeypatch)] == [512]
    said = capsys.readouterr().err
    assert said.count("left out") == 2
    assert "unknown ['gone']" in said


@pytest.mark.parametrize("text", ["[]", '{"records": 1}', '{"records": [1]}', "{}"])
def test_another_file_is_bad_input(file: Path, tmp_path: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(BadInput, match="mhc-tune inspect --json"):
        update_shipped([file], tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
