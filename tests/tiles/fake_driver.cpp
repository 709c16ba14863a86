// Stands in for libcuda.so.1 where there is no GPU: it keeps what a launcher asks of it, for a test to read.
#include <cstdint>
#include <cstring>
#if __has_include(<cuda.h>)
#include <cuda.h>
#else
struct CUlaunchAttribute { int id; char pad[4]; union { struct { unsigned x, y, z; } clusterDim; char space[64]; } value; };
struct CUlaunchConfig {
  unsigned gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
  void *hStream;
  CUlaunchAttribute *attrs;
  unsigned numAttrs;
};
#endif

extern "C" {

// CUDA's own header declares these with its own types.
int fake_cuLibraryLoadData(void **library, const void *code, void *, void **, unsigned, void *, void **, unsigned) __asm__("cuLibraryLoadData");
int fake_cuLibraryGetKernel(void **kernel, void *library, const char *name) __asm__("cuLibraryGetKernel");
int fake_cuKernelSetAttribute(int attribute, int value, void *kernel, int device) __asm__("cuKernelSetAttribute");
int fake_cuKernelGetFunction(void **function, void *kernel) __asm__("cuKernelGetFunction");
int fake_cuFuncLoad(void *function) __asm__("cuFuncLoad");
int fake_cuDeviceGet(int *device, int ordinal) __asm__("cuDeviceGet");
int fake_cuDevicePrimaryCtxRetain(void **context, int device) __asm__("cuDevicePrimaryCtxRetain");
int fake_cuCtxGetCurrent(void **context) __asm__("cuCtxGetCurrent");
int fake_cuCtxSetCurrent(void *context) __asm__("cuCtxSetCurrent");
int fake_cuCtxGetDevice(int *device) __asm__("cuCtxGetDevice");
int fake_cuLaunchKernelEx(const CUlaunchConfig *config, void *kernel, void **parameters, void **) __asm__("cuLaunchKernelEx");

struct Launch {
  unsigned grid[3], block[3], shared, cluster[3];
  int overlaps, device;
  void *stream;
  uint64_t parameters[64];
  char name[128];
};

struct Record {
  int libraries, attributes, launches, attribute, attribute_value, attribute_device;
  unsigned char image[16];
  Launch log[64];  // of the last 64 launches, number i at i % 64
} fake;

constexpr int INVALID_CONTEXT = 201, STREAM_CAPTURE_UNSUPPORTED = 900, DEVICES = 8;

struct Kernel {
  char name[128];
  bool asked[DEVICES], loaded[DEVICES];  // lazy loading: by device
} fake_kernels[16];
int fake_kernel_count = 0;

struct Count { char name[128]; int parameters; } fake_counts[32];  // how many parameters a kernel takes, by name
// What the next calls meet: loading fails with `fake_failure`; a capture allows no loading.
int fake_failure = 0, fake_capturing = 0;

char fake_contexts[DEVICES];  // a device's primary context is its place here
thread_local char *fake_context = nullptr;

// What torch does before a call: the calling thread's context, of no device where it is negative.
void fake_enter(int device) { fake_context = device < 0 ? nullptr : &fake_contexts[device]; }
int fake_current() { return fake_context ? (int)(fake_context - fake_contexts) : -1; }

int fake_cuLibraryLoadData(void **library, const void *code, void *, void **, unsigned, void *, void **, unsigned) {
  ++fake.libraries;
  memcpy(fake.image, code, sizeof fake.image);
  *library = (void *)0x11;
  return fake_capturing ? STREAM_CAPTURE_UNSUPPORTED : fake_failure;
}
int fake_cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  Kernel &made = fake_kernels[fake_kernel_count++ % 16];
  made = {};
  strncpy(made.name, name, sizeof made.name - 1);
  *kernel = &made;
  return library == (void *)0x11 ? 0 : 1;
}
int fake_cuKernelGetFunction(void **function, void *kernel) {
  if (!fake_context) return INVALID_CONTEXT;
  if (fake_capturing) return STREAM_CAPTURE_UNSUPPORTED;
  ((Kernel *)kernel)->asked[fake_current()] = true;
#ifdef WITHOUT_FUNC_LOAD  // drivers before CUDA 12.4
  ((Kernel *)kernel)->loaded[fake_current()] = true;
#endif
  *function = kernel;
  return fake_failure;
}
#ifndef WITHOUT_FUNC_LOAD
int fake_cuFuncLoad(void *function) {
  Kernel &kernel = *(Kernel *)function;
  if (!fake_context || !kernel.asked[fake_current()]) return INVALID_CONTEXT;
  kernel.loaded[fake_current()] = true;
  return 0;
}
#endif
int fake_cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  ++fake.attributes;
  fake.attribute = attribute;
  fake.attribute_value = value;
  fake.attribute_device = device;
  return kernel ? 0 : 1;
}
int fake_cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal < DEVICES ? 0 : 101;
}
int fake_cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = &fake_contexts[device];
  return 0;
}
int fake_cuCtxGetCurrent(void **context) {
  *context = fake_context;
  return 0;
}
int fake_cuCtxSetCurrent(void *context) {
  fake_context = (char *)context;
  return 0;
}
int fake_cuCtxGetDevice(int *device) {
  *device = fake_current();
  return fake_context ? 0 : INVALID_CONTEXT;
}
int fake_cuLaunchKernelEx(const CUlaunchConfig *config, void *kernel, void **parameters, void **) {
  if (!fake_context) return INVALID_CONTEXT;
  bool &loaded = ((Kernel *)kernel)->loaded[fake_current()];
  if (!loaded && fake_capturing) return STREAM_CAPTURE_UNSUPPORTED;
  loaded = true;
  Launch &launch = fake.log[fake.launches++ % 64];
  launch = {};
  const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  memcpy(launch.grid, grid, sizeof grid);
  memcpy(launch.block, block, sizeof block);
  for (unsigned at = 0; at < config->numAttrs; ++at) {
    const auto &attribute = config->attrs[at];
    if ((int)attribute.id == 4) memcpy(launch.cluster, &attribute.value, sizeof launch.cluster);
    if ((int)attribute.id == 6) memcpy(&launch.overlaps, &attribute.value, sizeof launch.overlaps);
  }
  launch.shared = config->sharedMemBytes;
  launch.stream = (void *)config->hStream;
  launch.device = fake_current();
  strncpy(launch.name, ((Kernel *)kernel)->name, sizeof launch.name - 1);
  for (const Count &count : fake_counts)
    for (int i = 0; i < count.parameters && !strcmp(count.name, launch.name); ++i)
      memcpy(&launch.parameters[i], parameters[i], sizeof(uint64_t));
  return 0;
}
}
