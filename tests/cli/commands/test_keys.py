"""The command keys."""

import json
from pathlib import Path

from cli_helpers import mhc_tune


def test_keys_are_shown_listed_and_forgotten(own_keys: Path) -> None:
    key = "ed25519:" + "0123456789abcdef" * 4
    assert mhc_tune("keys", "--trust", f"{key} [red]Alice").exit_code == 0
    assert not (own_keys / "signing-key.txt").exists()  # to trust others takes no key of one's own
    mine, theirs = mhc_tune("keys").stdout.splitlines()
    assert mine.endswith("yours")
    assert theirs == f"{key}  trusted: [red]Alice"
    assert json.loads(mhc_tune("keys", "--json").stdout) == {
        "folder": str(own_keys),
        "own": mine.split()[0],
        "listed": {key: "[red]Alice"},
    }
    assert mhc_tune("keys", "--forget", key).exit_code == 0
    for wrong in (["--forget", key], ["--trust", "ed25519:1"]):
        result = mhc_tune("keys", *wrong)
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
