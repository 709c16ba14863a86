"""The C++ functions of CPU programs, called by themselves."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from tiles.compiler.compile import CPU_FLAGS
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
LOWER = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_are_rounded_as_torch_rounds_them(dtype, tmp_path):
    """All 65,536 upper halves, with the lower halves at which something changes: those of a bfloat16 only decide
    between down, even and up, and of a float16 they are the last 3 bits of its own and what is rounded off, and NaN is
    NaN with any of them."""
    text, library = tmp_path / "calls.cpp", tmp_path / "calls.so"
    text.write_text(PRELUDE + CALLS.replace("STORED", dtype))
    subprocess.run(["g++", *CPU_FLAGS, "-shared", "-march=native", str(text), "-o", str(library)], check=True)
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    bits = torch.cat([upper + lower for lower in LOWER])
    values = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    values = torch.cat([values, values.roll(1)])  # each as the first and as the second of a pair
    wanted, calls = values.to(getattr(torch, dtype)), ctypes.CDLL(str(library))
    number = ~values.isnan()
    for how in ("one_by_one", "in_pairs", "rounded_first"):
        stored = torch.empty(len(values), dtype=torch.int16)
        getattr(calls, how)(
            ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(stored.data_ptr()), ctypes.c_int64(len(values))
        )
        assert stored.view(wanted.dtype)[~number].isnan().all(), how
        assert torch.equal(stored[number], wanted.view(torch.int16)[number]), how
