"""Expansion to streams, their reduction, and the learned head."""

import torch

import mhc

WIDTH = 16


def test_streams_begin_as_copies():
    h = torch.randn(2, 3, WIDTH)
    x = mhc.expand_streams(h, 4)
    assert x.shape == (2, 3, 4, WIDTH)
    assert x.is_contiguous()
    assert all(torch.equal(x[..., i, :], h) for i in range(4))


def test_reductions():
    x = torch.randn(2, 3, 4, WIDTH)
    torch.testing.assert_close(mhc.reduce_streams(x), x.sum(-2) / 4)
    torch.testing.assert_close(mhc.reduce_streams(x, "sum"), x.sum(-2))
    assert mhc.reduce_streams(x.bfloat16()).dtype == torch.bfloat16


def test_head_starts_close_to_the_mean():
    x = torch.randn(2, 3, 4, WIDTH)
    for n in (1, 2, 4):
        head = mhc.StreamHead(WIDTH, n)
        torch.testing.assert_close(head(x[..., :n, :]), mhc.reduce_streams(x[..., :n, :]), rtol=0, atol=0.1)
        head.alpha.data.zero_()
        torch.testing.assert_close(head(x[..., :n, :]), mhc.reduce_streams(x[..., :n, :]))


def test_head_follows_its_formula_and_learns():
    head, x = mhc.StreamHead(WIDTH, 3), torch.randn(5, 3, WIDTH)
    head.alpha.data.fill_(2.0)
    flat = x.flatten(1)
    logits = 2 * (flat @ head.phi.T) / (flat.square().mean(1, keepdim=True) + 1e-6).sqrt() + head.bias
    torch.testing.assert_close(head(x), (logits.sigmoid()[..., None] * x).sum(1))
    head(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in head.parameters())


def test_head_keeps_the_streams_dtype():
    head, x = mhc.StreamHead(WIDTH, 4), torch.randn(5, 4, WIDTH, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
    expected = head(x.float())
    torch.testing.assert_close(head(x).float(), expected, rtol=0.01, atol=0.01)
