"""A timeline of DualPipeV over hyper-connections, for chrome://tracing or https://ui.perfetto.dev.

    python -m mhc.examples.pipeline_trace --out trace.json
    torchrun --nproc-per-node 4 -m mhc.examples.pipeline_trace --out trace.json

Without torchrun one process holds both stages of a pipeline of one rank; with it every rank writes its own file. The
last step of three is recorded. On a GPU look for the two stages' CUDA streams side by side (`OVERLAP_F_B`), and for the
merges after the MLPs on a third one per stage, of high priority.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.pipelining import ScheduleDualPipeV
from torch.nn.functional import mse_loss
from torch.profiler import ProfilerActivity, profile, record_function

import mhc
from mhc.distributed import overlap_pairs, prioritise_merges, v_stages
from mhc.examples.model import Size, attention_sublayer, mlp_sublayer
from mhc.modules.recompute import recompute

STEPS = 3


SIZE = Size(blocks=8, width=2560, heads=20, context=4096, streams=4)
"""Of the default run: a layer is an attention and an MLP, `context` the tokens of a microbatch."""

MICROBATCHES = 8


class Layers(nn.Module):
    """A range of blocks: streams [1, tokens, n, C] -> the same, expanded by the first range and reduced by the last."""

    def __init__(self, size: Size, numbers: range, device: torch.device, plain: bool) -> None:
        super().__init__()
        self.expands = size.streams if numbers.start == 0 else None
        self.reduces = numbers.stop == 2 * size.blocks
        made = [block(size, number, dtype(device)) for number in numbers]
        self.blocks = mhc.HyperConnectionStack(made) if plain else recompute(made)
        if not plain:
            prioritise_merges(
                self.blocks, [one for one, number in zip(made, numbers, strict=True) if number % 2], device
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """h [1, tokens, C] before the first block and after the last, streams elsewhere."""
        x = self.blocks(mhc.expand_streams(x, self.expands) if self.expands else x)
        return mhc.reduce_streams(x) if self.reduces else x


def dtype(device: torch.device) -> torch.dtype:
    """Of streams and sublayers; coefficients are float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def block(size: Size, number: int, of: torch.dtype) -> mhc.HyperConnection:
    """Attention in blocks of even number, an MLP in the others."""
    sublayer = mlp_sublayer(size.width) if number % 2 else attention_sublayer(size.width, size.heads)
    return mhc.HyperConnection(size.width, size.streams, sublayer.to(of))


def run(size: Size, microbatches: int, device: torch.device, out: Path, *, plain: bool) -> float:
    """Three steps, the last one recorded in `out` -> that step's loss on rank 0, else 0.

    `plain` is PyTorch's schedule as it is: one stream, nothing recomputed.
    """
    torch.manual_seed(0)
    stages = v_stages(lambda numbers: Layers(size, numbers, device, plain), 2 * size.blocks, device=device)
    schedule = ScheduleDualPipeV(stages, microbatches, mse_loss)
    if not plain:
        overlap_pairs(schedule)
    data, target = torch.randn(2, microbatches, size.context, size.width, device=device, dtype=dtype(device))
    first = dist.get_rank() == 0

    def step() -> float:
        losses: list[torch.Tensor] = []
        schedule.step(*([data] if first else []), target=target if first else None, losses=losses)
        return torch.stack(losses).mean().item() if losses else 0.0

    for _ in range(STEPS - 1):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded, record_function("step"):
        loss = step()
    recorded.export_chrome_trace(str(out))
    return loss


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when done, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mhc.examples.pipeline_trace", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("trace.json"), help="(default: %(default)s)")
    defaults = {"layers": SIZE.blocks, "width": SIZE.width, "streams": SIZE.streams, "tokens": SIZE.context}
    for name, default in (defaults | {"microbatches": MICROBATCHES}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="PyTorch's schedule as it is, to compare with")
    chosen = parser.parse_args(arguments)
    size = Size(chosen.layers, chosen.width, max(1, chosen.width // 128), chosen.tokens, chosen.streams)
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    out = chosen.out.with_stem(f"{chosen.out.stem}-{rank}") if rank else chosen.out
    try:
        loss = run(size, chosen.microbatches, device, out, plain=chosen.plain)
    except mhc.BadInput as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    print(
        f"{out}: one step of {size}, {chosen.microbatches} microbatches, loss {loss:.4f}"
        if rank == 0
        else f"{out}: rank {rank}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
