"""The C++ functions that walk a block of tokens' streams, called by themselves."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cpp_calls import compiled, pointers

from tiles.compiler.cpu_elements import ELEMENTS, STORED
from tiles.compiler.cpu_prelude import PRELUDE
from tiles.compiler.cpu_streams import stream_functions

CALLS = r"""
extern "C" void stream_dots(float *dots, STORED_T *x, STORED_T *row, int32_t tokens, int32_t count, int32_t width) {
  mhc_stream_dots_3_STORED(dots, tokens, x, row, count, width);
}
extern "C" void row_dots(float *sums, float *rows, STORED_T *row, int32_t width) {
  mhc_row_dots_3_STORED(sums, rows, row, width);
}
extern "C" void norm_dots(float *dots, float *u_dots, STORED_T *x, STORED_T *row, float *gate, float *weight,
                          int32_t tokens, int32_t count, int32_t width) {
  mhc_norm_dots_3_STORED(dots, u_dots, tokens, x, row, gate, weight, count, width);
}
extern "C" void norm_rows(STORED_T *u, STORED_T *x, float *gate, float *weight, float *held, int32_t tokens,
                          int32_t count, int32_t width) {
  mhc_norm_rows_3_STORED(u, x, gate, tokens, weight, 1e-3f, held, count, width);
}
extern "C" void norm_gradients(float *of_u, float *dweight, float *weight, STORED_T *x, STORED_T *du, float *gate,
                               float *scale, float *slope, int32_t tokens, int32_t count, int32_t width) {
  mhc_norm_gradients_3_STORED(of_u, width, dweight, weight, x, du, width, gate, tokens, scale, slope, count, width);
}
"""
STREAMS, BLOCK = 3, 6
WIDTHS = (8, 24, 48, 64, 72, 120, 328)


class Walk:
    """Functions for one dtype, and what they read and write for `count` tokens of a block of BLOCK."""

    def __init__(self, dtype, folder):
        text = CALLS.replace("STORED_T", STORED[dtype]).replace("STORED", dtype)
        self._calls = compiled(PRELUDE + ELEMENTS + stream_functions(text) + text, folder)
        self._dtype = getattr(torch, dtype)

    def draw(self, width):
        random = torch.Generator().manual_seed(width)
        shapes = {"x": (BLOCK, STREAMS, width), "row": (BLOCK, width), "gate": (STREAMS, BLOCK), "weight": (width,)}
        shapes |= {"scale": (BLOCK,), "slope": (BLOCK,), "dweight": (width,)}
        drawn = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        return drawn | {name: drawn[name].to(self._dtype) for name in ("x", "row")}

    def run(self, given, count):
        """Results by name; what a call does not write is NaN."""
        width, nan = len(given["weight"]), float("nan")
        made = {name: torch.full((STREAMS, BLOCK), nan) for name in ("dots", "g_dots", "u_dots")}
        made |= {"u": torch.full((BLOCK, width), nan, dtype=self._dtype), "of_u": torch.full((BLOCK, width), nan)}
        made["dweight"] = given["dweight"].clone()
        x, row, gate, weight, held = given["x"], given["row"], given["gate"], given["weight"], torch.empty(2, width)
        sizes = [ctypes.c_int32(size) for size in (BLOCK, count, width)]
        self._calls.stream_dots(*pointers(made["dots"], x, row), *sizes)
        self._calls.norm_dots(*pointers(made["g_dots"], made["u_dots"], x, row, gate, weight), *sizes)
        self._calls.norm_rows(*pointers(made["u"], x, gate, weight, held), *sizes)
        factors = gate, given["scale"], given["slope"]
        self._calls.norm_gradients(*pointers(made["of_u"], made["dweight"], weight, x, row, *factors), *sizes)
        return made


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def walk(request, tmp_path_factory):
    return Walk(request.param, tmp_path_factory.mktemp("walk"))


def reference(given, count):
    wide = {name: value.double() for name, value in given.items()}
    x, row, weight = wide["x"][:count], wide["row"][:count], wide["weight"]
    gate, scale, slope = wide["gate"][:, :count], wide["scale"][:count, None], wide["slope"][:count, None]
    u = torch.einsum("it,tic->tc", gate, x)
    return {
        "dots": torch.einsum("tc,tic->it", row, x),
        "g_dots": torch.einsum("tc,tic->it", row * weight, x),
        "u_dots": torch.einsum("tc,tic->it", u, x),
        "u": u * torch.rsqrt((u * u).mean(-1, keepdim=True) + 1e-3) * weight,
        "of_u": scale * row * weight - slope * u,
        "dweight": wide["dweight"] + (scale * row * u).sum(0),
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_results_are_those_of_float64_and_nothing_else_is_written(walk, width):
    given = walk.draw(width)
    for count in (0, 1, 5):
        wanted = reference(given, count)
        for name, got in walk.run(given, count).items():
            own = got if name == "dweight" else got[:, :count] if name.endswith("dots") else got[:count]
            # A float32 sum of so many products; u is rounded once.
            near = 2 * torch.finfo(got.dtype).eps if name == "u" else 1e-5
            atol = near * max([1.0, *wanted[name].abs().flatten().tolist()])
            torch.testing.assert_close(own.double(), wanted[name], rtol=0, atol=atol)
            if name != "dweight":
                rest = got[:, count:] if name.endswith("dots") else got[count:]
                assert rest.isnan().all(), name


@pytest.mark.parametrize("width", WIDTHS)
def test_a_token_has_the_same_bits_wherever_it_lies(walk, width):
    given = walk.draw(width)
    together = walk.run(given, BLOCK)
    for token in range(BLOCK):
        first = {name: given[name].roll(-token, 0).contiguous() for name in ("x", "row", "scale", "slope")}
        alone = walk.run(given | first | {"gate": given["gate"].roll(-token, 1).contiguous()}, 1)
        for name in ("dots", "g_dots", "u_dots"):
            assert torch.equal(alone[name][:, 0], together[name][:, token]), name
        for name in ("u", "of_u"):
            assert torch.equal(alone[name][0], together[name][token]), name


@pytest.mark.parametrize(
    ("streams", "dtype"), [(3, "float32"), (3, "float16"), *((streams, "bfloat16") for streams in (1, 4, 5, 16))]
)
def test_row_dots_are_added_to_what_was_there(streams, dtype, tmp_path):
    text = CALLS.replace("STORED_T", STORED[dtype]).replace("STORED", dtype).replace("_3_", f"_{streams}_")
    calls = compiled(PRELUDE + ELEMENTS + stream_functions(text) + text, tmp_path)
    random = torch.Generator().manual_seed(streams)
    for width in WIDTHS:
        rows, before = torch.randn(streams, width, generator=random), torch.randn(streams, generator=random)
        row = torch.randn(width, generator=random).to(getattr(torch, dtype))
        sums = torch.cat([before, torch.full((4,), float("nan"))])
        calls.row_dots(*pointers(sums, rows, row), ctypes.c_int32(width))
        wanted = before.double() + rows.double() @ row.double()
        # A float32 sum of so many products.
        torch.testing.assert_close(sums[:streams].double(), wanted, rtol=0, atol=1e-5 * (1 + width**0.5))
        assert sums[streams:].isnan().all()
