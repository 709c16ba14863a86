"""Derivatives that kernels do not have: every way that torch has to ask for them gives the true one."""

import copy
import logging

import pytest
import torch
from called import called
from torch.autograd import forward_ad

import mhc
from mhc import functional
from mhc.dispatch.operators import OPERATORS
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem

N, WIDTH, TOKENS = 4, 16, 5
INTS = (N, WIDTH, 20)
CLOSE = {"rtol": 2e-4, "atol": 2e-4}
"""float32 against float64, through two derivatives of 20 Sinkhorn rounds."""

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode


def inputs_of(op):
    """The op's tensors, its scalars, and its results that may be differentiated, by their place."""
    problem = Problem(op, "forward", N, WIDTH)
    values = list(kernel_spec(op, "forward").inputs(problem, TOKENS, 0).values())
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    backward = kernel_spec(op, "backward").arguments(Problem(op, "backward", N, WIDTH))
    names = {argument.name for argument in backward if argument.role == "input"}
    results = [argument for argument in kernel_spec(op, "forward").arguments(problem) if argument.role == "output"]
    return tensors, values[len(tensors) :], [place for place, a in enumerate(results) if a.name not in names]


def energy(found, places, linear):
    """A number that depends on all results; `linear` in them, no upstream gradient depends on the inputs."""
    found = found if isinstance(found, tuple) else (found,)
    weights = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for place in places:
        weight = torch.randn(found[place].shape, generator=weights, dtype=torch.float64)
        total = total + ((found[place].double() if linear else found[place].double().square()) * weight).sum()
    return total


def in_float64(op, tensors, scalars):
    """All results of the reference in float64."""
    problem = Problem(op, "forward", N, WIDTH)
    arguments = kernel_spec(op, "forward").arguments(problem)
    names = [argument.name for argument in arguments if argument.role in ("input", "scalar")]
    wide = [tensor.double() for tensor in tensors]
    found = kernel_spec(op, "forward").reference(problem, dict(zip(names, (*wide, *scalars), strict=True)))
    return tuple(found[argument.name] for argument in arguments if argument.role == "output")


def directions(tensors):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(tensor.shape, generator=generator) for tensor in tensors]


def tangent_in_float64(op, tensors, scalars, along):
    """The derivative of all results along a direction, by central differences in float64."""
    reach = 1e-5
    above, below = (
        in_float64(op, [t.double() + sign * reach * v.double() for t, v in zip(tensors, along, strict=True)], scalars)
        for sign in (1, -1)
    )
    return [(high - low) / (2 * reach) for high, low in zip(above, below, strict=True)]


ASKED = {
    "call": called,
    "custom op": lambda op: OPERATORS[op],
}


@pytest.mark.parametrize("op", sorted(OPERATORS))
@pytest.mark.parametrize("how", ASKED)
@pytest.mark.parametrize("transform", [True, False])
def test_forward_mode(op, how, transform):
    tensors, scalars, places = inputs_of(op)
    along = directions(tensors)

    def run(*given):
        found = ASKED[how](op)(*given, *scalars, *INTS)
        return found if isinstance(found, tuple) else (found,)

    if transform:
        tangents = torch.func.jvp(run, tuple(tensors), tuple(along))[1]
    else:
        with forward_ad.dual_level():
            found = run(*(forward_ad.make_dual(t, v) for t, v in zip(tensors, along, strict=True)))
            tangents = [forward_ad.unpack_dual(result).tangent for result in found]
    true = tangent_in_float64(op, tensors, scalars, along)
    for place in places:
        torch.testing.assert_close(tangents[place].double(), true[place], **CLOSE)


@pytest.mark.parametrize("op", sorted(OPERATORS))
@pytest.mark.parametrize("how", ASKED)
@pytest.mark.parametrize("linear", [True, False])
def test_gradients_of_gradients(op, how, linear):
    """A Hessian-vector product; with a linear loss all of it comes from what the backward has saved."""
    tensors, scalars, places = inputs_of(op)

    def product(run, given):
        given = [tensor.requires_grad_() for tensor in given]
        first = torch.autograd.grad(energy(run(given), places, linear), given, create_graph=True)
        inner = sum((grad * along.to(grad.dtype)).sum() for grad, along in zip(first, directions(given), strict=True))
        found = torch.autograd.grad(inner, given, allow_unused=True) if inner.requires_grad else [None] * len(given)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(given, found, strict=True)]

    mine = product(lambda given: ASKED[how](op)(*given, *scalars, *INTS), tensors)
    true = product(lambda given: in_float64(op, given, scalars), [tensor.detach().double() for tensor in tensors])
    for found, wanted in zip(mine, true, strict=True):
        scale = wanted.abs().max().clamp(min=1)
        torch.testing.assert_close(found.double() / scale, wanted / scale, **CLOSE)


