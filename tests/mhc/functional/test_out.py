"""`out=`: results in tensors of the caller, bit for bit those without it, and what is refused in a line."""

import pytest
import torch

import mhc
from mhc import functional, sublayer_norm

T, N, C = (3, 5), 4, 16


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def calls(dtype=torch.float32, leading=T):
    """Each function on inputs of its own: called without `out`, or with."""
    torch.manual_seed(0)
    x, f = drawn(*leading, N, C, dtype=dtype), drawn(*leading, C, dtype=dtype)
    pre, post, res = drawn(*leading, N), drawn(*leading, N), drawn(*leading, N, N)
    maps = {rows: (drawn(rows, N * C), drawn(3 if rows > 2 * N else 2), drawn(rows)) for rows in (24, 8)}
    z, s = drawn(*leading, 24), drawn(*leading).square()

    def bind(function, *given, **settings):
        return lambda **out: function(*given, **settings, **out)

    return {
        "coefficients": bind(functional.coefficients, z, s, drawn(3), drawn(24), streams=N, width=C),
        "aggregate": bind(functional.aggregate, x, pre),
        "merge": bind(functional.merge, x, f, res, post),
        "merge_identity": bind(functional.merge, x, f, None, post),
        "pre": bind(functional.pre, x, *maps[24]),
        "pre_norm": bind(functional.pre, x, *maps[24], norm_weight=drawn(C)),
        "pre_identity": bind(functional.pre, x, *maps[8], hc_eps=1e-6),
        "step": bind(functional.step, x, f, post, res, *maps[24]),
        "step_norm": bind(functional.step, x, f, post, res, *maps[24], norm_weight=drawn(C)),
        "step_identity": bind(functional.step, x, f, post, None, *maps[8]),
        "single_pass": bind(functional.single_pass, x, f, pre, post, res, *maps[24]),
        "single_pass_identity": bind(functional.single_pass, x, f, pre, post, None, *maps[8]),
        "single_pass_norm": bind(functional.single_pass, x, f, pre, post, res, *maps[24], norm_weight=drawn(C)),
    }


def empty_like(results):
    if isinstance(results, torch.Tensor):
        return torch.full_like(results, torch.nan)
    return tuple(None if result is None else torch.full_like(result, torch.nan) for result in results)


def tensors(results):
    return [each for each in ((results,) if isinstance(results, torch.Tensor) else results) if each is not None]


def check(call):
    expected = call()
    out = empty_like(expected)
    versions = [each._version for each in tensors(out)]
    assert call(out=out) is out
    for got, want, version in zip(tensors(out), tensors(expected), versions, strict=True):
        assert torch.equal(got, want)
        assert got._version > version, "autograd sees the write"


@pytest.mark.parametrize("op", calls())
def test_results_are_those_without_out(op):
    """On the reference, whose results are copied."""
    check(calls()[op])


@pytest.mark.parametrize("op", ["pre_norm", "step_norm", "single_pass_norm"])
def test_a_norm_after_the_op_is_written_too(op, monkeypatch):
    """On devices whose kernels have no norm."""
    monkeypatch.setattr(sublayer_norm, "FUSED_DEVICES", ())
    check(calls()[op])


@pytest.mark.parametrize("op", ["coefficients", "aggregate", "merge", "pre", "step"])
def test_kernels_write_to_out_and_nothing_else_is_allocated(op, on_compiled, monkeypatch):
    call = calls()[op]
    out = empty_like(call())
    made = []
    empty = torch.empty
    check(call)
    monkeypatch.setattr(torch, "empty", lambda shape, **rest: made.append(tuple(shape)) or empty(shape, **rest))
    call(out=out)
    assert made == ([(*T, 24), T] if op in ("pre", "step") else []), "z and s alone"


@pytest.mark.slow
@pytest.mark.parametrize("leading", [(1,), (0,), (65,)], ids=str)
@pytest.mark.parametrize("op", ["merge_identity", "pre"])
def test_kernels_of_half_precision_write_to_out(op, leading, on_compiled):
    check(calls(torch.bfloat16, leading)[op])


def test_separate_kernels_fill_out_too(on_compiled, monkeypatch):
    call = calls()["pre"]
    expected = call()
    kernels = mhc.Kernels.defaults(fused=False)
    with mhc.using(kernels):
        out = empty_like(expected)
        call(out=out)
    assert "separate" in {row.runs for row in kernels.report()}
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_it_works_in_inference_mode_and_without_gradients_of_parameters():
    x, phi = drawn(5, N, C), drawn(24, N * C).requires_grad_()
    given = (x, phi, drawn(3), drawn(24))
    with torch.no_grad():
        out = empty_like(functional.pre(*given))
        assert functional.pre(*given, out=out) is out
    with torch.inference_mode():
        inner = empty_like(functional.pre(*given))
        functional.pre(*given, out=inner)
    assert torch.equal(out[0], inner[0])


