"""The contract between schedules, spaces, validity and generated code, for every kernel."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import re
from typing import Any

import pytest
from building import build

from autotune.measuring.verify import check
from tiles.compiler.compile import CompileError, compile_kernel, generate_source
from tiles.errors import BadInput
from tiles.kernels.registry import kernel_specs
from tiles.kernels.spec import IDENTITY, NORM, KernelSpec, Problem
from tiles.lang.dialect import dialect_for
from tiles.runtime.loaded_kernel import is_given
from tiles.target import Target, parse_target

SPECS = list(kernel_specs().values())
TARGETS = (Target("cpu", "x86-64-v3"), Target("cuda", "sm_80"), Target("cuda", "sm_90a"), Target("cuda", "sm_100a"))
ON_TARGETS = [(spec, target) for target in TARGETS for spec in SPECS if target.kind in spec.targets]


LARGE = ("pre.backward", "step.forward", "step.backward", "single_pass.forward", "single_pass.backward")
"""Kernels that take long to make; the fast tier has pre's forward, which takes the same schedule."""


NORMED = ("pre_norm.backward", "single_pass_norm.forward", "single_pass_norm.backward")
"""Of the kernels with a norm, those that stand for all; the others' texts have the same lines more."""


def but_slow(names: tuple[str, ...], normed: tuple[str, ...] = ()) -> list[Any]:
    """All kernels, of those with a norm these; slow are those of these names, and those of the identity or with a norm,
    whose texts are the others' with less or little more."""
    specs = [spec for spec in SPECS if NORM not in spec.op or spec.name in normed]
    slow = [spec.name in names or spec.op.endswith(IDENTITY) or NORM in spec.op for spec in specs]
    return [pytest.param(spec, marks=pytest.mark.slow if dear else ()) for spec, dear in zip(specs, slow, strict=True)]


def named(value: object) -> str:
    return str(getattr(value, "__name__", value.name if isinstance(value, KernelSpec) else value))


def problem_of(spec: KernelSpec, n: int = 4, width: int = 256) -> Problem:
    return spec.canonical(Problem(spec.op, spec.direction, n, width, "bfloat16", tokens=64))


@pytest.mark.parametrize(("spec", "target"), ON_TARGETS, ids=named)
def test_space_names_are_the_schedules_fields_and_hold_the_default(spec, target):
    problem = problem_of(spec)
    space, default = spec.space(problem, target), spec.default(problem, target)
    assert list(space) == [field.name for field in dataclasses.fields(default)]
    assert all(list(values) == sorted(set(values)) for values in space.values())
    assert all(value in space[name] for name, value in dataclasses.asdict(default).items())
    assert spec.schedule_from(dataclasses.asdict(default)) == default


@pytest.mark.parametrize(("spec", "target"), ON_TARGETS, ids=named)
def test_a_space_is_small_enough_to_be_listed(spec, target):
    """The tuner looks at every combination once, at some 20 µs each."""
    for n, width, tokens in ((1, 8, 1), (4, 2560, 4096), (16, 7168, 16384)):
        problem = spec.canonical(Problem(spec.op, spec.direction, n, width, "bfloat16", tokens=tokens))
        assert math.prod(map(len, spec.space(problem, target).values())) <= 125_000


@pytest.mark.parametrize(("spec", "target"), ON_TARGETS, ids=named)
def test_the_default_is_valid_for_every_problem(spec, target):
    for n, width in itertools.product(range(1, 17), (8, 16, 72, 136, 640, 1280, 7168, 8072)):
        problem = problem_of(spec, n, width)
        default = spec.default(problem, target)
        assert spec.why_invalid(problem, default, target) is None, (problem, default)


def program(spec: KernelSpec, problem: Problem, schedule: object, target: Target) -> str:
    """The program that TileLang is given to lower, which takes many times as long."""
    from tilelang.backend.target import determine_target

    module, _, function = spec.builder.partition(":")
    with determine_target("c" if target.kind == "cpu" else {"kind": "cuda", "arch": target.arch}, return_object=True):
        return getattr(importlib.import_module(module), function)(problem, schedule, dialect_for(target)).script()


