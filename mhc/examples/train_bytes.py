"""Training of a small byte-level transformer on the sources of the Python standard library.

    python -m mhc.examples.train_bytes --kernels tuned.mhcpack --residual mhc

The same seed gives the same weights and batches, so runs that differ in `--kernels` alone can be compared step by
step: `--kernels none` runs the torch reference. Kernels for its shape come from
`mhc-tune tune --streams 4 --width 256 --tokens 2048 --dtype float32`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch.nn.functional import cross_entropy

import mhc
from mhc.examples.model import ByteTransformer, Residual, Size
from tiles.cache.cache import write_atomically
from tiles.target import detect_device

NO_KERNELS = "none"
WARMUP_STEPS = 20
VALIDATION_BATCHES = 8


@dataclass(frozen=True)
class Run:
    """One training run; `batch` sequences of `size.context` bytes a step."""

    residual: Residual = "mhc"
    steps: int = 200
    seed: int = 0
    batch: int = 8
    size: Size = field(default_factory=Size)
    peak_rate: float = 1e-3


class Step(NamedTuple):
    """One step of training: loss in nats a byte, the gradient's norm before it is clipped to 1, and wall time."""

    loss: float
    gradient_norm: float
    ms: float


@dataclass(frozen=True)
class Outcome:
    """The results of a run."""

    steps: list[Step]
    validation_loss: float
    report: mhc.KernelReport

    def median_ms(self) -> float:
        """Of the steps but the first, which finds and loads the kernels (unless there is no other)."""
        return statistics.median(step.ms for step in self.steps[1:] or self.steps)


def standard_library() -> torch.Tensor:
    """The standard library's top-level modules, joined in the order of their names, as bytes [length] uint8."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def split(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first nine tenths for training, the last tenth for validation."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def batches(text: torch.Tensor, run: Run, seed: int) -> Iterator[torch.Tensor]:
    """Random windows [batch, context + 1], int64, for ever."""
    random = torch.Generator().manual_seed(seed)
    window = torch.arange(run.size.context + 1)
    while True:
        starts = torch.randint(len(text) - run.size.context, (run.batch, 1), generator=random)
        yield text[starts + window].long()


def train(run: Run, text: torch.Tensor) -> Outcome:
    """Train from scratch; prints about twenty lines of progress."""
    model = build(run)
    steps: list[Step] = []
    for step in training(model, run, text):
        steps.append(step)
        if len(steps) % max(1, run.steps // 20) == 0 or len(steps) in (1, run.steps):
            print(f"step {len(steps):5d} of {run.steps}  loss {step.loss:.4f}", flush=True)
    return Outcome(steps, validation_loss(model, text, run), mhc.kernel_report())


def build(run: Run) -> ByteTransformer:
    """A model whose weights the run's seed decides."""
    torch.manual_seed(run.seed)
    return ByteTransformer(run.size, run.residual)


def training(model: ByteTransformer, run: Run, text: torch.Tensor) -> Iterator[Step]:
    """Train step by step on the text's training part; batches depend on the run's seed alone.

    Runs that take turns see the same machine: each `next` is one step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.peak_rate, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, run.steps))
    for window in islice(batches(split(text)[0], run, run.seed), run.steps):
        began = time.perf_counter()
        loss = loss_of(model, window)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        yield Step(loss.item(), norm.item(), (time.perf_counter() - began) * 1e3)


def rate(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then half a cosine down to a tenth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))


def loss_of(model: ByteTransformer, window: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next byte, nats."""
    return cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: ByteTransformer, text: torch.Tensor, run: Run) -> float:
    """Mean loss over batches of the text's held-out part that are the same for every run."""
    source = batches(split(text)[1], run, seed=0)
    return sum(loss_of(model, next(source)).item() for _ in range(VALIDATION_BATCHES)) / VALIDATION_BATCHES


def as_json(run: Run, outcome: Outcome) -> dict[str, Any]:
    """Plain data: the run, its device, every step, the report's rows."""
    return {
        "run": asdict(run),
        **where_it_ran(),
        "losses": [step.loss for step in outcome.steps],
        "gradient_norms": [step.gradient_norm for step in outcome.steps],
        "step_ms": [step.ms for step in outcome.steps],
        "validation_loss": outcome.validation_loss,
        "kernels": [asdict(row) for row in outcome.report],
    }


def where_it_ran() -> dict[str, Any]:
    """The device, how many threads, and torch's version, as plain data."""
    device = detect_device("cpu").as_dict()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def parser_for(name: str, doc: str) -> argparse.ArgumentParser:
    """The command line of an example: its kernels, steps, seed and output."""
    parser = argparse.ArgumentParser(prog=f"python -m mhc.examples.{name}", description=doc.splitlines()[0])
    parser.add_argument("--kernels", metavar="PACK", help="pack or cache folder; none: torch (default: user's cache)")
    parser.add_argument("--steps", type=int, default=Run.steps, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Run.seed, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step of every run here")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when done, 2 for bad input."""
    parser = parser_for("train_bytes", __doc__)
    parser.add_argument("--residual", choices=get_args(Residual), default=Run.residual, help="(default: %(default)s)")
    chosen = parser.parse_args(arguments)
    run = Run(chosen.residual, chosen.steps, chosen.seed)
    try:
        if run.steps < 1:
            raise mhc.BadInput(f"--steps must be at least 1, got {run.steps}: choose a positive number")
        with mhc.using(kernels_for(chosen.kernels)):
            outcome = train(run, standard_library())
    except mhc.BadInput as error:
        print(error, file=sys.stderr)
        return 2
    if chosen.json:
        write_atomically(chosen.json, json.dumps(as_json(run, outcome), indent=1).encode())
    speed = run.batch * run.size.context / outcome.median_ms() * 1e3
    print(
        f"\n{outcome.report}\n\n{run.residual}: training loss {outcome.steps[-1].loss:.4f}, "
        f"validation loss {outcome.validation_loss:.4f} nats a byte, {speed:.0f} tokens/s"
    )
    return 0


def kernels_for(path: str | None) -> mhc.Kernels:
    """The kernels that `--kernels` names; raises `BadInput`."""
    if path is None:
        return mhc.active()
    return mhc.Kernels.reference() if path == NO_KERNELS else mhc.Kernels.from_path(path)


if __name__ == "__main__":
    sys.exit(main())
