"""The C++ functions of a register block with an epilogue: what is added to the products, and the conversion, come while
the sums are in registers. A program that calls them gets them after `cpu_prelude`.

With loops of their own for that, values would go to a cache and back twice, and memory would idle under the products.
"""

from __future__ import annotations

import re

EPILOGUE = r"""
// What is stored in 16 bits, as 32-bit words, and back. GCC 12 makes a vector of 512 bits out of two halves by itself.
template <int lanes>
struct mhc_words {
  typedef uint32_t type __attribute__((vector_size(4 * lanes), aligned(4), may_alias));
  typedef uint16_t lower __attribute__((vector_size(2 * lanes), aligned(2), may_alias));
};
template <int lanes>
MHC_INLINE typename mhc_words<lanes>::type mhc_get_words(const uint16_t *from) {
  typedef typename mhc_words<lanes>::type Words;
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#endif
#if defined(__AVX2__)
  if constexpr (lanes == 8) return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#endif
  return __builtin_convertvector(*(const typename mhc_words<lanes>::lower *)from, Words);
}
template <int lanes>
MHC_INLINE void mhc_put_words(uint16_t *to, typename mhc_words<lanes>::type words) {
  typedef typename mhc_words<lanes>::lower Lower;
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)words));
#endif
  *(Lower *)to = __builtin_convertvector(words, Lower);
}

// a b + c as one instruction where there is one. In an expression a C compiler may choose what it contracts, otherwise
// for six rows than for one, whose tokens must have the same bits.
template <int lanes, class Vector>
MHC_INLINE Vector mhc_fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(__FMA__)
  if constexpr (lanes == 8) return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  return a * b + c;
}

// Stored elements. `get` and `put` move a vector of them, as floats.
struct mhc_float32 {
  float stored;
  template <int lanes>
  MHC_INLINE typename mhc_vector<lanes>::type get(const mhc_float32 *from) {
    return *(const typename mhc_vector<lanes>::type *)from;
  }
  template <int lanes>
  MHC_INLINE void put(mhc_float32 *to, typename mhc_vector<lanes>::type values) {
    *(typename mhc_vector<lanes>::type *)to = values;
  }
};
struct mhc_bfloat16 {
  uint16_t stored;
  template <int lanes>
  MHC_INLINE typename mhc_vector<lanes>::type get(const mhc_bfloat16 *from) {
    return (typename mhc_vector<lanes>::type)(mhc_get_words<lanes>(&from->stored) << 16);
  }
  template <int lanes>
  MHC_INLINE void put(mhc_bfloat16 *to, typename mhc_vector<lanes>::type values) {  // as mhc_bits_bfloat16
    typedef typename mhc_words<lanes>::type Words;
    const Words bits = (Words)values, rounded = bits + 0x7fffu + ((bits >> 16) & 1u), nan = Words{} + 0x7fc00000u;
    mhc_put_words<lanes>(&to->stored, (values != values ? nan : rounded) >> 16);
  }
};
struct mhc_float16 {
  uint16_t stored;
  template <int lanes>
  MHC_INLINE typename mhc_vector<lanes>::type get(const mhc_float16 *from) {
    typename mhc_vector<lanes>::type values;
    for (int32_t v = 0; v < lanes; ++v) values[v] = mhc_load_float16(from[v].stored);
    return values;
  }
  template <int lanes>
  MHC_INLINE void put(mhc_float16 *to, typename mhc_vector<lanes>::type values) {
    for (int32_t v = 0; v < lanes; ++v) to[v].stored = mhc_store_float16(values[v]);
  }
};

template <class Element>
MHC_INLINE void mhc_fetch(const Element *first, int32_t count) {
  for (int32_t i = 0; i < count; i += MHC_LINE / sizeof(Element)) __builtin_prefetch(first + i, 0, 3);
}

// One block of columns: out[i] = Σ_j a[i][j] b[j] + 2 slope[i] x[i] + gate[i] u[i] + more[i]; the last two where
// `whole`. The rows that the epilogue reads come into the L1 cache under the products.
template <bool whole, int lanes, int vectors, int rows, class Out, class U, class More>
MHC_INLINE void mhc_gradients_block(Out *out, int64_t out_row, const float *a, int32_t a_row, int32_t a_column,
                                    const float *b, int64_t b_row, const float *x, int64_t x_row, const float *slope,
                                    const U *u, int64_t u_row, const float *gate, const More *more, int64_t more_row,
                                    int32_t count) {
  typedef typename mhc_vector<lanes>::type Vector;
  Vector total[rows][vectors] = {};
  for (int32_t i = 0; i < rows; ++i) {
    mhc_fetch(x + i * x_row, lanes * vectors);
    if (whole) mhc_fetch(u + i * u_row, lanes * vectors);
    if (whole) mhc_fetch(more + i * more_row, lanes * vectors);
  }
  for (int32_t j = 0; j < count; ++j) {
    const Vector *row = (const Vector *)(b + j * b_row);
    for (int32_t i = 0; i < rows; ++i) {
      const Vector factor = Vector{} + a[i * a_row + j * a_column];
      for (int32_t v = 0; v < vectors; ++v) total[i][v] = mhc_fma<lanes, Vector>(factor, row[v], total[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int32_t i = 0; i < rows; ++i) {
    const Vector of_x = Vector{} + 2 * slope[i];
#pragma GCC unroll 4
    for (int32_t v = 0; v < vectors; ++v) {
      Vector value = mhc_fma<lanes, Vector>(of_x, *(const Vector *)(x + i * x_row + v * lanes), total[i][v]);
      if (whole) {
        const Vector of_u = U::template get<lanes>(u + i * u_row + v * lanes);
        value = mhc_fma<lanes, Vector>(Vector{} + gate[i], of_u, value);
        value += More::template get<lanes>(more + i * more_row + v * lanes);
      }
      Out::template put<lanes>(out + i * out_row + v * lanes, value);
    }
  }
}

template <bool whole, int rows, class Out, class U, class More>
MHC_OWN_REGISTERS int32_t mhc_gradients(Out *out, int32_t out_row, float *a, int32_t a_row, int32_t a_column, float *b,
                                        int32_t b_row, float *x, int32_t x_row, float *slope, U *u, int32_t u_row,
                                        float *gate, More *more, int32_t more_row, int32_t count, int32_t width) {
  int32_t c = 0;
#define MHC_WHILE_FIT(lanes, vectors) \
  for (; c + lanes * vectors <= width; c += lanes * vectors) \
    mhc_gradients_block<whole, lanes, vectors, rows>(out + c, out_row, a, a_row, a_column, b + c, b_row, x + c, x_row, \
                                                     slope, u + c, u_row, gate, more + c, more_row, count);
  if constexpr (rows <= 6) MHC_WHILE_FIT(MHC_LANES, MHC_VECTORS)
  MHC_WHILE_FIT(MHC_LANES, (MHC_VECTORS / 2))
  MHC_WHILE_FIT(MHC_LANES, 1)
  MHC_WHILE_FIT(8, 1)
#undef MHC_WHILE_FIT
  return 0;
}
"""