@pytest.mark.usefixtures("on_compiled")
def test_every_transform_of_torch_func():
    x = torch.randn(4, N, N)

    def loss(logits):
        return functional.sinkhorn(logits).square().sum()

    per_matrix = torch.func.vmap(torch.func.grad(loss))(x)
    one_by_one = [torch.autograd.grad(loss(leaf), leaf)[0] for leaf in (m.clone().requires_grad_() for m in x)]
    torch.testing.assert_close(per_matrix, torch.stack(one_by_one))
    rows, columns = torch.func.jacrev(functional.sinkhorn)(x[0]), torch.func.jacfwd(functional.sinkhorn)(x[0])
    torch.testing.assert_close(rows, columns)
    vectorised = torch.autograd.functional.jacobian(functional.sinkhorn, x[0], vectorize=True)
    torch.testing.assert_close(vectorised, rows)
    hessian = torch.func.hessian(loss)(x[0])
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, x[0]), hessian)
    torch.testing.assert_close(hessian, hessian.permute(2, 3, 0, 1), rtol=1e-4, atol=1e-5)
    assert hessian.abs().max() > 0.01


def blocks(count, **settings):
    torch.manual_seed(0)
    made = [mhc.HyperConnection(WIDTH, N, torch.nn.Linear(WIDTH, WIDTH), **settings) for _ in range(count)]
    for block in made:
        for parameter in block.parameters(recurse=False):
            torch.nn.init.normal_(parameter, std=0.3)
    return made


NETS = {
    "block": lambda: blocks(1)[0],
    "hc": lambda: blocks(1, mode="hc")[0],
    "residual": lambda: blocks(1, mode="residual")[0],
    "kronecker": lambda: blocks(1, manifold="kronecker")[0],
    "tolerance": lambda: blocks(1, manifold="sinkhorn-tolerance")[0],
    "stack": lambda: mhc.HyperConnectionStack(blocks(3)),
    "recompute": lambda: mhc.recompute(blocks(3), segment=2),
    "single pass": lambda: mhc.HyperConnectionStack(blocks(3), single_pass=True),
}


SLOW = ("block", "stack", "recompute", "single pass")
"""Those of kernels that take long to compile."""


def tiers(names):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.mark.usefixtures("on_compiled")
@pytest.mark.parametrize("name", tiers(NETS))
def test_modules_second_derivatives(name):
    """Hessian-vector products by create_graph, against differences of the gradient."""
    net = NETS[name]()
    z = torch.randn(2, TOKENS, N, WIDTH, requires_grad=True)
    along = torch.randn_like(z)

    def gradient(at, create_graph=False):
        loss = net(at).double().square().sum() + at.double().pow(3).sum()
        return torch.autograd.grad(loss, at, create_graph=create_graph)[0]

    product = torch.autograd.grad((gradient(z, create_graph=True) * along).sum(), z)[0]
    reach = 1e-2  # float32 gradients; the third derivative is what this leaves
    high, low = (gradient((z + sign * reach * along).detach().requires_grad_()) for sign in (1, -1))
    difference = (high.double() - low.double()) / (2 * reach)
    assert (product - difference).norm() < 3e-3 * difference.norm()
    without_block = (6 * z * along).detach()
    assert (product - without_block).norm() > 0.1 * difference.norm()  # the block's share is what this test is about


@pytest.mark.usefixtures("on_compiled")
@pytest.mark.parametrize("name", tiers(name for name in NETS if name != "tolerance"))
def test_modules_under_transforms(name):
    """Per-sample gradients of the parameters, and forward mode."""
    net = NETS[name]()
    parameters = {key: value.detach() for key, value in net.named_parameters()}
    z = torch.randn(3, TOKENS, N, WIDTH)

    def loss(values, sample):
        return torch.func.functional_call(net, values, (sample,)).square().mean()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, z)
    twin = copy.deepcopy(net)
    for place, sample in enumerate(z):
        twin.zero_grad()
        twin(sample).square().mean().backward()
        for key, parameter in twin.named_parameters():
            torch.testing.assert_close(per_sample[key][place], parameter.grad, rtol=2e-4, atol=2e-5)
    along = torch.randn_like(z)
    tangent = torch.func.jvp(net, (z,), (along,))[1]
    reach = 1e-2
    with torch.no_grad():
        difference = (net(z + reach * along) - net(z - reach * along)) / (2 * reach)
    assert (tangent - difference).norm() < 2e-3 * difference.norm()


def test_the_iterated_manifold_says_what_it_does_not_do():
    with pytest.raises(mhc.BadInput, match=r"sinkhorn-tolerance .* got .*: take the manifold sinkhorn"):
        torch.func.jvp(mhc.manifolds.SinkhornToTolerance(), (torch.randn(4, 4),), (torch.randn(4, 4),))


def test_plain_torch_is_said_once(caplog):
    with mhc.using(mhc.Kernels.defaults()), caplog.at_level(logging.WARNING, logger="mhc"):
        for _ in range(2):
            torch.func.vmap(functional.sinkhorn)(torch.randn(2, 3, 3))
    said = [record.getMessage() for record in caplog.records if "plain torch" in record.getMessage()]
    assert len(said) == 1
