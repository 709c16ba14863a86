"""The direct call of kernels on plain tensors and the custom ops: the same results, and who gets which."""

import pytest
import torch
from called import called
from torch.utils._python_dispatch import TorchDispatchMode

from mhc import functional
from mhc.dispatch import operators
from mhc.dispatch.operators import OPERATORS, needs_dispatcher
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem

N, WIDTH = 4, 16


def values_of(op):
    """The op's inputs, differentiable, and the ints that follow."""
    problem = Problem(op, "forward", N, WIDTH)
    values = kernel_spec(op, "forward").inputs(problem, 5, 0).values()
    given = [value.requires_grad_() if isinstance(value, torch.Tensor) else value for value in values]
    return given, (N, WIDTH, 20)


def outcome(run, op):
    """Differentiable results, and gradients of all tensors."""
    given, ints = values_of(op)
    found = run(*given, *ints)
    found = found if isinstance(found, tuple) else (found,)
    results = found[: operators._HOW[op].returned]
    torch.manual_seed(1)
    upstream = [torch.randn_like(result) for result in results]
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    return [*results, *torch.autograd.grad(results, tensors, upstream)]


@pytest.mark.parametrize(
    ("kernels", "op"),
    [
        pytest.param(
            kernels,
            op,
            marks=pytest.mark.slow if kernels == "compiled" and op.startswith(("pre", "step", "single_pass")) else (),
        )
        for kernels in ("reference", "compiled")
        for op in sorted(OPERATORS)
    ],
    indirect=["kernels"],
)
def test_both_ways_give_the_same_bits(kernels, op):
    for direct, custom in zip(outcome(called(op), op), outcome(OPERATORS[op], op), strict=True):
        assert torch.equal(direct, custom)


@pytest.fixture
def ways(monkeypatch):
    """The ops that went through the dispatcher."""
    seen = []

    def note(op):
        return lambda *values: seen.append(op) or OPERATORS[op](*values)

    monkeypatch.setattr(operators, "OPERATORS", {op: note(op) for op in OPERATORS})
    return seen


def aggregate(x=None):
    return functional.aggregate(torch.randn(4, N, WIDTH) if x is None else x, torch.full((4, N), 0.5))


def test_plain_tensors_and_parameters_go_directly(ways):
    aggregate()
    aggregate(torch.nn.Parameter(torch.randn(4, N, WIDTH)))
    with torch.no_grad():
        aggregate()
    assert ways == []


def test_a_dispatch_mode_sees_the_custom_op():
    class Seen(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012 (one use)

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen() as mode:
        aggregate()
    assert "mhc.aggregate.default" in mode.names


def test_subclasses_and_function_transforms_are_watched():
    class Tagged(torch.Tensor):
        pass

    def note(x):
        seen.append(needs_dispatcher([x]))
        return x.sum()

    seen: list[bool] = []
    torch.func.grad(note)(torch.randn(2))
    assert seen == [True]
    assert needs_dispatcher([torch.randn(2).as_subclass(Tagged)])
    assert not needs_dispatcher([torch.randn(2), torch.nn.Parameter(torch.randn(2))])


@pytest.mark.parametrize("kernels", ["reference", "compiled"], indirect=True)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{"pre": torch.rand(3, 2, N)}, {"pre": torch.rand(2, 3, N).double()}, {"pre": torch.rand(2, 3, N, device="meta")}],
    ids=["leading dimensions", "dtype", "device"],
)
def test_what_does_not_fit_is_said_in_one_message(kernels, gradients, changes):
    """The kernel, which has looked at every tensor, says it in other words."""
    given = {"x": torch.randn(2, 3, N, WIDTH, requires_grad=gradients), **changes}
    with torch.set_grad_enabled(gradients), pytest.raises(BadInput, match=r"^pre must be torch\.float32 ") as raised:
        functional.aggregate(**given)
    assert raised.value.__context__ is None


@pytest.mark.parametrize("gradients", [True, False])
def test_what_a_function_transform_left_behind_is_taken(gradients):
    """Its wrappers of tensors live on where a function keeps them, with no memory of their own."""

    def keep(x):
        kept.append(x * 2)
        return x.sum()

    kept: list[torch.Tensor] = []
    torch.func.grad(keep)(torch.ones(4, N, WIDTH))
    with torch.set_grad_enabled(gradients):
        assert torch.equal(aggregate(kept[0]), aggregate(torch.full((4, N, WIDTH), 2.0)))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 0)])
@pytest.mark.parametrize("op", sorted(op for op in OPERATORS if not op.endswith("_norm_identity")))
def test_leading_dimensions_are_those_of_tokens_in_a_row(op, leading):
    """Results and gradients, directly and as the custom op."""
    how, tokens = operators._HOW[op], torch.Size(leading).numel()
    values = list(kernel_spec(op, "forward").inputs(Problem(op, "forward", N, WIDTH), tokens, 0).values())

    def run(call_op, shape):
        tensors = zip(how.has_tokens, values, strict=False)
        given = [v.reshape((*shape, *v.shape[1:])) if has_tokens else v.clone() for has_tokens, v in tensors]
        given = [value.requires_grad_() for value in given]
        found = call_op(*given, *values[len(given) :], N, WIDTH, 20)
        found = found if isinstance(found, tuple) else (found,)
        results = found[: how.returned]
        gradients = torch.autograd.grad([result.square().sum() for result in results], given)
        assert all(result.shape[: len(shape)] == torch.Size(shape) for result in results)
        assert all(gradient.shape == value.shape for gradient, value in zip(gradients, given, strict=True))
        return [value.detach().flatten() for value in (*results, *gradients)]

    for one, other in zip(run(called(op), leading), run(OPERATORS[op], (tokens,)), strict=True):
        assert torch.equal(one, other)


def test_results_may_be_written_to_whatever_their_leading_dimensions():
    """Each of several: a sublayer may begin in place."""
    x = torch.randn(2, 3, N, WIDTH, requires_grad=True)
    u, post, _res = functional.pre(x, torch.randn(24, N * WIDTH), torch.ones(3), torch.randn(24))
    (u.mul_(2).sum() + post.add_(1).sum()).backward()
    assert x.grad.abs().sum() > 0
