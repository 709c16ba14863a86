"""The command bench: what it measures and prints, with implementations in plain torch."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import write_config
from typer.testing import CliRunner

from autotune.measuring.roofline import Roofline
from autotune.measuring.stopwatch import QueuedStopwatch
from cli.bench import command as bench
from cli.bench import load_time
from cli.bench.cases import DIRECTIONS, OPS, make_case
from cli.bench.implementation import Implementation
from cli.bench.torch_composites import COMPOSITES
from cli.bench.torch_ops import variants
from cli.main import app
from mhc.dispatch import resolve
from mhc.dispatch.resolve import Resolver
from tiles.cache.cache import KernelCache
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.target import detect_device

SHAPE = (2, 8, 4)
USUAL_OPS = [op for op in OPS if op != "pre_norm"]
LOADED = {"from": "pack", "kernels": 16, "load_ms": 12.5, "total_ms": 31.25, "look_up_us": 1.75}


@pytest.fixture(autouse=True)
def _roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Roofline, "measure", lambda kind: Roofline(10.0, 50.0))


@pytest.fixture
def bench_eagerly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Runs the command without kernels: the cache is said to hold some."""
    monkeypatch.setattr(bench, "existing_cache", lambda folder: KernelCache(tmp_path))
    monkeypatch.setattr(bench, "IMPLS", ("eager",))
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(load_time, "measure", lambda folder, shape, skipped: [{"shape": shape, **LOADED}])
    shape = ["--streams", "2", "--width", "8", "--tokens", "4", "--dtype", "float32"]
    return lambda *more: CliRunner().invoke(app, ["bench", *shape, *more])


def test_ops_and_directions_can_be_chosen(bench_eagerly: Callable[..., Any]) -> None:
    result = bench_eagerly("--op", "stack", "--op", "merge", "--direction", "both", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert [(row["op"], row["direction"]) for row in printed["results"]] == [("merge", "both"), ("stack", "both")]
    assert (printed["copy_gb_per_s"], printed["gflops_peak"]) == (10.0, 50.0)
    assert printed["load"] == []
    assert "merge n=2 C=8 float32 T=4: both\n" in result.stderr


def test_only_tuned_kernels_need_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "run", lambda device, folder, *rest: {"results": [], "skipped": [], "load": [], "of": 1})
    monkeypatch.setattr(bench, "_show", lambda *given, **named: None)
    given = ["bench", "--cache", str(tmp_path / "empty"), "--op", "merge", "--json"]
    for impl in ("default", "eager"):
        done = CliRunner().invoke(app, [*given, "--impl", impl])
        assert done.exit_code == 0, done.stderr
    of_cache = (["--impl", "tuned"], ["--impl", "default", "--impl", "separate"], ["--impl", "invariant"])
    for more in (*of_cache, ["--impl", "eager", "--op", "load"]):
        done = CliRunner().invoke(app, [*given, *more])
        assert done.exit_code == 2
        assert "the kernel cache must hold tuned kernels, found none in" in done.stderr


@pytest.mark.slow
def test_all_ops_and_directions_are_the_default(bench_eagerly: Callable[..., Any]) -> None:
    result = bench_eagerly("--json")
    rows = json.loads(result.stdout)["results"]
    assert json.loads(result.stdout)["load"]
    assert {(row["op"], row["direction"]) for row in rows} == {(op, way) for op in USUAL_OPS for way in DIRECTIONS}
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["limit_ms"] == pytest.approx(max(row["bytes"] / 10, row["flops"] / 50) / 1e6)
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit_ms"] / row["median_ms"])
        assert row["form"]
    combined = {row["form"] for row in rows if row["op"] in COMPOSITES}
    assert all(form.count("; ") == 3 for form in combined)


def test_loading_can_be_timed_alone(bench_eagerly: Callable[..., Any]) -> None:
    result = bench_eagerly("--op", "load", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["results"] == []
    assert printed["load"] == [{"shape": [2, 8, 4, "float32"], **LOADED}]
    table = bench_eagerly("--op", "load").stdout
    assert all(text in table for text in ("pack", "first call ends ms", "12.5", "31.2", "1.75"))


def test_the_backward_is_compiled_apart_and_not_where_it_is_not_asked_for(
    bench_eagerly: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    seen: list[tuple[tuple[str, ...], bool]] = []

    def none(case: object, directions: list[str], *more: object) -> list[Implementation]:
        seen.append((tuple(directions), torch._functorch.config.donated_buffer))
        return []

    monkeypatch.setattr(bench, "_implementations", none)
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    assert bench_eagerly("--op", "merge").exit_code == 0
    assert seen == [(("forward", "both"), True), (("backward",), False)]
    seen.clear()
    assert bench_eagerly("--op", "merge", "--direction", "forward").exit_code == 0
    assert seen == [(("forward",), True)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "sinkhorn"], "op must be one of project,"),
        (["--direction", "sideways"], "direction must be one of forward, backward, both, got sideways"),
        (["--tokens", "0"], "at least one token, got 0"),
        (["--streams", "17"], "got 17"),
    ],
)
def test_bad_input_is_one_line(bench_eagerly: Callable[..., Any], arguments: list[str], said: str) -> None:
    result = bench_eagerly(*arguments)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert said in result.stderr


