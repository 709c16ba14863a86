"""The C++ functions that CPU programs call: low-precision storage, stores past the caches, the exponential, and
register blocks of products.

Storage and exponential are C++ and not TileLang because bfloat16 and float16 have no C type on TileLang's CPU target,
and because TVM's simplifier takes minutes over the same bit manipulations written as expressions. They are branch-free,
so that loops around them vectorise. Conversions to a narrower type round to nearest, ties to even, and keep NaN a NaN.
Register blocks are to a CPU what tile products are to a GPU: written out, so that their speed does not hang on what a C
compiler makes of nested loops.
"""

from __future__ import annotations

PRELUDE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

extern "C" {  // TileLang declares what it calls with C linkage

static inline uint32_t mhc_bits(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
static inline float mhc_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }

static inline float mhc_load_bfloat16(uint16_t stored) { return mhc_float((uint32_t)stored << 16); }

// Rounded in the upper half. A NaN is replaced: rounding could carry its mantissa into the sign.
static inline uint32_t mhc_bits_bfloat16(float value) {
  const uint32_t bits = mhc_bits(value), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value != value ? 0x7fc00000u : rounded;
}
static inline uint16_t mhc_store_bfloat16(float value) { return (uint16_t)(mhc_bits_bfloat16(value) >> 16); }

// The same value in a float.
static inline float mhc_round_bfloat16(float value) { return mhc_float(mhc_bits_bfloat16(value) & 0xffff0000u); }

// Moves the exponent from bias 15 to 127; subtracting 2^-14 turns the implicit one of a subnormal back into a zero.
static inline float mhc_widen_float16(uint32_t stored) {
  const uint32_t moved = (stored & 0x7fffu) << 13, exponent = moved & 0x0f800000u;
  const uint32_t rebiased = moved + (112u << 23);
  const uint32_t special = exponent == 0x0f800000u ? rebiased + (112u << 23) : rebiased;
  const uint32_t subnormal = mhc_bits(mhc_float(rebiased + (1u << 23)) - mhc_float(113u << 23));
  return mhc_float((exponent == 0 ? subnormal : special) | (stored & 0x8000u) << 16);
}
static inline float mhc_load_float16(uint16_t stored) { return mhc_widen_float16(stored); }

// Adding 0.5 lets the addition itself round a value that becomes subnormal.
static inline uint32_t mhc_bits_float16(float value) {
  const uint32_t bits = mhc_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal = mhc_bits(mhc_float(magnitude) + 0.5f) - (126u << 23);
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return (magnitude >= (143u << 23) ? special : finite) | ((bits >> 16) & 0x8000u);
}
static inline uint16_t mhc_store_float16(float value) { return (uint16_t)mhc_bits_float16(value); }
static inline float mhc_round_float16(float value) { return mhc_load_float16(mhc_store_float16(value)); }

// Two neighbouring elements in one word, so that vectors of them stay 32 bits wide: `which` is 0 for the first.
static inline uint32_t mhc_load_pair(uint16_t *first) { uint32_t pair; memcpy(&pair, first, 4); return pair; }
static inline int32_t mhc_store_pair(uint16_t *first, uint32_t pair) { memcpy(first, &pair, 4); return 0; }
static inline float mhc_of_pair_bfloat16(uint32_t pair, int32_t which) {
  return mhc_float(which ? pair & 0xffff0000u : pair << 16);
}
static inline float mhc_of_pair_float16(uint32_t pair, int32_t which) {
  return mhc_widen_float16(which ? pair >> 16 : pair & 0xffffu);
}
static inline uint32_t mhc_pair_bfloat16(float first, float second) {
  return mhc_bits_bfloat16(first) >> 16 | (mhc_bits_bfloat16(second) & 0xffff0000u);
}
static inline uint32_t mhc_pair_float16(float first, float second) {
  return mhc_bits_float16(first) | mhc_bits_float16(second) << 16;
}
static inline uint32_t mhc_narrow_pair_bfloat16(float first, float second) {
  return mhc_bits(first) >> 16 | mhc_bits(second);
}
static inline uint32_t mhc_narrow_pair_float16(float first, float second) { return mhc_pair_float16(first, second); }

// e^value for value <= 0: 2^k p(r) with value = k ln 2 + r and |r| <= ln(2)/2; p is Taylor to r^7, relative error
// under 2e-7. ln 2 is split so that k times its first part is exact. Values under -87 give e^-87.
static inline float mhc_exp(float value) {
  const float bounded = value < -87.0f ? -87.0f : value;  // this way round a NaN stays one
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

// Register blocks. Calls pass the sizes of a block as literals: once inlined, loops over them unroll and the
// accumulators are registers. Sums of 16-lane vectors use all of AVX-512's 32 registers, else blocks are narrower.
#if defined(__AVX512F__)
#define MHC_LANES 16
#define MHC_VECTORS 4
#elif defined(__AVX__)
#define MHC_LANES 8
#define MHC_VECTORS 2
#else
#define MHC_LANES 4
#define MHC_VECTORS 2
#endif
#define MHC_BLOCK 8  // most rows or columns of a register block
#define MHC_INLINE static inline __attribute__((always_inline))
// GCC makes a copy for the sizes that are called. Inlined into a kernel, accumulators meet its other values and spill.
#if defined(__GNUC__) && !defined(__clang__)
#define MHC_OWN_REGISTERS static __attribute__((noinline))
#else
#define MHC_OWN_REGISTERS MHC_INLINE
#endif

}  // extern "C"

// Vectors that may lie at any float. (As a template argument the type itself would lose its attributes.)
template <int lanes>
struct mhc_vector {
  typedef float type __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
};
typedef mhc_vector<MHC_LANES>::type mhc_lanes;
typedef mhc_vector<8>::type mhc_eight;
typedef mhc_vector<4>::type mhc_four;

// Sizes of register blocks differ among the calls of a kernel, the last outputs being fewer. A size that the compiler
// takes for a variable leaves the sums in memory, so that each gets a function of its own; others are dropped.
#define MHC_EACH_SIZE(call) \
  call(1) call(2) call(3) call(4) call(5) call(6) call(7) call(8)

template <int columns>
MHC_OWN_REGISTERS int32_t mhc_dots(float *sums, int32_t sums_row, float *a, int32_t a_row, float *b, int32_t b_row,
                                   int32_t rows, int32_t width) {
  mhc_lanes total[MHC_BLOCK][MHC_BLOCK];
  int32_t c = 0;
  for (int32_t i = 0; i < rows; ++i)
    for (int32_t j = 0; j < columns; ++j) total[i][j] = *(mhc_lanes *)(sums + i * sums_row + 16 * j);
  for (; c + MHC_LANES <= width; c += MHC_LANES) {
    mhc_lanes weight[MHC_BLOCK];
    for (int32_t j = 0; j < columns; ++j) weight[j] = *(mhc_lanes *)(b + j * (int64_t)b_row + c);
    for (int32_t i = 0; i < rows; ++i) {
      const mhc_lanes value = *(mhc_lanes *)(a + i * (int64_t)a_row + c);
      for (int32_t j = 0; j < columns; ++j) total[i][j] += value * weight[j];
    }
  }
  for (int32_t i = 0; i < rows; ++i)
    for (int32_t j = 0; j < columns; ++j) *(mhc_lanes *)(sums + i * sums_row + 16 * j) = total[i][j];
  for (; c < width; c += 8)
    for (int32_t i = 0; i < rows; ++i)
      for (int32_t j = 0; j < columns; ++j)
        *(mhc_eight *)(sums + i * sums_row + 16 * j) +=
            *(mhc_eight *)(a + i * (int64_t)a_row + c) * *(mhc_eight *)(b + j * (int64_t)b_row + c);
  return 0;
}

extern "C" {
// sums[i][j] += a[i]·b[j] over `width` columns, a multiple of 8. A sum is MHC_LANES partial sums, of 16 places.
MHC_INLINE int32_t mhc_add_dots(float *sums, int32_t sums_row, float *a, int32_t a_row, float *b, int32_t b_row,
                                int32_t rows, int32_t columns, int32_t width) {
#define MHC_OF(size) \
  case size: return mhc_dots<size>(sums, sums_row, a, a_row, b, b_row, rows, width);
  switch (columns) { MHC_EACH_SIZE(MHC_OF) }
#undef MHC_OF
  return 0;
}

// Brings the cache lines of `count` elements into the cache of a level. It may name memory that is not there.
#define MHC_PREFETCH(level, name, type) \
  MHC_INLINE int32_t mhc_prefetch_l##level##_##name(type *first, int32_t count) { \
    for (int32_t i = 0; i < count; i += 64 / sizeof(type)) __builtin_prefetch(first + i, 0, 4 - level); \
    return 0; \
  }
MHC_PREFETCH(1, float32, float)
MHC_PREFETCH(1, uint16, uint16_t)
MHC_PREFETCH(2, float32, float)
MHC_PREFETCH(2, uint16, uint16_t)

// Four sums of every fourth lane, then (0 + 2) + (1 + 3). In an order that is left to the compiler, tokens for which it
// vectorises a loop around this would be added up in another than the last ones.
static inline float mhc_dot_sum(float *sum) {
  const mhc_four *part = (mhc_four *)sum;
  mhc_four total = part[0];
  for (int32_t v = 1; v < MHC_LANES / 4; ++v) total += part[v];
  return (total[0] + total[2]) + (total[1] + total[3]);
}

// The sum of the squares of `count` floats, a multiple of 8: four sums side by side, as one waits for its additions.
// One function for all rows: each place where it is inlined may add up in an order of its own.
MHC_OWN_REGISTERS float mhc_squares(float *row, int32_t count) {
  mhc_lanes total[4] = {};
  float sum[16] = {};
  int32_t c = 0;
  for (; c + 4 * MHC_LANES <= count; c += 4 * MHC_LANES)
    for (int32_t v = 0; v < 4; ++v) {
      const mhc_lanes value = *(mhc_lanes *)(row + c + v * MHC_LANES);
      total[v] += value * value;
    }
  *(mhc_lanes *)sum = (total[0] + total[2]) + (total[1] + total[3]);
  for (; c < count; c += 4) {
    const mhc_four value = *(mhc_four *)(row + c);
    *(mhc_four *)sum += value * value;
  }
  return mhc_dot_sum(sum);
}

}  // extern "C"

