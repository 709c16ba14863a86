"""Comparisons of ops with each other, for results/: `python -m cli.maintain.compare boundaries OUT.json`. `mhc-tune
bench` times one op after another, and machines drift in between; here rounds are interleaved.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer

from autotune.measuring.timing import interleaved, narrow, paired_ratio
from cli.bench.cases import BenchCase, make_case
from cli.bench.our_kernels import op_function
from cli.bench.torch_ops import OpFunction
from mhc import functional
from mhc.dispatch.kernels import Kernels, using
from tiles.errors import BadInput
from tiles.target import detect_device

HC_EPS = 1e-6

Contender = tuple[str, Callable[[BenchCase], OpFunction]]
"""The op whose inputs it takes, and what is called."""


class Comparison(NamedTuple):
    """Contenders by name, on the same shapes and default schedules. Ratios are those of the others' times to the first
    one's."""

    contenders: Mapping[str, Contender]
    directions: tuple[str, ...]
    widths: tuple[int, ...]


def _without_norm(case: BenchCase) -> OpFunction:
    return op_function(case, fused=False)


def _with_hc_eps(case: BenchCase) -> OpFunction:
    return lambda *inputs: functional.pre(*inputs, hc_eps=HC_EPS)


COMPARISONS: Mapping[str, Comparison] = {
    "boundaries": Comparison(
        {"single_pass": ("single_pass", op_function), "step": ("step", op_function)}, ("both",), (1280, 2560)
    ),
    "norm": Comparison(
        {
            "pre_norm": ("pre_norm", op_function),
            "pre": ("pre", op_function),
            "pre, then torch's norm": ("pre_norm", _without_norm),
        },
        ("forward", "both"),
        (1280,),
    ),
    "hc_eps": Comparison(
        {f"hc_eps={HC_EPS}": ("pre", _with_hc_eps), "hc_eps=0": ("pre", op_function)}, ("forward", "both"), (1280,)
    ),
}

STREAMS, TOKENS, DTYPES = (2, 4, 8), (64, 2048), ("bfloat16", "float32")

ROUNDS, SECONDS, NARROW = 60, 12.0, 0.05
"""What ends a row: rounds, seconds, or an interval of every ratio of 5 %."""


def main(name: str, out: Path) -> None:
    """Time a comparison's contenders in interleaved rounds; write one row a shape and direction."""
    if name not in COMPARISONS:
        raise BadInput(f"the comparison must be one of {', '.join(COMPARISONS)}, got {name}: name one of them")
    comparison, device, rows = COMPARISONS[name], detect_device("cpu"), []
    shapes = itertools.product(STREAMS, comparison.widths, TOKENS, DTYPES)
    with using(Kernels.defaults()):
        for shape, direction in itertools.product(shapes, comparison.directions):
            rows.append(_row(comparison.contenders, shape, direction))
            ratios = ", ".join(f"{other} {ratio['median']:.2f}" for other, ratio in rows[-1]["ratios"].items())
            typer.echo("n={} C={} T={} {} ".format(*shape) + f"{direction}: {ratios}", err=True)
    first, *others = comparison.contenders
    means = {other: statistics.geometric_mean(row["ratios"][other]["median"] for row in rows) for other in others}
    found = {"device": device.as_dict(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    report = {**found, "first": first, "geometric_means": means, "rows": rows}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _row(contenders: Mapping[str, Contender], shape: tuple[int, int, int, str], direction: str) -> dict[str, Any]:
    """Median milliseconds of all, and the ratios of the others' to the first one's, with 95 % intervals."""
    calls = {}
    for name, (op, function) in contenders.items():
        case = make_case(op, *shape, seed=0)
        calls[name] = case.calls(function(case), (direction,))[direction]
    times = interleaved(calls, rounds=ROUNDS, seconds=SECONDS, enough=lambda times: narrow(times, NARROW), warmup=2)
    first, *others = times
    streams, width, tokens, dtype = shape
    return {
        **{"streams": streams, "width": width, "tokens": tokens, "dtype": dtype, "direction": direction},
        **{"rounds": len(times[first]), "ms": {name: statistics.median(each) for name, each in times.items()}},
        "ratios": {other: asdict(paired_ratio(times[other], times[first])) for other in others},
    }


if __name__ == "__main__":
    typer.run(main)
