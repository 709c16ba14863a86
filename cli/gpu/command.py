"""`mhc-tune gpu`: tests, tuning and benchmarks on one GPU within a time budget, the most important first."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from cli.gpu import items, plots, table
from cli.gpu.plan import Item, plan
from cli.gpu.store import Store
from cli.ui.options import TargetOption, measured_device
from cli.ui.output import say
from cli.ui.render import device_text
from tiles.target import Device

RESULTS = "gpu.json"
RESERVED_SECONDS = 10.0
"""Time kept for the tables, the plots and the pack."""

STATUS_ORDER = {"": 0, "partial": 1, "skipped": 2, "failed": 2}
"""Items that were never started come first, then unfinished ones, then those that failed."""

CHECKS = ("numerics", "tests", "sanitizer")
"""Kinds of items that check whether kernels are correct."""


def gpu(
    seconds: Annotated[float, typer.Option("--seconds", min=1.0, help="Time budget of this call.")] = 1500.0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the results.", show_default="results/ and the device's name"),
    ] = None,
    target: TargetOption = "cuda",
) -> None:
    """Run the GPU tests, tune the kernels and compare them with public ones, all on this machine's GPU.

    The most important items come first: numerics and tests, then n = 4 with width 2560 and 4096 tokens, then the other
    shapes of n in 2, 4, 8, width in 1280, 2560, 4096, 7168 and tokens in 1, 64, 4096, 16384. Ends within --seconds; run
    the same command to continue. Writes gpu.json after every item, and at the end results.md, plots and
    kernels.mhcpack. Exits with 1 when a check (numerics, tests, memory checker) failed.
    """
    device = measured_device(target)
    folder = (out or Path("results") / folder_name(device)).absolute()
    store = Store(folder / RESULTS, device)
    run(device, target, store, time.monotonic() + seconds)
    if any(item.kind in CHECKS and _status(store, item) == "failed" for item in plan()):
        raise typer.Exit(1)


def run(device: Device, target: str, store: Store, deadline: float) -> None:
    """Do the rest of the plan until the deadline (of `time.monotonic`), then write tables and plots."""
    folder = store.path.parent
    store.values["about"] = items.versions()
    store.write()
    items.restore_kernels(folder)
    todo = sorted(
        (item for item in plan() if _status(store, item) != "done"), key=lambda item: STATUS_ORDER[_status(store, item)]
    )
    say(f"{device_text(device)}: {len(todo)} of {len(plan())} items to do, {deadline - time.monotonic():.0f} s")
    try:
        for item in todo:
            left = deadline - RESERVED_SECONDS - time.monotonic()
            if left >= item.min_seconds:
                run_item(item, target, store, min(item.max_seconds, left))
    except KeyboardInterrupt:
        say("interrupted: run the same command to continue")
    items.save_kernels(folder)
    table.write(store.values, folder / "results.md")
    plots.write(store.values, folder)
    done = [item for item in plan() if _status(store, item) == "done"]
    say(f"{len(done)} of {len(plan())} items are done, in {folder}; run the same command for the others")


def run_item(item: Item, target: str, store: Store, seconds: float) -> None:
    """Do one item for at most `seconds` and keep what came of it: a failure is a result too."""
    say(f"{item.name}: {seconds:.0f} s at most")
    earlier, started = store.get(item.name), time.monotonic()
    try:
        found = items.RUNNERS[item.kind](item, target, store.path.parent, seconds, earlier)
    except Exception as error:
        found = {**earlier, "status": "failed", "why": f"{type(error).__name__}: {error}"}
    spent = earlier.get("seconds", 0.0) + time.monotonic() - started
    store.put(item.name, {**found, "seconds": round(spent, 1)})
    say(f"{item.name}: {found['status']}" + (f", {found['why']}" if found.get("why") else ""))


def folder_name(device: Device) -> str:
    """A folder name from a device's name."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in device.name.lower()).split())


def _status(store: Store, item: Item) -> str:
    return str(store.get(item.name).get("status", ""))
