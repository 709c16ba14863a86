"""Plots of measures and maps."""

import pytest
import torch
from watched import forward, stack

from mhc.diagnostics import Watch, plot_gains, plot_mappings
from mhc.diagnostics.plot import draw_mapping, short

SIGNED = torch.tensor([[1.0, -3.0], [0.5, 0.25]], dtype=torch.float64)
"""Rows sum to −2 and 0.75, columns to 1.5 and −2.75: absolute entries would give other gains."""


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