def has_parts_of_others(op: str) -> bool:
    """Whether sources of others stand for the op's."""
    return op.startswith(("pre", "single_pass")) or op.endswith(IDENTITY)


def programs_and_sources() -> list[Any]:
    """Programs of all kernels on a CPU and CUDA, and the sources of those that mix streams, of fused ones step's."""
    return [
        pytest.param(*spec.values, target, made, marks=pytest.mark.slow if made is generate_source else spec.marks)
        for made in (program, generate_source)
        for target in (TARGETS[0], TARGETS[2])
        for spec in but_slow(LARGE if target.kind == "cpu" else ("pre.forward", *LARGE))
        if made is program or not has_parts_of_others(spec.values[0].op)
    ]


@pytest.mark.parametrize(("spec", "target", "made"), programs_and_sources(), ids=named)
def test_every_tunable_changes_the_program_and_the_generated_source(spec, target, made):
    problem = problem_of(spec, 4 if target.kind == "cpu" else 2)  # lowering for CUDA takes long for many streams
    default, space = spec.default(problem, target), spec.space(problem, target)
    base = made(spec, problem, default, target)
    for name in (name for name, values in space.items() if len(values) > 1):
        start, other = neighbours(spec, problem, target, default, name)
        text = base if start == default else made(spec, problem, start, target)
        assert made(spec, problem, other, target) != text, name


@pytest.mark.parametrize("spec", but_slow(LARGE), ids=named)
def test_the_same_schedule_is_the_same_program(spec):
    problem, target = problem_of(spec, 2), TARGETS[2]
    default = spec.default(problem, target)
    assert program(spec, problem, default, target) == program(spec, problem, default, target)


def neighbours(spec, problem, target, default, name):
    """Two valid schedules that differ in this tunable: the default and another, or if none is valid beside it, two that
    differ from the default in one more."""

    def variants(schedule, tunable):
        values = spec.space(problem, target)[tunable]
        return [dataclasses.replace(schedule, **{tunable: value}) for value in values]

    starts = [default, *(start for second in spec.space(problem, target) for start in variants(default, second))]
    for start in starts:
        for other in variants(start, name):
            pair = start, other
            if start != other and all(spec.why_invalid(problem, schedule, target) is None for schedule in pair):
                return pair
    raise AssertionError(f"{name}: no other value is valid")


@pytest.mark.parametrize("most", [1, pytest.param(3, marks=pytest.mark.slow)], ids=["one", "all"])
@pytest.mark.parametrize("spec", but_slow(("coefficients.backward", "project.backward", *LARGE)), ids=named)
def test_schedules_far_from_the_default_compute_the_same(spec, tmp_path, most):
    target, problem = parse_target("cpu"), problem_of(spec, 3, 384)
    space = spec.space(problem, target)
    corners = [
        spec.schedule_from(dict(zip(space, pick, strict=True)))
        for pick in zip(*map(_ends, space.values()), strict=True)
    ]
    valid = [corner for corner in corners if spec.why_invalid(problem, corner, target) is None]
    assert valid
    for number, corner in enumerate(list(dict.fromkeys(reversed(valid)))[:most]):
        kernel = build(tmp_path / f"{number}.so", problem, corner)
        check(kernel, spec.inputs(problem, 21, seed=5), 21, 2)


