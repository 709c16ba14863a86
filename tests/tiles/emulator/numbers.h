// Vector types, 16-bit floats and arithmetic, as CUDA and TileLang name them.
#pragma once

#define EMULATED_VECTORS(name, type, size)                                                             \
  struct alignas(size) name##1 { type x; };                                                            \
  struct alignas(2 * size) name##2 { type x, y; };                                                     \
  struct name##3 { type x, y, z; };                                                                    \
  struct alignas(4 * size < 16 ? 4 * size : 16) name##4 { type x, y, z, w; };                          \
  inline name##1 make_##name##1(type x) { return {x}; }                                                \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                     \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                          \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(uchar, unsigned char, 1)
EMULATED_VECTORS(short, short, 2)
EMULATED_VECTORS(ushort, unsigned short, 2)
EMULATED_VECTORS(int, int, 4)
EMULATED_VECTORS(uint, unsigned, 4)
EMULATED_VECTORS(longlong, long long, 8)
EMULATED_VECTORS(ulonglong, unsigned long long, 8)
EMULATED_VECTORS(float, float, 4)
#undef EMULATED_VECTORS

template <typename To, typename From> inline To emulated_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To made;
  __builtin_memcpy(&made, &value, sizeof made);
  return made;
}

inline uint16_t emulated_to_bfloat16(float value) {
  const uint32_t bits = emulated_bits<uint32_t>(value);
  if (value != value) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float emulated_from_bfloat16(uint16_t bits) { return emulated_bits<float>((uint32_t)bits << 16); }
inline uint16_t emulated_to_float16(float value) { return emulated_bits<uint16_t>((_Float16)value); }
inline float emulated_from_float16(uint16_t bits) { return (float)emulated_bits<_Float16>(bits); }

// A 16-bit float: rounded to nearest, ties to even; arithmetic rounds every result.
template <uint16_t (*Round)(float), float (*Widen)(uint16_t)> struct EmulatedFloat16 {
  uint16_t bits;
  EmulatedFloat16() = default;
  explicit EmulatedFloat16(float value) : bits(Round(value)) {}
  operator float() const { return Widen(bits); }
  using Self = EmulatedFloat16;
  friend Self operator+(Self a, Self b) { return Self((float)a + (float)b); }
  friend Self operator-(Self a, Self b) { return Self((float)a - (float)b); }
  friend Self operator*(Self a, Self b) { return Self((float)a * (float)b); }
  friend Self operator/(Self a, Self b) { return Self((float)a / (float)b); }
};
using bfloat16_t = EmulatedFloat16<emulated_to_bfloat16, emulated_from_bfloat16>;
using half_t = EmulatedFloat16<emulated_to_float16, emulated_from_float16>;
using __nv_bfloat16 = bfloat16_t;
using __half = half_t;
using half = half_t;

struct alignas(4) __nv_bfloat162 { bfloat16_t x, y; };
struct alignas(4) __half2 { half_t x, y; };
using half2 = __half2;

inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {bfloat16_t(v.x), bfloat16_t(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {half_t(v.x), half_t(v.y)}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline bfloat16_t __float2bfloat16(float v) { return bfloat16_t(v); }
inline float __bfloat162float(bfloat16_t v) { return v; }
inline half_t __float2half(float v) { return half_t(v); }
inline float __half2float(half_t v) { return v; }
inline unsigned __pack_nv_bfloat162(bfloat16_t x, bfloat16_t y) { return (unsigned)y.bits << 16 | x.bits; }
inline unsigned __pack_half2(bfloat16_t x, bfloat16_t y) { return (unsigned)y.bits << 16 | x.bits; }
inline unsigned __pack_half2(half_t x, half_t y) { return (unsigned)y.bits << 16 | x.bits; }

#define EMULATED_MIN_MAX(type)                                  \
  inline type min(type a, type b) { return b < a ? b : a; }     \
  inline type max(type a, type b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(unsigned long long)
#undef EMULATED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float rsqrtf(float value) { return 1 / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
inline float __fdividef(float a, float b) { return a / b; }

namespace tl {

// rcp.approx.ftz: denormal numbers count as 0, given and returned.
inline float emulated_flushed(float value) { return fabsf(value) < 1.17549435e-38f ? copysignf(0, value) : value; }
inline float fast_rcp(float value) { return emulated_flushed(1 / emulated_flushed(value)); }

#define EMULATED_PAIRS(pair)                                                                               \
  inline pair add2(pair a, pair b) { return {a.x + b.x, a.y + b.y}; }                                      \
  inline pair sub2(pair a, pair b) { return {a.x - b.x, a.y - b.y}; }                                      \
  inline pair mul2(pair a, pair b) { return {a.x * b.x, a.y * b.y}; }
EMULATED_PAIRS(float2)
EMULATED_PAIRS(__nv_bfloat162)
EMULATED_PAIRS(__half2)
#undef EMULATED_PAIRS
inline float2 fma2(float2 a, float2 b, float2 c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }
inline float2 max2(float2 a, float2 b) { return {fmaxf(a.x, b.x), fmaxf(a.y, b.y)}; }
inline float2 min2(float2 a, float2 b) { return {fminf(a.x, b.x), fminf(a.y, b.y)}; }

inline ulonglong4 load_global_256(const ulonglong4 *address, int line = __builtin_LINE()) {
  emulated_access(address, 32, false, line);
  ulonglong4 value;
  __builtin_memcpy(&value, address, sizeof value);
  return value;
}
inline void store_global_256(ulonglong4 *address, ulonglong4 value, int line = __builtin_LINE()) {
  emulated_access(address, 32, true, line);
  __builtin_memcpy(address, &value, sizeof value);
}

}  // namespace tl
