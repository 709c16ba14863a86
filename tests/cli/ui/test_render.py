"""Tables for people: a terminal of 80 columns shows all of them."""

import io
from pathlib import Path

from rich.console import Console

from cli.ui.render import records_table
from tiles.cache.cache import KernelCache, Key
from tiles.kernels.spec import Problem
from tiles.target import Device

MEASUREMENT = {
    "default_ms": 0.123,
    "tuned_ms": 0.0617,
    "ratio": 1.99,
    "percent_of_copy": 71.5,
    "percent_of_limit": 72.5,
}
SCHEDULE = {"block_tokens": 48, "block_width": 640, "register_outputs": 6, "register_tokens": 12}


def test_a_table_of_kernels_fits_80_columns(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    for name in ("one processor", "another processor"):
        key = Key.of(Problem("project", "backward", 16, 16384, "bfloat16", 131072), Device("cpu", name, "x86-64-v4"))
        cache.put(key, SCHEDULE, b"code", "text", MEASUREMENT, {})
    screen = io.StringIO()
    Console(file=screen, width=80).print(records_table(cache.records(), "some folder"))
    shown = screen.getvalue()
    assert "…" not in shown
    for text in (
        "project backward",
        "bfloat16",
        "register_outputs=6",
        "one processor",
        "another processor",
        "x86-64-v4",
    ):
        assert text in shown, text
    for value in ("0.123", "0.0617", "1.99", "71.5", "72.5"):
        assert shown.count(value) == 2, value
