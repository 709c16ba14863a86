"""Train a small byte-level transformer on the Python standard library's own sources.

    python -m mhc.examples.train_bytes --kernels tuned.mhcpack --residual mhc

The same seed gives the same weights and batches, so runs that differ in `--kernels` alone can be compared step by
step: `--kernels none` runs the torch reference. Kernels for its shape come from
`mhc-tune tune --streams 4 --width 256 --tokens 2048 --dtype float32`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch.nn.functional import cross_entropy

import mhc
from mhc.examples.model import ByteTransformer, Residual, Size
from tiles.cache import write_atomically
from tiles.target import detect_device

NO_KERNELS = "none"
PEAK_RATE = 1e-3
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


@dataclass(frozen=True)
class Outcome:
    """What a run gave: losses in nats a byte, one a step; speed in tokens (bytes) per second of training.

    The first step finds and loads the kernels, so `tokens_per_s` leaves it out.
    """

    losses: list[float]
    validation_loss: float
    tokens_per_s: float
    report: mhc.KernelReport


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
    torch.manual_seed(run.seed)
    model = ByteTransformer(run.size, run.residual)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, run.steps))
    training, held_out = split(text)
    losses: list[float] = []
    source = batches(training, run, run.seed)
    began = time.perf_counter()
    for step in range(run.steps):
        loss = loss_of(model, next(source))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
        if step == 0:
            began = time.perf_counter()
        if step % max(1, run.steps // 20) == 0 or step == run.steps - 1:
            print(f"step {step + 1:5d} of {run.steps}  loss {losses[-1]:.4f}", flush=True)
    tokens = (run.steps - 1) * run.batch * run.size.context
    speed = tokens / (time.perf_counter() - began) if run.steps > 1 else 0.0
    return Outcome(losses, validation_loss(model, held_out, run), speed, mhc.kernel_report())


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
    """Mean loss over batches that are the same for every run."""
    source = batches(text, run, seed=0)
    return sum(loss_of(model, next(source)).item() for _ in range(VALIDATION_BATCHES)) / VALIDATION_BATCHES


def as_json(run: Run, outcome: Outcome) -> dict[str, Any]:
    """Plain data: the run, its device, the loss of every step, the report's rows."""
    return {
        "run": asdict(run),
        "device": detect_device("cpu").as_dict(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "losses": outcome.losses,
        "validation_loss": outcome.validation_loss,
        "tokens_per_s": outcome.tokens_per_s,
        "kernels": [asdict(row) for row in outcome.report],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when done, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mhc.examples.train_bytes", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", metavar="PACK", help="pack or cache folder; none: torch (default: user's cache)")
    parser.add_argument("--residual", choices=get_args(Residual), default=Run.residual, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=Run.steps, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Run.seed, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the loss of every step here")
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
    print(
        f"\n{outcome.report}\n\n{run.residual}: training loss {outcome.losses[-1]:.4f}, "
        f"validation loss {outcome.validation_loss:.4f} nats a byte, {outcome.tokens_per_s:.0f} tokens/s"
    )
    return 0


def kernels_for(path: str | None) -> mhc.Kernels:
    """What `--kernels` names; raises `BadInput`."""
    if path is None:
        return mhc.active()
    return mhc.Kernels.reference() if path == NO_KERNELS else mhc.Kernels.from_path(path)


if __name__ == "__main__":
    sys.exit(main())
