"""The serving loop: bits of requests, batches of many sizes, nothing loaded after warm-up, and its command line."""

import re

import pytest
import torch

import mhc
from mhc.examples import serve
from mhc.examples.serve import Load, Model, Request, Server

LOAD = Load(requests=10, rate=0.8, batch_tokens=40)


def server(streams=4):
    torch.manual_seed(3)
    return Server(Model(3, 16, streams).eval(), LOAD.batch_tokens)


def test_a_request_has_the_same_bits_in_every_batch():
    served = list(serve.requests(LOAD, seed=1))
    with mhc.using(mhc.Kernels.defaults().batch_invariant_form()):
        at_hand = server()
        times, tokens = serve.serve(at_hand, LOAD, served)
        assert mhc.kernel_report() == at_hand.report, "nothing is loaded after warm-up"
        assert serve.differing(at_hand, LOAD, served, seed=1) == 0
        served[4].logits[-1] = served[4].logits[-1] + 1e-6
        assert serve.differing(at_hand, LOAD, served, seed=1) == 1
    assert all(request.done for request in served)
    assert len(times) == len(tokens)
    assert len(set(tokens)) > 5, "batches of many sizes"
    assert max(tokens) <= LOAD.batch_tokens


def test_a_server_computes_what_its_modules_do():
    """The first logits of prompts in one batch: those of the stack on each prompt."""
    at_hand = server()
    batch = [Request([3, 1, 4, 1, 5], 1, 0), Request([9, 2], 1, 0)]
    prompts = [list(request.prompt) for request in batch]
    at_hand.step(batch)
    for request, prompt in zip(batch, prompts, strict=True):
        memory = [[] for _ in at_hand.blocks]
        x = mhc.expand_streams(at_hand.model.embedding(torch.tensor(prompt)), 4)
        for block, sums in zip(at_hand.blocks, memory, strict=True):
            x = block(x, sums)
        torch.testing.assert_close(request.logits[0], at_hand.model.head(x[-1].mean(0)))


def test_the_command_prints_latencies_and_compares_bits(capsys, monkeypatch):
    monkeypatch.setattr(serve, "kernels_for", lambda path: mhc.Kernels.defaults())
    command = ["--requests", "4", "--layers", "2", "--width", "16"]
    assert serve.main(command) == 0
    *_, steps, latency, bits = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"4 requests, \d+ answered tokens in \d+ steps of \d+\.\.\d+ tokens", steps)
    shown = r"p50 [\d.]+, p90 [\d.]+, p99 [\d.]+, longest [\d.]+; \d+ above 50 ms"
    assert re.fullmatch(rf"ms a step: {shown}; nothing was loaded on the way", latency)
    assert bits == "bits: 4 of 4 requests equal those served alone"
    assert serve.main([*command, "--by-tokens"]) == 0
    assert "bits" not in capsys.readouterr().out
    monkeypatch.setattr(serve, "differing", lambda *_: 1)
    assert serve.main(command) == 1


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [("--requests", "0", "at least 1, got 0 and 4"), ("--width", "12", "got 12"), ("--streams", "17", "got 17")],
)
def test_bad_input_is_refused_in_a_line(argument, value, text, capsys):
    assert serve.main(["--kernels", "none", argument, value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
