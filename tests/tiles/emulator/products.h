// Matrix instructions of a warp (mma) and of a warpgroup (wgmma).
#pragma once

namespace tl {

enum class DataType { kFloat16, kBFloat16, kFloat32 };

constexpr bool emulated_takes(DataType a, DataType b, DataType sums) {
  return a == b && (a == DataType::kFloat16 || a == DataType::kBFloat16) && sums == DataType::kFloat32;
}

template <DataType A, DataType B, DataType Sums, int rows, int columns, int inner, bool turned_a, bool turned_b>
inline void mma_sync(float *sums, const unsigned *a, const unsigned *b, int line = __builtin_LINE()) {
  static_assert(emulated_takes(A, B, Sums) && rows == 16 && columns == 8 && inner == 16 && !turned_a && turned_b);
  emulated_mma(sums, a, b, A == DataType::kBFloat16, line);
}

// Bits 0-13 the start, 16-29 the leading and 32-45 the stride offset, all in 16 bytes; 62-63 the swizzle.
struct GmmaDescriptor {
  uint64_t bits = 0;
  operator uint64_t() const { return bits; }
  template <typename T> GmmaDescriptor operator+(T offset) const {
    return {(bits & ~0xffffffffull) | (uint32_t)((uint32_t)bits + (uint32_t)offset)};
  }
};

template <int swizzle = 0, int leading = 0, int stride = 0, typename T>
inline void initialize_wgmma_descriptor(GmmaDescriptor &made, T *start, int line = __builtin_LINE()) {
  made.bits = (emulated_shared_offset(start, line) & 0x3ffff) >> 4 | (uint64_t)(leading & 0x3fff) << 16 |
              (uint64_t)(stride & 0x3fff) << 32 | (uint64_t)swizzle << 62;
}
template <typename T> inline void increase_descriptor_offset(GmmaDescriptor &made, T bytes) {
  made = made + (bytes >> 4);
}

inline void warpgroup_arrive() {}
template <typename T> inline void warpgroup_fence_operand(T *, int) {}
inline void warpgroup_commit_batch() { emulated_wgmma_commit(); }
template <int left> inline void warpgroup_wait() { emulated_wgmma_wait(left); }
inline void fence_proxy_async() { emulated_fence_proxy_async(); }
template <int registers> inline void warpgroup_reg_alloc() {}
template <int registers> inline void warpgroup_reg_dealloc() {}

template <DataType A, DataType B, DataType Sums, int rows, int columns, int inner, bool turned_a, bool turned_b,
          int scale_a, int scale_b>
inline void wgmma_ss(uint64_t a, uint64_t b, uint32_t *sums, bool accumulate, int line = __builtin_LINE()) {
  static_assert(emulated_takes(A, B, Sums) && rows == 64 && columns % 8 == 0 && columns <= 256 && inner == 16);
  const EmulatedWgmma given = {a, b, nullptr, (float *)sums, columns, A == DataType::kBFloat16,
                               turned_a, turned_b, accumulate, scale_a * scale_b < 0};
  emulated_wgmma(&given, line);
}
template <DataType A, DataType B, DataType Sums, int rows, int columns, int inner, bool turned_a, bool turned_b,
          int scale_a, int scale_b>
inline void wgmma_rs(const uint32_t *a, uint64_t b, uint32_t *sums, bool accumulate, int line = __builtin_LINE()) {
  static_assert(emulated_takes(A, B, Sums) && rows == 64 && columns % 8 == 0 && columns <= 256 && inner == 16);
  static_assert(!turned_a);
  const EmulatedWgmma given = {0, b, a, (float *)sums, columns, A == DataType::kBFloat16,
                               false, turned_b, accumulate, scale_a * scale_b < 0};
  emulated_wgmma(&given, line);
}

}  // namespace tl
