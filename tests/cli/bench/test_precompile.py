"""Compiling side by side: the process that times finds what other processes compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.bench.cases import make_case
from cli.bench.fastest_torch import FastestTorch
from cli.bench.precompile import Precompilers
from tiles.kernels.spec import Problem

SHAPE = (2, 8, 4)

CHILD = """
import json, torch
from torch._dynamo.utils import counters
from cli.bench.cases import make_case
from cli.bench.fastest_torch import FastestTorch
from cli.bench.precompile import Precompilers
with Precompilers() as precompilers:
    fastest, case = FastestTorch(2, 8, "float32", precompilers), make_case("merge", 2, 8, 4, "float32", 0)
    found = list(fastest.implementations("compile", case, ("forward", "both"), skipped := []))
directions = sorted({way for made in found for way in made.directions})
print(json.dumps({"skipped": skipped, "directions": directions, **counters["inductor"]}))
"""


@pytest.mark.slow
def test_what_other_processes_compiled_is_not_compiled_again(tmp_path: Path) -> None:
    """In a process of its own: pytest changes what torch's keys are made of."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("fxgraph_cache_hit") == 6, "two forms: with and without a gradient, and its backward"
    assert found == {"skipped": [], "directions": ["both", "forward"]}


def test_a_form_that_fails_there_is_left_to_the_process_that_times() -> None:
    with Precompilers() as precompilers:
        precompilers.compile(Problem("merge", "forward", *SHAPE[:2], "float32", SHAPE[2]), ["no form"], ("both",), 60)


def test_a_single_form_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        pytest.fail("nothing is compiled beside it")

    monkeypatch.setattr(Precompilers, "compile", never)
    monkeypatch.setattr("cli.bench.fastest_torch._compiled", lambda impl, function: function)
    with Precompilers() as precompilers:
        fastest = FastestTorch(*SHAPE[:2], "float32", precompilers)
        case = make_case("aggregate", *SHAPE, "float32", 0)
        assert len(list(fastest.implementations("compile", case, ("both",), []))) == 1
