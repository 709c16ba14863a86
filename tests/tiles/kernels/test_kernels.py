"""Every kernel, for every stream count and dtype, against its float64 reference.

Lowering and compiling take nearly all of the time, so the fast tier has few stream counts of the larger kernels."""

from __future__ import annotations

import pytest
import torch
from building import DefaultKernels, canonical

from autotune.measuring.verify import check, without_updated
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import DTYPES, IDENTITY, NORM, Problem
from tiles.runtime.loaded_kernel import is_result

STREAMS = (1, 2, 3, 4, 8, 16)
FUSED = ("pre", "step", "single_pass")
WIDTH = 72  # a multiple of 8 and of nothing larger, so that vectors have tails


def problems() -> list[Problem]:
    """All dtypes; fused ops, and those of the identity, whose texts are parts of the others', share them out, and those
    with a norm, whose texts are the others' with a few more lines, have the shapes of `LARGE` and `NORMED`."""
    found = [
        canonical(Problem(op, direction, n, WIDTH, dtype, tokens=64))
        for op, direction in kernel_specs()
        for at, n in enumerate(STREAMS)
        for turn, dtype in enumerate(DTYPES)
        if chosen(op, direction, n, dtype, (at + turn) % len(DTYPES) == 0)
    ]
    return list(dict.fromkeys(found))


def chosen(op: str, direction: str, n: int, dtype: str, its_turn: bool) -> bool:
    if (n, dtype) in LARGE.get((op, direction), ()):
        return True
    if NORM in op:
        return (n, dtype) in NORMED.get((op, direction), ())
    return its_turn or not (op in FUSED or op.endswith(IDENTITY))


LARGE = {
    ("coefficients", "forward"): ((3, "float32"),),
    ("coefficients", "backward"): ((3, "float32"),),
    ("project", "forward"): ((3, "bfloat16"),),
    ("project", "backward"): ((4, "float32"),),
    ("pre", "forward"): ((3, "float16"),),
    ("pre", "backward"): (),
    ("step", "forward"): ((3, "float32"),),
    ("step", "backward"): ((4, "bfloat16"),),
    ("single_pass", "forward"): ((4, "bfloat16"),),
    ("single_pass", "backward"): ((3, "float32"),),
    ("merge_identity", "forward"): ((4, "bfloat16"),),
    ("merge_identity", "backward"): ((4, "bfloat16"),),
    ("pre_identity", "forward"): ((4, "bfloat16"),),
    ("pre_identity", "backward"): (),
    ("step_identity", "forward"): (),
    ("step_identity", "backward"): (),
    ("single_pass_identity", "forward"): (),
    ("single_pass_identity", "backward"): ((2, "bfloat16"),),
    ("pre_norm", "forward"): (),
    ("pre_norm", "backward"): ((3, "float32"),),
    ("step_norm", "forward"): (),
    ("step_norm", "backward"): (),
    ("single_pass_norm", "forward"): (),
    ("single_pass_norm", "backward"): (),
    ("pre_norm_identity", "forward"): (),
    ("pre_norm_identity", "backward"): (),
    ("step_norm_identity", "forward"): (),
    ("step_norm_identity", "backward"): (),
    ("single_pass_norm_identity", "forward"): (),
    ("single_pass_norm_identity", "backward"): (),
}
"""What of the kernels that take long to compile is fast."""
NORMED = {
    ("pre_norm", "forward"): ((16, "float16"), (4, "bfloat16")),
    ("pre_norm", "backward"): ((1, "float16"), (8, "bfloat16")),
    ("step_norm", "forward"): ((3, "float32"),),
    ("step_norm", "backward"): ((4, "float16"),),
    ("single_pass_norm", "backward"): ((8, "float16"),),
    ("pre_norm_identity", "backward"): ((4, "float32"),),
    ("single_pass_norm_identity", "backward"): ((2, "float32"),),
}
"""What of those with a norm is slow."""
FEW = (1, 3)
"""The fast stream counts of sinkhorn, which knows one dtype."""


def fast() -> set[Problem]:
    """Of aggregate and merge all but the most streams, which share the dtypes out."""
    dtypes, found = list(DTYPES), set()
    for at, (op, direction) in enumerate(kernel_specs()):
        shared = [(n, dtypes[(at + turn) % len(dtypes)]) for turn, n in enumerate(STREAMS[:-1])]
        few = [(n, "float32") for n in FEW]
        for n, dtype in LARGE.get((op, direction), few if op == "sinkhorn" else shared):
            found.add(canonical(Problem(op, direction, n, WIDTH, dtype, tokens=64)))
    return found


