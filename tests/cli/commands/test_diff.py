"""The command diff, on packs and cache folders."""

import json
from typing import Any

import pytest
from cli_helpers import mhc_tune, packed, put_merge

from tiles.cache.cache import KernelCache


def test_equal_contents_do_not_differ(a: KernelCache, b: KernelCache) -> None:
    for cache, date in ((a, "2026-01-01"), (b, "2026-02-02")):
        put_merge(cache, 64, 1.0, date=date)
    for one, other in ((a.folder, packed(a)), (a.folder, b.folder), (packed(b), packed(a))):
        result = mhc_tune("diff", one, other, "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["equal"] is True
    assert "both hold the same kernels" in mhc_tune("diff", a.folder, b.folder).stderr


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"tuned_ms": 0.5}, ["measured"]),
        ({"binary": b"other"}, ["code"]),
        ({"schedule": {"block_width": 32}}, ["schedule"]),
        ({"sources": "elsewhere", "binary": b"x", "tuned_ms": 2.0}, ["version", "code", "measured"]),
    ],
)
def test_what_differs_is_named(a: KernelCache, b: KernelCache, change: dict[str, Any], changed: list[str]) -> None:
    put_merge(a, 64, 1.0)
    put_merge(b, **({"width": 64, "tuned_ms": 1.0} | change))
    result = mhc_tune("diff", packed(a), b.folder, "--json")
    assert result.exit_code == 1
    (difference,) = json.loads(result.stdout)["differences"]
    assert difference["changed"] == changed
    assert difference["a"]["measurement"] == {"tuned_ms": 1.0}
    table = mhc_tune("diff", packed(a), b.folder)
    assert table.exit_code == 1
    assert ", ".join(changed) in table.stdout
    assert ("block_width=64 -> 32" in table.stdout) == ("schedule" in changed)


def test_kernels_of_one_side_are_listed(a: KernelCache, b: KernelCache) -> None:
    put_merge(a, 64, 1.0)
    put_merge(a, 128, 1.0)
    put_merge(b, 128, 1.0)
    put_merge(b, 256, 1.0)
    result = mhc_tune("diff", a.folder, b.folder, "--json")
    found = [
        (item["changed"], (item["a"] or item["b"])["key"]["width"]) for item in json.loads(result.stdout)["differences"]
    ]
    assert found == [(["only in A"], 64), (["only in B"], 256)]
    assert "2 kernels differ" in mhc_tune("diff", a.folder, b.folder).stderr


def test_of_several_versions_the_current_counts_then_the_latest(a: KernelCache, b: KernelCache) -> None:
    put_merge(a, 64, 1.0)
    put_merge(a, 64, 9.0, sources="older", date="2026-09-09")
    put_merge(a, 128, 2.0, sources="one", date="2026-02-02")
    put_merge(a, 128, 3.0, sources="two", date="2026-03-03")
    put_merge(b, 64, 1.0)
    put_merge(b, 128, 3.0, sources="two", date="2026-03-03")
    assert mhc_tune("diff", a.folder, b.folder).exit_code == 0
