"""The C++ functions of CPU programs, called by themselves."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from cpp_calls import compiled, pointers

from tiles.compiler.cpu_elements import ELEMENTS, STORED
from tiles.compiler.cpu_epilogue import epilogues
from tiles.compiler.cpu_prelude import PRELUDE

CALLS = r"""
extern "C" void one_by_one(float *values, uint16_t *stored, int64_t count) {
  for (int64_t i = 0; i < count; ++i) stored[i] = mhc_store_STORED(values[i]);
}
extern "C" void in_pairs(float *values, uint16_t *stored, int64_t count) {
  for (int64_t i = 0; i < count; i += 2) mhc_store_pair(stored + i, mhc_pair_STORED(values[i], values[i + 1]));
}
extern "C" void rounded_first(float *values, uint16_t *stored, int64_t count) {
  for (int64_t i = 0; i < count; i += 2)
    mhc_store_pair(stored + i, mhc_narrow_pair_STORED(mhc_round_STORED(values[i]), mhc_round_STORED(values[i + 1])));
}
"""
SUMS = r"""
extern "C" int32_t lanes() { return MHC_LANES; }
template <int columns>
void sums(float *lanes, float *total, int32_t count) {
  for (int32_t t = 0; t < count; ++t)
    for (int32_t k = 0; k < columns; ++k) total[t * columns + k] = mhc_dot_sum(lanes + (t * columns + k) * 16);
}
extern "C" void sums_3(float *lanes, float *total, int32_t count) { sums<3>(lanes, total, count); }
extern "C" void sums_24(float *lanes, float *total, int32_t count) { sums<24>(lanes, total, count); }
"""
EPILOGUE = r"""
extern "C" void rows(STORED_T *out, float *a, float *b, float *x, float *slope, U_T *u, float *gate, STORED_T *more,
                     int32_t row, int32_t count, int32_t width) {
  mhc_gradients_3_STORED_U_STORED(out, row, a, 1, 3, b, row, x, row, slope, u, row, gate, more, row, 1, count, width);
}
extern "C" void first(STORED_T *out, float *a, float *b, float *x, float *slope, U_T *u, float *gate, STORED_T *more,
                      int32_t row, int32_t count, int32_t width) {
  mhc_gradients_3_STORED_U_STORED(out, row, a, 1, 3, b, row, x, row, slope, u, row, gate, more, row, 0, count, width);
}
extern "C" void plain(STORED_T *out, float *a, float *b, float *x, float *slope, int32_t row, int32_t count,
                      int32_t width) {
  mhc_gradients_3_STORED(out, row, a, 1, 3, b, row, x, row, slope, count, width);
}
"""
LOWER = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_are_rounded_as_torch_rounds_them(dtype, tmp_path):
    """All 65,536 upper halves, with the lower halves at which something changes: those of a bfloat16 only decide
    between down, even and up, and of a float16 they are the last 3 bits of its own and what is rounded off, and NaN is
    NaN with any of them."""
    calls = compiled(PRELUDE + CALLS.replace("STORED", dtype), tmp_path)
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    bits = torch.cat([upper + lower for lower in LOWER])
    values = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    values = torch.cat([values, values.roll(1)])  # each as the first and as the second of a pair
    wanted = values.to(getattr(torch, dtype))
    number = ~values.isnan()
    for how in ("one_by_one", "in_pairs", "rounded_first"):
        stored = torch.empty(len(values), dtype=torch.int16)
        getattr(calls, how)(
            ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(stored.data_ptr()), ctypes.c_int64(len(values))
        )
        assert stored.view(wanted.dtype)[~number].isnan().all(), how
        assert torch.equal(stored[number], wanted.view(torch.int16)[number]), how


def test_lanes_are_added_in_one_order_wherever_a_token_lies(tmp_path):
    """In loops over any number of tokens, which compilers vectorise as they like."""
    calls = compiled(PRELUDE + SUMS, tmp_path)
    used = calls.lanes()
    for columns, tokens in itertools.product((3, 24), (1, 2, 5, 6, 16, 17)):
        lanes = torch.randn(tokens, columns, 16)
        lanes[..., used:] = float("nan")
        parts = lanes[..., :used].unflatten(-1, (-1, 4)).unbind(-2)
        four = sum(parts[1:], parts[0])
        wanted = (four[..., 0] + four[..., 2]) + (four[..., 1] + four[..., 3])
        total = torch.full((tokens, columns), float("nan"))
        run = getattr(calls, f"sums_{columns}")
        run(ctypes.c_void_p(lanes.data_ptr()), ctypes.c_void_p(total.data_ptr()), ctypes.c_int32(tokens))
        assert torch.equal(total, wanted), (columns, tokens)


def with_epilogue(dtype, u, folder):
    text = EPILOGUE.replace("STORED_T", STORED[dtype]).replace("U_T", STORED[u])
    text = text.replace("_STORED", f"_{dtype}").replace("_U_", f"_{u}_")
    return compiled(PRELUDE + ELEMENTS + epilogues(text) + text, folder)


@pytest.mark.parametrize(
    ("dtype", "u"), [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32"), ("float16",) * 2]
)
def test_register_blocks_with_an_epilogue_add_up_and_touch_no_column_beside_theirs(dtype, u, tmp_path):
    """Widths for all sizes of vectors; `out` is `more` too, as in pre's backward."""
    calls, stored = with_epilogue(dtype, u, tmp_path), getattr(torch, dtype)
    row, count = 512, 5
    for width in (8, 16, 24, 48, 120, 128, 328):
        a, b, x, slope, gate = (torch.randn(size) for size in ((count, 3), (count, row), (3, row), (3,), (3,)))
        of_u, out = torch.randn(3, row).to(getattr(torch, u)), torch.randn(3, row).to(stored)
        product = a.double().T @ b.double() + 2 * slope.double()[:, None] * x.double()
        wanted = product + gate.double()[:, None] * of_u.double() + out.double()
        before, tolerance = (
            out.clone(),
            1e-5 if dtype == "float32" else 2 * torch.finfo(stored).eps * wanted.abs().max(),
        )
        sizes = [ctypes.c_int32(size) for size in (row, count, width)]
        calls.rows(*pointers(out, a, b, x, slope, of_u, gate, out), *sizes)
        assert (out - wanted)[:, :width].abs().max() <= tolerance, width
        assert torch.equal(out[:, width:], before[:, width:]), width
        nothing = torch.full_like(out, float("nan"))
        calls.first(*pointers(nothing, a, b, x, slope, of_u, gate, nothing), *sizes)
        assert (nothing - wanted + before.double())[:, :width].abs().max() <= tolerance, width
        calls.plain(*pointers(out, a, b, x, slope), *sizes)
        assert (out - product)[:, :width].abs().max() <= tolerance, width
        assert torch.equal(out[:, width:], before[:, width:]), width


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_epilogue_rounds_floats_as_torch_does(dtype, tmp_path):
    """The floats of the first test, but for the sign of zeros, as they are added to zeros."""
    calls, stored = with_epilogue(dtype, "float32", tmp_path), getattr(torch, dtype)
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    bits = torch.cat([upper + lower for lower in (*LOWER, 0, 0)])
    values = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32).view(3, -1)
    zeros, out = torch.zeros_like(values), torch.zeros(values.shape, dtype=stored)
    sizes = [ctypes.c_int32(size) for size in (values.shape[1], 0, values.shape[1])]
    gate, more = torch.ones(3), torch.zeros_like(out)
    calls.rows(*pointers(out, zeros, zeros, zeros, zeros, values, gate, more), *sizes)
    wanted, number = values.to(stored), ~values.isnan()
    assert out[~number].isnan().all()
    assert torch.equal(out[number], wanted[number])
