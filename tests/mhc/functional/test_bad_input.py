"""Error messages for bad input: one line with the rule, the values received, what to do."""

import re

import pytest
import torch

import mhc
from mhc import functional

F32, CPU = torch.float32, "cpu"


def zeros(*shape, dtype=F32, device=CPU):
    return torch.zeros(shape, dtype=dtype, device=device)


def coefficients(z=None, s=None, alpha=None, bias=None, streams=4, width=8, rounds=20):
    given = (
        value if value is not None else zeros(*shape)
        for value, shape in ((z, (5, 24)), (s, (5,)), (alpha, (3,)), (bias, (24,)))
    )
    return functional.coefficients(*given, streams=streams, width=width, rounds=rounds)


def merge(x=None, f=None, res=None, post=None):
    shapes = (5, 4, 8), (5, 8), (5, 4, 4), (5, 4)
    return functional.merge(
        *(zeros(*shape) if value is None else value for value, shape in zip((x, f, res, post), shapes, strict=True))
    )


CASES = {
    "width": (lambda: functional.project(zeros(5, 4, 12), zeros(24, 48)), "multiple of 8, got 12", "pad to 16"),
    "no width": (lambda: functional.project(zeros(5, 4, 0), zeros(24, 0)), "multiple of 8, got 0", "pad to 8"),
    "n = 0": (lambda: functional.project(zeros(5, 0, 8), zeros(0, 0)), "1..16, got 0", "choose"),
    "n = 17": (lambda: functional.project(zeros(5, 17, 8), zeros(323, 136)), "1..16, got 17", "choose"),
    "no streams": (lambda: functional.project(zeros(8), zeros(3, 8)), "x must be", "dimension"),
    "dtype of x": (lambda: functional.project(zeros(5, 4, 8, dtype=torch.float64), zeros(24, 32)), "float64", "cast"),
    "dtype of phi": (lambda: functional.project(zeros(5, 4, 8), zeros(24, 32, dtype=torch.bfloat16)), "phi", "cast"),
    "shape of phi": (lambda: functional.project(zeros(5, 4, 8), zeros(32, 24)), r"\(24, 32\).*\(32, 24\)", "reshape"),
    "device of phi": (lambda: functional.project(zeros(5, 4, 8), zeros(24, 32, device="meta")), "cpu.*meta", "move"),
    "shape of z": (lambda: coefficients(z=zeros(5, 15)), r"z .*\(5, 24\).*\(5, 15\)", "reshape"),
    "tokens of s": (lambda: coefficients(s=zeros(4)), r"z .*\(4, 24\).*\(5, 24\)", "reshape"),
    "shape of alpha": (lambda: coefficients(alpha=zeros(1)), r"alpha .*\(3,\).*\(1,\)", "reshape"),
    "shape of bias": (lambda: coefficients(bias=zeros(8)), r"bias .*\(24,\).*\(8,\)", "reshape"),
    "streams of coefficients": (lambda: coefficients(streams=17), "1..16, got 17", "choose"),
    "width of coefficients": (lambda: coefficients(width=9), "multiple of 8, got 9", "pad to 16"),
    "rounds": (lambda: coefficients(rounds=-1), "rounds must be .*got -1", "20"),
    "square logits": (lambda: functional.sinkhorn(zeros(5, 4, 3)), r"\(5, 3, 3\).*\(5, 4, 3\)", "reshape"),
    "one-dimensional logits": (lambda: functional.sinkhorn(zeros(4)), "logits", "square"),
    "far too many logits": (lambda: functional.sinkhorn(zeros(5, 17, 17)), "1..16, got 17", "choose"),
    "shape of pre": (lambda: functional.aggregate(zeros(5, 4, 8), zeros(5, 3)), r"pre .*\(5, 4\).*\(5, 3\)", "reshape"),
    "mixed dtypes": (lambda: merge(f=zeros(5, 8, dtype=torch.bfloat16)), "f must be torch.float32.*bfloat16", "cast"),
    "mixed devices": (lambda: merge(f=zeros(5, 8, device="meta")), "f must be .*cpu.*meta", "move"),
    "shape of res": (lambda: merge(res=zeros(5, 4)), r"res .*\(5, 4, 4\).*\(5, 4\)", "reshape"),
    "dtype of res": (lambda: merge(res=zeros(5, 4, 4, dtype=torch.float16)), "res must be torch.float32", "cast"),
    "tokens of post": (lambda: merge(post=zeros(1, 4)), r"post .*\(5, 4\).*\(1, 4\)", "reshape"),
    "module's width": (lambda: mhc.HyperConnection(12, 4, torch.nn.Identity()), "got 12", "pad to 16"),
    "module's streams": (lambda: mhc.HyperConnection(8, 17, torch.nn.Identity()), "got 17", "choose"),
    "module's mode": (
        lambda: mhc.HyperConnection(8, 4, torch.nn.Identity(), mode="x"),
        "mhc, hc, residual, got x",
        "choose",
    ),
    "module's input": (
        lambda: mhc.HyperConnection(8, 4, torch.nn.Identity())(zeros(5, 8, 8)),
        r"\(5, 4, 8\)",
        "reshape",
    ),
    "head's input": (lambda: mhc.StreamHead(8, 4)(zeros(5, 8, 8)), r"\(5, 4, 8\)", "reshape"),
    "expand": (lambda: mhc.expand_streams(zeros(5, 8), 0), "1..16, got 0", "choose"),
    "reduce": (lambda: mhc.reduce_streams(zeros(5, 4, 8), "max"), "mean or sum, got max", "StreamHead"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_rule_values_and_remedy(case):
    call, received, remedy = CASES[case]
    with pytest.raises(mhc.BadInput) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert re.search(received, text), text
    assert remedy in text


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder / "missing.mhcpack",
        lambda folder: write(folder / "text.mhcpack", b"no pack"),
        lambda folder: write(folder / "empty.mhcpack", b""),
        lambda folder: folder,
    ],
    ids=["missing", "not a pack", "empty file", "empty folder"],
)
def test_kernels_that_cannot_be_loaded(tmp_path, make):
    before = mhc.active()
    with pytest.raises(mhc.BadInput) as caught:
        mhc.load_kernels(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert mhc.active() is before, "what ran before goes on"
