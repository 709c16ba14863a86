// Stands in for CUDA's and TileLang's headers when g++ compiles a generated text; comes before it by -include.
#pragma once
#include <math.h>
#include <stdint.h>

#include <utility>

#include "runtime.h"

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;

template <int which, int axis> struct EmulatedIndex {
  operator unsigned() const { return emulated_index(which, axis); }
};
template <int which> struct EmulatedIndices {
  EmulatedIndex<which, 0> x;
  EmulatedIndex<which, 1> y;
  EmulatedIndex<which, 2> z;
};
inline constexpr EmulatedIndices<0> threadIdx;
inline constexpr EmulatedIndices<1> blockIdx;
inline constexpr EmulatedIndices<2> blockDim;
inline constexpr EmulatedIndices<3> gridDim;

#include "numbers.h"
#include "warps.h"
#include "copies.h"
#include "products.h"

// Launches are one after the other here, but a kernel that may start early is held to its wait.
inline void cudaGridDependencySynchronize() { emulated_await_last(); }
inline void cudaTriggerProgrammaticLaunchCompletion() {}

// Calls a kernel with the parameters of a launch: a pointer to each.
template <typename... Parameters, size_t... places>
__attribute__((no_sanitize("thread"))) void emulated_call(void (*kernel)(Parameters...), void **given,
                                                          std::index_sequence<places...>) {
  kernel(*(Parameters *)given[places]...);
}
template <typename... Parameters>
std::index_sequence_for<Parameters...> emulated_places(void (*)(Parameters...)) {
  return {};
}
#define EMULATED_KERNEL(name)                                                                    \
  __attribute__((constructor, no_sanitize("thread"))) static void emulated_announce_##name() {   \
    emulated_kernel(#name, [](void **given) { emulated_call(name, given, emulated_places(name)); }); \
  }

// Other threads write where a parameter points to.
#define __restrict__
#define __CUDACC__ 1
