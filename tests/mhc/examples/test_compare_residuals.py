"""The comparison of residual connections, small: contenders take turns; what is recorded and plotted."""

import json
from dataclasses import replace

import pytest
from tiny import TINY, losses

import mhc
from mhc.examples import compare_residuals, plot_loss, train_bytes
from mhc.examples.train_bytes import Run, train


def test_contenders_take_turns_and_see_what_they_would_alone(compiled, text):
    run = Run(steps=4, batch=2, size=TINY)
    outcomes = compare_residuals.compare(run, text, compiled)
    assert list(outcomes) == ["plain", "hc", "mhc", "mhc-eager"]
    for name in ("plain", "hc", "mhc"):
        with mhc.using(compiled):
            assert losses(outcomes[name]) == losses(train(replace(run, residual=name), text))
    assert losses(outcomes["mhc-eager"]) == losses(train(replace(run, residual="mhc"), text))
    assert {row.runs for row in outcomes["mhc-eager"].report} == {"reference"}
    assert "reference" not in {row.runs for row in outcomes["mhc"].report}
    assert losses(outcomes["mhc"]) == pytest.approx(losses(outcomes["mhc-eager"]), abs=1e-3)


def test_contenders_step_in_another_order_every_time_each_on_its_kernels(monkeypatch, text):
    turns, given = [], mhc.active()
    take_turns = train_bytes.training

    def training(model, run, text):
        for step in take_turns(model, run, text):
            turns.append((id(model), mhc.active() is given))
            yield step

    monkeypatch.setattr(compare_residuals, "training", training)
    compare_residuals.compare(Run(steps=4, batch=1, size=TINY), text, given)
    rounds = [turns[start : start + 4] for start in range(0, 16, 4)]
    assert [on_given for _, on_given in rounds[0]] == [True, True, True, False]  # the last one is mhc-eager
    assert all(set(order) == set(rounds[0]) for order in rounds)
    assert len({order[0] for order in rounds}) == 4


def test_extra_time_is_a_share_of_the_eager_one():
    assert compare_residuals.extra_time({"plain": 10, "hc": 11, "mhc": 12, "mhc-eager": 18}) == 0.25


def test_comparison_is_written_and_drawn(tmp_path, monkeypatch, capsys):
    whole = compare_residuals.compare
    monkeypatch.setattr(
        compare_residuals,
        "compare",
        lambda run, text, kernels: whole(replace(run, batch=1, size=TINY), text, kernels),
    )
    out = tmp_path / "compare.json"
    assert compare_residuals.main(["--kernels", "none", "--steps", "4", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "| mhc-eager |" in said
    assert "of mhc-eager's" in said.splitlines()[-1]
    written = json.loads(out.read_text())
    assert [run["run"]["residual"] for run in written["runs"].values()] == ["plain", "hc", "mhc", "mhc"]
    assert all(len(run["losses"]) == len(run["step_ms"]) == 4 for run in written["runs"].values())
    assert written["extra_time_of_eager"] == compare_residuals.extra_time(written["median_step_ms"])
    plot_loss.main(str(tmp_path / "compare.png"), str(out))
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_comparison_needs_two_steps(capsys):
    assert compare_residuals.main(["--steps", "1"]) == 2
    assert "got 1" in capsys.readouterr().err


def test_old_records_without_step_times_are_still_drawn(tmp_path):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"losses": [3.0, 2.0]}))
    plot_loss.main(str(tmp_path / "old.png"), str(old))
    assert (tmp_path / "old.png").read_bytes()[:4] == b"\x89PNG"
