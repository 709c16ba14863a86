"""The comparisons of ops with each other."""

import json
import math

import pytest

import mhc
from cli.maintain import compare
from tiles.errors import BadInput


@pytest.fixture
def found(request, tmp_path, monkeypatch):
    """What a comparison writes, at small shapes and on the reference."""
    monkeypatch.setattr(compare, "STREAMS", (2,))
    monkeypatch.setattr(compare, "TOKENS", (3, 5))
    monkeypatch.setattr(compare, "DTYPES", ("float32",))
    monkeypatch.setattr(compare, "ROUNDS", 6)
    monkeypatch.setattr(mhc.Kernels, "defaults", mhc.Kernels.reference)
    small = compare.COMPARISONS[request.param]._replace(widths=(16,))
    monkeypatch.setattr(compare, "COMPARISONS", {request.param: small})
    compare.main(request.param, tmp_path / "out.json")
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("found", ["boundaries", "norm", "hc_eps"], indirect=True)
def test_a_row_has_all_contenders_and_ratios_with_intervals_and_the_means_are_geometric(found):
    directions = {row["direction"] for row in found["rows"]}
    assert len(found["rows"]) == 2 * len(directions)
    assert {row["tokens"] for row in found["rows"]} == {3, 5}
    for row in found["rows"]:
        first, *others = row["ms"]
        assert found["first"] == first
        assert list(row["ratios"]) == others == list(found["geometric_means"])
        assert row["rounds"] == 6
        assert min(row["ms"].values()) > 0
        assert all(ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in row["ratios"].values())
    for other, mean in found["geometric_means"].items():
        product = math.prod(row["ratios"][other]["median"] for row in found["rows"])
        assert mean == pytest.approx(product ** (1 / len(found["rows"])))
    assert found["device"]["kind"] == "cpu"


def test_another_name_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="boundaries, norm, hc_eps, got pre: name one of them"):
        compare.main("pre", tmp_path / "out.json")


def test_ratios_are_of_the_others_to_the_first(monkeypatch):
    times = {"fast": [1.0] * 6, "slow": [3.0] * 6}
    monkeypatch.setattr(compare, "interleaved", lambda calls, **settings: times)
    contender = compare.COMPARISONS["boundaries"].contenders["step"]
    row = compare._row({"fast": contender, "slow": contender}, (1, 8, 2, "float32"), "forward")
    assert row["ratios"] == {"slow": {"median": 3.0, "low": 3.0, "high": 3.0}}
