"""Torch custom ops of every kernel, `torch.ops.mhc.<op>` and `torch.ops.mhc.<op>_backward`.

All are made from the kernels' arguments. A backward takes the forward's tensors, the results that it saved, the
gradients of its other results, and its scalars; it returns the gradients of the forward's tensors. A tensor whose
gradient is that of the forward's result (x of x + post f) may be left out of both. Arguments that a kernel adds to hold
nothing here. The ints after the arguments are streams, width and Sinkhorn rounds. Tensors of custom ops have one
leading dimension, tokens; those of `call` have any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch._library.autograd import make_autograd_impl
from torch.library import Library, custom_op

from mhc.dispatch import torch_form
from mhc.dispatch.kernels import DTYPE_NAMES, active
from tiles.kernels.reference_inputs import DTYPES
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import TOKENS, Argument, Direction, Problem
from tiles.runtime.loaded_kernel import has_tokens, is_result, leading_shape

PROBLEM = ("streams", "width", "rounds")

_LIBRARY = Library("mhc", "FRAGMENT")


def _arguments(op: str, direction: Direction) -> tuple[list[Argument], list[Argument]]:
    """A kernel's inputs and its results; names and roles are the same for every problem."""
    arguments = kernel_spec(op, direction).arguments(Problem(op, direction, streams=1, width=8))
    given = [argument for argument in arguments if argument.role in ("input", "scalar")]
    return given, [argument for argument in arguments if is_result(argument)]


def _schema(given: list[Argument], results: list[Argument]) -> str:
    inputs = [f"{'float' if argument.role == 'scalar' else 'Tensor'} {argument.name}" for argument in given]
    inputs += [f"int {name}" for name in PROBLEM]
    outputs = ", ".join("Tensor" for _ in results)
    return f"({', '.join(inputs)}) -> {f'({outputs})' if len(results) > 1 else outputs}"


def _arguments_for(op: str, direction: Direction, values: tuple[Any, ...]) -> tuple[Argument, ...]:
    """A kernel's arguments at the shapes of the values that it is called with."""
    first, (streams, width, rounds) = values[0], values[-len(PROBLEM) :]
    problem = Problem(op, direction, streams, width, DTYPE_NAMES[first.dtype], rounds=rounds)
    return kernel_spec(op, direction).arguments(problem)


