"""Measures of residual maps, against closed forms."""

import math

import pytest
import torch

import mhc
from mhc.diagnostics import (
    Watch,
    backward_gain,
    column_error,
    composites,
    entropy,
    forward_gain,
    measure,
    spectral_norm,
)

SIGNED = torch.tensor([[1.0, -3.0], [0.5, 0.25]], dtype=torch.float64)
"""Rows sum to −2 and 0.75, columns to 1.5 and −2.75: absolute entries would give other gains."""


def test_gains_are_of_signed_sums():
    assert forward_gain(SIGNED) == 2.0
    assert backward_gain(SIGNED) == 2.75
    assert column_error(SIGNED) == 3.75  # |−2.75 − 1|


def test_gains_are_of_the_right_side():
    """Rows are what a signal of equal streams meets, columns what a gradient meets."""
    res = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    assert forward_gain(res) == (res @ torch.ones(2)).abs().max() == 3.0
    assert backward_gain(res) == (res.T @ torch.ones(2)).abs().max() == 2.0


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
def test_measures_of_permutation_mean_and_doubled_identity(n):
    eye = torch.eye(n)
    for res, gain, error, largest, spread in (
        (eye.roll(1, 0), 1.0, 0.0, 1.0, 0.0),
        (torch.full((n, n), 1 / n), 1.0, 0.0, 1.0, math.log(n)),
        (2 * eye, 2.0, 1.0, 2.0, 0.0),
    ):
        assert forward_gain(res).item() == pytest.approx(gain)
        assert backward_gain(res).item() == pytest.approx(gain)
        assert column_error(res).item() == pytest.approx(error, abs=1e-6)
        assert spectral_norm(res).item() == pytest.approx(largest)
        assert entropy(res).item() == pytest.approx(spread, abs=1e-6)


def test_spectral_norm_of_a_rotation_and_a_shear():
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    shear = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    golden = (1 + math.sqrt(5)) / 2
    torch.testing.assert_close(spectral_norm(torch.stack((rotation, shear))), torch.tensor([1.0, golden]).double())


def test_entropy_weighs_rows_alike_whatever_their_sums():
    res = torch.tensor([[10.0, -10.0], [0.0, 3.0]])
    assert entropy(res).item() == pytest.approx(math.log(2) / 2)


def test_measures_keep_leading_dimensions_and_dtype():
    res = torch.randn(2, 3, 5, 4, 4)[:, :, ::2]
    for of in (forward_gain, backward_gain, column_error, spectral_norm, entropy):
        found = of(res)
        assert found.shape == (2, 3, 3)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[1, 2, 1], of(res[1, 2, 1].clone()))


def test_composites_are_the_products_from_each_layer_to_the_last():
    maps = list(torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(3)))
    for first, product in enumerate(composites(maps)):
        expected = torch.eye(3, dtype=torch.float64).expand(7, 3, 3)
        for res in maps[first:]:
            expected = res.double() @ expected
        assert product.dtype == torch.float64
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


def test_composite_is_what_the_streams_meet():
    """Blocks whose sublayers give nothing: the streams at the end are the composite map of those at the start."""
    torch.manual_seed(0)
    blocks = [mhc.HyperConnection(16, 4, torch.nn.Linear(16, 16), mode="hc") for _ in range(3)]
    for block in blocks:
        torch.nn.init.zeros_(block.sublayer.weight)
        torch.nn.init.zeros_(block.sublayer.bias)
        torch.nn.init.normal_(block.alpha)
    x = torch.randn(2, 5, 4, 16)
    with Watch(model := mhc.HyperConnectionStack(blocks)) as watch:
        end = model(x)
    whole = composites(list(watch.layers().values()))[0]
    torch.testing.assert_close(end.double(), whole @ x.double(), rtol=1e-5, atol=1e-5)  # float32 sums of four


def test_measures_are_means_over_tokens_of_each_tokens_own():
    """Two tokens whose maps would cancel in the mean map: gains are of each, mappings of the mean."""
    res = torch.stack((torch.eye(2), -torch.eye(2)))
    found = measure({"only": res})
    assert found.names == ["only"]
    assert found.forward == found.backward == found.composite_forward == found.composite_backward == [1.0]
    assert found.column_error == [1.0]  # 0 and 2
    assert found.spectral_norm == [1.0]
    assert found.entropy == [0.0]
    assert found.mappings.tolist() == found.composites.tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


def test_measure_of_growing_layers():
    found = measure({"a": 2 * torch.eye(3).expand(4, 3, 3), "b": 3 * torch.eye(3).expand(4, 3, 3)})
    assert found.forward == found.spectral_norm == [2.0, 3.0]
    assert found.composite_forward == found.composite_backward == [6.0, 3.0]
    torch.testing.assert_close(found.composites[0], 6 * torch.eye(3, dtype=torch.float64))


def test_what_is_not_finite_is_nan_not_an_error():
    res = torch.eye(2).repeat(3, 1, 1)
    res[1, 0, 0] = math.nan
    assert spectral_norm(res).isnan().tolist() == [False, True, False]
    assert all(math.isnan(values[0]) for values in measure({"a": res}).series().values())
