"""The ops that a model is said to call are those that it calls, no more and no fewer."""

import pytest
import torch
from torch import nn

import mhc
from mhc.modules.recompute_segments import segment_length
from mhc.serving.ops_of_model import dtype_of_streams

WIDTH, N, TOKENS = 16, 4, 6


def block(**settings):
    return mhc.HyperConnection(WIDTH, N, nn.Linear(WIDTH, WIDTH), **settings)


def hooked():
    made = block()
    made.register_forward_hook(lambda module, args, output: None)
    return made


def stack(*settings, **of_stack):
    return mhc.HyperConnectionStack([block(**each) for each in settings], **of_stack)


def normed(**settings):
    return {"norm": nn.RMSNorm(WIDTH), **settings}


IDENTITY = {"manifold": "identity"}
MODELS = {
    "a block": lambda: block(rounds=7),
    "identity": lambda: block(**IDENTITY),
    "static": lambda: block(dynamic=False),
    "static identity": lambda: block(dynamic=False, **IDENTITY),
    "another manifold": lambda: block(manifold="orthogonal"),
    "hc": lambda: block(mode="hc"),
    "a stack": lambda: stack({}, {"rounds": 3}, {}),
    "a stack of all kinds": lambda: stack({}, IDENTITY, IDENTITY, {"mode": "residual"}, {}, {"dynamic": False}),
    "a stack of one": lambda: stack({}),
    "hooks": lambda: mhc.HyperConnectionStack([block(), hooked(), block(), block()]),
    "single pass": lambda: stack({}, {}, single_pass=True),
    "single pass of identities": lambda: stack(IDENTITY, IDENTITY, IDENTITY, single_pass=True),
    "single pass of two kinds": lambda: stack({}, IDENTITY, single_pass=True, collapse=False),
    "norms": lambda: stack(normed(), normed(**IDENTITY), normed(**IDENTITY), normed(dynamic=False)),
    "single pass with norms": lambda: stack(normed(), {}, normed(), single_pass=True),
    "recomputed": lambda: mhc.recompute([block() for _ in range(4)], segment=2),
    "recomputed one by one": lambda: mhc.recompute([block() for _ in range(2)], segment=1, single_pass=True),
    "blocks and a head": lambda: nn.Sequential(block(), stack({}, {}), mhc.StreamHead(WIDTH, N)),
    "a head": lambda: mhc.StreamHead(WIDTH, N),
}


def kinds(report):
    return {(row.op, row.direction, row.streams, row.width, row.dtype, row.tokens, row.rounds) for row in report}


def run(model, training, dtype=torch.float32):
    """The kinds of what a model runs on the reference, forward and, in training, backward."""
    model.train(training)
    x = torch.randn(2, TOKENS // 2, N, WIDTH, dtype=dtype, requires_grad=training)
    with mhc.using(mhc.Kernels.reference()) as kernels, torch.set_grad_enabled(training):
        results = model(x)
        if training:
            first = results[0] if isinstance(results, tuple) else results
            first.square().sum().backward()
    return kinds(kernels.report())


def warm(model, **settings):
    with mhc.using(mhc.Kernels.reference()):
        return kinds(mhc.warm_up(model, [TOKENS], **settings))


@pytest.mark.parametrize("training", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_said_to_call_what_it_calls(name, training):
    model = MODELS[name]()
    ran, said = run(model, training), warm(model)
    assert ran
    assert said == ran


def test_a_wrapped_transformer_is_said_to_call_what_it_calls():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=True)
    model = mhc.wrap(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), streams=N).eval()
    with mhc.using(mhc.Kernels.reference()) as kernels, torch.no_grad():
        model(torch.randn(2, TOKENS // 2, WIDTH))
    assert warm(model) == kinds(kernels.report())


def test_the_streams_dtype_is_that_of_the_other_parameters_or_the_one_given():
    model = mhc.HyperConnectionStack([block(), block()]).eval()
    model.blocks[0].sublayer.to(torch.bfloat16), model.blocks[1].sublayer.to(torch.bfloat16)
    assert dtype_of_streams(model) == torch.bfloat16
    assert warm(model) == run(model, training=False, dtype=torch.bfloat16)
    assert {kind[4] for kind in warm(model, dtype=torch.float16)} == {"float16"}
    assert dtype_of_streams(mhc.HyperConnection(WIDTH, N, nn.Identity())) == torch.float32
    assert dtype_of_streams(nn.Linear(2, 2).double()) == torch.float32


def test_segments_of_a_default_length_are_known_too():
    assert segment_length(6, N) > 1
    model = mhc.recompute([block() for _ in range(6)])
    assert warm(model.train()) == run(model, training=True)
