// Barriers, shuffles and the sums that TileLang builds of them.
#pragma once

inline void __syncthreads(int line = __builtin_LINE()) { emulated_barrier(0, 0, line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { emulated_syncwarp(mask, line); }

inline unsigned emulated_lane() { return emulated_index(0, 0) % 32; }

// Lanes `first`..`first + width - 1` shuffle among themselves; who asks for a lane outside of them keeps its value.
template <typename T> inline T emulated_shuffled(unsigned mask, T value, int source, int first, int width, int line) {
  if (source < first || source >= first + width) source = (int)emulated_lane();
  emulated_shuffle(&value, sizeof value, (unsigned)source, mask, line);
  return value;
}
inline int emulated_first(int width) { return (int)emulated_lane() / width * width; }

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int first = emulated_first(width);
  return emulated_shuffled(mask, value, first + (source & (width - 1)), first, width, line);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, int line = __builtin_LINE()) {
  return emulated_shuffled(mask, value, (int)emulated_lane() ^ flip, emulated_first(width), width, line);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, int line = __builtin_LINE()) {
  return emulated_shuffled(mask, value, (int)emulated_lane() - (int)by, emulated_first(width), width, line);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, int line = __builtin_LINE()) {
  return emulated_shuffled(mask, value, (int)emulated_lane() + (int)by, emulated_first(width), width, line);
}

namespace tl {

template <typename T> inline T shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return __shfl_sync(mask, value, source, 32, line);
}
template <typename T> inline T shfl_xor_sync(unsigned mask, T value, int flip, int line = __builtin_LINE()) {
  return __shfl_xor_sync(mask, value, flip, 32, line);
}
template <typename T> inline T shfl_up_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  return __shfl_up_sync(mask, value, (unsigned)by, 32, line);
}
template <typename T> inline T shfl_down_sync(unsigned mask, T value, int by, int line = __builtin_LINE()) {
  return __shfl_down_sync(mask, value, (unsigned)by, 32, line);
}

inline void __sync_thread_partial(int id = 0, int count = 0, int line = __builtin_LINE()) {
  emulated_barrier((unsigned)id, (unsigned)count, line);
}

struct SyncThreadsBarrier {
  template <int phase = 0> static void sync(int line) { emulated_barrier(0, 0, line); }
};
template <int threads> struct NamedBarrier {
  template <int phase = 1> static void sync(int line) { emulated_barrier(phase, threads, line); }
};

struct SumOp {
  template <typename T> T operator()(T a, T b) { return a + b; }
};
struct MaxOp {
  template <typename T> T operator()(T a, T b) { return a < b ? b : a; }
};
struct MinOp {
  template <typename T> T operator()(T a, T b) { return b < a ? b : a; }
};

// Reduces over `threads` / `scale` threads that are `scale` apart: across warps by the buffer, in a warp by shuffles.
template <class Reducer, int threads, int scale, int first = 0, class Barrier = SyncThreadsBarrier, int batch = 1,
          int stride = 0>
struct AllReduce {
  template <typename T> static T run(T value, T *buffer = nullptr, int line = __builtin_LINE()) {
    run_batch(&value, buffer, line, 1);
    return value;
  }
  template <typename T>
  static void run_batch(T *values, T *buffer = nullptr, int line = __builtin_LINE(), int count = batch) {
    for (int distance = threads / 2; distance >= scale; distance /= 2) {
      if (distance < 32) {
        for (int i = 0; i < count; ++i)
          values[i] = Reducer()(values[i], __shfl_xor_sync(~0u, values[i], distance, 32, line));
        continue;
      }
      const int place = (int)emulated_index(0, 0) - first;
      Barrier::template sync<1>(line);
      for (int i = 0; i < count; ++i) buffer[place + i * stride] = values[i];
      Barrier::template sync<2>(line);
      for (int i = 0; i < count; ++i) values[i] = Reducer()(values[i], buffer[(place ^ distance) + i * stride]);
    }
  }
};

}  // namespace tl
