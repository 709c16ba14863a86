"""Shapes of a command: from options, from a model, and where both contradict."""

from dataclasses import replace

import pytest
import torch

import mhc
from cli.ui.model_config import known_models
from cli.ui.options import MIXING_OPS, problems
from cli.ui.shapes import shapes
from tiles.cache.cache import Key
from tiles.errors import BadInput
from tiles.kernels.spec import Problem
from tiles.target import Device

ALL = MIXING_OPS


def test_options_and_their_defaults() -> None:
    found = shapes(None, None, [64, 128], None, None)
    assert (found.streams, found.widths, found.dtypes, found.ops) == ([4], [64, 128], ["bfloat16"], ALL)
    assert (found.rounds, found.model, list(found.reasons())) == (20, None, [])
    assert shapes(None, [2], None, ["float32"], ["merge"]).ops == ["merge"]


@pytest.mark.parametrize(
    ("name", "unused"), [("deepseek-v4-pro", {"single_pass"}), ("deepseek-v4.1-flash", {"step", "pre"})]
)
def test_a_model_says_what_it_needs_and_why(name: str, unused: set[str]) -> None:
    found, row = shapes(name, None, None, None, None), known_models()[name]
    assert (found.streams, found.widths, found.dtypes, found.rounds) == ([4], [row.width], ["bfloat16"], 20)
    assert set(found.ops) == set(ALL) - unused - {"sinkhorn"}
    first, dtype, fused, parts, scalars = found.reasons()
    assert first.startswith(f"{name}: 4 streams of width {row.width}, 20 Sinkhorn rounds (github.com/")
    assert dtype == "bfloat16: --dtype, as it names none"
    whose = "the pre of the sublayer before" if row.single_pass else "its own pre"
    assert fused.endswith(f"{row.boundary}: a sublayer of it reads the streams through {whose}")
    assert set(parts.split(":")[0].split(", ")) == {"aggregate", "merge", "coefficients", "project"}
    assert scalars.startswith(f"eps {row.eps:g}, hc_eps 1e-06, post_scale 2: ")


@pytest.mark.parametrize("single_pass", [False, True])
def test_the_ops_of_a_boundary_are_those_that_a_stack_runs(single_pass: bool) -> None:
    stack = mhc.HyperConnectionStack(
        [mhc.HyperConnection(8, 2, torch.nn.Identity()) for _ in range(2)], single_pass=single_pass
    )
    x = torch.randn(3, 2, 8, requires_grad=True)
    kernels = mhc.Kernels.reference()
    with mhc.using(kernels):
        stack(x).sum().backward()
    found = shapes("deepseek-v4.1-flash" if single_pass else "deepseek-v4-flash", None, None, None, None)
    ran = {row.op for row in kernels.report()}
    assert found.model
    assert found.model.boundary in ran
    assert ran <= set(found.ops)


def test_a_model_without_a_dtype_takes_that_of_the_option() -> None:
    found = shapes("glm-5.3-flash", None, None, ["float32", "float16"], None)
    assert found.dtypes == ["float32", "float16"]
    assert "float32, float16: --dtype, as it names none" in found.reasons()


def test_a_model_whose_res_is_the_identity_has_ops_of_its_own() -> None:
    found = shapes("hunyuan-v4", None, None, None, None)
    assert found.ops == ["aggregate", "merge_identity", "pre_identity", "step_identity"]
    first, _dtype, fused, parts, _scalars = found.reasons()
    assert parts == "aggregate, merge_identity: of what is before the first sublayer and after the last one"
    assert "4 streams of width 6144, res is the identity (" in first
    assert fused.startswith("pre_identity, step_identity: a sublayer of it reads the streams through its own pre")


@pytest.mark.parametrize(
    ("name", "op", "other"),
    [
        ("glm-5.3-flash", "step_norm", "single_pass_norm"),
        ("deepseek-v4.1-flash", "single_pass_norm", "pre_norm"),
        ("hunyuan-v4", "pre_norm_identity", "pre_norm"),
    ],
)
def test_ops_with_a_norm_are_taken_where_they_are_named(name: str, op: str, other: str) -> None:
    assert not any("norm" in usual for usual in shapes(name, None, None, None, None).ops)
    assert shapes(name, None, None, None, [op]).ops == [op]
    with pytest.raises(BadInput, match=f"got {other}: choose"):
        shapes(name, None, None, None, [other])


def test_options_that_agree_with_the_model_are_taken() -> None:
    found = shapes("glm-5.3-flash", [4], [4096], ["bfloat16"], ["merge"])
    assert (found.ops, found.widths) == (["merge"], [4096])
    assert not [line for line in found.reasons() if "reads the streams" in line], "no fused op is wanted"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"streams": [2]}, "--streams must be 4, which glm-5.3-flash has, got 2: leave --streams or --model out"),
        ({"widths": [4096, 64]}, "--width must be 4096, which glm-5.3-flash has, got 4096 and 64: leave"),
        ({"ops": ["sinkhorn"]}, "op must be one of aggregate, merge, .* got sinkhorn"),
        ({"ops": ["single_pass"]}, "op must be one of aggregate, merge, .* got single_pass"),
        (
            {"model": "hunyuan-v4", "offered": ["aggregate", "pre", "layer"]},
            "has ops of maps that mix streams, got the identity of hunyuan-v4: give --streams",
        ),
    ],
)
def test_contradictions_are_refused(given: dict, said: str) -> None:
    asked = {"model": "glm-5.3-flash", "streams": None, "widths": None, "dtypes": None, "ops": None} | given
    with pytest.raises(BadInput, match=said):
        shapes(**asked)


def test_a_contradicted_dtype_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    held = replace(known_models()["glm-5.3-flash"], dtype="float16")
    monkeypatch.setattr("cli.ui.shapes.read_model", lambda named: held)
    assert shapes("x", None, None, None, None).dtypes == ["float16"]
    with pytest.raises(BadInput, match=r"--dtype must be float16, which glm-5\.3-flash has, got float32"):
        shapes("x", None, None, ["float32"], None)


def test_kernels_that_do_not_depend_on_a_width_or_dtype_are_a_models_too() -> None:
    device = Device("cpu", "A CPU", "x86-64")
    found = shapes("glm-5.3-flash", None, None, None, None)
    kernels = [Key.of(problem, device).problem for problem in problems([4], [4096], [100], ["bfloat16"])]
    assert {problem.op for problem in kernels if problem in found} == set(found.ops)
    for other in ({"width": 2560}, {"rounds": 10}, {"streams": 2}, {"dtype": "float32"}):
        problem = Problem(
            **{"op": "step", "direction": "forward", "streams": 4, "width": 4096, "dtype": "bfloat16"} | other
        )
        assert problem not in found
