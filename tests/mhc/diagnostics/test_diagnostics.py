"""Looking at the residual maps of a model: watching, NaN, logs, plots. The measures themselves: test_gains."""

import copy
import json
import math

import pytest
import torch

import mhc
from mhc import diagnostics
from mhc.diagnostics import (
    JsonLines,
    Log,
    TensorBoard,
    Watch,
    check_finite,
    composites,
    entropy,
    forward_gain,
    measure,
    plot_gains,
    plot_mappings,
    spectral_norm,
)
from mhc.diagnostics.plot import draw_mapping, short
from tiles.errors import BadInput

SIGNED = torch.tensor([[1.0, -3.0], [0.5, 0.25]], dtype=torch.float64)
"""Rows sum to −2 and 0.75, columns to 1.5 and −2.75: absolute entries would give other gains."""


def stack(mode="mhc", blocks=3, streams=4, width=16):
    torch.manual_seed(0)
    layers = [mhc.HyperConnection(width, streams, torch.nn.Linear(width, width), mode=mode) for _ in range(blocks)]
    return mhc.HyperConnectionStack(layers)


def forward(model, tokens=(2, 5), streams=4, width=16):
    return model(torch.randn(*tokens, streams, width, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: forward_gain(torch.zeros(2, 3)), "(2, 3)"),
        (lambda: entropy(torch.zeros(3)), "(3,)"),
        (lambda: spectral_norm(torch.zeros(2, 2, dtype=torch.int64)), "int64"),
        (lambda: composites([torch.zeros(4, 2, 2), torch.zeros(5, 2, 2)]), "(4, 2, 2), (5, 2, 2)"),
        (lambda: measure({}), "got none"),
        (lambda: Watch(torch.nn.Linear(2, 2)), "got Linear"),
        (lambda: check_finite(torch.nn.Identity()), "got Identity"),
        (lambda: Watch(stack()).measure(), "got none"),
    ],
)
def test_bad_input_is_one_line(call, says):
    with pytest.raises(BadInput) as raised:
        call()
    assert says in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


# Watching


@pytest.mark.parametrize("mode", ["mhc", "hc"])
def test_watch_sees_every_block_of_a_stack_as_alone(kernels, mode):
    model = stack(mode)
    with Watch(model) as watch:
        forward(model)
        in_stack = watch.layers()
        x = torch.randn(2, 5, 4, 16, generator=torch.Generator().manual_seed(1))
        for block in model.blocks:
            x = block(x)
        alone = watch.layers()
    assert list(in_stack) == list(alone) == ["blocks.0", "blocks.1", "blocks.2"]
    for name, res in in_stack.items():
        assert res.shape == (2, 5, 4, 4)
        assert not res.requires_grad
        torch.testing.assert_close(res, alone[name], rtol=1e-4, atol=1e-5)  # the joined pass sums in another order


def test_watch_ends_and_changes_nothing():
    model = stack()
    expected = forward(model)
    with Watch(model) as first, Watch(model) as second:
        assert torch.equal(forward(model), expected)
    assert all(not block.watchers for block in model.blocks)
    before = first.layers()["blocks.0"].clone()
    model.blocks[0].bias.data.add_(torch.randn(24))
    forward(model)
    assert torch.equal(first.layers()["blocks.0"], before)
    assert torch.equal(second.layers()["blocks.0"], before)
    second.close()
    assert list(model.state_dict()) == list(stack().state_dict())


def test_a_watched_model_can_be_copied_and_trained():
    model = stack()
    watch = Watch(model)
    twin = copy.deepcopy(model)
    forward(model).square().mean().backward()
    assert model.blocks[0].phi.grad.isfinite().all()
    assert len(watch.layers()) == 3
    del watch
    forward(twin)


