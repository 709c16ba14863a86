"""The peers on a CPU."""

import pytest

from cli.bench import peers
from cli.bench.cases import OPS, TOLERANCE, make_case

SHAPE = (3, 16, 5)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("project", "coefficients")])
def test_the_peer_computes_our_maths(op: str) -> None:
    case = make_case(op, *SHAPE, "bfloat16", 1)
    function = peers.cpu_function("tile-kernels", case)
    assert not isinstance(function, str), f"the test extra installs tile-kernels, yet: {function}"
    assert case.error(function) <= TOLERANCE["bfloat16"]


def test_a_peer_that_is_not_installed_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers._tile_kernels.cache_clear()
    skipped: list[str] = []
    try:
        case = make_case("merge", *SHAPE, "bfloat16", 1)
        assert list(peers.implementations("tile-kernels", case, ("both",), skipped)) == []
    finally:
        peers._tile_kernels.cache_clear()
    assert "not installed" in skipped[0]
