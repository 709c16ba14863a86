"""Variants of the ops in plain torch: each computes the same maths as the reference."""

import pytest

from cli.bench.cases import TOLERANCE, make_case
from cli.bench.torch_composites import SINGLE_OPS
from cli.bench.torch_ops import FUSIBLE, variants
from tiles.kernels.spec import DTYPES

SHAPE = (3, 16, 5)
ALL_FORMS = [(op, dtype, name) for dtype in DTYPES for op in SINGLE_OPS for name in variants(op, *SHAPE[:2], dtype)]


@pytest.mark.parametrize(("op", "dtype", "name"), ALL_FORMS)
def test_a_form_and_its_gradients_equal_the_reference(op: str, dtype: str, name: str) -> None:
    case = make_case(op, *SHAPE, dtype, seed=1)
    assert case.error(variants(op, *SHAPE[:2], dtype)[name]) <= TOLERANCE[dtype]


def test_float32_streams_need_no_native_forms() -> None:
    assert not any(name.endswith("native") for op in SINGLE_OPS for name in variants(op, 4, 64, "float32"))
    assert any(name.endswith("native") for name in variants("merge", 4, 64, "bfloat16"))


def test_forms_for_the_compiler_exist() -> None:
    assert all(set(FUSIBLE[op]) <= set(variants(op, 4, 64, "bfloat16")) for op in SINGLE_OPS)
