"""Settings of the whole process that users change: default device and dtype, grad modes, warnings as errors."""

import pytest
import torch
from torch import nn

import mhc
from mhc import functional, manifolds
from tiles.runtime import cpu_memory_pool

TOKENS = 5


@pytest.fixture
def default_device():
    yield torch.set_default_device
    torch.set_default_device(None)


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("pooled", [False, True])
def test_ops_of_cpu_tensors_do_not_look_at_the_default_device(kernels, default_device, monkeypatch, pooled):
    monkeypatch.setattr(cpu_memory_pool, "MIN_POOLED_BYTES", 1 if pooled else 2**20)
    x = torch.randn(TOKENS, 4, 16, requires_grad=True)
    block = mhc.HyperConnection(16, 4, nn.Identity())
    wanted = block(x)
    (gradient,) = torch.autograd.grad(wanted.sum(), x)
    default_device("meta")
    found = block(x)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], gradient)
    assert functional.sinkhorn(x.detach()[:, :4, :4]).device.type == "cpu"


@pytest.mark.parametrize("manifold", manifolds.NAMES)
def test_a_block_made_under_another_default_device_and_reset(default_device, manifold):
    default_device("meta")
    block = mhc.HyperConnection(16, 4, nn.Identity(), manifold=manifold)
    assert {parameter.device.type for parameter in block.parameters()} == {"meta"}
    block.to_empty(device="cpu")
    default_device(None)
    block.reset_parameters()
    default_device("meta")
    x = torch.randn(TOKENS, 4, 16, device="cpu")
    assert torch.isfinite(block(x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"mode": "hc"}, {"dynamic": False}, {"manifold": "kronecker"}], ids=str)
def test_parameters_are_float32_whatever_the_default_dtype(default_dtype, dtype, settings):
    default_dtype(dtype)
    block, head = mhc.HyperConnection(16, 4, nn.Identity(), **settings), mhc.StreamHead(16, 4)
    assert {parameter.dtype for module in (block, head) for parameter in module.parameters()} == {torch.float32}
    x = torch.randn(TOKENS, 4, 16, dtype=torch.float32)
    assert head(block(x)).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_grad_modes(kernels):
    block = mhc.HyperConnectionStack([mhc.HyperConnection(16, 4, nn.Linear(16, 16)) for _ in range(2)])
    x = torch.randn(TOKENS, 4, 16)
    wanted = block(x).detach()
    with torch.inference_mode():
        assert torch.equal(block(x), wanted)
    with torch.no_grad():
        assert torch.equal(block(x), wanted)
        with torch.enable_grad():
            block(x).sum().backward()
    assert block.blocks[0].phi.grad is not None
    with torch.autograd.set_multithreading_enabled(False), torch.autograd.detect_anomaly(check_nan=True):
        block(x).sum().backward()


def test_deterministic_algorithms(kernels):
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(TOKENS, 4, 16, requires_grad=True)
        mhc.HyperConnection(16, 4, nn.Identity())(x).sum().backward()
        assert torch.isfinite(x.grad).all()
    finally:
        torch.use_deterministic_algorithms(False)
