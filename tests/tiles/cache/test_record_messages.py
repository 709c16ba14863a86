"""Messages on what a record or manifest should not hold."""

from __future__ import annotations

import pytest

from tiles.cache.record import check_fields
from tiles.errors import BadInput


def test_a_refused_manifest_is_shown_to_two_levels():
    """With all that its records hold it would be longer than what an editor shows of a line."""
    schedule = {f"a tunable with a long name {at}": "a value as long" * 9 for at in range(40)}
    manifest = {"records": [{"key": {"problem": schedule}, "schedule": schedule}] * 9, "odd": "\x1b" * 99}
    with pytest.raises(BadInput) as refused:
        check_fields(manifest, {"records": list}, "a manifest")
    said = str(refused.value)
    assert said.startswith("a manifest must have the fields records, got {")
    assert "tunable" not in said
    assert said.isprintable()
    assert len(said) < 300
