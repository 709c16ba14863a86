"""Tables and plots of made-up results of `mhc-tune gpu`."""

import sys
from pathlib import Path
from typing import Any

import pytest

from cli.gpu import plots as gpu_plots
from cli.gpu import table as gpu_table
from cli.gpu.plan import MAIN_SHAPE


def row(
    op: str, direction: str, impl: str, ms: float, shape: tuple[int, int, int] = MAIN_SHAPE, **more: Any
) -> dict[str, Any]:
    streams, width, tokens = shape
    return {
        **{"op": op, "direction": direction, "streams": streams, "width": width, "tokens": tokens, "impl": impl},
        **{"median_ms": ms, "gb_per_s": 2000.0, "percent_of_copy": 70.0, "percent_of_limit": 65.0, "host_us": 21.0},
    }


DECODE_TOKENS = (4, 2560, 1)
BENCH = {
    "merge": {
        "rows": [row("merge", "forward", "tuned", 0.1), row("merge", "forward", "copy", 0.08)],
        "skipped": ["liger merge n=4: not installed"],
    },
    "layer": {
        "rows": [
            row("layer", "both", "tuned", 0.5),
            row("layer", "both", "default", 0.6),
            row("layer", "both", "tile-kernels", 1.25),
            row("layer", "both", "compile", 1.0),
        ],
        "skipped": [],
    },
}
SMALL = {
    "pre": {
        "rows": [
            row("pre", "forward", "default", 0.006, DECODE_TOKENS),
            row("pre", "forward", "unsplit", 0.024, DECODE_TOKENS),
            row("pre", "forward", "liger", 0.03, DECODE_TOKENS),
        ]
    }
}
VALUES = {
    "device": {"name": "NVIDIA H100", "arch": "sm_90a"},
    "about": {"torch": "2.11.0", "tile-kernels": "1.0.0"},
    "items": {
        "numerics default n=4 C=2560 T=4096": {
            "status": "failed",
            "why": "step: no kernel",
            "ops": {
                "merge": {"errors": {"x": 2e-3, "dpost": None}, "within": False, "repeats": True},
                "step": {"failed": "no kernel"},
            },
        },
        "numerics tuned n=4 C=2560 T=4096": {
            "status": "done",
            "ops": {"pre": {"errors": {"u": 2e-3, "res": 1e-6}, "within": True, "repeats": True}},
        },
        "tests": {"status": "done", "counts": {"PASSED": 80, "SKIPPED": 1}},
        "bench n=4 C=2560 T=4096": {"status": "done", "ops": BENCH},
        "bench n=4 C=2560 T=1": {"status": "done", "ops": SMALL},
        "block": {
            "status": "done",
            "ops": {
                "block": {
                    **{"layers": 4, "streams": 4, "width": 2560, "tokens": 4096, "dtype": "bfloat16"},
                    "rows": [
                        {"network": "plain", "median_ms": 20.0, "overhead_percent": 0.0, "peak_bytes": 2**30},
                        {"network": "mhc, recomputed", "median_ms": 21.0, "overhead_percent": 5.0, "peak_bytes": None},
                    ],
                }
            },
        },
    },
}


@pytest.fixture
def table(tmp_path: Path) -> str:
    gpu_table.write(VALUES, tmp_path / "results.md")
    return (tmp_path / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        "# NVIDIA H100 (sm_90a)",
        "| merge | default | dpost - | NO | yes |",
        "| pre | tuned | u 0.002 | yes | yes |",
        "Tests on the GPU: 80 passed, 1 skipped",
        "| merge | forward | 4 | 2560 | 4096 | tuned | 0.1 | 2000 | 70 | 65 | 0.08 |",
        "| layer | both | 4 | 2560 | 4096 | 0.5 | 1.25 | - | 1 | - | compile | 2.00 |",
        "| pre | forward | 4 | 2560 | 1 | default | 6 | 24 | liger 30 | 21 |",
        "| plain | 20 | 0.0 | 1024 |",
        "| mhc, recomputed | 21 | 5.0 | - |",
        "- numerics default n=4 C=2560 T=4096: failed, step: no kernel",
        "- liger merge n=4: not installed",
    ],
)
def test_the_table_says(line: str, table: str) -> None:
    assert line in table.splitlines()


def test_nothing_measured_makes_no_empty_tables(tmp_path: Path) -> None:
    gpu_table.write(VALUES | {"items": {}}, tmp_path / "results.md")
    assert "##" not in (tmp_path / "results.md").read_text()
    gpu_plots.write(VALUES | {"items": {}}, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    gpu_plots.write(VALUES, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"shares", "widths", "tokens"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_pictures_are_left_out_where_matplotlib_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    gpu_plots.write({"items": {}, "device": VALUES["device"]}, tmp_path)
    assert "no plots" in capsys.readouterr().err