FAST = fast()
TIERS = [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in problems()]
STREAMS_TIERS = [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in STREAMS]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    return DefaultKernels(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("problem", TIERS, ids=Problem.describe)
def test_matches_the_float64_reference_and_writes_nowhere_else(kernels, problem):
    kernel = kernels[problem]
    for tokens, slices in ((0, 1), (1, 1), (5, 2), (37, 3)):
        inputs = kernel.spec.inputs(problem, tokens, seed=tokens)
        check(kernel, inputs, tokens, slices)
        if len(fresh := without_updated(kernel.arguments, inputs)) < len(inputs):
            check(kernel, fresh, tokens, slices)


@pytest.mark.parametrize(
    "problem", [p for p in problems() if p.streams in (2, 3, 4) and p in FAST], ids=Problem.describe
)
def test_repeats_bit_for_bit_at_a_fixed_slice_count(kernels, problem):
    kernel = kernels[problem]
    first = kernel.run(list(kernel.spec.inputs(problem, 61, seed=3).values()), 61, 2)
    for _ in range(3):
        again = kernel.run(list(kernel.spec.inputs(problem, 61, seed=3).values()), 61, 2)
        assert all(
            torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(first, again, strict=True)
        )


def test_results_of_a_token_do_not_depend_on_the_other_tokens(kernels):
    for problem in (p for p in problems() if p in FAST and p.streams > 1 and p.dtype == "float32"):
        kernel = kernels[problem]
        results = [arg.name for arg in kernel.arguments if is_result(arg)]
        partial = {arg.name for arg in kernel.arguments if arg.role == "partial"}
        many = kernel.spec.inputs(problem, 9, seed=1)
        shaped = {arg.name for arg in kernel.arguments if "tokens" in arg.shape}
        one = {name: value[4:5].clone() if name in shaped else value for name, value in many.items()}
        for name, whole, single in zip(results, kernel(*many.values()), kernel(*one.values()), strict=True):
            if name not in partial:
                torch.testing.assert_close(whole[4:5], single, rtol=1e-6, atol=1e-7)


def test_merge_weighs_input_stream_j_in_output_stream_i_with_res_ij(kernels):
    problem = Problem("merge", "forward", 2, WIDTH, tokens=64)
    x = torch.stack((torch.full((WIDTH,), 1.0), torch.full((WIDTH,), 10.0)))[None]
    res = torch.tensor([[[0.25, 0.75], [0.5, 2.0]]])
    out = kernels[problem](x, torch.full((1, WIDTH), 100.0), res, torch.tensor([[0.0, 1.0]]))[0]
    assert out[0, :, 0].tolist() == [0.25 * 1 + 0.75 * 10, 0.5 * 1 + 2.0 * 10 + 100.0]


@pytest.mark.parametrize("n", STREAMS_TIERS)
def test_sinkhorn_is_doubly_stochastic_with_rows_to_rounding(kernels, n):
    problem = Problem("sinkhorn", "forward", n, WIDTH, tokens=64)
    res = kernels[problem](2 * torch.randn(200, n, n, generator=torch.Generator().manual_seed(n)), 0.0)[0]
    assert (res >= 0).all()
    # n additions and one division, each rounded
    assert (res.sum(2) - 1).abs().max() <= (n + 2) * 2.0**-24 * 2
    assert (res.sum(1) - 1).abs().max() < 0.05


@pytest.mark.parametrize("n", STREAMS_TIERS)
@pytest.mark.parametrize("size", [1e2, 1e4, 1e20, 1e38, 3.4e38])
def test_logits_of_any_finite_size_give_finite_results(kernels, n, size):
    random = torch.Generator().manual_seed(7)
    logits = size * (2 * torch.rand(64, n, n, generator=random) - 1)
    logits[:8] = torch.sign(logits[:8]) * size
    logits[8:16, 0] = -size
    logits[16:24, :, 0] = size
    forward = Problem("sinkhorn", "forward", n, WIDTH, tokens=64)
    res = kernels[forward](logits, 0.0)[0]
    assert torch.isfinite(res).all()
    assert (res >= 0).all()
    backward = Problem("sinkhorn", "backward", n, WIDTH, tokens=64)
    assert torch.isfinite(kernels[backward](logits, torch.randn(64, n, n, generator=random), 0.0)[0]).all()


@pytest.mark.parametrize("n", STREAMS_TIERS)
def test_logits_up_to_60_apart_match_the_log_domain_reference(kernels, n):
    random = torch.Generator().manual_seed(n)
    logits = 60 * torch.rand(256, n, n, generator=random) - 30
    grad = torch.randn(256, n, n, generator=random)
    for direction, inputs in (("forward", (logits, 0.0)), ("backward", (logits, grad, 0.0))):
        kernel = kernels[Problem("sinkhorn", direction, n, WIDTH, tokens=64)]
        given = {"logits": logits.double(), "dres": grad.double(), "hc_eps": 0.0}
        want = kernel.spec.reference(kernel.problem, given)
        # 40 half rounds, each with an error of a few float32 ulps
        torch.testing.assert_close(kernel(*inputs)[0].double(), next(iter(want.values())), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_stored_value_survives_a_copy(kernels, dtype):
    """n = 1, res = 1, f = -0 copies x: all 65,536 bit patterns, NaNs as NaNs."""
    kernel = kernels[Problem("merge", "forward", 1, WIDTH, dtype, tokens=64)]
    x, used = _all_patterns(getattr(torch, dtype))
    ones = torch.ones(len(x))
    out = kernel(x, -torch.zeros(len(x), WIDTH, dtype=x.dtype), ones[:, None, None], ones[:, None])[0]
    before, after = x.flatten()[:used], out.flatten()[:used]
    assert torch.equal(before.isnan(), after.isnan())
    number = ~before.isnan()
    assert torch.equal(before[number].view(torch.int16), after[number].view(torch.int16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [0.3337, 1 + 2.0**-9, 3e-5, 7e3])
def test_stores_round_like_torch(kernels, dtype, scale):
    """One product a value, so torch's own rounding of the float32 product is the answer, overflow and underflow too."""
    kernel = kernels[Problem("merge", "forward", 1, WIDTH, dtype, tokens=64)]
    x, _used = _all_patterns(getattr(torch, dtype))
    res = torch.full((len(x), 1, 1), scale)
    out = kernel(x, -torch.zeros(len(x), WIDTH, dtype=x.dtype), res, torch.ones(len(x), 1))[0]
    want = (x.float() * res).to(x.dtype)
    number = ~want.isnan()
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(out[number].view(torch.int16), want[number].view(torch.int16))


def _all_patterns(dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    rows = -(-len(patterns) // WIDTH)
    padded = torch.cat((patterns, torch.zeros(rows * WIDTH - len(patterns), dtype=torch.int16)))
    return padded.view(dtype).view(rows, 1, WIDTH), len(patterns)


def test_nan_and_infinity_in_the_streams_reach_the_results(kernels):
    kernel = kernels[Problem("project", "forward", 4, WIDTH, "float32", tokens=64)]
    inputs = kernel.spec.inputs(kernel.problem, 3, seed=0)
    inputs["x"][1, 2, 5] = torch.nan
    z, s = kernel(*inputs.values())
    assert z[1].isnan().all()
    assert s[1].isnan()
    assert not z[::2].isnan().any()


def test_a_token_of_zeros_is_normalised_to_zeros_with_finite_gradients(kernels):
    forward, backward = Problem("pre_norm", "forward", 4, WIDTH, "bfloat16"), Problem("pre_norm", "backward", 3, WIDTH)
    for problem in (forward, backward):
        kernel = kernels[problem]
        inputs = kernel.spec.inputs(kernel.problem, 5, seed=1)
        inputs["x"][2] = 0
        inputs |= {"s": inputs["s"].index_fill(0, torch.tensor(2), 0)} if "s" in inputs else {}
        results = kernel(*inputs.values())
        assert all(result.isfinite().all() for result in results)
        if problem is forward:
            assert not results[0][2].any()
            assert results[0][:2].all()


@pytest.mark.parametrize("n", STREAMS_TIERS[1:])  # with one stream res is 1 whatever its logit
def test_a_nan_logit_spreads_over_its_token_and_no_further(kernels, n):
    """A run that has diverged must show it: nothing turns a NaN into a plausible matrix."""
    sinkhorn = kernels[Problem("sinkhorn", "forward", n, WIDTH, tokens=64)]
    logits = torch.randn(40, n, n, generator=torch.Generator().manual_seed(n))
    for place in range(n * n):
        poisoned = logits.clone()
        poisoned[7].view(-1)[place] = torch.nan
        res = sinkhorn(poisoned, 0.0)[0]
        assert res[7].isnan().all()
        assert not res[:7].isnan().any()
        assert not res[8:].isnan().any()
    coefficients = kernels[Problem("coefficients", "forward", n, WIDTH, tokens=64)]
    inputs = coefficients.spec.inputs(coefficients.problem, 9, seed=0)
    inputs["z"][4] = torch.nan
    for result in coefficients(*inputs.values()):
        assert result[4].isnan().all()
        assert not result[:4].isnan().any()


def test_a_kernel_refuses_tensors_that_do_not_fit(kernels):
    problem = Problem("aggregate", "forward", 4, WIDTH, "float32", tokens=64)
    kernel = kernels[problem]
    x, pre = kernel.spec.inputs(problem, 3, seed=0).values()
    for bad in ((x.bfloat16(), pre), (x, pre[:2]), (x.transpose(1, 2), pre), (x[..., :64], pre), (x.to("meta"), pre)):
        with pytest.raises(ValueError, match="must be a contiguous float32 cpu tensor"):
            kernel(*bad)
    with pytest.raises(TypeError, match="must be a tensor"):
        kernel(1.0, pre)


def test_small_work_stays_on_one_thread_and_large_work_uses_torchs_threads(kernels):
    kernel = kernels[Problem("aggregate", "forward", 4, WIDTH, "float32", tokens=64)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert [kernel.slices(tokens) for tokens in (0, 1, 10, 100_000)] == [1, 1, 1, 2]
        torch.set_num_threads(1)
        assert kernel.slices(100_000) == 1
    finally:
        torch.set_num_threads(before)


def test_rounds_are_part_of_the_problem(kernels):
    for rounds in (1, 100):
        problem = Problem("sinkhorn", "forward", 3, 8, rounds=rounds)
        kernel = kernels[problem]
        assert kernel.problem.rounds == rounds
        check(kernel, kernel.spec.inputs(kernel.problem, 19, seed=0), 19, 1)
