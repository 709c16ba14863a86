"""The README's figures are those of the record that it names, and its folders exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDER = ROOT / "results" / "amd-epyc-family-26-x86-64-v4"
RECORDS = ("bench.json", "stack-bfloat16.json", "stack-float32.json")
IMPLS = ("tuned", "default", "eager", "compile")


def test_every_figure_of_the_table_is_in_the_record():
    times = {
        (row["op"], row["direction"], row["dtype"], row["impl"]): row["median_ms"]
        for record in RECORDS
        for row in json.loads((FOLDER / record).read_text(encoding="utf-8"))["results"]
    }
    rows = re.findall(r"^\| (\w+) \| (forward|both) \| (\w+) \| (.*) \|$", README, flags=re.MULTILINE)
    assert len(rows) == 16
    for op, direction, dtype, figures in rows:
        wanted = [times[op, direction, dtype, impl] for impl in IMPLS]
        *shown, eager, compiled = map(float, figures.split(" | "))
        for time, figure in zip(wanted, shown, strict=True):
            assert abs(figure - time) <= (0.051 if time >= 10 else 0.0051)
        assert abs(eager - wanted[2] / wanted[0]) <= 0.051
        assert abs(compiled - wanted[3] / wanted[0]) <= 0.051


def test_the_tree_names_every_folder():
    tree = README.split("## The tree")[1]
    for folder in ("tiles", "autotune", "mhc", "cli", "tests", "results"):
        assert f"\n{folder}/" in tree
        assert (ROOT / folder).is_dir()
