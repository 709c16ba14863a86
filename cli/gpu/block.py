"""Overhead of mHC in a training step: transformer layers with plain residuals, with mHC, with single-pass mHC, and with
recomputation."""

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
class NetworkSize:
    """Size of the network that is timed. A layer is attention and an MLP of four times the width."""

    layers: int = 4
    streams: int = 4
    width: int = 2560
    heads: int = 20
    tokens: int = 4096
    dtype: torch.dtype = torch.bfloat16


ROUNDS, SECONDS = 20, 20.0


def measure(device: Device, folder: Path, size: NetworkSize = NetworkSize()) -> dict[str, Any]:
    """Rows for `plain`, `mhc`, `mhc, single pass` and `mhc, recomputed`: median time (ms) of forward and backward, peak
    memory of one step (bytes, on a GPU), and `overhead_percent` over plain. Also `runs`, the kernels that ran."""
    torch_device = torch.device(device.kind)
    kernels = Kernels.from_path(folder) if any(folder.glob("*.json")) else Kernels.defaults()
    with using(kernels), torch.random.fork_rng(devices=[0] if torch_device.type == "cuda" else []):
        torch.manual_seed(0)
        made = [sublayer for _ in range(size.layers) for sublayer in model.sublayers(size.width, size.heads)]
        sublayers = [sublayer.to(device=torch_device, dtype=size.dtype) for sublayer in made]
        x = torch.randn(1, size.tokens, size.width, device=torch_device, dtype=size.dtype, requires_grad=True)
        steps = {name: _step(network, x) for name, network in _networks(sublayers, size, torch_device).items()}
        peaks = {name: _peak_bytes(step, torch_device) for name, step in steps.items()}
        times = interleaved(steps, stopwatch=queued_stopwatch_for(torch_device), rounds=ROUNDS, seconds=SECONDS)
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


class _PlainResiduals(nn.Module):
    """Plain residuals: h + sublayer(h) for each sublayer in turn."""

    def __init__(self, sublayers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for sublayer in self.sublayers:
            h = h + sublayer(h)
        return h


class _WithStreams(nn.Module):
    """A stack with streams expanded before it and, where it does not do that itself, reduced after it."""

    def __init__(self, streams: int, stack: mhc.HyperConnectionStack) -> None:
        super().__init__()
        self.streams, self.stack = streams, stack

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.stack(mhc.expand_streams(h, self.streams))
        return out if self.stack.single_pass else mhc.reduce_streams(out)


def _networks(sublayers: Sequence[nn.Module], size: NetworkSize, torch_device: torch.device) -> dict[str, nn.Module]:
    """The same sublayers with plain residuals, mHC, single-pass mHC, and mHC with recomputation."""
    blocks = [mhc.HyperConnection(size.width, size.streams, sublayer).to(torch_device) for sublayer in sublayers]
    return {
        "plain": _PlainResiduals(sublayers),
        "mhc": _WithStreams(size.streams, mhc.HyperConnectionStack(blocks)),
        "mhc, single pass": _WithStreams(size.streams, mhc.HyperConnectionStack(blocks, single_pass=True)),
        "mhc, recomputed": _WithStreams(size.streams, mhc.recompute(blocks)),
    }


def _step(network: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """One forward, and the backward to x and all weights."""
    wanted = [x, *network.parameters()]

    def run() -> object:
        return torch.autograd.grad(network(x).float().square().mean(), wanted)

    return run


def _peak_bytes(step: Callable[[], object], torch_device: torch.device) -> int | None:
    """Peak memory (bytes) of a step beyond what was allocated before it; after one step to warm up."""
    step()
    if torch_device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
