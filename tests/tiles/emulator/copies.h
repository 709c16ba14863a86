// Asynchronous copies and loads of matrices from shared memory.
#pragma once

namespace tl {

template <int bytes> inline void cp_async_gs(const void *shared, const void *global, int line = __builtin_LINE()) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  emulated_copy(const_cast<void *>(shared), global, bytes, true, line);
}
template <int bytes>
inline void cp_async_gs_conditional(const void *shared, const void *global, bool full, int line = __builtin_LINE()) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  emulated_copy(const_cast<void *>(shared), global, bytes, full, line);
}
inline void cp_async_commit() { emulated_copy_commit(); }
template <int left> inline void cp_async_wait() { emulated_copy_wait(left); }

#define EMULATED_LDMATRIX(matrices)                                                                             \
  inline void ptx_ldmatrix_x##matrices(const void *row, void *values, int line = __builtin_LINE()) {            \
    emulated_ldmatrix(row, (uint32_t *)values, matrices, false, line);                                          \
  }                                                                                                             \
  inline void ptx_ldmatrix_x##matrices##_trans(const void *row, void *values, int line = __builtin_LINE()) {    \
    emulated_ldmatrix(row, (uint32_t *)values, matrices, true, line);                                           \
  }
EMULATED_LDMATRIX(1)
EMULATED_LDMATRIX(2)
EMULATED_LDMATRIX(4)
#undef EMULATED_LDMATRIX

}  // namespace tl
