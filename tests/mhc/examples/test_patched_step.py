"""The measurement of patched models: contenders are what they are called, and losses are those of one network."""

import json

import pytest
import torch
from torch import nn

from mhc.examples import patched_step
from mhc.examples.patched_step import CONTENDERS, Shape

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and its libraries' own
SMALL = Shape(layers=2, width=64, batch=1, context=32)


@pytest.fixture(scope="module", autouse=True)
def _needs_transformers():
    pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")


def eager():
    return {name: make for name, make in CONTENDERS.items() if not name.endswith("compile")}


def test_a_measurement(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(patched_step, "CONTENDERS", eager())
    monkeypatch.setattr(patched_step, "MEASURED", SMALL)
    out = tmp_path / "steps.json"
    assert patched_step.main(["--steps", "2", "--kernels", "none", "--json", str(out)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(eager())
    record = json.loads(out.read_text())
    assert {(row["op"], row["width"]) for row in record["kernels"]} >= {("pre", 64), ("step", 64), ("merge", 64)}
    results = record["results"]
    assert results.keys() == eager().keys()
    for result in results.values():
        assert len(result["every_step_ms"]) == 2
        assert 0 < result["forward_ms"] < result["step_ms"]
    assert results["plain"]["hyper_connections_ms"] == 0
    kept = {name: result["kept_bytes"] for name, result in results.items()}
    assert kept["plain"] < kept["patched-step"] < kept["patched-merge"] < kept["unpatched"]


def test_patched_contenders_compute_what_the_unpatched_one_does():
    torch.manual_seed(0)
    ids = next(patched_step.tokens(SMALL, seed=0))
    models = {name: make(patched_step.deepseek_v4(SMALL, seed=0)) for name, make in eager().items()}
    losses = {name: model(input_ids=ids, labels=ids).loss.item() for name, model in models.items()}
    assert losses["patched-step"] == pytest.approx(losses["unpatched"], rel=1e-6)
    assert losses["patched-merge"] == pytest.approx(losses["unpatched"], rel=1e-6)
    assert losses["plain"] != pytest.approx(losses["unpatched"], rel=1e-6)


def test_training(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(patched_step, "TRAINED", SMALL)
    out = tmp_path / "losses.json"
    assert patched_step.main(["--train", "--steps", "8", "--kernels", "none", "--json", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert runs["patched"]["losses"] == pytest.approx(runs["unpatched"]["losses"], rel=1e-4)
    assert runs["patched"]["losses"][-1] < runs["patched"]["losses"][0]
    assert patched_step.main(["--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_contenders(monkeypatch):
    """Without torch's own code generation, which takes minutes."""
    compile_model = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_model(self, backend="eager"))
    results = patched_step.measure(SMALL, rounds=1)["results"]
    assert results.keys() == CONTENDERS.keys()
    assert results["plain-compile"]["hyper_connections_ms"] == 0
