"""Serving with continuous batching: requests arrive at random, and every step computes all tokens that are there.

    python -m mhc.examples.serve --kernels tuned.mhcpack

A step takes the whole prompt of each request that has just arrived and the last token of each that goes on, in one
batch; the streams of all its tokens pass through `mhc.functional.pre` and `step` into two buffers in turn (`out=`).
With batch invariance, which is the default here, a request's logits have the same bits as those of the request served
alone, whatever it met in its batches; this is checked. Sublayers have to do their part: here each works on a request's
own tokens, in its own tensors, as attention does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

import mhc
from mhc import functional
from mhc.examples.train_bytes import kernels_for

VOCABULARY = 256
PROMPT, ANSWER = (4, 24), (4, 12)
"""The least and the most tokens of a prompt and of an answer."""

SLOW_MS = 50.0
"""What no step of a small model should take: a longer one has waited for something."""


@dataclass(frozen=True)
class Load:
    """What is served: requests, how many arrive in a step on average, and the most tokens of a step."""

    requests: int = 24
    rate: float = 0.7
    batch_tokens: int = 96


@dataclass
class Request:
    """A request: its tokens, those to come, and the logits of all its steps."""

    prompt: list[int]
    answer: int
    arrives: int
    computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)
    memory: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """Tokens that its next step computes."""
        return len(self.prompt) - self.computed

    @property
    def done(self) -> bool:
        """Whether its answer is complete."""
        return len(self.logits) == self.answer


class Mix(nn.Module):
    """A sublayer: a causal mean over a request's tokens so far, normalised, through two matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, u: torch.Tensor, memory: list[torch.Tensor]) -> torch.Tensor:
        """u [t, C] of one request's new tokens -> [t, C]; `memory` holds the sum of the tokens before, or nothing."""
        u = self.norm(u)
        total = torch.cumsum(torch.cat([*memory, u]), 0)[len(memory) :]
        memory[:] = [total[-1:]]
        return self.down(nn.functional.silu(self.up(u + total)))


class Model(nn.Module):
    """Embedding, hyper-connected sublayers, and a head on the mean of the streams."""

    def __init__(self, layers: int, width: int, streams: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY)
        self.stack = mhc.HyperConnectionStack([mhc.HyperConnection(width, streams, Mix(width)) for _ in range(layers)])


class Buffers(NamedTuple):
    """Memory for the results of a boundary, with a row for each token."""

    x: torch.Tensor
    u: torch.Tensor
    post: torch.Tensor
    res: torch.Tensor

    @classmethod
    def of(cls, tokens: int, streams: int, width: int) -> Buffers:
        """Uninitialised."""
        shapes = (streams, width), (width,), (streams,), (streams, streams)
        return cls(*(torch.empty(tokens, *shape) for shape in shapes))

    def first(self, tokens: int) -> Buffers:
        """The first rows."""
        return Buffers(*(tensor[:tokens] for tensor in self))