def test_a_compiled_model_is_watched_too():
    model = stack("hc", blocks=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with Watch(model) as watch:
        forward(compiled)
        before = watch.measure()
        model.blocks[0].bias.data[8] += 1  # res[0, 0]
        forward(compiled)
        after = watch.measure()
    assert after.forward[0] == pytest.approx(
        before.forward[0] + 1, abs=0.1
    )  # the largest row was another by at most 0.1
    assert after.forward[1] == pytest.approx(before.forward[1], abs=0.1)


def test_residual_blocks_have_no_map_and_mixed_stacks_do():
    blocks = [mhc.HyperConnection(16, 4, torch.nn.Identity(), mode=mode) for mode in ("residual", "mhc", "hc")]
    with Watch(model := mhc.HyperConnectionStack(blocks)) as watch:
        forward(model)
        assert list(watch.layers()) == ["blocks.1", "blocks.2"]


def test_a_block_by_itself_and_one_token():
    block = mhc.HyperConnection(16, 4, torch.nn.Identity())
    with Watch(block) as watch:
        block(torch.randn(4, 16))
        found = watch.measure()
    assert found.names == ["model"]
    assert found.forward == pytest.approx([1.0], abs=1e-6)


def test_mhc_gains_are_one_and_hc_gains_are_what_its_maps_say():
    with Watch(model := stack("mhc", blocks=60)) as watch:
        forward(model)
        constrained = watch.measure()
    assert max(constrained.composite_forward) == pytest.approx(1, abs=1e-5)  # rows are divided last
    assert max(constrained.composite_backward) < 1.05  # columns as 20 rounds leave them
    with Watch(model := stack("hc", blocks=60)) as watch:
        for block in model.blocks:
            block.bias.data[8:].add_(0.1 * torch.eye(4).flatten())
        forward(model)
        free = watch.measure()
    assert free.composite_forward[0] > 1.1**60 / 3 > 100


# NaN


@pytest.mark.parametrize("mode", ["mhc", "hc"])
@pytest.mark.parametrize(("parameter", "values"), [("phi", 24 * 64), ("alpha", 3), ("bias", 24)])
def test_check_finite_names_the_block_whose_logits_are_nan(kernels, mode, parameter, values):
    """Compiled kernels for a CPU make finite maps of them, which is why parameters are looked at."""
    model = torch.nn.ModuleDict({"decoder": stack(mode)})
    done = check_finite(model)
    forward(model["decoder"])
    getattr(model["decoder"].blocks[1], parameter).data.view(-1)[-1] = math.nan
    with pytest.raises(BadInput, match=rf"{parameter} of block decoder\.blocks\.1 .*1 of {values} values") as raised:
        forward(model["decoder"])
    assert len(str(raised.value).splitlines()) == 1
    done()
    forward(model["decoder"])
    assert all(not block.watchers for block in model["decoder"].blocks)


@pytest.mark.parametrize("mode", ["mhc", "hc", "residual"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_check_finite_finds_bad_streams_and_a_bad_sublayer(kernels, mode, bad):
    model = stack(mode)
    check_finite(model)
    x = torch.randn(3, 4, 16)
    model.blocks[2].sublayer.bias.data[3] = bad
    with pytest.raises(BadInput, match=r"f of block blocks\.2 .* 3 of 48 values: look at its sublayer, Linear"):
        model(x)
    x[2, 0, 0] = bad
    with pytest.raises(BadInput, match=r"(res|u) of block blocks\.0 .*streams that enter"):
        model(x)


class Pair(torch.nn.Module):
    """A sublayer that gives a second output."""

    def forward(self, u):
        return u, u.sum()


def test_check_finite_takes_sublayers_of_several_outputs():
    block = mhc.HyperConnection(16, 4, Pair())
    check_finite(block)
    found, total = block(torch.randn(3, 4, 16))
    assert found.isfinite().all()
    assert total.isfinite()


# Logs


def test_json_lines_hold_every_measure_of_every_layer(tmp_path):
    path, model = tmp_path / "gains.jsonl", stack()
    log = Log(model, JsonLines(path))
    for step in (0, 10):
        loss = forward(model).mean()
        log(step, loss=loss.item(), bad=math.inf)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 10]
    assert lines[1]["loss"] == loss.item()
    assert lines[1]["bad"] is None
    assert lines[1]["names"] == ["blocks.0", "blocks.1", "blocks.2"]
    for name, values in log.watch.measure().series().items():
        assert lines[1][name] == values
    assert set(lines[0]) == {"step", "loss", "bad", "names"} | {
        "forward",
        "backward",
        "composite_forward",
        "composite_backward",
        "column_error",
        "spectral_norm",
        "entropy",
    }


class Curves:
    """Has `add_scalar`, as torch.utils.tensorboard.SummaryWriter."""

    def __init__(self):
        self.points = {}

    def add_scalar(self, tag, scalar_value, global_step):
        self.points[tag, global_step] = scalar_value


def test_tensorboard_gets_every_curve():
    curves, model = Curves(), stack("hc", blocks=2)
    log = Log(model, TensorBoard(curves))
    forward(model)
    log(7, loss=2.5)
    found = log.watch.measure()
    assert curves.points["loss", 7] == 2.5
    assert curves.points["mhc/backward/blocks.1", 7] == found.backward[1]
    assert curves.points["mhc_worst/composite_forward", 7] == max(found.composite_forward)
    assert len(curves.points) == 1 + 7 * (2 + 1)


# Plots


@pytest.mark.parametrize("streams", [1, 4, 16])
def test_plots_are_written(tmp_path, streams):
    with Watch(model := stack("hc", streams=streams)) as watch:
        forward(model, streams=streams)
        found = watch.measure()
    for plot in (plot_gains, plot_mappings):
        plot(found, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
        (tmp_path / "plot.png").unlink()


def test_plotted_maps_carry_row_and_column_sums():
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    draw_mapping(panel, "signed", SIGNED)
    assert [label.get_text() for label in panel.get_yticklabels()] == ["-2.00", "0.75"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1.50", "-2.75"]
    assert [text.get_text() for text in panel.texts] == ["1.00", "-3.00", "0.50", "0.25"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (-2.004, "-2.00"),
        (9.996, "10.0"),
        (99.96, "100"),
        (-184.3, "-184"),
        (999.7, "1e3"),
        (2.02e6, "2e6"),
    ],
)
def test_numbers_in_a_plot_stay_short(value, text):
    assert short(value) == text


def test_the_package_offers_them():
    assert mhc.diagnostics is diagnostics
