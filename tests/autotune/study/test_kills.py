"""Runs killed with SIGKILL at random moments and resumed: nothing is lost, and the result is the same."""

import json
import subprocess
import sys
from pathlib import Path

import toy

RUNS = 100


def test_runs_that_are_killed_at_random_moments_lose_nothing_and_end_alike(tmp_path):
    script = Path(__file__).parents[1] / "killing.py"
    command = [sys.executable, str(script), str(tmp_path), str(RUNS), "0"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
    seen = json.loads(done.stdout)
    assert seen["problems"] == [], done.stderr
    assert sum(seen["killed"].values()) == RUNS
    assert min(seen["killed"].values()) > 0, "a phase in which nothing was killed"
    record, trials = seen["undisturbed"]
    assert record[0] == {"block": toy.BEST.block, "unroll": toy.BEST.unroll, "packed": toy.BEST.packed}
    assert len(trials) == 16
    assert len(seen["outcomes"]) > 5
    assert all(outcome == seen["undisturbed"] for outcome in seen["outcomes"])
