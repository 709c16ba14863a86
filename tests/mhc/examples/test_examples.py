"""The training example, small."""

import json
from dataclasses import replace

import pytest
import torch

import mhc
from mhc.examples import compare_residuals, plot_loss, train_bytes
from mhc.examples.model import ByteTransformer, Size
from mhc.examples.train_bytes import Outcome, Run, Step, train

TINY = Size(blocks=2, width=16, heads=2, context=32)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text():
    return train_bytes.standard_library()


def test_text_is_the_standard_library_and_splits_apart(text):
    training, held_out = train_bytes.split(text)
    assert len(text) > 1_000_000
    assert b"import " in bytes(text[:100_000].tolist())
    assert torch.equal(torch.cat((training, held_out)), text)


def losses(outcome):
    return [step.loss for step in outcome.steps]


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
def test_the_loss_falls(on_compiled, residual, text):
    outcome = train(Run(residual, steps=60, batch=4, size=TINY), text)
    assert len(outcome.steps) == 60
    assert losses(outcome)[-1] < losses(outcome)[0] - 0.4
    assert outcome.validation_loss < losses(outcome)[0] - 0.4
    assert all(step.gradient_norm > 0 and step.ms > 0 for step in outcome.steps)
    assert outcome.report == on_compiled.report()


def test_a_seed_repeats_and_compiled_kernels_follow_the_reference(compiled, text):
    run = Run("mhc", steps=5, batch=4, size=TINY)
    expected = losses(train(run, text))
    assert losses(train(run, text)) == expected
    with mhc.using(compiled):
        found = losses(train(run, text))
    assert found == pytest.approx(expected, abs=1e-3)


def test_gradient_norm_is_that_before_clipping(text):
    run, models = Run("plain", steps=1, batch=4, size=TINY), []
    for _ in range(2):
        models.append(train_bytes.build(run))
        models[-1].head.weight.data.mul_(10)
    (step,) = train_bytes.training(models[0], run, text)
    window = next(train_bytes.batches(train_bytes.split(text)[0], run, run.seed))
    train_bytes.loss_of(models[1], window).backward()
    expected = torch.stack([parameter.grad.square().sum() for parameter in models[1].parameters()]).sum().sqrt()
    assert expected > 1
    assert step.gradient_norm == pytest.approx(expected.item(), rel=1e-5)


def test_median_leaves_out_the_step_that_loads_the_kernels():
    assert Outcome([Step(1, 1, 900), Step(1, 1, 3), Step(1, 1, 5), Step(1, 1, 4)], 1, None).median_ms() == 4
    assert Outcome([Step(1, 1, 900)], 1, None).median_ms() == 900


def test_plain_is_the_usual_pre_norm_network():
    model = ByteTransformer(TINY, "plain")
    text = torch.randint(256, (2, 32))
    h = model.embed(text) + model.position.weight
    for layer in model.layers.blocks:
        h = h + layer.sublayer(h)
    torch.testing.assert_close(model(text), model.head(model.norm(h)))


def test_no_byte_sees_the_future():
    model, text = ByteTransformer(TINY, "mhc"), torch.randint(256, (1, 32))
    changed = text.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    differs = (model(text) != model(changed)).any(-1)[0]
    assert differs.nonzero().min() == 20


def test_command_writes_losses_and_prints_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_bytes, "train", lambda run, text: train(replace(run, batch=2, size=TINY), text))
    out = tmp_path / "run.json"
    assert train_bytes.main(["--kernels", "none", "--residual", "mhc", "--steps", "3", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "step     3 of 3" in said
    assert "asked for" in said
    assert "tokens/s" in said.splitlines()[-1]
    written = json.loads(out.read_text())
    assert len(written["losses"]) == 3
    assert written["run"]["residual"] == "mhc"
    assert {row["runs"] for row in written["kernels"]} == {"reference"}
    plot_loss.main(str(tmp_path / "loss.png"), str(out))
    assert (tmp_path / "loss.png").stat().st_size > 1000


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


@pytest.mark.parametrize("bad", [["--kernels", "missing.mhcpack"], ["--steps", "0"]])
def test_bad_input_is_one_line_and_exit_code_2(bad, capsys):
    assert train_bytes.main(bad) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert bad[1] in captured.err
