"""A step of transformers' DeepSeek-V4, unpatched and patched: its time, what its hyper-connections cost, what it keeps.

    python -m mhc.examples.patched_step --kernels tuned.mhcpack --json OUT.json
    python -m mhc.examples.patched_step --kernels tuned.mhcpack --train --json LOSSES.json

The first measures forward and backward of a random V4: 8 layers of width 512, n = 4, 1024 tokens, float32, on the CPU.
Contenders take turns in one process, each round in another order and on fresh tokens; times are medians. What
hyper-connections cost is the median of the time beyond the same model with plain residual connections in the same
round, compiled for the compiled contender. What a step keeps are the bytes that autograd holds when the forward has
ended, without parameters.

With `--train` a smaller V4 learns the bytes of `mhc.examples.train_bytes`, unpatched and patched in turn, from the same
weights; `mhc.examples.plot_loss` draws the file. Kernels come from `mhc-tune tune --streams 4 --width 512 --tokens 1024
--dtype float32`. Needs transformers.
"""

from __future__ import annotations

import copy
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

import mhc
from mhc.examples.model import Size
from mhc.examples.train_bytes import Run, batches, kernels_for, parser_for, split, standard_library, where_it_ran
from mhc.integrations.patched_class import Patched, patched_class
from tiles.cache.cache import write_atomically

BYTES = 256
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
MEASURED_ROUNDS, TRAINING_STEPS = 20, 100


@dataclass(frozen=True)
class Shape:
    """A V4's size, and the tokens of a step: `batch` sequences of `context`."""

    layers: int = 8
    width: int = 512
    batch: int = 1
    context: int = 1024


MEASURED, TRAINED = Shape(), Shape(layers=4, width=128, batch=8, context=128)


def deepseek_v4(shape: Shape, seed: int) -> nn.Module:
    """A random V4 on bytes; raises `BadInput` where transformers has none."""
    try:
        transformers = importlib.import_module("transformers")
        kind, config = transformers.DeepseekV4ForCausalLM, transformers.DeepseekV4Config
    except (ImportError, AttributeError):
        raise mhc.BadInput(
            "patched_step needs transformers 5.24 or newer, got none: pip install transformers"
        ) from None
    torch.manual_seed(seed)
    width = shape.width
    attention: dict[str, Any] = {
        "num_attention_heads": 8,
        "head_dim": width // 8,
        "q_lora_rank": width // 2,
        "o_lora_rank": width // 4,
    }
    attention |= {"o_groups": 2, "partial_rotary_factor": 0.5, "sliding_window": 128}
    indexer = {"index_n_heads": 2, "index_head_dim": width // 8, "index_topk": 64}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": width // 2}
    schedule = {
        "layer_types": [KINDS[index % len(KINDS)] for index in range(shape.layers)],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 32},
        "mlp_layer_types": ["moe"] * shape.layers,
    }
    sizes = {"vocab_size": BYTES, "hidden_size": width, "num_hidden_layers": shape.layers}
    sizes |= {"max_position_embeddings": shape.context, "use_cache": False}
    model: nn.Module = kind(config(**sizes | attention | indexer | experts | schedule))
    return model


class PlainLayer(Patched):
    """A V4 layer with plain residual connections, h [B, S, C] -> h'; the first one takes the equal streams."""

    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, h: torch.Tensor, input_ids: Any = None, **kwargs: Any) -> torch.Tensor:
        """h + attention, then h + MLP."""
        h = h[:, :, 0] if h.dim() == 4 else h
        h = h + self.self_attn(self.input_layernorm(h), **kwargs)[0]
        return h + self.mlp(self.post_attention_layernorm(h), input_ids=input_ids)


class PlainHead(Patched):
    """Nothing to reduce."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h -> h."""
        return h


def without_streams(model: nn.Module) -> nn.Module:
    """The V4 with plain residual connections, in place: what a step costs without hyper-connections."""
    inner: Any = model.model
    for layer in inner.layers:
        layer.__class__ = patched_class(PlainLayer, type(layer))
    inner.hc_head.__class__ = patched_class(PlainHead, type(inner.hc_head))
    return model


def compiled(model: nn.Module) -> nn.Module:
    """The model under torch.compile, in place."""
    model.compile()
    return model


CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": without_streams,
    "plain-compile": lambda model: compiled(without_streams(model)),
    "unpatched": lambda model: model,
    "unpatched-compile": compiled,
    "patched-merge": lambda model: mhc.patch(model, steps=False),
    "patched-step": mhc.patch,
}
"""The models that take turns, each made of a copy of the same V4."""


