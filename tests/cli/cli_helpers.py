"""Helpers of the command line's tests: running a command, stand-ins of worker processes, kernels in caches."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from cli.main import app
from tiles.cache.cache import KernelCache, Key
from tiles.cache.record import Record
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.pack.pack import write_pack
from tiles.target import Device

DEVICE = Device("cpu", "A CPU", "x86-64")


def mhc_tune(*arguments: object) -> Result:
    """Run a command; an exception that is no exit fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result


class NoWorkers:
    """Stands in for worker processes that are never called."""

    def __enter__(self) -> "NoWorkers":
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Clock:
    """A clock that only tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write_config(folder: Path, **changes: Any) -> Path:
    """Write the config.json of a tiny model with 2 streams of width 64 in float32."""
    values = {"model_type": "deepseek_v4", "hidden_size": 64, "rms_norm_eps": 1e-6, "torch_dtype": "float32"}
    values |= {"hc_mult": 2, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6}
    path = folder / "config.json"
    path.write_text(json.dumps(values | changes))
    return path


def put_kernel(cache: KernelCache, op: str, width: int, device: Device, dtype: str = "float32") -> Record:
    """Store a kernel with its default schedule; its code says which it is."""
    problem = Problem(op, "forward", 2, width, dtype, 64)
    schedule = asdict(kernel_spec(op, "forward").default(problem, device.target))
    content = f"{op} {width} {device}".encode(), "// source"
    return cache.put(Key.of(problem, device), schedule, *content, {"tuned_ms": 1.0}, {"host": "a"})


def put_merge(
    cache: KernelCache,
    width: int,
    tuned_ms: float | None,
    binary: bytes = b"code",
    schedule: dict[str, Any] | None = None,
    date: str = "2026-01-01",
    **changes: Any,
) -> Record:
    """Store a kernel of merge; `schedule` is changes to the default, `changes` to the key."""
    problem = Problem("merge", "forward", 4, width, "float32", 128)
    values = asdict(kernel_spec("merge", "forward").default(problem, DEVICE.target)) | (schedule or {})
    measured = {} if tuned_ms is None else {"tuned_ms": tuned_ms}
    return cache.put(replace(Key.of(problem, DEVICE), **changes), values, binary, "//", measured, {"date": date})


def packed(cache: KernelCache, **options: bool) -> Path:
    """The cache as a pack beside its folder."""
    path = cache.folder.with_suffix(".mhcpack")
    write_pack(cache, path, **options)
    return path
