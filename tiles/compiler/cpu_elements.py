"""The C++ types of stored elements, which move vectors of them as floats, for the functions that programs call."""

ELEMENTS = r"""
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
"""

STORED = {"float32": "float", "bfloat16": "uint16_t", "float16": "uint16_t"}
"""The C type of each dtype in a kernel's signature."""
