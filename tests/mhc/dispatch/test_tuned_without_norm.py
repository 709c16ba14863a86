"""Ops with a norm where a kernel was tuned for the op without it alone: that runs, and torch's rms_norm after it."""

from dataclasses import asdict, replace

import pytest
import torch

import mhc
from mhc import functional
from mhc.dispatch.candidates import KernelCandidate
from mhc.dispatch.kernels import normalising
from mhc.dispatch.resolve import Resolver
from tiles.cache.cache import KernelCache, Key
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import EVERY_TOKENS, Problem
from tiles.target import Device, detect_device

HERE, CPU = detect_device("cpu"), torch.device("cpu")
NEWER = Device("cpu", "Newer CPU", "x86-64-v9")
STREAMS, WIDTH, ROUNDS = 4, 16, 20


def put(folder, op="pre", *, direction="forward", width=WIDTH, tokens=64, dtype="float32", device=HERE):
    """Store a kernel that is not called here."""
    problem = Problem(op, direction, STREAMS, width, dtype, tokens)
    usual = replace(problem, tokens=64)
    schedule = asdict(kernel_spec(op, direction).default(usual, HERE.target))
    KernelCache(folder).put(Key.of(problem, device), schedule, b"code", "source", {}, {})


def apart(kernels, op="pre", width=WIDTH, dtype=torch.float32):
    return kernels.op_with_norm(op, STREAMS, width, ROUNDS, dtype, CPU) == op


@pytest.mark.parametrize(
    ("op", "normed"),
    [("pre", "pre_norm"), ("step_identity", "step_norm_identity"), ("single_pass", "single_pass_norm")],
)
def test_what_was_tuned_decides(tmp_path, op, normed):
    assert normalising(op) == normed
    put(tmp_path, op)
    assert apart(mhc.Kernels.from_path(tmp_path), op)
    put(tmp_path, normed)
    assert not apart(mhc.Kernels.from_path(tmp_path), op)


@pytest.mark.parametrize(
    "stored",
    [{"op": "merge"}, {"width": 32}, {"dtype": "bfloat16"}, {"device": NEWER}, {"direction": "backward"}],
    ids=str,
)
def test_kernels_for_something_else_do_not(tmp_path, stored):
    put(tmp_path, **stored)
    assert not apart(mhc.Kernels.from_path(tmp_path))


@pytest.mark.parametrize("kernels", [mhc.Kernels.reference, mhc.Kernels.defaults, mhc.Kernels.from_default_folder])
def test_without_tuned_kernels_the_norm_is_inside(kernels):
    assert not apart(kernels())


def test_the_choice_is_made_once_and_is_the_same_for_every_token_count(tmp_path, monkeypatch):
    put(tmp_path)
    put(tmp_path, tokens=EVERY_TOKENS)
    kernels, asked = mhc.Kernels.from_path(tmp_path), []
    has_stored = Resolver.has_stored
    monkeypatch.setattr(Resolver, "has_stored", lambda self, *given: asked.append(given) or has_stored(self, *given))
    assert apart(kernels)
    assert apart(kernels)
    assert [problem.op for problem, _ in asked] == ["pre", "pre_norm"]
    assert apart(kernels.batch_invariant_form())
    assert apart(mhc.Kernels.from_path(tmp_path, batch_invariant=True))


def test_records_that_cannot_be_read_end_no_run(tmp_path, monkeypatch):
    put(tmp_path)
    kernels = mhc.Kernels.from_path(tmp_path)
    kernels.resolver.records = None
    monkeypatch.setattr(KernelCache, "records", lambda self: 1 / 0)
    assert not apart(kernels)


@pytest.fixture
def stored(tmp_path):
    """Kernels of a folder that has pre and step; what runs is torch."""

    def of(*ops):
        for op in ops:
            put(tmp_path, op)
        kernels = mhc.Kernels.from_path(tmp_path)
        kernels.resolver.candidates = lambda *_: [KernelCandidate("reference", "the code of these is none")]
        return kernels

    return of


def block():
    norm = torch.nn.RMSNorm(WIDTH, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    return mhc.HyperConnection(WIDTH, STREAMS, torch.nn.Linear(WIDTH, WIDTH), norm=norm)


def outcome(model, x):
    result = model(x)
    return [result, *torch.autograd.grad(result.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize(
    ("ops", "run"),
    [
        (("pre", "step"), ("pre", "step", "merge")),
        (("pre", "step", "step_norm"), ("pre", "step_norm", "merge")),
        (("pre_norm", "step_norm"), ("pre_norm", "step_norm", "merge")),
    ],
    ids=str,
)
def test_a_model_runs_the_kernels_that_were_tuned(stored, ops, run):
    torch.manual_seed(0)
    model, x = mhc.HyperConnectionStack([block(), block()]), torch.randn(5, STREAMS, WIDTH, requires_grad=True)
    wanted = outcome(model, x)
    with mhc.using(stored(*ops)) as kernels:
        found = outcome(model, x)
        assert {row.op for row in kernels.report()} == set(run)
        assert {row.op for row in mhc.warm_up(model, [5])} == set(run)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_preallocated_results_and_a_compiler(stored):
    """A compiler cannot look at kernels while it traces: it takes what is inside."""
    made, x = block(), torch.randn(5, STREAMS, WIDTH)

    def run(**more):
        return functional.pre(x, *made.parameters_for_ops(), **made.settings_with_norm(), **more)

    with torch.no_grad():
        wanted = run()
        with mhc.using(stored("pre")) as kernels:
            out = tuple(torch.empty_like(each) for each in wanted)
            for found in (run(), run(out=out), torch.compile(run, fullgraph=True, backend="eager")()):
                for mine, theirs in zip(found, wanted, strict=True):
                    torch.testing.assert_close(mine, theirs)
            assert [row.op for row in kernels.report()] == ["pre", "pre_norm"]
