"""The stability example, small: its records, its resumption, its plots."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mhc.diagnostics import Watch, backward_gain, composites, forward_gain
from mhc.examples import stability, stability_plot, train_bytes
from mhc.examples.model import Size
from mhc.examples.train_bytes import Run

RECORDED = Path(__file__).parents[3] / "results" / "stability"
TINY = Size(blocks=2, width=16, heads=2, context=16)


def tiny(residual="mhc", **changes):
    return replace(Run(residual, steps=3, batch=2, size=TINY), **changes)


@pytest.fixture
def plan(monkeypatch):
    runs = [tiny(residual, seed=seed) for seed in (0, 1) for residual in ("plain", "hc", "mhc")]
    monkeypatch.setattr(stability, "plan", lambda: runs)
    return runs


def test_the_plan_is_every_residual_with_the_same_seeds_and_rates():
    runs = stability.plan()
    assert len(runs) == 36 == len({str(run) for run in runs})
    for residual in ("plain", "hc", "mhc", "single-pass"):
        chosen = [run for run in runs if run.residual == residual]
        assert [replace(run, residual="plain") for run in chosen] == [run for run in runs if run.residual == "plain"]
    assert {2 * run.size.blocks for run in runs} == {60}
    assert len({run.seed for run in runs}) == 3


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc", "single-pass"])
def test_a_record_holds_every_step_of_an_ordinary_training(residual, text):
    record = stability.record(tiny(residual), text)
    steps = train_bytes.train(tiny(residual), text).steps
    assert record["run"] == asdict(tiny(residual))
    assert record["loss"] == pytest.approx([step.loss for step in steps], rel=1e-5)  # recorded with six digits
    assert record["gradient_norm"] == pytest.approx([step.gradient_norm for step in steps], rel=1e-5)
    assert len(record["composite_forward"]) == len(record["composite_backward"]) == 3
    assert math.isfinite(record["validation_loss"])
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_recorded_gains_are_the_largest_of_the_composites(text):
    torch.manual_seed(0)
    layers = list(torch.randn(4, 7, 3, 3))
    layers[1] *= 5  # the largest is then of a composite that begins past the first layer or at it, not of the last
    products = composites(layers)
    found = stability.worst_gains(layers)
    assert found[0] == pytest.approx(max(forward_gain(product).mean().item() for product in products))
    assert found[1] == pytest.approx(max(backward_gain(product).mean().item() for product in products))
    assert stability.worst_gains([]) == (1.0, 1.0)


def test_gains_are_those_of_the_forward_that_gave_the_loss(text):
    run = tiny("hc", steps=1)
    record = stability.record(run, text)
    window = next(train_bytes.batches(train_bytes.split(text)[0], run, run.seed))
    model = train_bytes.build(run)
    with Watch(model) as watch, torch.no_grad():
        loss = train_bytes.loss_of(model, window)
        found = watch.measure()
    assert record["loss"] == pytest.approx([loss.item()], rel=1e-5)
    assert record["composite_forward"] == pytest.approx([max(found.composite_forward)], rel=1e-5)
    assert record["composite_backward"] == pytest.approx([max(found.composite_backward)], rel=1e-5)
    assert record["layers"]["entropy"] == pytest.approx(found.entropy, rel=1e-5)
    assert record["layers"]["composite"] == pytest.approx(found.composites[0].flatten().tolist(), rel=1e-5)


def test_a_run_that_diverges_is_recorded_up_to_there(text, monkeypatch):
    steps = train_bytes.training

    def diverging(model, run, text):
        for number, step in enumerate(steps(model, run, text)):
            yield step._replace(loss=math.nan) if number == 1 else step

    monkeypatch.setattr(stability, "training", diverging)
    record = stability.record(tiny("hc"), text)
    assert record["loss"][1:] == [None]
    assert len(record["composite_forward"]) == 2
    json.dumps(record, allow_nan=False)


def test_the_command_goes_on_where_it_was(plan, tmp_path, capsys, monkeypatch):
    path, done = tmp_path / "runs.jsonl", []
    record = stability.record

    def interrupted(run, text):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run)
        return record(run, text)

    monkeypatch.setattr(stability, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stability.main([str(path), "--kernels", "none"])
    first = path.read_text()
    assert len(first.splitlines()) == 2
    monkeypatch.setattr(stability, "record", record)
    assert stability.main([str(path), "--kernels", "none"]) == 0
    assert path.read_text().startswith(first)
    assert [line["run"] for line in stability.read(path)] == [asdict(run) for run in plan]
    assert "6 of 6  mhc" in capsys.readouterr().out.splitlines()[-1]
    assert stability.main([str(path), "--kernels", "none"]) == 0
    assert capsys.readouterr().out == ""


def test_bad_kernels_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert stability.main([str(tmp_path / "runs.jsonl"), "--kernels", "missing.mhcpack"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "runs.jsonl").exists()


def made_up(residual, seed, largest, loss=(3.0, 2.0), rate=1e-3):
    """A record with what the table and the plots read."""
    maps = {"composite_forward": [largest, 1.0], "composite_backward": [1.0, 1.0], "composite": [1.0, 0.0, 0.0, 1.0]}
    return {
        "run": {"residual": residual, "seed": seed, "peak_rate": rate, "size": {"streams": 2}},
        "loss": list(loss),
        "gradient_norm": [4.0, 5.0],
        "composite_forward": [1.0, largest],
        "composite_backward": [largest, 1.0],
        "validation_loss": 2.5,
        "layers": None if residual == "plain" else maps,
    }


def test_table_has_median_and_range_of_all_seeds():
    records = [made_up("hc", seed, largest) for seed, largest in ((0, 8.0), (1, 30.0), (2, 4.0))]
    lines = list(stability_plot.table([made_up("plain", 0, 1.0), *records]))
    assert len(lines) == 4
    assert lines[2].startswith("| 0.001 | plain | 1 | 2.5 (2.5 to 2.5) ")
    assert lines[3].startswith("| 0.001 | hc | 3 | ")
    assert lines[3].endswith("| 5 (5 to 5) | 8 (4 to 30) | 8 (4 to 30) |")


def test_table_says_infinite_where_a_run_diverged():
    lines = list(stability_plot.table([made_up("hc", 0, None, loss=(3.0, None))]))
    assert lines[2].count("inf (inf to inf)") == 3


def test_plots_are_drawn_of_what_the_command_wrote(plan, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    stability.main([str(path), "--kernels", "none"])
    capsys.readouterr()
    stability_plot.main(str(path), str(tmp_path / "plots"))
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3
    assert sorted(plot.name for plot in (tmp_path / "plots").iterdir()) == [
        "composites.png",
        "curves-0.001.png",
        "layers.png",
    ]


def test_a_diverged_run_is_drawn_too(tmp_path):
    records = [made_up("mhc", 0, 1.0), made_up("hc", 0, 1e9, loss=(3.0,)), made_up("hc", 1, 9.0, loss=(3.0, None))]
    stability_plot.plot_curves(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not RECORDED.is_dir(), reason="results/ is not part of this installation")
def test_the_recorded_runs_are_all_there_and_bear_out_what_is_said_of_them():
    records = stability.read(RECORDED / "runs.jsonl")
    assert sorted(str(record["run"]) for record in records) == sorted(str(asdict(run)) for run in stability.plan())
    said = (RECORDED / "README.md").read_text(encoding="utf-8")
    assert "\n".join(stability_plot.table(records)) in said
    for record in records:
        if record["run"]["residual"] == "mhc":
            assert max(record["composite_forward"] + record["composite_backward"]) < 2
