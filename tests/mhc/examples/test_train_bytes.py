"""The byte-level transformer and its training, small."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import TINY, losses

import mhc
from mhc.examples import plot_loss, train_bytes
from mhc.examples.model import ByteTransformer
from mhc.examples.train_bytes import Outcome, Run, Step, train


def test_text_is_the_standard_library_and_splits_apart(text):
    training, held_out = train_bytes.split(text)
    assert len(text) > 1_000_000
    assert b"import " in bytes(text[:100_000].tolist())
    assert torch.equal(torch.cat((training, held_out)), text)


@pytest.mark.parametrize(
    "residual", ["plain", "hc", "mhc", pytest.param("single-pass", marks=pytest.mark.slow)]
)  # compiling takes seconds
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


@pytest.mark.parametrize("bad", [["--kernels", "missing.mhcpack"], ["--steps", "0"]])
def test_bad_input_is_one_line_and_exit_code_2(bad, capsys):
    assert train_bytes.main(bad) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert bad[1] in captured.err
