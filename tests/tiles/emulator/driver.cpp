// NVIDIA's driver as far as a launcher uses it: kernels run here, one block after the other, in an order by chance.
#include <string.h>
#include <string>
#include <vector>

#include "check.h"
#include "runtime.h"
#include "threads.h"
#include "traffic.h"

namespace {

struct Kernel {
  std::string name;
  void (*call)(void **);
  unsigned most_shared = 48 * 1024;
};

std::vector<Kernel> &kernels() {
  static std::vector<Kernel> all;
  return all;
}

struct Attribute {
  int id;
  char pad[4];
  unsigned value[16];
};

struct Config {
  unsigned grid[3], block[3], shared;
  void *stream;
  Attribute *attributes;
  unsigned count;
};

constexpr int CLUSTER = 4, PROGRAMMATIC_STREAM_SERIALIZATION = 6, MOST_DYNAMIC_SHARED = 8;

}  // namespace

extern "C" {

void emulated_kernel(const char *name, void (*call)(void **)) {
  check::set_library((const void *)call);
  kernels().push_back({name, call});
}

// For the process that calls a launcher.
void emulated_begin(uint64_t seed, int late) {
  threads::seed(seed);
  threads::late = late;
}
void emulated_tensor(const char *name, void *address, uint64_t bytes, int writable, int overlapping) {
  check::add_tensor(name, address, bytes, writable, overlapping);
}

int cuLibraryLoadData(void **library, const void *, int *, void **, unsigned, int *, void **, unsigned) {
  *library = &kernels();
  return 0;
}
int cuLibraryGetKernel(void **kernel, void *, const char *name) {
  for (Kernel &one : kernels())
    if (one.name == name) return *kernel = &one, 0;
  return 500;  // CUDA_ERROR_NOT_FOUND
}
int cuKernelSetAttribute(int attribute, int value, void *kernel, int) {
  if (attribute != MOST_DYNAMIC_SHARED || value > EMULATED_SHARED) return 1;  // CUDA_ERROR_INVALID_VALUE
  ((Kernel *)kernel)->most_shared = (unsigned)value;
  return 0;
}
int cuKernelGetFunction(void **function, void *kernel) { return *function = kernel, 0; }
int cuFuncLoad(void *) { return 0; }

// One device, whose primary context every thread has.
int cuDeviceGet(int *device, int ordinal) { return *device = 0, ordinal; }
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &kernels(), 0; }
int cuCtxGetCurrent(void **context) { return *context = &kernels(), 0; }
int cuCtxSetCurrent(void *) { return 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuLaunchKernelEx(const Config *config, void *given, void **parameters, void **) {
  Kernel &kernel = *(Kernel *)given;
  bool overlaps = false;
  for (unsigned at = 0; at < config->count; ++at) {
    const Attribute &attribute = config->attributes[at];
    for (int axis = 0; axis < 3 && attribute.id == CLUSTER; ++axis)
      if (attribute.value[axis] != 1) check::finding("not emulated", "a cluster");
    if (attribute.id == PROGRAMMATIC_STREAM_SERIALIZATION) overlaps = attribute.value[0];
  }
  const unsigned *block = config->block, *grid = config->grid;
  if (block[0] > threads::MOST || block[1] != 1 || block[2] != 1 || grid[1] > 65535 || grid[2] > 65535 ||
      config->shared > kernel.most_shared)
    return 1;  // CUDA_ERROR_INVALID_VALUE
  memcpy(threads::grid, grid, sizeof threads::grid);
  check::launch_starts(overlaps);
  traffic::launch_starts(kernel.name);
  for (unsigned index : threads::shuffled(grid[0] * grid[1] * grid[2])) {
    threads::block[0] = index % grid[0];
    threads::block[1] = index / grid[0] % grid[1];
    threads::block[2] = index / grid[0] / grid[1];
    check::block_starts(config->shared);
    emulated_wgmmas_begin();
    threads::run(kernel.call, parameters, block[0]);
    check::block_ends();
    traffic::block_ends();
  }
  return 0;
}
}