#define MHC_LINE 64  // bytes of a cache line

// One cache line to memory past the caches, which would read it first. Where a processor has no such stores, as usual.
MHC_INLINE void mhc_stream_line(void *line, const void *from) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i *)line, _mm512_loadu_si512(from));
#elif defined(__AVX__)
  const __m256i *vectors = (const __m256i *)from;
  for (int32_t v = 0; v < 2; ++v) _mm256_stream_si256((__m256i *)line + v, _mm256_loadu_si256(vectors + v));
#elif defined(__SSE2__)
  const __m128i *vectors = (const __m128i *)from;
  for (int32_t v = 0; v < 4; ++v) _mm_stream_si128((__m128i *)line + v, _mm_loadu_si128(vectors + v));
#else
  memcpy(line, from, MHC_LINE);
#endif
}

// `count` bytes: whole cache lines past the caches, what is beside them as usual.
MHC_INLINE int32_t mhc_stream(uint8_t *to, const uint8_t *from, int32_t count) {
  const int32_t beside = -(uintptr_t)to & (MHC_LINE - 1);
  int32_t c = beside < count ? beside : count;
  memcpy(to, from, c);
  for (; c + MHC_LINE <= count; c += MHC_LINE) mhc_stream_line(to + c, from + c);
  memcpy(to + c, from + c, count - c);
  return 0;
}

