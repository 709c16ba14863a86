"""Runs killed with SIGKILL at random moments and resumed: nothing is lost, and the result is the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import toy


@pytest.mark.parametrize("kills", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_runs_that_are_killed_at_random_moments_lose_nothing_and_end_alike(tmp_path, kills):
    script = Path(__file__).parents[1] / "killing.py"
    command = [sys.executable, str(script), str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
    seen = json.loads(done.stdout)
    assert seen["problems"] == [], done.stderr
    assert sum(seen["killed"].values()) == kills
    assert sum(count > 0 for count in seen["killed"].values()) >= (5 if kills == 100 else 3), seen["killed"]
    record, trials = seen["undisturbed"]
    assert record[0] == {"block": toy.BEST.block, "unroll": toy.BEST.unroll, "packed": toy.BEST.packed}
    assert len(trials) == 16
    assert len(seen["outcomes"]) > (5 if kills == 100 else 0)
    assert all(outcome == seen["undisturbed"] for outcome in seen["outcomes"])