def test_on_a_gpu_calls_are_queued_and_the_cpus_share_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Queued(QueuedStopwatch):
        def __init__(self) -> None:
            self.host_seconds, self.conditions = {}, {"throttled": 0.0}

        def prepared(self, call: Any) -> Any:
            self.host_seconds[call] = 3e-6
            return call

        def milliseconds(self, prepared: Any) -> float:
            assert prepared in self.host_seconds
            prepared()
            return 2.0

        def observe(self, prepared: Any) -> None:
            pass

    monkeypatch.setattr(bench, "queued_stopwatch_for", lambda device: Queued())
    monkeypatch.setattr(bench, "ROUNDS", 2)
    case = make_case("aggregate", *SHAPE, "float32", 0)
    function = variants("aggregate", *SHAPE[:2], "float32")["einsum, float32"]
    (row,) = bench._measure(
        case, [Implementation("eager", function, "einsum", ("forward",))], ["forward"], Roofline(10.0, 50.0)
    )
    assert (row["median_ms"], row["host_us"]) == (2.0, pytest.approx(3.0))
    assert row["conditions"] == {"throttled": 0.0}
    assert row["percent_of_copy"] == pytest.approx(100 * row["bytes"] / 2e6 / 10.0)


def test_an_implementation_that_fails_is_a_reason_and_no_error(
    bench_eagerly: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(bench, "IMPLS", ("liger", "eager"))
    monkeypatch.setattr(bench.peers, "implementations", breaks)
    result = bench_eagerly("--op", "merge", "--direction", "forward", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert [row["impl"] for row in printed["results"]] == ["eager"]
    assert printed["skipped"] == ["liger merge n=2 C=8 float32 T=4: RuntimeError: no such kernel"]


def test_a_given_schedule_is_one_more_implementation(
    bench_eagerly: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def compiled(resolver: Resolver, option: Any, problem: Problem, here: Any) -> Any:
        seen.append({"kernel": f"{problem.op}.{problem.direction}", "runs": option.runs, **option.schedule})
        return resolve.reference(problem, torch.device("cpu"), "the test").call, ""

    monkeypatch.setattr(Resolver, "_compiled", compiled)
    block = kernel_spec("merge", "forward").default(
        Problem("merge", "forward", 2, 8, "float32", 4), detect_device("cpu").target
    )
    field = next(iter(asdict(block)))
    given = f"mine:merge.forward={json.dumps({field: asdict(block)[field]})}"
    result = bench_eagerly("--op", "merge", "--direction", "both", "--schedule", given, "--json")
    assert result.exit_code == 0, result.stderr
    assert [row["impl"] for row in json.loads(result.stdout)["results"]] == ["eager", "mine"]
    assert [(one["kernel"], one["runs"]) for one in seen] == [
        ("merge.forward", "recompiled"),
        ("merge.backward", "default"),
    ]
    assert {name: seen[0][name] for name in asdict(block)} == asdict(block)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("wide", "LABEL:OP.DIRECTION=JSON"),
        ("wide:merge={}", "LABEL:OP.DIRECTION=JSON"),
        ("wide:merge.forward={", "LABEL:OP.DIRECTION=JSON"),
        ('wide:merge.forward={"tiles": 3}', "got tiles"),
        ("wide:knead.forward={}", "no kernel knead.forward"),
    ],
)
def test_a_schedule_that_says_nothing_known_is_refused(
    bench_eagerly: Callable[..., Any], given: str, said: str
) -> None:
    result = bench_eagerly("--op", "merge", "--schedule", given)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert said in result.stderr


def test_the_whole_run_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    report = bench.run(detect_device("cpu"), tmp_path, [(*SHAPE, "float32")], ["aggregate"], ["forward"], ["eager"])
    assert set(report) == {
        *("device", "threads", "copy_gb_per_s", "gflops_peak", "torch", "results", "load", "skipped"),
    }
    (row,) = report["results"]
    assert set(row) == {
        *("op", "direction", "streams", "width", "tokens", "dtype", "impl", "form", "rounds"),
        *("median_ms", "bytes", "gb_per_s", "percent_of_copy", "flops", "limit_ms", "percent_of_limit"),
    }


@pytest.mark.slow
def test_a_models_ops_are_measured(bench_eagerly: Callable[..., Any], tmp_path: Path) -> None:
    write_config(tmp_path, hidden_size=8)
    result = bench_eagerly("--model", str(tmp_path), "--direction", "forward", "--json")
    assert result.exit_code == 0, result.stderr
    measured = {row["op"] for row in json.loads(result.stdout)["results"]}
    assert measured == set(USUAL_OPS) - {"single_pass"}
    assert "2 streams of width 8, 20 Sinkhorn rounds" in result.stderr


@pytest.mark.parametrize(
    ("changes", "more", "said"),
    [
        ({"hc_sinkhorn_iters": 10, "hidden_size": 8}, (), "bench compares maps of 20 Sinkhorn rounds, got 10: give"),
        ({"model_type": "deepseek_v41", "hidden_size": 8}, ("--op", "stack"), "op must be one of project, "),
        ({}, (), "--width must be 64, which "),
    ],
)
def test_what_a_model_rules_out_is_one_line(
    bench_eagerly: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], more: tuple[str, ...], said: str
) -> None:
    write_config(tmp_path, **changes)
    result = bench_eagerly("--model", str(tmp_path), *more)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert said in result.stderr
