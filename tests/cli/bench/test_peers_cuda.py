"""The GPU peers' calls, with stand-ins of their modules that have their signatures, shapes and maths on a CPU."""

from types import SimpleNamespace

import pytest
import torch

from cli.bench import peers, peers_cuda
from cli.bench.cases import TOLERANCE, make_case
from cli.bench.peers import _tile_kernels
from cli.bench.peers_cuda import TileKernels

DIRECTIONS = ("forward", "both")


def stand_in_for_tile_kernels():
    """Its torch reference behind the signatures of its kernels; the layer's pre only where a merge follows."""
    torch_reference = _tile_kernels()
    assert not isinstance(torch_reference, str), torch_reference

    def norm_fn(residual, fn, weight, eps, fuse_grad_acc=True, n_splits=16):
        assert not fuse_grad_acc, "no merge follows whose gradient could be added to"
        return torch_reference.mhc_pre_norm_fn_ref(residual, fn, weight, eps)

    def pre(residual, fn, scale, base, *, norm_eps, post_mult_value, pre_eps, sinkhorn_eps, sinkhorn_repeat):
        assert residual.dim() == 4
        assert residual.dtype == torch.bfloat16
        assert residual.is_contiguous()
        n = residual.shape[-2]
        mixes = torch_reference.mhc_pre_norm_fn_ref(residual, fn, None, norm_eps)
        weights, post, comb = torch_reference.mhc_pre_split_mixes_ref(mixes, scale, base, n, post_mult_value, pre_eps)
        comb = torch_reference.sinkhorn_normalize_ref(comb, repeat=sinkhorn_repeat, eps=sinkhorn_eps)
        return torch_reference.mhc_pre_apply_mix_ref(residual, weights), (post, comb)

    def post(x, residual, post_mix, comb):
        assert x.is_contiguous()
        assert post_mix.is_contiguous()
        assert comb.is_contiguous()
        assert post_mix.shape[-1] == 1
        return torch_reference.mhc_post_ref(x, residual, post_mix, comb)

    def forward_kernel(outputs, groups, columns):
        def run(x, fn, out, sums):
            assert out.shape == (len(x), groups, outputs)
            out.copy_((x.float() @ fn.T)[:, None])
            sums.copy_(x.float().square().sum(1, keepdim=True))

        return run

    def backward_kernel(outputs, groups, columns):
        def run(dz, ds, x, fn, dx, dfn):
            dx += (dz[:, 0] @ fn + 2 * x.float() * ds).bfloat16()
            dfn.copy_(dz[:, 0].T @ x.float())

        return run

    return TileKernels(
        functional=SimpleNamespace(mhc_pre=pre),
        ops=SimpleNamespace(
            mhc_pre_norm_fn=norm_fn,
            mhc_pre_split_mixes=torch_reference.mhc_pre_split_mixes_ref,
            sinkhorn_normalize=torch_reference.sinkhorn_normalize_ref,
            mhc_pre_apply_mix=torch_reference.mhc_pre_apply_mix_ref,
            mhc_post=post,
        ),
        kernels=SimpleNamespace(
            round_to_tf32=lambda tensor: tensor.clone(),
            _mhc_pre_norm_fn_fwd_mul=forward_kernel,
            _mhc_pre_norm_fn_bwd_mul=backward_kernel,
        ),
    )


def stand_in_for_liger():
    """Its maths in torch: phi [K, N], Sinkhorn that begins with the rows."""

    def coefficients(x, phi, b, alpha_pre, alpha_post, alpha_res, *, tmax, rms_eps, sinkhorn_eps):
        assert phi.dtype == x.dtype
        assert phi.is_contiguous()
        n, rows = x.shape[-2], x.flatten(-2).float()
        mix = rows @ phi.float() * torch.rsqrt(rows.square().mean(-1, keepdim=True) + rms_eps)
        pre, post, res = mix.split((n, n, n * n), -1)
        b_pre, b_post, b_res = b.split((n, n, n * n))
        m = (alpha_res * res + b_res).unflatten(-1, (n, n)).softmax(-1)
        m = m / m.sum(-2, keepdim=True)
        for _ in range(tmax - 1):
            m = m / m.sum(-1, keepdim=True)
            m = m / m.sum(-2, keepdim=True)
        return (alpha_pre * pre + b_pre).sigmoid(), 2 * (alpha_post * post + b_post).sigmoid(), m

    def post_res(x, f_out, h_post, h_res):
        mixed = torch.einsum("toi,tic->toc", h_res, x.float())
        return (mixed + h_post[..., None] * f_out.float()[:, None]).to(x.dtype)

    return SimpleNamespace(
        liger_mhc_coeffs=coefficients,
        liger_mhc_pre=lambda x, h_pre: (h_pre[..., None] * x.float()).sum(-2).to(x.dtype),
        liger_mhc_post_res=post_res,
    )


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    tile_kernels, liger = stand_in_for_tile_kernels(), stand_in_for_liger()
    monkeypatch.setattr(peers_cuda, "tile_kernels", lambda: tile_kernels)
    monkeypatch.setattr(peers_cuda, "liger", lambda: liger)


@pytest.mark.parametrize("op", ["project", "aggregate", "merge", "pre", "step", "single_pass", "layer"])
@pytest.mark.parametrize("name", peers.NAMES)
def test_the_peers_calls_compute_our_maths(name, op):
    case = make_case(op, 4, 64, 9, "bfloat16", 1)
    made = peers_cuda.implementation(name, case, DIRECTIONS)
    if (name, op) == ("liger", "project"):
        assert "divides the work between these ops differently" in made
        return
    assert not isinstance(made, str), made
    assert made.error(case) <= TOLERANCE["bfloat16"]
    with torch.no_grad():
        assert set(made.calls(case)) == set(DIRECTIONS)


@pytest.mark.parametrize(
    ("name", "streams", "dtype", "said"),
    [
        ("tile-kernels", 2, "bfloat16", "n = 4"),
        ("tile-kernels", 4, "float32", "bfloat16 only"),
        ("liger", 3, "bfloat16", "n = 2"),
    ],
)
def test_what_a_peer_has_no_kernels_for_is_said(name, streams, dtype, said):
    assert said in peers_cuda.implementation(name, make_case("merge", streams, 16, 3, dtype, 0), DIRECTIONS)


@pytest.mark.parametrize("op", ["coefficients", "stack"])
def test_ops_that_peers_do_not_have_are_said(op):
    case = make_case(op, 4, 16, 3, "bfloat16", 0)
    assert all(isinstance(peers_cuda.implementation(name, case, DIRECTIONS), str) for name in peers.NAMES)


def test_turning_twice_changes_nothing_and_turning_once_does():
    case = make_case("pre", 4, 16, 3, "bfloat16", 0)
    once = peers_cuda.transpose_res(case)
    twice = peers_cuda.transpose_res(once)
    assert not torch.equal(once.inputs[1], case.inputs[1])
    pairs = zip(
        (*twice.inputs, *twice.expected, *twice.grad_outputs),
        (*case.inputs, *case.expected, *case.grad_outputs),
        strict=True,
    )
    assert all(torch.equal(one, other) for one, other in pairs)


def test_missing_packages_are_reasons(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(peers_cuda.importlib.util, "find_spec", lambda name: None)
    peers_cuda.tile_kernels.cache_clear()
    peers_cuda.liger.cache_clear()
    try:
        assert "not installed" in peers_cuda.tile_kernels()
        assert "not installed" in peers_cuda.liger()
    finally:
        peers_cuda.tile_kernels.cache_clear()
        peers_cuda.liger.cache_clear()