def _ends(values: tuple[int, ...]) -> tuple[int, int, int]:
    return values[0], values[len(values) // 2], values[-1]


@pytest.mark.parametrize(
    ("n", "width"),
    [(2, 72), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((4, 1280), (5, 72)))],
)
@pytest.mark.parametrize("spec", but_slow(("pre.forward", *LARGE), NORMED), ids=named)
def test_a_kernel_allocates_the_scratch_that_it_states(spec, n, width):
    target, problem = TARGETS[0], problem_of(spec, n, width)
    schedule = spec.default(problem, target)
    source = generate_source(spec, problem, schedule, target)
    arrays = re.findall(r"^\s+(float|uint16_t) \w+\[(\d+)\];", source, flags=re.MULTILINE)
    # Arrays of one element are variables.
    held = sum({"float": 4, "uint16_t": 2}[kind] * int(size) for kind, size in arrays if int(size) > 1)
    assert held == spec.scratch(problem, schedule, target)
    assert "alloc(" not in source


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_a_broken_rule_is_said_in_one_sentence_and_nothing_compiles(spec):
    target, problem = parse_target("cpu"), problem_of(spec)
    default = spec.default(problem, target)
    field = dataclasses.fields(default)[0].name
    broken = dataclasses.replace(default, **{field: 100_000})
    why = spec.why_invalid(problem, broken, target)
    assert why is not None
    assert "100000" in why.replace(",", "") or "bytes" in why
    assert "choose" in why
    assert "\n" not in why
    with pytest.raises(BadInput, match=spec.op):
        compile_kernel(problem, broken, target)


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_traffic_equals_the_bytes_of_the_tensors(spec):
    for n, width, dtype, tokens in ((4, 256, "bfloat16", 33), (3, 72, "float32", 1), (16, 8, "float16", 0)):
        problem = spec.canonical(Problem(spec.op, spec.direction, n, width, dtype))
        values = spec.inputs(problem, tokens, 0)
        assert list(values) == [argument.name for argument in spec.arguments(problem) if is_given(argument)]
        results = spec.reference(problem, values)
        read = sum(value.nbytes for value in values.values() if not isinstance(value, float))
        traffic = spec.traffic(problem, tokens)
        assert traffic.read == read
        assert traffic.written == sum(result.nbytes for result in results.values())
        assert traffic.bytes == traffic.read + traffic.written
        assert traffic.flops >= 0


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_inputs_and_reference_have_the_shapes_of_the_arguments(spec):
    problem = problem_of(spec, 3, 72)
    values = spec.inputs(problem, 5, 0)
    results = spec.reference(problem, values)
    for argument in spec.arguments(problem):
        if argument.is_scalar:
            assert argument.role == "flag" or isinstance(values[argument.name], float)
            continue
        tensor = (values if is_given(argument) else results)[argument.name]
        assert tuple(tensor.shape) == argument.sized(5)
        assert str(tensor.dtype) == f"torch.{argument.dtype}"
        assert tensor.nbytes == argument.nbytes(5)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"block_width": 8},
        {"block_width": 8, "nontemporal": 0},
        {"block_width": "8", "threads": 0},
        {"block_width": True, "threads": 0},
    ],
)
def test_a_schedule_of_wrong_names_or_types_is_refused(values):
    with pytest.raises(BadInput, match=r"tune (it|this kernel) again"):
        kernel_specs()["merge", "forward"].schedule_from(values)


def test_a_compiler_that_fails_is_told_with_the_problem(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no space left' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    spec = kernel_specs()["aggregate", "forward"]
    problem, target = problem_of(spec), parse_target("cpu")
    with pytest.raises(CompileError, match=r"aggregate forward n=4 .* g\+\+ failed: no space left"):
        compile_kernel(problem, spec.default(problem, target), target)


def test_a_missing_compiler_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    spec = kernel_specs()["aggregate", "forward"]
    problem, target = problem_of(spec), parse_target("cpu")
    with pytest.raises(BadInput, match="no C\\+\\+ compiler is on PATH: install"):
        compile_kernel(problem, spec.default(problem, target), target)


def test_coefficients_are_computed_for_whole_vectors_of_tokens():
    """Else the last tokens of a block go through a C compiler's remainder of a loop, and may round in another way."""
    spec = kernel_specs()["pre", "backward"]
    problem = problem_of(spec, 2, 72)
    default = spec.default(problem, TARGETS[0])
    for block, lanes in ((42, 48), (48, 48), (54, 64)):
        text = program(spec, problem, dataclasses.replace(default, block_tokens=block), TARGETS[0])
        of_tokens = {
            int(size)
            for size in re.findall(r"thread in range\((\d+)\)|T\.serial\((\d+)\)", text)
            for size in size
            if size
        }
        assert lanes in of_tokens, of_tokens
        assert block == lanes or block not in of_tokens, of_tokens
