"""The schedules that the wheel carries: valid for today's kernels, and measured."""

import json
import subprocess
import sys

import pytest

from tiles.cache import shipped
from tiles.cache.record import Key
from tiles.cache.shipped import shipped_records
from tiles.kernels.registry import kernel_spec


def test_every_schedule_is_valid_for_its_problem_and_device_today():
    assert shipped_records()
    for record in shipped_records():
        problem = record.key.problem
        spec = kernel_spec(problem.op, problem.direction)
        schedule = spec.schedule_from(record.schedule)
        assert spec.why_invalid(problem, schedule, record.key.device.target) is None, record


def test_keys_are_todays_and_differ():
    keys = [record.key for record in shipped_records()]
    assert all(key.current and key == Key.of(key.problem, key.device) for key in keys)
    assert len(set(keys)) == len(keys)


def test_every_schedule_was_measured_no_slower_than_the_default():
    for record in shipped_records():
        measured = record.measurement
        assert measured["tuned_ms"] > 0
        assert measured["ratio"] >= 1
        assert set(record.provenance) == {"date", "file", "commit"}
        assert record.provenance["date"].startswith("20")


def test_the_file_says_each_schedule_once_and_in_order():
    values = json.loads(shipped.FILE.read_text(encoding="utf-8"))
    problems = [[entry[name] for name in ("source", *shipped.PROBLEM)] for entry in values["schedules"]]
    assert problems == sorted(problems)
    assert len(shipped.FILE.read_text(encoding="utf-8").splitlines()) > len(problems)


def test_importing_the_module_reads_nothing():
    code = (
        "import sys; from tiles.cache import shipped; "
        "print(shipped.shipped_records.cache_info().currsize, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


def test_a_file_of_another_format_is_not_read(monkeypatch, tmp_path):
    file = tmp_path / "shipped.json"
    file.write_text(json.dumps({"format": 2, "sources": [], "schedules": []}))
    monkeypatch.setattr(shipped, "FILE", file)
    with pytest.raises(AssertionError):
        shipped_records.__wrapped__()
