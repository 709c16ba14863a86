"""The C++ functions that walk the streams of a block of tokens: dot products with a row, and a sublayer's RMSNorm
(`tiles.kernels.fused.norm`). A program that calls them gets them after `cpu_prelude` and `cpu_elements`.

A C compiler adds up the lanes of a sum after every block of columns, and keeps sums over tokens in a cache. It would
also write a row of u at once after its last column is known, and wait for the memory of each of its cache lines.
"""

from __future__ import annotations

import re

from tiles.compiler.cpu_elements import STORED

STREAMS = r"""
// Calls block(lanes, vectors, c) for all columns of a row, so many vectors at a time from column c on.
template <int size>
struct mhc_int {
  static constexpr int value = size;
};
template <class Block>
MHC_INLINE void mhc_each_block(int32_t width, Block block) {
  int32_t c = 0;
  for (; c + MHC_LANES * MHC_VECTORS <= width; c += MHC_LANES * MHC_VECTORS)
    block(mhc_int<MHC_LANES>{}, mhc_int<MHC_VECTORS>{}, c);
  for (; c + MHC_LANES <= width; c += MHC_LANES) block(mhc_int<MHC_LANES>{}, mhc_int<1>{}, c);
  for (; c + 8 <= width; c += 8) block(mhc_int<8>{}, mhc_int<1>{}, c);
}
#define MHC_BLOCK_FUNCTION [&](auto lanes_, auto vectors_, int32_t c) __attribute__((always_inline))

// sum[v] = Σ_i gate[i] x[i], of so many vectors of columns.
template <int lanes, int vectors, int streams, class Element>
MHC_INLINE void mhc_weighted(typename mhc_vector<lanes>::type *sum, const Element *x, int64_t x_stream,
                             const float *gate, int32_t gate_row) {
  typedef typename mhc_vector<lanes>::type Vector;
  for (int32_t v = 0; v < vectors; ++v) sum[v] = Vector{};
#pragma GCC unroll 16
  for (int32_t i = 0; i < streams; ++i) {
    const Vector factor = Vector{} + gate[i * gate_row];
    for (int32_t v = 0; v < vectors; ++v) {
      const Vector of_x = Element::template get<lanes>(x + i * x_stream + v * lanes);
      sum[v] = mhc_fma<lanes, Vector>(factor, of_x, sum[v]);
    }
  }
}

// The sum of a vector's lanes, or of the eight that are left of a row where there are more; others are 0.
MHC_INLINE float mhc_lane_sum(float *lanes) {
  if (MHC_LANES == 4) *(mhc_vector<4>::type *)lanes += *(mhc_vector<4>::type *)(lanes + 4);
  return mhc_dot_sum(lanes);
}

// total[i] += g ∘ x[i], where g is `row`, times weight with `norm`; then also total[streams + i] += u ∘ x[i], where u
// is Σ_i gate[i] x[i].
template <bool norm, int lanes, int streams, class Element>
MHC_INLINE void mhc_add_stream_dots(typename mhc_vector<lanes>::type *total, const Element *x, int64_t x_stream,
                                    const Element *row, const float *gate, int32_t gate_row, const float *weight) {
  typedef typename mhc_vector<lanes>::type Vector;
  Vector value[streams], g = Element::template get<lanes>(row), u = {};
  if (norm) g *= *(const Vector *)weight;
#pragma GCC unroll 16
  for (int32_t i = 0; i < streams; ++i) {
    value[i] = Element::template get<lanes>(x + i * x_stream);
    total[i] = mhc_fma<lanes, Vector>(g, value[i], total[i]);
    if (norm) u = mhc_fma<lanes, Vector>(Vector{} + gate[i * gate_row], value[i], u);
  }
#pragma GCC unroll 16
  for (int32_t i = 0; norm && i < streams; ++i)
    total[streams + i] = mhc_fma<lanes, Vector>(u, value[i], total[streams + i]);
}

// Of each four lanes of a and then of b the first and the third, or the second and the fourth.
template <int odd>
MHC_INLINE mhc_lanes mhc_every_second(mhc_lanes a, mhc_lanes b) {
  int32_t at __attribute__((vector_size(4 * MHC_LANES))) = {};
  for (int32_t l = 0; l < MHC_LANES; ++l) at[l] = (l & ~3) + (l & 2 ? MHC_LANES : 0) + 2 * (l & 1) + odd;
  return __builtin_shuffle(a, b, at);
}
MHC_INLINE mhc_lanes mhc_add_pairs(mhc_lanes a, mhc_lanes b) {
  return mhc_every_second<0>(a, b) + mhc_every_second<1>(a, b);
}

// sums[i] += the sum of total[i]'s lanes. Four sums are added up side by side.
template <int count>
MHC_INLINE void mhc_add_lane_sums(float *sums, const mhc_lanes *total) {
#pragma GCC unroll 4
  for (int32_t i = 0; i < count; i += 4) {
    mhc_lanes four[4] = {};
    for (int32_t k = 0; k < 4 && i + k < count; ++k) four[k] = total[i + k];
    const mhc_lanes quads = mhc_add_pairs(mhc_add_pairs(four[0], four[1]), mhc_add_pairs(four[2], four[3]));
    mhc_four sum = {};
    for (int32_t v = 0; v < MHC_LANES / 4; ++v) sum += ((const mhc_four *)&quads)[v];
    for (int32_t k = 0; k < 4 && i + k < count; ++k) sums[i + k] += sum[k];
  }
}

// sums[i] += rows[i]·row, of rows of `width` columns that lie one after the other.
template <int streams, class Element>
MHC_OWN_REGISTERS int32_t mhc_row_dots(float *sums, float *rows, Element *row, int32_t width) {
  constexpr int sides = streams <= 4 ? 2 : 1;
  mhc_lanes total[sides][streams] = {};
  int32_t c = 0;
  for (; c + sides * MHC_LANES <= width; c += sides * MHC_LANES)
    for (int32_t side = 0; side < sides; ++side) {
      const int32_t at = c + side * MHC_LANES;
      const mhc_lanes value = Element::template get<MHC_LANES>(row + at);
      for (int32_t i = 0; i < streams; ++i)
        total[side][i] = mhc_fma<MHC_LANES, mhc_lanes>(value, *(mhc_lanes *)(rows + i * width + at), total[side][i]);
    }
  for (; c < width; c += 8) {
    const mhc_eight value = Element::template get<8>(row + c);
    for (int32_t i = 0; i < streams; ++i) {
      const mhc_eight product = value * *(mhc_eight *)(rows + i * width + c);
      for (int32_t lane = 0; lane < 8; ++lane) total[0][i][lane % MHC_LANES] += product[lane];
    }
  }
  for (int32_t i = 0; sides == 2 && i < streams; ++i) total[0][i] += total[1][i];
  mhc_add_lane_sums<streams>(sums, total[0]);
  return 0;
}

// dots[i][t] = Σ_c g_c x[t][i]_c, with g as above, and with `norm` u_dots[i][t] = Σ_c u_c x[t][i]_c, for `count`
// tokens. The same columns of the next token are asked for meanwhile.
template <bool norm, int streams, class Element>
MHC_INLINE int32_t mhc_walk_dots(float *dots, float *u_dots, int32_t dots_row, Element *x, Element *row, float *gate,
                            float *weight, int32_t count, int32_t width) {
  constexpr int sums = norm ? 2 * streams : streams, sides = sums <= 4 ? 2 : 1;
  for (int32_t t = 0; t < count; ++t) {
    const Element *token = x + (int64_t)t * streams * width, *upper = row + (int64_t)t * width;
    mhc_lanes total[sides][sums] = {};
    mhc_vector<8>::type rest[sums] = {};
    int32_t c = 0;
    for (; c + 64 <= width; c += 64) {
      for (int32_t at = c; at < c + 64; at += MHC_LINE / sizeof(Element)) {
        __builtin_prefetch(upper + width + at, 0, 3);
        for (int32_t i = 0; i < streams; ++i) __builtin_prefetch(token + (int64_t)(streams + i) * width + at, 0, 3);
      }
#pragma GCC unroll 16
      for (int32_t part = 0; part < 64 / MHC_LANES; ++part) {
        const int32_t at = c + part * MHC_LANES;
        mhc_add_stream_dots<norm, MHC_LANES, streams>(total[part % sides], token + at, width, upper + at, gate + t,
                                                      dots_row, weight + at);
      }
    }
    for (; c + 8 <= width; c += 8)
      mhc_add_stream_dots<norm, 8, streams>(rest, token + c, width, upper + c, gate + t, dots_row, weight + c);
    for (int32_t i = 0; i < sums; ++i) {
      float lanes[16] = {};
      *(mhc_lanes *)lanes = sides == 2 ? total[0][i] + total[1][i] : total[0][i];
      *(mhc_vector<8>::type *)lanes += rest[i];
      (i < streams ? dots + i * dots_row : u_dots + (i - streams) * dots_row)[t] = mhc_lane_sum(lanes);
    }
  }
  return 0;
}
template <int streams, class Element>
MHC_OWN_REGISTERS int32_t mhc_stream_dots(float *dots, int32_t dots_row, Element *x, Element *row, int32_t count,
                                          int32_t width) {
  return mhc_walk_dots<false, streams>(dots, dots, dots_row, x, row, dots, dots, count, width);
}
template <int streams, class Element>
MHC_OWN_REGISTERS int32_t mhc_norm_dots(float *dots, float *u_dots, int32_t dots_row, Element *x, Element *row,
                                        float *gate, float *weight, int32_t count, int32_t width) {
  return mhc_walk_dots<true, streams>(dots, u_dots, dots_row, x, row, gate, weight, count, width);
}

// u[t] = Σ_i gate[i][t] x[t][i], times scale and weight, where the scale makes its mean square 1. While a token's sums
// are made, the row before is scaled and stored, and the row after is asked for. `held` has room for two rows.
template <int streams, class Element>
MHC_OWN_REGISTERS int32_t mhc_norm_rows(Element *u, Element *x, float *gate, int32_t gate_row, float *weight, float eps,
                                        float *held, int32_t count, int32_t width) {
  float scale = 0;
  for (int32_t t = 0; t <= count; ++t) {
    float *now = held + (t & 1) * width, *before = held + (~t & 1) * width;
    const Element *row = x + (int64_t)t * streams * width;
    Element *ready = u + ((int64_t)t - 1) * width;
    mhc_each_block(width, MHC_BLOCK_FUNCTION {
      constexpr int lanes = decltype(lanes_)::value, vectors = decltype(vectors_)::value;
      typedef typename mhc_vector<lanes>::type Vector;
      if (t < count) {
        for (int32_t at = 0; at < lanes * vectors; at += MHC_LINE / sizeof(Element))
          __builtin_prefetch(ready + 2 * width + c + at, 1, 3);
        Vector sum[vectors];
        mhc_weighted<lanes, vectors, streams>(sum, row + c, width, gate + t, gate_row);
        for (int32_t v = 0; v < vectors; ++v) *(Vector *)(now + c + v * lanes) = sum[v];
      }
      if (t > 0)
        for (int32_t v = 0; v < vectors; ++v) {
          const Vector value = *(const Vector *)(before + c + v * lanes) * (Vector{} + scale);
          Element::template put<lanes>(ready + c + v * lanes, value * *(const Vector *)(weight + c + v * lanes));
        }
    });
    if (t < count) scale = 1 / sqrtf(mhc_squares(now, width) / width + eps);
  }
  return 0;
}

// of_u[t] = scale[t] du[t] weight − slope[t] u[t], and dweight += Σ_t scale[t] du[t] u[t], with u as above. The next
// columns of du are asked for. Rows of x and du are `row` columns of each stream long, of which these are `width`.
template <int streams, class Element>
MHC_OWN_REGISTERS int32_t mhc_norm_gradients(float *of_u, int32_t of_u_row, float *dweight, float *weight, Element *x,
                                             Element *du, int32_t row, float *gate, int32_t gate_row, float *scale,
                                             float *slope, int32_t count, int32_t width) {
  mhc_each_block(width, MHC_BLOCK_FUNCTION {
    constexpr int lanes = decltype(lanes_)::value, vectors = decltype(vectors_)::value;
    typedef typename mhc_vector<lanes>::type Vector;
    Vector weights[vectors], total[vectors];
    for (int32_t v = 0; v < vectors; ++v) {
      weights[v] = *(const Vector *)(weight + c + v * lanes);
      total[v] = *(const Vector *)(dweight + c + v * lanes);
    }
    for (int32_t t = 0; t < count; ++t) {
      Vector u[vectors];
      mhc_weighted<lanes, vectors, streams>(u, x + (int64_t)t * streams * row + c, row, gate + t, gate_row);
      for (int32_t at = 0; at < lanes * vectors; at += MHC_LINE / sizeof(Element))
        __builtin_prefetch(du + (int64_t)t * row + c + width + at, 0, 2);
      for (int32_t v = 0; v < vectors; ++v) {
        const Vector upper = Element::template get<lanes>(du + (int64_t)t * row + c + v * lanes);
        const Vector scaled = (Vector{} + scale[t]) * upper;
        const Vector along = (Vector{} - slope[t]) * u[v];
        *(Vector *)(of_u + t * of_u_row + c + v * lanes) = mhc_fma<lanes, Vector>(scaled, weights[v], along);
        total[v] = mhc_fma<lanes, Vector>(scaled, u[v], total[v]);
      }
    }
    for (int32_t v = 0; v < vectors; ++v) *(Vector *)(dweight + c + v * lanes) = total[v];
  });
  return 0;
}
"""

