"""Verification finds every kind of wrong kernel."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from autotune.measuring.verify import GUARD_TOKENS, ODD_TOKENS, GuardedTensor, WrongResult, init_updated, verify
from tiles.kernels.spec import TOKENS, Argument, Problem

TOKEN_COUNT = 64
PROBLEM = Problem("toy", "forward", 1, 8, tokens=TOKEN_COUNT)
ARGUMENTS = (
    Argument("x", (TOKENS, 8), "bfloat16", "input"),
    Argument("y", (TOKENS, 8), "bfloat16", "output"),
    Argument("total", (8,), "float32", "partial"),
)


def reference(problem, values):
    return {"y": 2 * values["x"], "total": values["x"].sum(0)}


def inputs(problem, tokens, seed):
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
    x[:1, 0] = 0.0 if tokens == ODD_TOKENS else 1.0
    return {"x": x}


SPEC = SimpleNamespace(inputs=inputs, reference=reference, tolerance=lambda problem, name: (1e-2, 1e-4))


def neighbour(tensor, offset):
    """One element outside of a result's memory."""
    at = tensor.storage_offset() + (tensor.numel() - 1 + offset if offset > 0 else offset)
    return torch.as_strided(tensor, (1,), (1,), at)


@dataclass
class Kernel:
    """y = 2x and total = Σ x, in slices of tokens, with a fault."""

    fault: str = "none"
    problem = PROBLEM
    device = torch.device("cpu")
    arguments = ARGUMENTS
    spec = SPEC

    def __post_init__(self):
        self.runs = []

    kind = "cpu"

    def slices(self, tokens):
        return 2

    def launch(self, inputs, results, tokens, slices):
        self.runs.append((tokens, slices, inputs["x"]))
        x, y, total = inputs["x"], results["y"], results["total"]
        assert torch.isnan(y).all()
        assert torch.isnan(total).all()
        for part in range(slices):
            rows = slice(tokens * part // slices, tokens * (part + 1) // slices)
            y[rows] = 2 * x[rows]
            total[part] = x[rows].float().sum(0)
        self.do_wrong(x, y, total, tokens, slices)

    def do_wrong(self, x, y, total, tokens, slices):
        if self.fault == "forgets the tail" and tokens == ODD_TOKENS:
            y[-1] = torch.nan
        if self.fault == "wrong value" and tokens == TOKEN_COUNT:
            y[40, 3] += 1
        if self.fault == "infinite":
            y[:1] = torch.inf
        if self.fault == "loses a slice" and slices > 1:
            total[1] = 0
        if self.fault == "no zero for no tokens" and tokens == 0:
            total[0] = 1
        if self.fault == "writes behind":
            neighbour(y, 1).zero_()
        if self.fault == "writes NaN behind":
            neighbour(y, 1).view(torch.int16).fill_(-1)
        if self.fault == "writes before":
            neighbour(total, -1).zero_()
        if self.fault == "adds behind":
            neighbour(y, 1).add_(1)
        if self.fault == "adds far behind":
            neighbour(y, GUARD_TOKENS * 8).add_(1)
        if self.fault == "changes an input" and tokens:
            x[0, 0] += 1
        if self.fault == "changes a bit of an input" and tokens == ODD_TOKENS:
            x[0, 0] = -0.0
        if self.fault == "writes beside an input":
            neighbour(x, -1).zero_()
        if self.fault == "uses what lies behind an input" and tokens == ODD_TOKENS:
            y[-1] = 2 * x[-1] + 0 * neighbour(x, 1)
        if self.fault == "off by rounding":
            y.mul_(1 + 2**-8)


def run(fault="none", seed=5):
    kernel = Kernel(fault)
    verify(kernel, inputs(PROBLEM, TOKEN_COUNT, seed), TOKEN_COUNT, seed)
    return kernel


def test_a_right_kernel_is_run_on_0_1_an_odd_and_its_own_number_of_tokens_in_slices():
    assert [(tokens, slices) for tokens, slices, _ in run().runs] == [(0, 1), (1, 1), (ODD_TOKENS, 3), (TOKEN_COUNT, 2)]
    assert ODD_TOKENS % 2 == 1
    run("off by rounding")


def test_inputs_are_drawn_afresh():
    first, second = run(seed=1), run(seed=2)
    assert not torch.equal(first.runs[2][2], second.runs[2][2])


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("forgets the tail", r"^y at 131 tokens in 3 slices: 8 of 1048 elements .* got nan where the reference has"),
        ("wrong value", r"^y at 64 tokens in 2 slices: 1 of 512 elements are beyond rtol 0\.01, atol 0\.0001; got "),
        ("infinite", r"^y at 1 tokens in 1 slices: 8 of 8 elements .* got inf"),
        ("loses a slice", r"^total at 131 tokens in 3 slices"),
        (
            "no zero for no tokens",
            r"^total at 0 tokens in 1 slices: 8 of 8 elements .* got 1 where the reference has 0",
        ),
        ("writes behind", r"^y at 0 tokens in 1 slices: wrote outside of the result$"),
        ("writes NaN behind", r"^y at 0 tokens in 1 slices: wrote outside of the result$"),
        ("adds behind", r"^y at 0 tokens in 1 slices: wrote outside of the result$"),
        ("adds far behind", r"^y at 0 tokens in 1 slices: wrote outside of the result$"),
        ("changes an input", r"^x at 1 tokens in 1 slices: wrote to an input or beside it$"),
        ("changes a bit of an input", r"^x at 131 tokens in 3 slices: wrote to an input or beside it$"),
        ("writes beside an input", r"^x at 0 tokens in 1 slices: wrote to an input or beside it$"),
        ("uses what lies behind an input", r"^y at 131 tokens in 3 slices: 8 of 1048 elements .* got nan"),
        ("writes before", r"^total at 0 tokens in 1 slices: wrote outside of the result$"),
    ],
)
def test_each_fault_is_found(fault, said):
    with pytest.raises(WrongResult, match=said) as caught:
        run(fault)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_results_start_as_nan_that_no_arithmetic_leaves_as_it_is(dtype):
    guarded = GuardedTensor(Argument("y", (TOKENS, 8), dtype, "output"), 3, 1)
    assert guarded.tensor.isnan().all()
    assert guarded.tensor.shape == (3, 8)
    assert guarded.intact()
    for change in (lambda guard: guard.add_(0), lambda guard: guard.mul_(-1), lambda guard: guard.fill_(torch.nan)):
        guarded = GuardedTensor(Argument("y", (TOKENS, 8), dtype, "output"), 3, 1)
        change(neighbour(guarded.tensor, 1))
        assert not guarded.intact()


def test_what_a_kernel_updates_starts_as_it_is_given():
    arguments = (*ARGUMENTS, Argument("dx", (TOKENS, 8), "float32", "updated"))
    given, results = {"dx": torch.arange(16.0).view(2, 8)}, {"dx": torch.empty(2, 8), "y": torch.zeros(2, 8)}
    init_updated(SimpleNamespace(arguments=arguments), given, results)
    assert torch.equal(results["dx"], given["dx"])
    assert not results["y"].any()
