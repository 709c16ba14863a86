"""Every op, forward and backward, against the paper's formulas written out in float64."""

import math

import pytest
import torch

from mhc import functional

TOKENS, WIDTH = 5, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Results are rounded to the streams' dtype once: half a unit in the last place.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# float32 accumulation of up to K = 256 products, or of 40 half rounds of Sinkhorn, relative to the largest result.
ACCUMULATED = 2e-5
EPS = 1e-6


def sinkhorn(logits, rounds=20):
    m = torch.exp(logits - logits.amax(-2, keepdim=True))
    for _ in range(rounds):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def project(x, phi):
    flat = x.flatten(1)
    return flat @ phi.T, (flat * flat).sum(1)


def coefficients(z, s, alpha, bias):
    n = math.isqrt(z.shape[1] + 1) - 1
    r = 1 / torch.sqrt(s / (n * WIDTH) + EPS)[:, None]
    h_pre = alpha[0] * z[:, :n] * r + bias[:n]
    h_post = alpha[1] * z[:, n : 2 * n] * r + bias[n : 2 * n]
    h_res = alpha[2] * z[:, 2 * n :] * r + bias[2 * n :]
    return torch.sigmoid(h_pre), 2 * torch.sigmoid(h_post), sinkhorn(h_res.view(-1, n, n))


def aggregate(x, pre):
    return sum(pre[:, i, None] * x[:, i] for i in range(x.shape[1]))


def merge(x, f, res, post):
    n = x.shape[1]
    rows = [sum(res[:, i, j, None] * x[:, j] for j in range(n)) + post[:, i, None] * f for i in range(n)]
    return torch.stack(rows, dim=1)


def pre(x, phi, alpha, bias):
    weights, post, res = coefficients(*project(x, phi), alpha, bias)
    return aggregate(x, weights), post, res


def step(x, f, post, res, phi, alpha, bias):
    x_next = merge(x, f, res, post)
    return (x_next, *pre(x_next, phi, alpha, bias))


def single_pass(x, f, pre, post, res, phi, alpha, bias):
    x_next = merge(x, f, res, post)
    return (x_next, aggregate(x_next, pre), *coefficients(*project(x_next, phi), alpha, bias))


OPS = ("project", "coefficients", "sinkhorn", "aggregate", "merge")
FUSED = (pre, step, single_pass)
FORMULAS = {each.__name__: each for each in (project, coefficients, sinkhorn, aggregate, merge, *FUSED)}


def inputs(op, n, dtype):
    """Asymmetric values; streams in `dtype`, the rest float32."""
    random = torch.Generator().manual_seed(n)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=random).to(dtype)

    fan_in, outputs = n * WIDTH, n * n + 2 * n
    x = normal(TOKENS, n, WIDTH, dtype=DTYPES[dtype])
    parameters = normal(outputs, fan_in) / fan_in**0.5, normal(3), normal(outputs)
    f, post = normal(TOKENS, WIDTH, dtype=DTYPES[dtype]), 2 * normal(TOKENS, n).sigmoid()
    res = normal(TOKENS, n, n).softmax(-1)
    s = fan_in * (0.5 + torch.rand(TOKENS, generator=random))
    return {
        "project": (x, parameters[0]),
        "coefficients": (normal(TOKENS, outputs), s, *parameters[1:]),
        "sinkhorn": (3 * normal(TOKENS, n, n),),
        "aggregate": (x, normal(TOKENS, n).sigmoid()),
        "merge": (x, f, res, post),
        "pre": (x, *parameters),
        "step": (x, f, post, res, *parameters),
        "single_pass": (x, f, post.roll(1, 1) / 2, post, res, *parameters),
    }[op]


def call(op, given, n):
    extra = {"streams": n, "width": WIDTH} if op == "coefficients" else {}
    return getattr(functional, op)(*given, **extra)


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def assert_close(actual, expected, what):
    error = (actual.double() - expected).abs()
    allowed = ROUNDING[actual.dtype] * expected.abs() + ACCUMULATED * max(1.0, expected.abs().max().item())
    assert (error <= allowed).all(), f"{what}: error {error.max():.3g}, allowed {allowed.min():.3g}"


