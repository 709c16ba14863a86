"""Warm-up of a patched model: it loads what the model runs, with or without steps, and besides it merges and heads
alone."""

import pytest
import torch
from tiny_transformers import FAMILIES, TOKENS, batch, made

import mhc

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # transformers' and its libraries' own


def kinds(report):
    return {(row.op, row.direction, row.streams, row.width, row.dtype, row.tokens, row.rounds) for row in report}


@pytest.mark.parametrize("steps", [True, False], ids=["steps", "no steps"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_patched_model_runs_is_loaded(family, steps):
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="transformers is not installed")
    model, ids = mhc.patch(made(transformers, family).eval(), steps=steps), batch()
    with mhc.using(mhc.Kernels.reference()) as kernels, torch.no_grad():
        model(ids)
        ran = kinds(kernels.report())
    with mhc.using(mhc.Kernels.reference()):
        said = kinds(mhc.warm_up(model, [ids.shape[0] * TOKENS]))
    assert ran <= said
    assert {op.removesuffix("_identity") for op, *_ in said - ran} <= {"merge", "pre"}
