"""What mHC adds to a training step: transformer layers with it, recomputation on and off, and with plain residuals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mhc
from autotune.measuring.stopwatch import queued_stopwatch_for
from autotune.measuring.timing import interleaved
from mhc.dispatch.kernels import Kernels, using
from mhc.examples import model
from tiles.target import Device


@dataclass(frozen=True)
class Size:
    """Of the network that is timed. A layer is attention and an MLP of four times the width."""

    layers: int = 4
    streams: int = 4
    width: int = 2560
    heads: int = 20
    tokens: int = 4096
    dtype: torch.dtype = torch.bfloat16


ROUNDS, SECONDS = 20, 20.0


def measure(device: Device, folder: Path, size: Size = Size()) -> dict[str, Any]:
    """Rows for `plain`, `mhc` and `mhc, recomputed`: median time (ms) of forward and backward, the peak of memory (on
    a GPU, bytes) in one step, and `overhead_percent` over plain. Also `runs`, the kernels that ran."""
    place = torch.device(device.kind)
    kernels = Kernels.from_path(folder) if any(folder.glob("*.json")) else Kernels.defaults()
    with using(kernels), torch.random.fork_rng(devices=[0] if place.type == "cuda" else []):
        torch.manual_seed(0)
        made = [sublayer for _ in range(size.layers) for sublayer in model.sublayers(size.width, size.heads)]
        sublayers = [sublayer.to(device=place, dtype=size.dtype) for sublayer in made]
        x = torch.randn(1, size.tokens, size.width, device=place, dtype=size.dtype, requires_grad=True)
        steps = {name: _step(network, x) for name, network in _networks(sublayers, size, place).items()}
        peaks = {name: _peak_bytes(step, place) for name, step in steps.items()}
        times = interleaved(steps, stopwatch=queued_stopwatch_for(place), rounds=ROUNDS, seconds=SECONDS)
    medians = {name: statistics.median(milliseconds) for name, milliseconds in times.items()}
    rows = [
        {"network": name, "median_ms": median, "overhead_percent": 100 * (median / medians["plain"] - 1)}
        | {"rounds": len(times[name]), "peak_bytes": peaks[name]}
        for name, median in medians.items()
    ]
    runs = sorted({f"{row.op} {row.direction}: {row.runs}" for row in kernels.report()})
    return {"rows": rows, "layers": size.layers, "streams": size.streams, "width": size.width, "runs": runs} | {
        "tokens": size.tokens,
        "dtype": str(size.dtype).removeprefix("torch."),
    }


class _Plain(nn.Module):
    """h + sublayer(h), one sublayer after the other."""

    def __init__(self, sublayers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for sublayer in self.sublayers:
            h = h + sublayer(h)
        return h


class _WithStreams(nn.Module):
    """Streams made before a stack and reduced behind it."""

    def __init__(self, streams: int, stack: nn.Module) -> None:
        super().__init__()
        self.streams, self.stack = streams, stack

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return mhc.reduce_streams(self.stack(mhc.expand_streams(h, self.streams)))


def _networks(sublayers: Sequence[nn.Module], size: Size, place: torch.device) -> dict[str, nn.Module]:
    """The same sublayers, joined in three ways."""
    blocks = [mhc.HyperConnection(size.width, size.streams, sublayer).to(place) for sublayer in sublayers]
    return {
        "plain": _Plain(sublayers),
        "mhc": _WithStreams(size.streams, mhc.HyperConnectionStack(blocks)),
        "mhc, recomputed": _WithStreams(size.streams, mhc.recompute(blocks)),
    }


def _step(network: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Forward and backward to x and all weights."""
    wanted = [x, *network.parameters()]

    def run() -> object:
        return torch.autograd.grad(network(x).float().square().mean(), wanted)

    return run


def _peak_bytes(step: Callable[[], object], place: torch.device) -> int | None:
    """The most memory that a step held beyond what was there before; the first one builds things."""
    step()
    if place.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
