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

struct Record {
  int libraries, attributes, launches, attribute, attribute_value, attribute_device;
  unsigned grid[3], block[3], shared, cluster[3];
  void *stream, *kernel;
  uint64_t parameters[64];
  char name[128];
  unsigned char image[16];
} fake;

int fake_parameters = 0, fake_device = 0, fake_failure = 0;

int fake_cuLibraryLoadData(void **library, const void *code, void *, void **, unsigned, void *, void **, unsigned) {
  ++fake.libraries;
  memcpy(fake.image, code, sizeof fake.image);
  *library = (void *)0x11;
  return fake_failure;
}
int fake_cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  strncpy(fake.name, name, sizeof fake.name - 1);
  *kernel = (void *)0x22;
  return library == (void *)0x11 ? 0 : 1;
}
int fake_cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  ++fake.attributes;
  fake.attribute = attribute;
  fake.attribute_value = value;
  fake.attribute_device = device;
  return kernel == (void *)0x22 ? 0 : 1;
}
int fake_cuCtxGetDevice(int *device) {
  *device = fake_device;
  return 0;
}
int fake_cuLaunchKernelEx(const CUlaunchConfig *config, void *kernel, void **parameters, void **) {
  ++fake.launches;
  const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  memcpy(fake.grid, grid, sizeof grid);
  memcpy(fake.block, block, sizeof block);
  memset(fake.cluster, 0, sizeof fake.cluster);
  if (config->numAttrs == 1 && (int)config->attrs[0].id == 4) memcpy(fake.cluster, &config->attrs[0].value, sizeof fake.cluster);
  fake.shared = config->sharedMemBytes;
  fake.stream = (void *)config->hStream;
  fake.kernel = kernel;
  for (int i = 0; i < fake_parameters; ++i) memcpy(&fake.parameters[i], parameters[i], sizeof(uint64_t));
  return 0;
}
}
