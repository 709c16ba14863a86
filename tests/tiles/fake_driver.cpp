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
int fake_cuCtxGetDevice(int *device) __asm__("cuCtxGetDevice");
int fake_cuLaunchKernelEx(const CUlaunchConfig *config, void *kernel, void **parameters, void **) __asm__("cuLaunchKernelEx");

struct Launch {
  unsigned grid[3], block[3], shared, cluster[3];
  int overlaps;
  void *stream;
  uint64_t parameters[64];
  char name[128];
};

struct Record {
  int libraries, attributes, launches, attribute, attribute_value, attribute_device;
  unsigned char image[16];
  Launch log[64];  // of the last 64 launches, number i at i % 64
} fake;

char fake_names[16][128];
int fake_kernels = 0;

struct Count { char name[128]; int parameters; } fake_counts[32];  // how many parameters a kernel takes, by name
int fake_device = 0, fake_failure = 0;

int fake_cuLibraryLoadData(void **library, const void *code, void *, void **, unsigned, void *, void **, unsigned) {
  ++fake.libraries;
  memcpy(fake.image, code, sizeof fake.image);
  *library = (void *)0x11;
  return fake_failure;
}
int fake_cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  char *kept = fake_names[fake_kernels++ % 16];
  strncpy(kept, name, sizeof fake_names[0] - 1);
  *kernel = kept;  // a kernel is its name
  return library == (void *)0x11 ? 0 : 1;
}
int fake_cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  ++fake.attributes;
  fake.attribute = attribute;
  fake.attribute_value = value;
  fake.attribute_device = device;
  return kernel ? 0 : 1;
}
int fake_cuCtxGetDevice(int *device) {
  *device = fake_device;
  return 0;
}
int fake_cuLaunchKernelEx(const CUlaunchConfig *config, void *kernel, void **parameters, void **) {
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
  strncpy(launch.name, (const char *)kernel, sizeof launch.name - 1);
  for (const Count &count : fake_counts)
    for (int i = 0; i < count.parameters && !strcmp(count.name, launch.name); ++i)
      memcpy(&launch.parameters[i], parameters[i], sizeof(uint64_t));
  return 0;
}
}
