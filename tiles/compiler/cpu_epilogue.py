"""The C++ functions of a register block with an epilogue: what is added to the products, and the conversion, come while
the sums are in registers. A program that calls them gets them after `cpu_prelude` and `cpu_elements`.

With loops of their own for that, values would go to a cache and back twice, and memory would idle under the products.
"""

from __future__ import annotations

import re

from tiles.compiler.cpu_elements import STORED

EPILOGUE = r"""
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
                                        float *gate, More *more, int32_t more_row, bool more_is_given, int32_t count,
                                        int32_t width) {
  static const More nothing[MHC_LANES * MHC_VECTORS] = {};
  int32_t c = 0;
#define MHC_WHILE_FIT(lanes, vectors) \
  for (; c + lanes * vectors <= width; c += lanes * vectors) \
    mhc_gradients_block<whole, lanes, vectors, rows>(out + c, out_row, a, a_row, a_column, b + c, b_row, x + c, x_row, \
                                                     slope, u + c, u_row, gate, more_is_given ? more + c : nothing, \
                                                     more_is_given ? more_row : 0, count);
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


def epilogues(source: str) -> str:
    """The C++ that a program needs for the register blocks that it calls: nothing, or templates and these blocks.

    mhc_gradients_ROWS_OUT computes ROWS rows out[i] = Σ_j a[i][j] b[j] + 2 slope[i] x[i] over `width` columns, a
    multiple of 8, and rounds them to dtype OUT; mhc_gradients_ROWS_OUT_U_MORE adds gate[i] u[i], and more[i]
    where that is given.
    """
    blocks = sorted(set(_CALLED.findall(source)))
    return EPILOGUE + "".join(_block(*block) for block in blocks) if blocks else ""


def _block(rows: str, out: str, u: str, more: str) -> str:
    name = "_".join(filter(None, ("mhc_gradients", rows, out, u, more)))
    others, given = "", "out, 0, slope, out, 0, false"
    whole, kinds = "false", f"mhc_{out}, mhc_{out}, mhc_{out}"
    if u:
        others = f"{STORED[u]} *u, int32_t u_row, float *gate, {STORED[more]} *more, int32_t more_row, float is_given, "
        given = f"(mhc_{u} *)u, u_row, gate, (mhc_{more} *)more, more_row, is_given != 0"
        whole, kinds = "true", f"mhc_{out}, mhc_{u}, mhc_{more}"
    return f"""
extern "C" {{
MHC_INLINE int32_t {name}({STORED[out]} *to, int32_t out_row, float *a, int32_t a_row, int32_t a_column,
    float *b, int32_t b_row, float *x, int32_t x_row, float *slope, {others}int32_t count, int32_t width) {{
  mhc_{out} *out = (mhc_{out} *)to;
  return mhc_gradients<{whole}, {rows}, {kinds}>(out, out_row, a, a_row, a_column, b, b_row, x, x_row, slope,
    {given}, count, width);
}}
}}
"""
