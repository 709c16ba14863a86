"""Tables and pictures of made-up results, and what numerics and the transformer's step say on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.measuring.verify import WrongResult
from cli.bench import our_kernels as ours
from cli.bench.cases import OPS, make_case
from cli.bench.implementation import Contender
from cli.gpu import block as gpu_block
from cli.gpu import child as gpu_child
from cli.gpu import numerics as gpu_numerics
from cli.gpu import plots as gpu_plots
from cli.gpu import table as gpu_table
from cli.gpu.plan import TELLING
from mhc.dispatch.kernels import Kernels
from tiles.target import detect_device

CPU = detect_device("cpu")


def row(
    op: str, direction: str, impl: str, ms: float, shape: tuple[int, int, int] = TELLING, **more: Any
) -> dict[str, Any]:
    streams, width, tokens = shape
    return {
        **{"op": op, "direction": direction, "streams": streams, "width": width, "tokens": tokens, "impl": impl},
        **{"median_ms": ms, "gb_per_s": 2000.0, "percent_of_copy": 70.0, "percent_of_limit": 65.0, "host_us": 21.0},
    }


FEW = (4, 2560, 1)
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
            row("pre", "forward", "default", 0.006, FEW),
            row("pre", "forward", "unsplit", 0.024, FEW),
            row("pre", "forward", "liger", 0.03, FEW),
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
    gpu_plots.draw(VALUES | {"items": {}}, tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    gpu_plots.draw(VALUES, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"shares", "widths", "tokens"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


@pytest.mark.parametrize("op", ["project", "pre", "step", "layer"])
def test_numerics_tell_every_result_and_gradient(op: str) -> None:
    case = make_case(op, 2, 16, 9, "bfloat16", 1)
    judged = gpu_numerics.judged(Contender("default", ours.form(case), "", kernels=Kernels.reference()), case)
    assert list(judged["errors"]) == [*gpu_numerics.result_names(case), *(f"d{name}" for name in case.names)]
    assert judged["within"]
    assert judged["repeats"]
    assert 0 < max(judged["errors"].values()) < 1e-2


@pytest.mark.parametrize("op", OPS)
def test_every_result_has_a_name(op: str) -> None:
    case = make_case(op, 2, 16, 3, "float32", 0)
    assert len(gpu_numerics.result_names(case)) == len(case.upstream)


def test_numerics_see_what_is_wrong_and_what_does_not_repeat() -> None:
    case = make_case("aggregate", 2, 16, 9, "float32", 1)
    calls: list[float] = []

    def drifting(x: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(1.0)
        return ((pre[:, :, None] * x).sum(1) * (1 + 1e-4 * len(calls)),)

    judged = gpu_numerics.judged(Contender("default", drifting, ""), case)
    assert (judged["within"], judged["repeats"]) == (True, False)
    judged = gpu_numerics.judged(Contender("default", lambda x, pre: (x.sum(1) * pre.sum() * torch.nan,), ""), case)
    assert (judged["within"], judged["errors"]["u"]) == (False, None)


def test_numerics_say_which_kernels_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "KERNELS", {"default": (lambda folder: Kernels.reference(), "default")})
    about = ("merge", 2, 16, 5, "float32", CPU, tmp_path)
    assert "the torch reference was asked for" in gpu_numerics.of_op("default", *about)["skipped"][0]
    monkeypatch.undo()
    assert "that holds some" in gpu_numerics.of_op("tuned", *about)["skipped"][0]


def test_numerics_that_are_far_off_are_no_skipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "KERNELS", {"default": (lambda folder: Kernels.reference(), "reference")})
    monkeypatch.setattr(ours, "form", lambda case, joined: lambda x, pre: ((2 * pre[:, :, None] * x).sum(1),))
    with pytest.raises(WrongResult, match="wrong, relative error"):
        gpu_numerics.of_op("default", "aggregate", 2, 16, 5, "float32", CPU, tmp_path)


def test_the_transformers_step_is_timed_with_and_without_mhc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "defaults", Kernels.reference)
    monkeypatch.setattr(gpu_block, "ROUNDS", 2)
    size = gpu_block.Size(layers=1, streams=2, width=16, heads=2, tokens=8, dtype=torch.float32)
    found = gpu_block.measure(CPU, tmp_path, size)
    assert [row["network"] for row in found["rows"]] == ["plain", "mhc", "mhc, recomputed"]
    plain, with_streams, _ = found["rows"]
    assert plain["overhead_percent"] == 0
    gain = with_streams["median_ms"] / plain["median_ms"] - 1
    assert with_streams["overhead_percent"] == pytest.approx(100 * gain)
    assert any("merge forward: reference" in ran for ran in found["runs"])


def test_a_child_keeps_each_op_and_why_one_failed(tmp_path: Path) -> None:
    progress = gpu_child.Progress(tmp_path / "out.json")

    def breaks() -> dict[str, Any]:
        raise ValueError("too large\nby far")

    progress.each("a", lambda: {"rows": []}, broken=lambda: False)
    progress.each("b", breaks, broken=lambda: False)
    assert progress.values["ops"] == {"a": {"rows": []}, "b": {"failed": "ValueError: too large"}}
    with pytest.raises(SystemExit) as ended:
        progress.each("c", lambda: {"rows": []}, broken=lambda: True)
    assert ended.value.code == gpu_child.BROKEN
    assert '"c": {"rows": []}' in (tmp_path / "out.json").read_text()


def test_a_child_names_who_broke_the_gpu(tmp_path: Path) -> None:
    progress = gpu_child.Progress(tmp_path / "out.json")

    def breaks() -> dict[str, Any]:
        raise gpu_child.bench.Poisoned("liger", "illegal memory access")

    with pytest.raises(SystemExit):
        progress.each("layer", breaks, broken=lambda: False)
    assert '"without": {"liger": "illegal memory access"}' in (tmp_path / "out.json").read_text()
