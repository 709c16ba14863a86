"""res[i, j] weighs input stream j in output stream i. Each test fails where res is transposed anywhere."""

import pytest
import torch

from mhc import functional

WIDTH = 16


def test_merge_reads_stream_j_for_column_j(kernels):
    x = torch.stack([torch.full((1, WIDTH), 10.0**i) for i in range(4)], dim=1)
    res = torch.zeros(1, 4, 4)
    res[0, 0, 3] = res[0, 1, 0] = res[0, 2, 2] = res[0, 3, 2] = 1.0
    out = functional.merge(x, torch.zeros(1, WIDTH), res, torch.zeros(1, 4))
    assert out[0, :, 0].tolist() == [1000.0, 1.0, 100.0, 100.0]


def test_gradient_of_stream_j_comes_from_column_j(kernels):
    x = torch.zeros(1, 4, WIDTH, requires_grad=True)
    res = torch.zeros(1, 4, 4)
    res[0, 0, 3] = 5.0
    g = torch.zeros(1, 4, WIDTH)
    g[0, 0] = 1.0
    functional.merge(x, torch.zeros(1, WIDTH), res, torch.zeros(1, 4)).backward(g)
    assert x.grad[0, :, 0].tolist() == [0.0, 0.0, 0.0, 5.0]


def test_gradient_of_res_is_row_of_result_times_column_of_input(kernels):
    x, g = torch.zeros(1, 4, WIDTH), torch.zeros(1, 4, WIDTH)
    x[0, 3], g[0, 1] = 2.0, 3.0
    res = torch.zeros(1, 4, 4, requires_grad=True)
    functional.merge(x, torch.zeros(1, WIDTH), res, torch.zeros(1, 4)).backward(g)
    expected = torch.zeros(4, 4)
    expected[1, 3] = 6.0 * WIDTH
    assert torch.equal(res.grad[0], expected)


def test_bias_packs_res_by_rows(kernels):
    bias = torch.zeros(24)
    bias[8 + 4 * 0 + 3] = bias[8 + 4 * 1 + 0] = bias[8 + 4 * 2 + 1] = bias[8 + 4 * 3 + 2] = 20.0
    given = torch.zeros(1, 24), torch.ones(1), torch.zeros(3), bias
    res = functional.coefficients(*given, streams=4, width=WIDTH)[2][0]
    assert res.argmax(dim=1).tolist() == [3, 0, 1, 2]
    assert res.argmax(dim=0).tolist() == [1, 2, 3, 0]


def test_alpha_gates_pre_post_res_in_this_order(kernels):
    z, s, bias = torch.ones(1, 24), torch.full((1,), 4.0 * WIDTH), torch.zeros(24)
    z[0, 8] = 9.0  # uneven, as equal logits give equal weights at any gate
    for gate, moved in enumerate(("pre", "post", "res")):
        alpha = torch.zeros(3)
        alpha[gate] = 1.0
        found = functional.coefficients(z, s, alpha, bias, streams=4, width=WIDTH)
        still = (torch.full((1, 4), 0.5), torch.ones(1, 4), torch.full((1, 4, 4), 0.25))
        differs = [not torch.allclose(a, b) for a, b in zip(found, still, strict=True)]
        assert differs == [name == moved for name in ("pre", "post", "res")]


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_rows_are_divided_last(n):
    """After one round rows sum to one exactly, columns not yet."""
    res = functional.sinkhorn(torch.randn(3, n, n, generator=torch.Generator().manual_seed(0)), rounds=1)
    assert torch.allclose(res.sum(-1), torch.ones(3, n), atol=1e-6)
    assert (res.sum(-2) - 1).abs().max() > 1e-3
