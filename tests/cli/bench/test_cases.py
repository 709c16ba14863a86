"""Benchmark cases: their inputs, reference, and the least that each op must move and compute."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from cli.bench import cases
from cli.bench.cases import CPU, DIRECTIONS, DISTINCT_TOKENS, OPS, least_traffic, make_case, reference, repeat_tokens
from cli.bench.torch_composites import STACK_LAYERS
from mhc.sublayer_norm import NORM_EPS
from tiles.kernels.arguments import PAPER_SCALARS
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Direction, Problem, Traffic

SHAPE = (2, 16, 6)


def moved(op: str, direction: Direction, dtype: str = "bfloat16") -> Traffic:
    streams, width, tokens = SHAPE
    return kernel_spec(op, direction).traffic(Problem(op, direction, streams, width, dtype, tokens), tokens)


def least(op: str, dtype: str = "bfloat16") -> Mapping[str, Traffic]:
    streams, width, tokens = SHAPE
    return least_traffic(Problem(op, "forward", streams, width, dtype, tokens))


@pytest.mark.parametrize("op", OPS)
def test_the_reference_in_float64_is_what_is_wanted(op: str) -> None:
    case = make_case(op, *SHAPE, "float32", 1)
    assert case.error(reference(op, Problem(op, "forward", *SHAPE[:2], "float32", SHAPE[2]))) < 1e-5
    assert all(tensor.dtype == torch.float64 for tensor in case.expected)
    assert len(case.expected) == len(case.grad_outputs) + len(case.inputs)
    assert len(case.names) == len(case.inputs)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("layer", "stack")])
def test_what_is_wanted_is_what_the_ops_own_kernel_computes(op: str) -> None:
    """Of pre, step and single_pass, the fused kernel's reference; the case's is made of the four ops'."""
    case = make_case(op, *SHAPE, "float32", 1)
    problem = Problem(op, "forward", *SHAPE[:2], "float32", SHAPE[2])
    spec = kernel_spec(op, "forward")
    given = dict(zip(case.names, (tensor.detach().double() for tensor in case.inputs), strict=True))
    given |= PAPER_SCALARS | {"norm_eps": NORM_EPS}
    outputs = [argument.name for argument in spec.arguments(problem) if argument.role == "output"]
    results = spec.reference(problem, given)
    for name, want in zip(outputs, case.expected[: len(case.grad_outputs)], strict=False):
        torch.testing.assert_close(results[name], want)


def test_a_stack_has_as_many_layers_as_it_says_and_all_differ() -> None:
    case = make_case("stack", *SHAPE, "float32", 1)
    assert case.names == ("x", *("phi", "alpha", "bias") * STACK_LAYERS)
    for first in (1, 2, 3):
        assert len({float(parameter.detach().sum()) for parameter in case.inputs[first::3]}) == STACK_LAYERS


@pytest.mark.parametrize(("streams", "width", "tokens"), [(1, 16, 20), (4, 64, 20), (16, 16, 10)])
def test_the_streams_of_a_stack_neither_explode_nor_become_alike(streams: int, width: int, tokens: int) -> None:
    case = make_case("stack", streams, width, tokens, "float32", 0)
    before, after = case.inputs[0].detach().double(), case.expected[0]
    assert 0.5 < after.norm() / before.norm() < 4
    if streams > 1:
        assert after.std(1).norm() > before.std(1).norm() / 4


