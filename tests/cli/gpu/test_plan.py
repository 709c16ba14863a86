"""The plan of `mhc-tune gpu`: its order and its timings."""

from cli.gpu.plan import MAIN_SHAPE, STREAMS, TOKENS, WIDTHS, plan, shapes, timing
from tiles.kernels.registry import kernel_specs


def test_what_tells_most_comes_first() -> None:
    names = [(item.kind, item.shape) for item in plan()]
    assert {shape for _, shape in names[:7]} == {MAIN_SHAPE}
    first = [f"{item.kind} {item.impl}".strip() for item in plan()[:7]]
    assert first == ["numerics default", "tests", "tune", "numerics tuned", "bench", "block", "sanitizer"]
    benched = [shape for kind, shape in names if kind == "bench"]
    assert benched[:4] == [MAIN_SHAPE, (4, 1280, 4096), (4, 4096, 4096), (4, 7168, 4096)]
    assert benched[4:9] == [(2, 2560, 4096), (8, 2560, 4096), (4, 2560, 64), (4, 2560, 1), (4, 2560, 16384)]
    assert set(benched) == {(n, width, tokens) for n in STREAMS for width in WIDTHS for tokens in TOKENS}
    assert len(benched) == len(shapes()) == 48
    assert all(names.index(("tune", shape)) < names.index(("bench", shape)) for shape in benched)
    assert len({item.name for item in plan()}) == len(plan())


def test_every_kernel_is_checked_tuned_and_timed_at_the_main_shape() -> None:
    """sinkhorn runs inside of coefficients; an identity is tuned where it is asked for."""
    kernels = {op for op, _ in kernel_specs() if not ("_identity" in op or "_norm" in op)} - {"sinkhorn"}
    first = {f"{item.kind} {item.impl}".strip(): item for item in plan()[:5]}
    assert set(first["tune"].ops) == kernels
    assert set(first["numerics default"].ops) == set(first["numerics tuned"].ops) == {*kernels, "layer"}
    assert {timing.op for timing in first["bench"].timings} == {*kernels, "layer"}


def test_a_timing_has_every_peer_and_the_directions_that_are_asked_about() -> None:
    layer = timing("layer", (4, 7168, 4096))
    assert layer.directions == ("forward", "both")
    assert {"tuned", "tile-kernels", "liger", "compile", "eager"} <= set(layer.impls)
    assert timing("project", MAIN_SHAPE).directions == ("forward", "backward")
    assert "compile" not in timing("pre", (4, 2560, 64)).impls, "compiling takes the time of everything else"