def test_two_buffers_in_turn_carry_the_residual():
    """x is read, the other buffer is written: the next call has them the other way round."""
    buffers, f = [drawn(8, N, C), torch.empty(8, N, C)], drawn(8, C)
    res, post, expected = drawn(8, N, N), drawn(8, N), buffers[0].clone()
    for _ in range(3):
        functional.merge(buffers[0][:5], f[:5], res[:5], post[:5], out=buffers[1][:5])
        expected = functional.merge(expected, f, res, post)
        buffers.reverse()
    assert torch.equal(buffers[0][:5], expected[:5])


X, F, RES, POST, PRE = drawn(5, N, C), drawn(5, C), drawn(5, N, N), drawn(5, N), drawn(5, N)
MAPS = drawn(24, N * C), drawn(3), drawn(24)
OVERLAPPING = torch.empty(9, N, C)


def merged(out, x=X, **changes):
    return functional.merge(x, F, RES, POST, out=out, **changes)


def before(*out):
    return functional.pre(X, *MAPS, out=out)


U, POST_OUT, RES_OUT = torch.empty(5, C), torch.empty(5, N), torch.empty(5, N, N)

REFUSED = {
    "shape": (lambda: merged(torch.empty(4, N, C)), r"out must be .*\(5, 4, 16\).*got .*\(4, 4, 16\)"),
    "dtype": (lambda: merged(torch.empty(5, N, C, dtype=torch.bfloat16)), "out must be torch.float32.*bfloat16"),
    "device": (lambda: merged(torch.empty(5, N, C, device="meta")), "out must be .*on cpu.*on meta"),
    "not contiguous": (lambda: merged(torch.empty(N, 5, C).transpose(0, 1)), "out must be contiguous .*strides"),
    "not aligned": (lambda: merged(torch.empty(5 * N * C + 1)[1:].view(5, N, C)), "multiple of 32 bytes, got .*byte 4"),
    "no tensor": (lambda: merged([X]), r"out must be a tensor, got \(Tensor\): pass what merge returns"),
    "a tensor alone": (lambda: functional.pre(X, *MAPS, out=U), "out must be a tuple of 3 tensors, got Tensor"),
    "too few": (lambda: before(U, POST_OUT), r"out must be a tuple of 3 tensors, got \(Tensor, Tensor\)"),
    "no res": (lambda: before(U, POST_OUT, None), r"a tuple of 3 tensors, got \(Tensor, Tensor, NoneType\)"),
    "a res of the identity": (
        lambda: functional.pre(X, MAPS[0][:8], MAPS[1][:2], MAPS[2][:8], out=(U, POST_OUT, RES_OUT)),
        "a tuple of 2 tensors and None, for res, got",
    ),
    "one of several": (lambda: before(U, POST_OUT, POST_OUT), r"out\[2\], res, must be .*\(5, 4, 4\).*\(5, 4\)"),
    "in place": (lambda: merged(X), r"out must have memory of its own, got some of x: .*two in turn"),
    "a part of an input": (lambda: merged(OVERLAPPING[4:], OVERLAPPING[:5]), "memory of its own, got some of x"),
    "the streams of a step": (
        lambda: functional.step(X, F, POST, RES, *MAPS, out=(X, U, POST_OUT, RES_OUT)),
        r"out\[0\], x_next must have memory of its own, got some of x",
    ),
    "each other": (
        lambda: functional.single_pass(X, F, PRE, POST, RES, *MAPS, out=(X + 0, U, POST_OUT, POST_OUT, RES_OUT)),
        r"out\[3\], post_next must have memory of its own, got some of out\[2\], pre_next",
    ),
    "gradients of an input": (lambda: merged(X + 0, X.clone().requires_grad_()), "out has no gradients, .*no_grad"),
    "gradients of out": (lambda: merged((X + 0).requires_grad_()), "out has no gradients, .*no_grad"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_a_line(case):
    call, text = REFUSED[case]
    kept = X.clone()
    with pytest.raises(mhc.BadInput, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert torch.equal(X, kept)


def test_under_transforms_it_is_refused_in_a_line():
    with pytest.raises(mhc.BadInput, match=r"^out is for plain tensors outside of torch\.compile"):
        torch.func.vmap(lambda f: functional.merge(X, f, RES, POST, out=torch.empty(5, N, C)))(drawn(2, 5, C))
