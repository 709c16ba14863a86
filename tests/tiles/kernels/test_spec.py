"""The rules of problems, arguments and schedules, and how kernels are found."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest

from tiles.errors import BadInput
from tiles.kernels import registry
from tiles.kernels.registry import families, kernel_spec, kernel_specs
from tiles.kernels.spec import TOKENS, Argument, Problem, Traffic

PROBLEM = Problem("merge", "forward", 4, 1280, "bfloat16", 2048)


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 8, 16])
def test_sizes_follow_from_the_streams(streams):
    problem = replace(PROBLEM, streams=streams)
    assert problem.fan_in == streams * 1280
    assert problem.outputs == streams**2 + 2 * streams


@pytest.mark.parametrize("ending", ["", "_norm", "_identity", "_norm_identity"])
def test_an_ops_endings_say_what_is_inside(ending):
    problem = replace(PROBLEM, op="step" + ending)
    assert problem.base_op == "step"
    assert (problem.normalises, problem.mixes) == ("norm" in ending, "identity" not in ending)
    assert problem.of("merge").op == ("merge" if problem.mixes else "merge_identity")


def test_a_problem_reads_as_one_line():
    assert PROBLEM.describe() == "merge forward n=4 C=1280 bfloat16 T=2048"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"streams": 0}, "streams must be in 1..16, got 0: choose a stream count in that range"),
        ({"streams": 17}, "streams must be in 1..16, got 17: choose a stream count in that range"),
        ({"width": 100}, "width must be a positive multiple of 8, got 100: pad to 104"),
        ({"width": 0}, "width must be a positive multiple of 8, got 0: pad to 8"),
        ({"width": -8}, "width must be a positive multiple of 8, got -8: pad to 8"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16, got float64: cast the streams"),
        ({"tokens": -1}, "tokens must be in 0..2^40, got -1: choose a number in that range"),
        ({"tokens": 2**40 + 1}, "tokens must be in 0..2^40, got 1099511627777: choose a number in that range"),
        ({"width": 2**17 + 8}, "width must be at most 131072, got 131080: split it"),
        ({"rounds": 0}, "Sinkhorn rounds must be in 1..100, got 0: the paper uses 20"),
        ({"rounds": 101}, "Sinkhorn rounds must be in 1..100, got 101: the paper uses 20"),
    ],
)
def test_a_broken_rule_is_one_line_with_the_values_and_the_remedy(changes, line):
    with pytest.raises(BadInput) as caught:
        replace(PROBLEM, **changes)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"streams": 1}, {"streams": 16}, {"width": 8}, {"tokens": 0}, {"rounds": 1}])
def test_the_edges_of_the_rules_are_valid(changes):
    assert replace(PROBLEM, **changes) != PROBLEM


def test_bytes_of_arguments():
    x = Argument("x", (TOKENS, 4, 8), "bfloat16", "input")
    assert (x.sized(3), x.nbytes(3), x.nbytes(0)) == ((3, 4, 8), 192, 0)
    assert Argument("dphi", (24, 32), "float32", "partial").nbytes(10**6) == 24 * 32 * 4
    assert Argument("eps", (), "float32", "scalar").nbytes(7) == 4
    assert Traffic(read=3, written=4, flops=9).bytes == 7


@dataclass(frozen=True)
class Tunables:
    block: int
    unroll: bool
    added: int = 0


def test_schedules_take_exactly_their_fields_and_types():
    spec = replace(kernel_spec("merge", "forward"), schedules=(Tunables,))
    assert spec.schedule_from({"block": 8, "unroll": True, "added": 3}) == Tunables(8, True, 3)
    assert spec.schedule_from({"block": 8, "unroll": True}) == Tunables(8, True), "a record from before `added`"
    for values, why in (
        ({}, "unknown [], missing ['block', 'unroll']"),
        ({"block": 8}, "unknown [], missing ['unroll']"),
        ({"block": 8, "unroll": True, "more": 1}, "unknown ['more'], missing []"),
    ):
        with pytest.raises(BadInput, match=re.escape(f"must have its fields, got {why}: tune this kernel again")):
            spec.schedule_from(values)
    for values in ({"block": "8", "unroll": True}, {"block": True, "unroll": True}, {"block": 8, "unroll": 1}):
        with pytest.raises(BadInput, match="must be of type"):
            spec.schedule_from(values)


def test_every_kernel_is_found_by_op_and_direction():
    assert sum(len(family.kernels) for family in families()) == len(kernel_specs())
    for (op, direction), spec in kernel_specs().items():
        assert kernel_spec(op, direction) is spec
        assert spec.name == f"{op}.{direction}"


def test_families_are_the_folders_and_both_directions_are_there():
    mixing = ("merge", "pre", "step", "single_pass")
    normed = (f"{op}_norm{ending}" for op in mixing[1:] for ending in ("", "_identity"))
    assert [family.name for family in families()] == ["apply", "coefficients", "project", "fused", "single_pass"]
    assert set(kernel_specs()) == {
        (op, direction)
        for op in (
            "project",
            "coefficients",
            "sinkhorn",
            "aggregate",
            *mixing,
            *(f"{op}_identity" for op in mixing),
            *normed,
        )
        for direction in ("forward", "backward")
    }


def test_an_unknown_kernel_is_refused_with_the_choices():
    with pytest.raises(BadInput, match=r"no kernel swirl\.forward: choose one of .*merge\.forward"):
        registry.kernel_spec("swirl", "forward")