def test_gradients_of_one_name_count_as_one() -> None:
    case = make_case("stack", *SHAPE, "float32", 1)
    right = reference("stack", Problem("stack", "forward", *SHAPE[:2], "float32", SHAPE[2]))
    size = torch.stack(
        [want.norm() for name, want in zip(case.names, case.expected[1:], strict=True) if name == "bias"]
    )

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return 2 * grad

    def wrong(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return right(*values[:-1], Twice.apply(values[-1]))

    assert case.error(wrong) == pytest.approx(float(size[-1] / size.norm()), rel=1e-3)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bytes_and_operations_are_those_of_the_fewest_passes(direction: Direction) -> None:
    streams, width, tokens = SHAPE
    for op in ("merge", "coefficients", "pre", "step", "single_pass"):
        adds = op == "pre" and direction == "backward"  # alone it has no gradient of the streams to add to
        read = moved(op, direction).read - adds * 2 * streams * width * tokens
        assert least(op)[direction] == replace(moved(op, direction), read=read)
    pre, step, merge = (moved(op, direction) for op in ("pre", "step", "merge"))
    layer, stack = (least(op)[direction] for op in ("layer", "stack"))
    for field in ("read", "written", "flops"):
        assert getattr(layer, field) == getattr(pre, field) + getattr(merge, field)
        assert getattr(stack, field) == sum(
            count * getattr(part, field) for count, part in ((1, pre), (STACK_LAYERS - 1, step), (1, merge))
        )


def test_both_is_the_sum() -> None:
    traffic = least("stack", "float32")
    assert set(traffic) == set(DIRECTIONS)
    assert traffic["both"].bytes == traffic["forward"].bytes + traffic["backward"].bytes
    assert traffic["both"].flops == traffic["forward"].flops + traffic["backward"].flops
    assert traffic["both"].bytes > least("stack")["both"].bytes
    assert make_case("merge", *SHAPE, "float32", 1).traffic == least("merge", "float32")


@pytest.mark.parametrize(("op", "tokens"), [*((op, 13) for op in OPS), ("merge", 5), ("pre", 10)])
def test_what_is_wanted_is_the_reference_of_all_tokens(op: str, tokens: int) -> None:
    case = repeat_tokens(make_case(op, *SHAPE[:2], 5, "float32", 1), tokens, CPU)
    problem = Problem(op, "forward", *SHAPE[:2], "float32", tokens)
    assert (case.tokens, case.traffic) == (tokens, least_traffic(problem))
    # Both are float64: only the order of the sums differs.
    assert case.error(lambda *inputs: reference(op, problem)(*(tensor.double() for tensor in inputs))) < 1e-6
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in case.inputs)
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in case.inputs)
    results = reference(op, problem)(*wide)[: len(case.grad_outputs)]
    gradients = torch.autograd.grad(results, wide, tuple(gradient.double() for gradient in case.grad_outputs))
    for got, wanted in zip((*results, *gradients), case.expected, strict=True):
        torch.testing.assert_close(wanted, got, rtol=1e-9, atol=1e-9)


def test_half_precision_is_held_against_float32_copies() -> None:
    case = repeat_tokens(make_case("aggregate", *SHAPE[:2], 5, "bfloat16", 1), 12, CPU)
    assert {tensor.dtype for tensor in case.expected} == {torch.float32}
    assert case.inputs[0].dtype == torch.bfloat16


def test_a_token_from_another_block_is_seen() -> None:
    """Blocks of tokens are powers of two, which a prime period is no multiple of."""
    case = repeat_tokens(make_case("aggregate", *SHAPE[:2], DISTINCT_TOKENS, "float32", 1), 1024, CPU)

    def shifted(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor]:
        return ((pre[:, :, None] * x).sum(1).roll(256, 0),)

    assert case.error(lambda x, pre: ((pre[:, :, None] * x).sum(1),)) < 1e-5
    assert case.error(shifted) > 0.5


def test_tokens_that_are_drawn_for_a_cpu_all_differ() -> None:
    case = make_case("merge", *SHAPE[:2], DISTINCT_TOKENS + 1, "float32", 0)
    assert len({float(token.detach().sum()) for token in case.inputs[0]}) == DISTINCT_TOKENS + 1


def test_few_tokens_are_drawn_for_a_gpu_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "repeat_tokens", lambda case, tokens, device: (case.tokens, tokens, device))
    gpu = torch.device("cuda")
    for tokens, drawn in ((DISTINCT_TOKENS + 1, DISTINCT_TOKENS), (3, 3)):
        assert make_case("merge", *SHAPE[:2], tokens, "float32", 0, gpu) == (drawn, tokens, gpu)