extern "C" {
MHC_INLINE int32_t mhc_copy_float32(float *to, float *from, int32_t count) {
  memcpy(to, from, 4 * (size_t)count);
  return 0;
}
MHC_INLINE int32_t mhc_copy_uint16(uint16_t *to, uint16_t *from, int32_t count) {
  memcpy(to, from, 2 * (size_t)count);
  return 0;
}
MHC_INLINE int32_t mhc_stream_float32(float *to, float *from, int32_t count) {
  return mhc_stream((uint8_t *)to, (uint8_t *)from, 4 * count);
}
MHC_INLINE int32_t mhc_stream_uint16(uint16_t *to, uint16_t *from, int32_t count) {
  return mhc_stream((uint8_t *)to, (uint8_t *)from, 2 * count);
}
}  // extern "C"

// One block of columns, `vectors` wide: out[i] += Σ_j a[i][j] b[j].
template <int lanes, int vectors>
MHC_INLINE void mhc_product_block(float *out, int32_t out_row, const float *a, int32_t a_row, int32_t a_column,
                                  const float *b, int32_t b_row, int32_t rows, int32_t count) {
  typedef typename mhc_vector<lanes>::type Vector;
  Vector total[MHC_BLOCK][vectors], *at[MHC_BLOCK];
  for (int32_t i = 0; i < rows; ++i) {
    at[i] = (Vector *)(out + i * (int64_t)out_row);
    for (int32_t v = 0; v < vectors; ++v) total[i][v] = at[i][v];
  }
  for (int32_t j = 0; j < count; ++j) {
    const Vector *row = (const Vector *)(b + j * (int64_t)b_row);
    for (int32_t i = 0; i < rows; ++i) {
      const float factor = a[i * a_row + j * a_column];
      for (int32_t v = 0; v < vectors; ++v) total[i][v] += factor * row[v];
    }
  }
  for (int32_t i = 0; i < rows; ++i)
    for (int32_t v = 0; v < vectors; ++v) at[i][v] = total[i][v];
}

