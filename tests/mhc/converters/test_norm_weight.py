"""The norm's weight, folded into phi."""

import pytest
import torch
from torch import nn

import mhc
from mhc.converters import fold_norm_weight, unfold_norm_weight

N, WIDTH = 4, 16


def test_a_folded_weight_gives_the_maps_of_a_norm_with_one():
    torch.manual_seed(0)
    block = mhc.HyperConnection(WIDTH, N, nn.Identity())
    nn.init.normal_(block.phi)
    nn.init.ones_(block.alpha)
    phi, gamma = block.phi.detach().clone(), 1 + 0.5 * torch.randn(N * WIDTH)
    x = torch.randn(5, N, WIDTH)
    flat = x.flatten(-2).double()
    normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + block.eps) * gamma.double()
    h = normed @ phi.double().T + block.bias.detach().double()
    with torch.no_grad():
        block.phi.copy_(fold_norm_weight(phi, gamma))
    pre, post, _ = block.maps(x)
    assert (pre - h[:, :N].sigmoid()).abs().max() < 1e-5
    assert (post - 2 * h[:, N : 2 * N].sigmoid()).abs().max() < 1e-5
    assert torch.allclose(unfold_norm_weight(block.phi.detach(), gamma), phi, rtol=1e-6, atol=0)


def test_bad_input_is_one_line():
    phi, gamma = torch.randn(24, 64), torch.ones(64)
    gamma[3] = 0
    fold_norm_weight(phi, gamma)
    with pytest.raises(mhc.BadInput, match="gamma must have no zeros to be unfolded, got 1 of 64: keep phi folded"):
        unfold_norm_weight(phi, gamma)
    for function in (fold_norm_weight, unfold_norm_weight):
        for wrong in ((phi, gamma[1:]), (phi[0], gamma), (phi, gamma[None])):
            with pytest.raises(mhc.BadInput, match=r"phi must be \[N, K\] and gamma \[K\], got"):
                function(*wrong)