def check_op(op, n, dtype):
    given = [value.requires_grad_() for value in inputs(op, n, dtype)]
    wide = [value.detach().double().requires_grad_() for value in given]
    actual, expected = as_tuple(call(op, given, n)), as_tuple(FORMULAS[op](*wide))
    for index, (result, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert result.dtype == (given[0].dtype if op in ("aggregate", "merge", "pre") and index == 0 else torch.float32)
        assert_close(result.detach(), wanted.detach(), f"{op} result {index}")
    random = torch.Generator().manual_seed(7)
    grads = [torch.randn(result.shape, generator=random).to(result.dtype) for result in actual]
    found = torch.autograd.grad(actual, given, grads)
    truths = torch.autograd.grad(expected, wide, [grad.double() for grad in grads])
    for index, (value, grad, truth) in enumerate(zip(given, found, truths, strict=True)):
        assert grad.dtype == value.dtype
        assert grad.shape == value.shape
        assert_close(grad, truth, f"{op} gradient {index}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("op", OPS)
def test_reference_follows_its_formula(op, n, dtype):
    check_op(op, n, dtype)


# Compiling takes seconds a kernel; tests/tiles compiles every family at more stream counts.
COMPILED = [("coefficients", 4, "float32")]
REST = [(op, 3, "float16") for op in OPS] + [(op, 4, "float32") for op in OPS if op != "coefficients"]
REST += [(op, 4, "bfloat16") for op in ("project", "aggregate", "merge")]


@pytest.mark.parametrize(
    ("op", "n", "dtype"), [*COMPILED, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
)
def test_compiled_kernels_follow_their_formula(on_compiled, op, n, dtype):
    check_op(op, n, dtype)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("op", ["pre", "step", "single_pass"])
def test_compositions_follow_their_formulas(op, n):
    check_op(op, n, "float32")


def test_rounds_and_eps_reach_the_kernels(kernels):
    z, s, alpha, bias = inputs("coefficients", 4, "float32")
    once = functional.coefficients(z, s, alpha, bias, streams=4, width=WIDTH, rounds=1)[2]
    logits = (alpha[2] * z * torch.rsqrt(s / (4 * WIDTH) + EPS)[:, None] + bias)[:, 8:].view(-1, 4, 4).double()
    assert_close(once, sinkhorn(logits, 1), "one round")
    dull = functional.coefficients(z, s, alpha, bias, streams=4, width=WIDTH, eps=1e12)[0]
    assert_close(dull, torch.sigmoid(bias[:4]).double().expand(TOKENS, 4), "an eps that drowns z")


@pytest.mark.parametrize("kernels", ["reference", pytest.param("compiled", marks=pytest.mark.slow)], indirect=True)
def test_leading_dimensions_are_tokens(kernels):
    x, f, res, post = inputs("merge", 4, "float32")
    given = x[:4], f[:4], res[:4], post[:4]
    apart = functional.merge(*(value.unflatten(0, (2, 2)) for value in given))
    assert torch.equal(apart.flatten(0, 1), functional.merge(*given))
    alone = functional.merge(x[0], f[0], res[0], post[0])
    assert torch.equal(alone, functional.merge(x[:1], f[:1], res[:1], post[:1])[0])
    z, s = functional.project(x[0], torch.ones(24, 4 * WIDTH))
    assert (z.shape, s.shape) == ((24,), ())
    assert functional.sinkhorn(res.view(1, TOKENS, 4, 4)).shape == (1, TOKENS, 4, 4)


@pytest.mark.parametrize("op", sorted(FORMULAS))
def test_inputs_need_not_be_contiguous(kernels, op):
    given = inputs(op, 4, "float32")
    strided = [torch.stack((value, value), dim=-1)[..., 0].requires_grad_() for value in given]
    packed = [value.clone().requires_grad_() for value in given]
    assert not any(value.is_contiguous() for value in strided)
    left, right = (
        # sum() hands out the gradient as an expanded scalar, which is not contiguous either
        (*results, *torch.autograd.grad(sum(result.sum() for result in results), values))
        for values in (strided, packed)
        for results in [as_tuple(call(op, values, 4))]
    )
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("op", sorted(FORMULAS))
def test_no_token_and_one_token(kernels, op, tokens):
    fused = {"pre": (1, 2, 3), "step": (4, 5, 6), "single_pass": (5, 6, 7)}
    parameters = ({"project": (1,), "coefficients": (2, 3)} | fused).get(op, ())
    given = [
        (value if index in parameters else value[:tokens].clone()).requires_grad_()
        for index, value in enumerate(inputs(op, 4, "float32"))
    ]
    results = as_tuple(call(op, given, 4))
    found = torch.autograd.grad(sum(result.sum() for result in results), given)
    for index, (value, grad) in enumerate(zip(given, found, strict=True)):
        assert grad.shape == value.shape
        assert grad.isfinite().all()
        if tokens == 0 and index in parameters:
            assert (grad == 0).all(), "no token, no gradient for parameters"
    if tokens == 1:
        for result, wanted in zip(
            results, as_tuple(FORMULAS[op](*(value.detach().double() for value in given))), strict=True
        ):
            assert_close(result.detach(), wanted, op)
    assert all(result.isfinite().all() for result in results)


def test_only_what_needs_a_gradient_gets_one(kernels):
    x, f, res, post = inputs("merge", 4, "float32")
    f.requires_grad_()
    functional.merge(x, f, res, post).sum().backward()
    assert f.grad is not None
    assert all(value.grad is None for value in (x, res, post))
    with torch.no_grad():
        assert not functional.merge(x, f, res, post).requires_grad


def test_an_unused_result_counts_as_zero_gradient(kernels):
    x, phi = (value.requires_grad_() for value in inputs("project", 4, "float32"))
    functional.project(x, phi)[1].sum().backward()
    assert_close(x.grad, 2 * x.detach().double(), "the norm alone")
    assert (phi.grad == 0).all()