_CALLED = re.compile(
    r"\bmhc_(stream_dots|row_dots|norm_dots|norm_rows|norm_gradients)_(\d+)_(float32|bfloat16|float16)\("
)
_PARAMETERS = {
    "stream_dots": "float *dots, int32_t dots_row, STORED *x, STORED *row, int32_t count, int32_t width",
    "row_dots": "float *sums, float *rows, STORED *row, int32_t width",
    "norm_dots": "float *dots, float *u_dots, int32_t dots_row, STORED *x, STORED *row, float *gate, float *weight, "
    "int32_t count, int32_t width",
    "norm_rows": "STORED *u, STORED *x, float *gate, int32_t gate_row, float *weight, float eps, float *held, "
    "int32_t count, int32_t width",
    "norm_gradients": "float *of_u, int32_t of_u_row, float *dweight, float *weight, STORED *x, STORED *du, "
    "int32_t row, float *gate, int32_t gate_row, float *scale, float *slope, int32_t count, int32_t width",
}
_STORED = re.compile(r"STORED \*(\w+)")


def stream_functions(source: str) -> str:
    """The C++ that a program needs for what it calls, mhc_FUNCTION_STREAMS_DTYPE: nothing, or templates and these."""
    called = sorted(set(_CALLED.findall(source)))
    return STREAMS + "".join(_function(*each) for each in called) if called else ""


def _function(name: str, streams: str, dtype: str) -> str:
    parameters = _PARAMETERS[name]
    stored = set(_STORED.findall(parameters))
    names = [parameter.split()[-1].lstrip("*") for parameter in parameters.split(", ")]
    given = ", ".join(f"(mhc_{dtype} *){each}" if each in stored else each for each in names)
    return f"""
extern "C" {{
MHC_INLINE int32_t mhc_{name}_{streams}_{dtype}({parameters.replace("STORED", STORED[dtype])}) {{
  return mhc_{name}<{streams}>({given});
}}
}}
"""
