"""The C++ functions that CPU programs call: low-precision storage and the exponential.

They are C++ and not TileLang because bfloat16 and float16 have no C type on TileLang's CPU target, and because TVM's
simplifier takes minutes over the same bit manipulations written as expressions. All are branch-free, so that loops
around them vectorise. Conversions to a narrower type round to nearest, ties to even, and keep NaN a NaN.
"""

from __future__ import annotations

PRELUDE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

extern "C" {  // TileLang declares what it calls with C linkage

static inline uint32_t mhc_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
static inline float mhc_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }

static inline float mhc_load_bfloat16(uint16_t stored) { return mhc_float((uint32_t)stored << 16); }

// A NaN is replaced: rounding could carry its mantissa into the sign.
static inline uint16_t mhc_store_bfloat16(float value) {
  const uint32_t bits = mhc_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Moves the exponent from bias 15 to 127; subtracting 2^-14 turns the implicit one of a subnormal back into a zero.
static inline float mhc_load_float16(uint16_t stored) {
  const uint32_t moved = (uint32_t)(stored & 0x7fffu) << 13, exponent = moved & 0x0f800000u;
  const uint32_t rebiased = moved + (112u << 23);
  const uint32_t special = exponent == 0x0f800000u ? rebiased + (112u << 23) : rebiased;
  const uint32_t subnormal = mhc_bits(mhc_float(rebiased + (1u << 23)) - mhc_float(113u << 23));
  return mhc_float((exponent == 0 ? subnormal : special) | (uint32_t)(stored & 0x8000u) << 16);
}

// Adding 0.5 lets the addition itself round a value that becomes subnormal.
static inline uint16_t mhc_store_float16(float value) {
  const uint32_t bits = mhc_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = mhc_bits(mhc_float(magnitude) + 0.5f) - (126u << 23);
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (uint16_t)((magnitude >= (143u << 23) ? special : finite) | ((bits >> 16) & 0x8000u));
}

// e^value for value <= 0: 2^k p(r) with value = k ln 2 + r and |r| <= ln(2)/2; p is Taylor to r^7, relative error
// under 2e-7. ln 2 is split so that k times its first part is exact. Values under -87 give e^-87.
static inline float mhc_exp(float value) {
  const float bounded = value > -87.0f ? value : -87.0f;
  const int32_t k = (int32_t)(bounded * 1.44269504f - 0.5f);
  const float r = bounded - (float)k * 0.693359375f + (float)k * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return mhc_float(mhc_bits(p) + ((uint32_t)k << 23));
}
}  // extern "C"
"""
