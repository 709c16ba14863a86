"""The custom ops in torch: registration, fakes, compilation, autocast, checkpointing."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import mhc
from mhc import functional
from mhc.dispatch.operators import OPERATORS
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import Problem

WIDTH = 16


def cases():
    """Forwards at n = 4, backwards at n = 1; the other way round in the slow tier."""
    for op, direction in sorted(kernel_specs()):
        for n in (1, 4):
            fast = (direction == "forward") == (n == 4)
            yield pytest.param(op, direction, n, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("op", "direction", "n"), [*cases()])
def test_opcheck(op, direction, n):
    spec, problem = kernel_spec(op, direction), Problem(op, direction, n, WIDTH)
    updated = {argument.name for argument in spec.arguments(problem) if argument.role == "updated"}
    values = [value for name, value in spec.inputs(problem, 5, 0).items() if name not in updated]
    if direction == "forward":
        values = [value.requires_grad_() if isinstance(value, torch.Tensor) else value for value in values]
        checked = OPERATORS[op]
    else:
        checked = getattr(torch.ops.mhc, f"{op}_backward").default
    assert set(opcheck(checked, (*values, n, WIDTH, 20)).values()) == {"SUCCESS"}


def network(modes=("mhc", "hc", "residual")):
    torch.manual_seed(0)
    sublayers = [torch.nn.Sequential(torch.nn.RMSNorm(WIDTH), torch.nn.Linear(WIDTH, WIDTH)) for _ in modes]
    layers = [mhc.HyperConnection(WIDTH, 4, each, mode=mode) for each, mode in zip(sublayers, modes, strict=True)]
    return torch.nn.Sequential(*layers, mhc.StreamHead(WIDTH, 4))


def outcome(model, h):
    """The result and all gradients of one forward and backward."""
    model.zero_grad()
    result = model(mhc.expand_streams(h, 4))
    result.square().sum().backward()
    return [result.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
def test_a_block_and_a_head_compile_in_one_graph(on_compiled):
    expect_same_when_compiled(network(["mhc"]), "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_modules_compile_in_one_graph(kernels, backend):
    expect_same_when_compiled(network(), backend)


def expect_same_when_compiled(model, backend):
    h = torch.randn(2, 3, WIDTH)
    expected = outcome(model, h)
    found = outcome(torch.compile(model, fullgraph=True, backend=backend), h)
    for actual, wanted in zip(found, expected, strict=True):
        scale = wanted.abs().max()  # small elements of a gradient are sums that cancel
        torch.testing.assert_close(actual / scale, wanted / scale, rtol=0, atol=2e-5)


def test_step_and_sinkhorn_compile_in_one_graph_for_any_token_count():
    torch.manual_seed(0)
    parameters = torch.randn(24, 4 * WIDTH), torch.full((3,), 0.1), torch.randn(24)

    def block(x, f, post, res):
        return functional.step(x, f, post, functional.sinkhorn(res), *parameters)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 7):
        given = (
            torch.randn(tokens, 4, WIDTH),
            torch.randn(tokens, WIDTH),
            torch.rand(tokens, 4),
            torch.rand(tokens, 4, 4),
        )
        for actual, wanted in zip(compiled(*given), block(*given), strict=True):
            torch.testing.assert_close(actual, wanted)


def test_autocast_leaves_the_ops_in_full_precision():
    x, phi = torch.randn(5, 4, WIDTH), torch.randn(24, 4 * WIDTH)
    expected = functional.project(x, phi)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = functional.project(x, phi)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_checkpointing_gives_the_same_gradients():
    model, x = network(), torch.randn(3, 4, WIDTH)
    expected = [each.clone() for each in torch.autograd.grad(model(x).sum(), tuple(model.parameters()))]
    found = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), tuple(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