def tokens(shape: Shape, seed: int) -> Iterator[torch.Tensor]:
    """Random bytes [batch, context] for ever."""
    random = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(BYTES, (shape.batch, shape.context), generator=random)


def forward_and_backward(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """ms of the forward and of both passes."""
    model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    middle = time.perf_counter()
    loss.backward()
    return (middle - began) * 1e3, (time.perf_counter() - began) * 1e3


def kept_bytes(model: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd holds when the forward has ended; every storage counts once, parameters do not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    kept = sum(storages.values())
    del loss
    return kept


def measure(shape: Shape, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Every contender's times, medians, cost of hyper-connections and kept bytes; prints a line a contender."""
    model = deepseek_v4(shape, seed)
    models = {name: make(copy.deepcopy(model)) for name, make in CONTENDERS.items()}
    source, order = tokens(shape, seed), list(models)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for name in order:  # compiles, finds and loads kernels
        forward_and_backward(models[name], next(source))
    for _ in range(rounds):
        ids = next(source)
        for name in order:
            times[name].append(forward_and_backward(models[name], ids))
        order = [*order[1:], order[0]]
    ids, results = next(source), dict[str, dict[str, Any]]()
    for name, each in models.items():
        forward, both = ([taken[index] for taken in times[name]] for index in (0, 1))
        results[name] = {
            "forward_ms": statistics.median(forward),
            "step_ms": statistics.median(both),
            "kept_bytes": kept_bytes(each, ids),
            "every_step_ms": both,
        }
    for name, result in results.items():
        plain = results["plain-compile" if name.endswith("compile") else "plain"]
        beyond = [mine - base for mine, base in zip(result["every_step_ms"], plain["every_step_ms"], strict=True)]
        result["hyper_connections_ms"] = statistics.median(beyond)
        print(
            f"{name:18s} step {result['step_ms']:9.1f} ms, of it hyper-connections "
            f"{result['hyper_connections_ms']:9.1f} ms; keeps {result['kept_bytes'] / 1e6:8.1f} MB",
            flush=True,
        )
    return {"shape": asdict(shape), "rounds": rounds, **where_it_ran(), "results": results}


def train(shape: Shape, steps: int, seed: int = 0) -> dict[str, Any]:
    """Losses of the unpatched and the patched V4, which take turns on the same bytes, from the same weights."""
    model = deepseek_v4(shape, seed)
    models = {"unpatched": copy.deepcopy(model), "patched": mhc.patch(model)}
    optimizers = {name: torch.optim.AdamW(each.parameters(), lr=1e-3) for name, each in models.items()}
    run = Run(batch=shape.batch, size=Size(context=shape.context - 1))
    runs: dict[str, dict[str, list[float]]] = {name: {"losses": [], "step_ms": []} for name in models}
    for number, window in enumerate(islice(batches(split(standard_library())[0], run, seed), steps)):
        for name, each in models.items():
            began = time.perf_counter()
            loss = each(input_ids=window, labels=window).loss
            optimizers[name].zero_grad(set_to_none=True)
            loss.backward()
            optimizers[name].step()
            runs[name]["step_ms"].append((time.perf_counter() - began) * 1e3)
            runs[name]["losses"].append(loss.item())
        if number % max(1, steps // 20) == 0:
            losses = "  ".join(f"{name} {held['losses'][-1]:.4f}" for name, held in runs.items())
            print(f"step {number + 1:5d} of {steps}  {losses}", flush=True)
    return {"shape": asdict(shape), "steps": steps, **where_it_ran(), "runs": runs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 when done, 2 for bad input."""
    parser = parser_for("patched_step", __doc__)
    parser.set_defaults(steps=None)
    parser.add_argument("--train", action="store_true", help="train a small V4, unpatched and patched, on real text")
    chosen = parser.parse_args(arguments)
    steps = (TRAINING_STEPS if chosen.train else MEASURED_ROUNDS) if chosen.steps is None else chosen.steps
    try:
        if steps < 1:
            raise mhc.BadInput(f"--steps must be at least 1, got {steps}: choose a positive number")
        with mhc.using(kernels_for(chosen.kernels)):
            run, shape = (train, TRAINED) if chosen.train else (measure, MEASURED)
            record = run(shape, steps, chosen.seed)
            record["kernels"] = [asdict(row) for row in mhc.kernel_report()]
    except mhc.BadInput as error:
        print(error, file=sys.stderr)
        return 2
    if chosen.json:
        write_atomically(chosen.json, json.dumps(record, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
