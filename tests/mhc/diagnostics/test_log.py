"""Logs: JSON lines and TensorBoard curves hold every measure of every layer."""

import json
import math

from watched import forward, stack

from mhc.diagnostics import JsonLines, Log, TensorBoard


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