// As many such blocks as fit between columns `c` and `width`; the column where they end.
template <int lanes, int vectors>
MHC_INLINE int32_t mhc_product_blocks(float *out, int32_t out_row, const float *a, int32_t a_row, int32_t a_column,
                                      const float *b, int32_t b_row, int32_t rows, int32_t count, int32_t c,
                                      int32_t width) {
  for (; c + lanes * vectors <= width; c += lanes * vectors)
    mhc_product_block<lanes, vectors>(out + c, out_row, a, a_row, a_column, b + c, b_row, rows, count);
  return c;
}

template <int rows>
MHC_OWN_REGISTERS int32_t mhc_product(float *out, int32_t out_row, float *a, int32_t a_row, int32_t a_column, float *b,
                                      int32_t b_row, int32_t count, int32_t width) {
#define MHC_FROM(lanes, vectors) \
  mhc_product_blocks<lanes, vectors>(out, out_row, a, a_row, a_column, b, b_row, rows, count, c, width)
  int32_t c = 0;
  if (rows <= 6) c = MHC_FROM(MHC_LANES, MHC_VECTORS);
  c = MHC_FROM(MHC_LANES, MHC_VECTORS / 2);
  c = MHC_FROM(MHC_LANES, 1);
  c = MHC_FROM(8, 1);
#undef MHC_FROM
  return 0;
}

extern "C" {
// out[i] += Σ_{j < count} a[i][j] b[j] over `width` columns, a multiple of 8.
MHC_INLINE int32_t mhc_add_product(float *out, int32_t out_row, float *a, int32_t a_row, int32_t a_column, float *b,
                                   int32_t b_row, int32_t rows, int32_t count, int32_t width) {
#define MHC_OF(size) \
  case size: return mhc_product<size>(out, out_row, a, a_row, a_column, b, b_row, count, width);
  switch (rows) { MHC_EACH_SIZE(MHC_OF) }
#undef MHC_OF
  return 0;
}
}  // extern "C"
"""