_ELEMENT = "(float32|bfloat16|float16)"
_CALLED = re.compile(rf"\bmhc_gradients_(\d)_{_ELEMENT}(?:_{_ELEMENT}_{_ELEMENT})?\(")
_STORED = {"float32": "float", "bfloat16": "uint16_t", "float16": "uint16_t"}


def epilogues(source: str) -> str:
    """The C++ that a program needs for the register blocks that it calls: nothing, or templates and these blocks.

    mhc_gradients_ROWS_OUT computes ROWS rows out[i] = Σ_j a[i][j] b[j] + 2 slope[i] x[i] over `width` columns, a
    multiple of 8, and rounds them to dtype OUT; mhc_gradients_ROWS_OUT_U_MORE adds gate[i] u[i] + more[i].
    """
    blocks = sorted(set(_CALLED.findall(source)))
    return EPILOGUE + "".join(_block(*block) for block in blocks) if blocks else ""


def _block(rows: str, out: str, u: str, more: str) -> str:
    name = "_".join(filter(None, ("mhc_gradients", rows, out, u, more)))
    others = f"{_STORED[u]} *u, int32_t u_row, float *gate, {_STORED[more]} *more, int32_t more_row, " if u else ""
    given = f"(mhc_{u} *)u, u_row, gate, (mhc_{more} *)more, more_row" if u else "out, 0, slope, out, 0"
    whole, kinds = ("true", f"mhc_{out}, mhc_{u}, mhc_{more}") if u else ("false", ", ".join([f"mhc_{out}"] * 3))
    return f"""
extern "C" {{
MHC_INLINE int32_t {name}({_STORED[out]} *to, int32_t out_row, float *a, int32_t a_row, int32_t a_column,
    float *b, int32_t b_row, float *x, int32_t x_row, float *slope, {others}int32_t count, int32_t width) {{
  mhc_{out} *out = (mhc_{out} *)to;
  return mhc_gradients<{whole}, {rows}, {kinds}>(out, out_row, a, a_row, a_column, b, b_row, x, x_row, slope,
    {given}, count, width);
}}
}}
"""
