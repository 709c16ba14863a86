"""Batch invariance: a token's bits alone and among others, the schedules that give them, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

import mhc
from mhc.dispatch.kernels import Kernels
from tiles.cache.cache import KernelCache
from tiles.cache.record import Key
from tiles.compiler.compile import compile_kernel
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_spec, kernel_specs
from tiles.kernels.spec import DTYPES, EVERY_TOKENS, IDENTITY, NORM, TOKENS, Problem
from tiles.runtime.loaded_kernel import is_given, is_result
from tiles.target import detect_device

WIDTH = 72
BATCHES = (1, 2, 17, 63, 64, 65, 1000)
ALL_TOKENS = 4096

FAST = {
    ("aggregate", "backward", 2, "bfloat16"),
    ("merge", "forward", 4, "bfloat16"),
    ("coefficients", "forward", 2, "float32"),
}


def cases():
    return [
        pytest.param(op, direction, n, dtype, marks=() if (op, direction, n, dtype) in FAST else pytest.mark.slow)
        for op, direction in kernel_specs()
        if not op.endswith(IDENTITY) and (NORM not in op or op == "single_pass_norm")
        for at, n in enumerate((1, 2, 4, 8))
        if NORM not in op or n == 2  # its sums are the others', and one more of each token
        for dtype in dtypes_of(op, at)
    ]


def dtypes_of(op, at):
    """Those that an op has; of ops that take long to compile, one for each stream count in turn."""
    if op in ("coefficients", "sinkhorn"):
        return DTYPES[:1]
    return DTYPES if op in ("aggregate", "merge") else (DTYPES[at % len(DTYPES)],)


@pytest.fixture(scope="module")
def kernels():
    return Kernels.defaults().batch_invariant_form()


@pytest.mark.parametrize(("op", "direction", "n", "dtype"), cases())
def test_a_token_has_the_same_bits_in_every_batch_and_with_every_number_of_threads(kernels, op, direction, n, dtype):
    """All results of the forward and, backward, all gradients that are a token's own. Batches begin at odd places, so
    that a token is at another place of a register block, of a block of tokens, and of a thread's share."""
    problem = Problem(op, direction, n, WIDTH, dtype)
    spec = kernel_spec(op, direction)
    arguments = spec.arguments(problem)
    inputs = spec.inputs(problem, ALL_TOKENS, seed=1)
    names = [argument.name for argument in arguments if is_result(argument)]
    own = [argument.name for argument in arguments if is_result(argument) and argument.shape[:1] == (TOKENS,)]

    def run(first, count):
        given = [
            inputs[argument.name][first : first + count].clone() if TOKENS in argument.shape else inputs[argument.name]
            for argument in arguments
            if is_given(argument)
        ]
        return dict(zip(names, kernels.run(op, direction, n, WIDTH, problem.rounds, given), strict=True))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = run(0, ALL_TOKENS)
        for number in (1, 2):
            torch.set_num_threads(number)
            for count in BATCHES:
                first = 3 * count % (ALL_TOKENS - count) + number
                some = run(first, count)
                for name in own:
                    assert torch.equal(some[name], together[name][first : first + count]), (name, count, number)
    finally:
        torch.set_num_threads(threads)
    assert own


def test_layers_of_one_token_and_of_many_agree_inside_the_block_alone():
    """The kernels that run, by the report; outside of the block token counts have buckets again."""
    x = torch.randn(40, 2, 64)
    with mhc.using(Kernels.defaults()) as usual:
        block = mhc.HyperConnection(64, 2, torch.nn.Identity())
        with torch.no_grad():
            torch.nn.init.normal_(block.phi)
            with mhc.batch_invariant() as kernels:
                together, alone = block(x), block(x[7:8])
            assert torch.equal(alone[0], together[7])
            assert {row.tokens for row in kernels.report()} == {EVERY_TOKENS}
            assert "  every  " in str(kernels.report())
            block(x)
        assert {row.tokens for row in usual.report()} == {64}
        assert mhc.active() is usual


def stored(folder, tokens):
    problem = Problem("aggregate", "forward", 2, 64, "float32", tokens)
    spec, device = kernel_spec("aggregate", "forward"), detect_device("cpu")
    cache, schedule = KernelCache(folder), spec.default(problem, device.target)
    schedule = replace(schedule, block_width=32 if tokens == EVERY_TOKENS else 64, nontemporal=0)
    made = compile_kernel(problem, schedule, device.target)
    cache.put(Key.of(problem, device), asdict(schedule), made.binary, made.source, {"tuned_ms": 1.0}, {})


def test_kernels_for_every_token_count_are_loaded_by_name_and_serve_every_batch(tmp_path):
    for tokens in (64, EVERY_TOKENS):
        stored(tmp_path, tokens)
    x, pre = torch.randn(100, 2, 64), torch.rand(100, 2)
    with mhc.using(Kernels.from_path(tmp_path, batch_invariant=True)) as kernels:
        for count in (1, 64, 100):
            mhc.functional.aggregate(x[:count], pre[:count])
        (row,) = kernels.report()
    assert (row.runs, row.tokens) == ("tuned", EVERY_TOKENS)
    assert row.why.startswith("exact: tuned for every token count on this device")
    with mhc.using(Kernels.from_path(tmp_path)) as kernels:
        mhc.functional.aggregate(x[:64], pre[:64])
        (row,) = kernels.report()
    assert row.why.startswith("exact: tuned for 64 tokens")


def test_a_cache_without_kernels_for_every_token_count_is_refused_in_a_line(tmp_path):
    stored(tmp_path, 64)
    with pytest.raises(BadInput, match=r"^batch_invariant must have kernels .* run `mhc-tune tune --batch-invariant`$"):
        mhc.load_kernels(tmp_path, batch_invariant=True)