def _runner(op: str, direction: Direction) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function that runs one kernel on tensors and settings: scalars and the ints of `PROBLEM`."""
    updated = [None for argument in _arguments(op, direction)[1] if argument.role == "updated"]

    def run(tensors: Iterable[torch.Tensor], settings: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        *scalars, streams, width, rounds = settings
        inputs = [*map(torch.Tensor.contiguous, tensors), *scalars, *updated]
        return active().run(op, direction, streams, width, rounds, inputs)

    return run


def _custom_op(name: str, op: str, direction: Direction) -> Any:
    """The custom op (torch's CustomOpDef) of one kernel, with its fake implementation."""
    given, results = _arguments(op, direction)
    tensors = sum(argument.role == "input" for argument in given)
    single, run_kernel = len(results) == 1, _runner(op, direction)

    def run(*values: Any) -> Any:
        outputs = run_kernel(values[:tensors], values[tensors:])
        return outputs[0] if single else outputs

    def fake(*values: Any) -> Any:
        tokens = values[0].shape[0]
        outputs = tuple(
            values[0].new_empty(
                [tokens if size == TOKENS else size for size in argument.shape], dtype=DTYPES[argument.dtype]
            )
            for argument in _arguments_for(op, direction, values)
            if is_result(argument)
        )
        return outputs[0] if single else outputs

    made = custom_op(f"mhc::{name}", run, mutates_args=(), schema=_schema(given, results))
    made.register_fake(fake)
    return made


class _Differentiation(NamedTuple):
    """How an op's backward is called: which of the forward's inputs that are tensors (they come first) have tokens, and
    the dimensions after tokens of the first; how many of its results the backward takes the gradients of (the others,
    behind them, are saved for it); the positions of the tensors that it leaves out."""

    has_tokens: tuple[bool, ...]
    dims: int
    returned: int
    left_out: tuple[int, ...]

    @property
    def tensors(self) -> int:
        """The number of inputs that are tensors."""
        return len(self.has_tokens)

    def flat(self, tensors: Sequence[torch.Tensor], leading: torch.Size) -> Sequence[torch.Tensor]:
        """Inputs with one dimension of tokens in the place of these."""
        if len(leading) == 1:
            return tensors
        return [
            tensor.reshape(-1, *tensor.shape[len(leading) :]) if of_tokens else tensor
            for of_tokens, tensor in zip(self.has_tokens, tensors, strict=True)
        ]

    def unflat(self, results: Sequence[torch.Tensor], leading: torch.Size) -> tuple[torch.Tensor, ...]:
        """Results with these leading dimensions, less those that are saved for the backward."""
        returned = results[: self.returned]
        if len(leading) == 1:
            return tuple(returned)
        return tuple(result.view((*leading, *result.shape[1:])) for result in returned)

    def given(self, kept: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Of the tensors and results that are saved, those that the backward takes."""
        if not self.left_out:
            return kept
        return [tensor for index, tensor in enumerate(kept) if index not in self.left_out]

    def gradients(self, results: Sequence[torch.Tensor], grad: torch.Tensor) -> Sequence[torch.Tensor | None]:
        """The gradients of all tensors from the backward's results, and the gradient of the forward's only one."""
        if not self.left_out:
            return results
        found = iter(results)
        return [grad if index in self.left_out else next(found) for index in range(self.tensors)]


def _differentiation(op: str) -> _Differentiation:
    (given, results), (taken, _) = _arguments(op, "forward"), _arguments(op, "backward")
    names, tensors = {argument.name for argument in taken}, [a for a in given if a.role == "input"]
    saved = [argument.name in names for argument in results]
    returned = saved.count(False)
    assert all(saved[returned:]), f"{op}: the results that only the backward takes are the last"
    left_out = tuple(index for index, argument in enumerate(tensors) if argument.name not in names)
    return _Differentiation(tuple(map(has_tokens, tensors)), len(tensors[0].shape) - 1, returned, left_out)


def _differentiable_op(op: str) -> Any:
    """An op's forward as a custom op whose gradient is its backward kernel."""
    forward, backward = _custom_op(op, op, "forward"), _custom_op(f"{op}_backward", op, "backward")
    how = _HOW[op]
    tensors, returned = how.tensors, how.returned

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors], *(output[returned:] if isinstance(output, tuple) else ()))
        ctx.settings = inputs[tensors:]

    def gradients(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        taken = grads[:returned]
        results: Sequence[torch.Tensor | None]
        if torch_form.kernel_is_not_enough(taken):
            results = torch_form.gradients(op, ctx.saved_tensors[:tensors], ctx.settings, taken)
        else:
            found = backward(*how.given(ctx.saved_tensors), *taken, *ctx.settings)
            results = how.gradients(found if isinstance(found, tuple) else (found,), taken[0])
        return (*results, *(None for _ in ctx.settings))

    forward.register_autograd(gradients, setup_context=setup_context)
    _differentiate_transformed(op, forward)
    return forward


def _differentiate_transformed(op: str, forward: Any) -> None:
    """Have torch differentiate the plain torch form in forward mode and under transforms, where it would take a custom
    op's derivative to be zero."""
    reverse_mode = make_autograd_impl(forward._opoverload, forward)

    def differentiate(keyset: Any, *values: Any) -> Any:
        if torch_form.is_transformed(values):
            return _alone_or_all(torch_form.outputs(op, values))
        return reverse_mode(keyset, *values)

    for key in ("AutogradCPU", "AutogradCUDA"):
        _LIBRARY.impl(forward._name, differentiate, key, with_keyset=True)


def _alone_or_all(outputs: tuple[torch.Tensor, ...]) -> Any:
    """A single result by itself, as the custom ops return it."""
    return outputs if len(outputs) > 1 else outputs[0]


class _Direct(torch.autograd.Function):
    """An op as a function of autograd."""

    run: Callable[..., tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]
    """The op without autograd -> its results, and those that are saved for a backward."""


def _direct_op(op: str) -> type[_Direct]:
    """The same for plain tensors, without torch's dispatcher, which costs more than a small kernel does, and much more
    when its code is no longer in the processor's caches."""
    forward_kernel, backward_kernel = _runner(op, "forward"), _runner(op, "backward")
    how = _HOW[op]
    returned = how.returned

    class Direct(_Direct):
        @staticmethod
        def run(
            tensors: tuple[torch.Tensor, ...], settings: tuple[Any, ...]
        ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            outputs = forward_kernel(tensors, settings)
            return outputs[:returned], outputs[returned:]

        @staticmethod
        def forward(ctx: Any, settings: tuple[Any, ...], *tensors: torch.Tensor) -> Any:
            results, kept = Direct.run(tensors, settings)
            ctx.save_for_backward(*tensors, *kept)
            ctx.settings = settings
            return _alone_or_all(results)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            kept, settings = ctx.saved_tensors, ctx.settings
            if torch_form.kernel_is_not_enough(grads):
                return None, *torch_form.gradients(op, kept[: how.tensors], settings, grads)
            return None, *how.gradients(backward_kernel((*how.given(kept), *grads), settings), grads[0])

    return Direct


_HOW = {op: _differentiation(op) for op in sorted({op for op, _ in kernel_specs()})}
"""How each op is differentiated."""

OPERATORS = {op: _differentiable_op(op) for op in _HOW}
"""The differentiable custom ops by name."""

_DIRECT = {op: _direct_op(op) for op in OPERATORS}


def call(op: str, tensors: tuple[torch.Tensor, ...], settings: tuple[Any, ...], check: Callable[[], object]) -> Any:
    """Run an op, differentiably, on tensors with any leading dimensions, which the results have too; its settings are
    scalars and the ints of `PROBLEM`. As a custom op where `needs_dispatcher`, else directly; under transforms and in
    forward mode in plain torch (`mhc.dispatch.torch_form`). Results that only a backward takes are left out.

    `check` raises `BadInput` unless the tensors fit. What runs directly looks at every tensor itself, so that there it
    is called to say what does not fit.
    """
    fault: ValueError | None = None
    if not needs_dispatcher(tensors):
        try:
            if torch.is_grad_enabled():
                return _DIRECT[op].apply(settings, *tensors)  # type: ignore[no-untyped-call]
            living = tuple(map(torch._C._functorch.unwrap_if_dead, tensors))  # as a function of autograd does
            return _alone_or_all(_DIRECT[op].run(living, settings)[0])
        except ValueError as error:
            fault = error
    check()
    if fault is not None:
        raise fault
    if torch_form.is_transformed(tensors):
        return _alone_or_all(torch_form.outputs(op, (*tensors, *settings))[: _HOW[op].returned])
    how = _HOW[op]
    leading = leading_shape(tensors[0], how.dims)
    outputs = OPERATORS[op](*how.flat(tensors, leading), *settings)
    return _alone_or_all(how.unflat(outputs if isinstance(outputs, tuple) else (outputs,), leading))


def needs_dispatcher(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether ops on these tensors must go through torch's dispatcher: under a compiler, a tracing or dispatch mode, a
    function transform, forward mode, or with tensor subclasses."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch_form.is_transformed(tensors)
        or not PLAIN_TYPES.issuperset(map(type, tensors))
    )


PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))