class Server:
    """Serves requests; all memory for the residual is there from the start."""

    def __init__(self, model: Model, batch_tokens: int) -> None:
        self.model = model
        self.blocks: list[mhc.HyperConnection] = list(model.stack.blocks)  # type: ignore[arg-type]
        first = self.blocks[0]
        self.buffers = [Buffers.of(batch_tokens, first.streams, first.width) for _ in range(2)]
        self.parameters = [(block.parameters_for_ops(), block.settings_for_ops()) for block in self.blocks]
        self.report = mhc.warm_up(model, range(1, batch_tokens + 1))

    @torch.no_grad()
    def step(self, batch: Sequence[Request]) -> None:
        """Compute the tokens that the requests wait for, and append one token to each."""
        sizes = [request.waiting for request in batch]
        here, there = (buffers.first(sum(sizes)) for buffers in self.buffers)
        tokens = torch.tensor([token for request in batch for token in request.prompt[request.computed :]])
        here.x.copy_(self.model.embedding(tokens).unsqueeze(1).expand_as(here.x))
        (parameters, settings), *following = self.parameters
        functional.pre(here.x, *parameters, **settings, out=(here.u, here.post, here.res))
        for number, block in enumerate(self.blocks):
            f = self._sublayer(block.sublayer, number, batch, here.u.split(sizes))
            if number < len(following):
                parameters, settings = following[number]
                functional.step(here.x, f, here.post, here.res, *parameters, **settings, out=there)
            else:
                functional.merge(here.x, f, here.res, here.post, out=there.x)
            here, there = there, here
        for request, x in zip(batch, here.x.split(sizes), strict=True):
            request.computed = len(request.prompt)
            request.logits.append(self.model.head(x[-1].mean(0)))
            request.prompt.append(int(request.logits[-1].argmax()))

    def _sublayer(
        self, sublayer: nn.Module, number: int, batch: Sequence[Request], u: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """f [T, C]: each request by itself, in tensors of the same size and alignment as when it is alone."""
        for request in batch:
            request.memory += [[] for _ in range(number + 1 - len(request.memory))]
        pairs = zip(batch, u, strict=True)
        return torch.cat([sublayer(own.clone(), request.memory[number]) for request, own in pairs])


def requests(load: Load, seed: int) -> Iterator[Request]:
    """Requests with random prompts, in the order in which they arrive."""
    random, arrives = torch.Generator().manual_seed(seed), 0.0
    for _ in range(load.requests):
        length, answer = (int(torch.randint(least, most + 1, (), generator=random)) for least, most in (PROMPT, ANSWER))
        prompt = torch.randint(0, VOCABULARY, (length,), generator=random).tolist()
        yield Request(prompt, answer, int(arrives))
        arrives += float(torch.empty(()).exponential_(load.rate, generator=random))


def serve(server: Server, load: Load, arriving: Sequence[Request]) -> tuple[list[float], list[int]]:
    """Serve all requests; the ms and the tokens of each step. Those that find no room in a step wait for the next."""
    waiting, running, times, tokens, now = list(arriving), list[Request](), list[float](), list[int](), 0
    while waiting or running:
        room = load.batch_tokens - len(running)
        while waiting and waiting[0].arrives <= now and waiting[0].waiting <= room:
            room -= waiting[0].waiting
            running.append(waiting.pop(0))
        if running:
            tokens.append(sum(request.waiting for request in running))
            began = time.perf_counter()
            server.step(running)
            times.append((time.perf_counter() - began) * 1e3)
            running = [request for request in running if not request.done]
        now += 1
    return times, tokens


def differing(server: Server, load: Load, served: Sequence[Request], seed: int) -> int:
    """How many requests have other bits when each is served alone."""
    count = 0
    for request, again in zip(served, requests(load, seed), strict=True):
        again.arrives = 0
        serve(server, load, [again])
        count += not all(map(torch.equal, request.logits, again.logits))
    return count


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when done, 1 where bits differ, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mhc.examples.serve", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", metavar="PACK", help="pack or cache folder; none: torch (default: user's cache)")
    parser.add_argument("--requests", type=int, default=Load.requests, help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="sublayers (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--streams", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and requests (default: %(default)s)")
    parser.add_argument("--by-tokens", action="store_true", help="choose kernels by token count, and compare no bits")
    chosen = parser.parse_args(arguments)
    load = Load(chosen.requests)
    try:
        if chosen.requests < 1 or chosen.layers < 1:
            got = f"{chosen.requests} and {chosen.layers}"
            raise mhc.BadInput(f"--requests and --layers must be at least 1, got {got}: choose positive numbers")
        torch.manual_seed(chosen.seed)
        model = Model(chosen.layers, chosen.width, chosen.streams).eval()
        with mhc.using(kernels_for(chosen.kernels)), nullcontext() if chosen.by_tokens else mhc.batch_invariant():
            return _run(Server(model, load.batch_tokens), load, chosen.seed, compare=not chosen.by_tokens)
    except mhc.BadInput as error:
        print(error, file=sys.stderr)
        return 2


def _run(server: Server, load: Load, seed: int, *, compare: bool) -> int:
    print(server.report)
    served, before = list(requests(load, seed)), len(mhc.kernel_report())
    times, tokens = serve(server, load, served)
    loaded = "nothing" if len(mhc.kernel_report()) == before else "a kernel"
    answered, steps = sum(request.answer for request in served), f"{len(times)} steps"
    print(f"{len(served)} requests, {answered} answered tokens in {steps} of {min(tokens)}..{max(tokens)} tokens")
    shown = ", ".join(f"p{share} {percentile(times, share / 100):.2f}" for share in (50, 90, 99))
    slow = sum(taken > SLOW_MS for taken in times)
    print(
        f"ms a step: {shown}, longest {max(times):.2f}; {slow} above {SLOW_MS:.0f} ms; {loaded} was loaded on the way"
    )
    if not compare:
        return 0
    different = differing(server, load, served, seed)
    print(f"bits: {len(served) - different} of {len(served)} requests equal those served alone")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
