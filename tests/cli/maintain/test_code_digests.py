"""Digests of generated code: equal up to names and comments, different for other code; and their comparison."""

import json

from cli.maintain.code_digests import compare, digest, of_default
from tiles.kernels.spec import Problem
from tiles.target import Target

SOURCE = "float sum(const float *x) {\n  float s = 0.5f; // start\n  return s + x[0];\n}\n"


def test_names_comments_and_white_space_do_not_count():
    renamed = "float total(const float *values) { float t = 0.5f; return t + values[0]; } /* end */"
    assert digest(renamed) == digest(SOURCE)


def test_a_constant_an_operator_and_an_exchange_of_names_count():
    others = [SOURCE.replace("0.5", "0.25"), SOURCE.replace("+", "*"), SOURCE.replace("s + x[0]", "x + s[0]")]
    assert len({digest(SOURCE), *map(digest, others)}) == 4


def test_a_kernel_has_one_digest_and_another_kernel_another_one():
    target = Target("cpu", "x86-64-v3")
    found = of_default((Problem("aggregate", "forward", 2, 64, "float32", 16), target))
    assert found == of_default((Problem("aggregate", "forward", 2, 64, "float32", 16), target))
    assert found != of_default((Problem("aggregate", "forward", 2, 64, "bfloat16", 16), target))


def test_a_comparison_lists_what_differs_or_is_missing(tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps({"same": "1", "changed": "2", "gone": "3"}))
    after.write_text(json.dumps({"same": "1", "changed": "4", "new": "5"}))
    assert compare(before, after) == ["changed", "gone", "new"]
    assert compare(before, before) == []
