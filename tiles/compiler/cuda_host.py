"""The C++ text around a CUDA kernel's launches: the driver, contexts, loading, and how a call is cut.

`tiles.compiler.cuda_launcher` fills it in.
"""

# The declarations restate the few of the driver's API (cuda.h, CUDA 12) that a launch needs, so that no CUDA header is
# needed: CUlaunchConfig with its attributes, attribute 4 is the cluster's dimensions, 6 allows a kernel to start before
# the one before it in the stream has ended, function attribute 8 is the largest dynamic shared memory. Above 48 KiB a
# kernel has to ask for it, once for each device. Drivers load kernels lazily: cuKernelGetFunction asks for one in the
# current context, cuFuncLoad (CUDA 12.4) finishes that.
HOST = """\
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>

__asm__(
    ".section .rodata\\n"
    ".balign 64\\n"
    ".local mhc_image\\n"
    "mhc_image:\\n"
    ".incbin \\"{image}\\"\\n"
    ".previous\\n");
extern "C" __attribute__((visibility("hidden"))) const unsigned char mhc_image[];

namespace {{

struct Attribute {{
  int id;
  char pad[4];
  union {{ unsigned cluster[3]; int allowed; char value[64]; }};
}};
struct Config {{
  unsigned grid[3], block[3], shared;
  void *stream;
  Attribute *attributes;
  unsigned count;
}};

int (*load_library)(void **, const void *, int *, void **, unsigned, int *, void **, unsigned);
int (*get_kernel)(void **, void *, const char *);
int (*get_function)(void **, void *);
int (*load_function)(void *);
int (*set_attribute)(int, int, void *, int);
int (*get_device)(int *, int);
int (*retain_primary)(void **, int);
int (*current_context)(void **);
int (*set_context)(void *);
int (*current_device)(int *);
int (*launch_kernel)(const Config *, void *, void **, void **);

const char *const names[{count}] = {{{names}}};
const int shared_bytes[{count}] = {{{shared}}};

// Written under the lock, before the device's bit of `loaded` is set; read after.
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
bool has_driver = false;
void *library = nullptr, *kernels[{count}] = {{}};
uint64_t loaded = 0;

template <typename Function>
bool find(void *driver, const char *name, Function &function) {{
  function = (Function)dlsym(driver, name);
  return function != nullptr;
}}

int find_driver() {{
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (!driver) return {no_driver};
  find(driver, "cuFuncLoad", load_function);
  has_driver = find(driver, "cuLibraryLoadData", load_library) && find(driver, "cuLibraryGetKernel", get_kernel) &&
               find(driver, "cuKernelGetFunction", get_function) &&
               find(driver, "cuKernelSetAttribute", set_attribute) && find(driver, "cuDeviceGet", get_device) &&
               find(driver, "cuDevicePrimaryCtxRetain", retain_primary) &&
               find(driver, "cuCtxGetCurrent", current_context) && find(driver, "cuCtxSetCurrent", set_context) &&
               find(driver, "cuCtxGetDevice", current_device) && find(driver, "cuLaunchKernelEx", launch_kernel);
  return has_driver ? 0 : {old_driver};
}}

// A context of the device for this thread. A fresh thread (autograd's) has none: torch leaves it to the CUDA runtime's
// first call, and none of these is one. What it gets is what the runtime would give it, the device's primary context,
// and stays; a context of another device comes back.
struct Context {{
  void *before = nullptr;
  bool replaced = false;
  int device = 0, failed;

  explicit Context(int ordinal) {{
    int current = 0;
    failed = get_device(&device, ordinal);
    if (!failed) failed = current_context(&before);
    if (!failed && before) failed = current_device(&current);
    if (failed || (before && current == device)) return;
    void *primary = nullptr;
    failed = retain_primary(&primary, device);
    if (!failed) failed = set_context(primary);
    replaced = !failed && before;
  }}
  ~Context() {{
    if (replaced) set_context(before);
  }}
}};

int load_kernel(int index, int device) {{
  const int shared = shared_bytes[index];
  void *kernel = kernels[index], *function = nullptr;
  int failed = kernel ? 0 : get_kernel(&kernel, library, names[index]);
  if (!failed && shared > 48 * 1024) failed = set_attribute(8, shared, kernel, device);
  if (!failed) failed = get_function(&function, kernel);
  if (!failed && load_function) failed = load_function(function);
  if (!failed && !kernels[index]) kernels[index] = kernel;  // others may launch it on another device now
  return failed;
}}

int load_all(int ordinal) {{
  int failed = has_driver ? 0 : find_driver();
  if (failed) return failed;
  const Context context(ordinal);
  failed = context.failed;
  if (!failed && !library) {{
    void *made = nullptr;
    failed = load_library(&made, mhc_image, nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (!failed) library = made;
  }}
  for (int index = 0; index < {count} && !failed; ++index) failed = load_kernel(index, context.device);
  return failed;
}}

int load(int ordinal) {{
  const uint64_t bit = ordinal < 64 ? (uint64_t)1 << ordinal : 0;
  if (__atomic_load_n(&loaded, __ATOMIC_ACQUIRE) & bit) return 0;
  pthread_mutex_lock(&lock);
  const int failed = loaded & bit ? 0 : load_all(ordinal);
  if (!failed) __atomic_fetch_or(&loaded, bit, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&lock);
  return failed;
}}

int run(int index, const unsigned *grid, const unsigned *block, const unsigned *cluster, int clustered, int use_pdl,
        void *stream, void **parameters) {{
  if (!grid[0] || !grid[1] || !grid[2]) return 0;
  Attribute attributes[2] = {{}}, *next = attributes;
  if (clustered) {{
    next->id = 4;
    for (int axis = 0; axis < 3; ++axis) next->cluster[axis] = cluster[axis];
    ++next;
  }}
  if (use_pdl) next->id = 6, next->allowed = 1, ++next;
  Config config = {{{{grid[0], grid[1], grid[2]}}, {{block[0], block[1], block[2]}},
                   (unsigned)shared_bytes[index], stream, attributes, (unsigned)(next - attributes)}};
  return launch_kernel(&config, kernels[index], parameters, nullptr);
}}

int64_t padded(int64_t bytes) {{ return (bytes + 255) / 256 * 256; }}

// How a call is cut: chunks of `tokens` tokens, each in `splits` splits; where the parts of the workspace lie.
struct Cut {{ int64_t tokens, chunks, splits, bytes, at[{spaces}]; }};

Cut cut(int64_t all) {{
  const int64_t tokens = {chunk_tokens} && all > {chunk_tokens} ? {chunk_tokens} : all;
  const int64_t chunks = tokens ? (all + tokens - 1) / tokens : 1;
  const int64_t worth = tokens / {split_tokens};
  const int64_t splits = worth < 1 ? 1 : worth > {most_splits} ? {most_splits} : worth;
  Cut made = {{tokens, chunks, splits, 0, {{}}}};
  int64_t bytes = 0, *at = made.at;
  (void)at;
{offsets}  made.bytes = bytes;
  return made;
}}

}}  // namespace

extern "C" int64_t {workspace_entry}(int64_t tokens) {{ return cut(tokens).bytes; }}

extern "C" int32_t {load_entry}(int32_t device) {{ return load(device); }}

// The CUDA toolkit whose nvcc made the cubin, as the driver tells versions: 13000 is 13.0, 0 that it is not known.
#ifndef MHC_TOOLKIT
#define MHC_TOOLKIT 0
#endif
extern "C" int32_t {toolkit_entry}() {{ return MHC_TOOLKIT; }}

extern "C" int32_t {entry}(void **tensors, const float *scalars, int64_t all, void *stream, char *space,
                           int32_t device) {{
  if (all > INT32_MAX / {token_elements}) return {too_many};
  if (int failed = load(device)) return failed;
  // A vector that does not begin at a multiple of its size ends the process's context.
  for (int place = 0; place < {tensors}; ++place)
    if ((uintptr_t)tensors[place] % {alignment}) return {misaligned};
  const Context context(device);
  if (context.failed) return context.failed;
  const Cut made = cut(all);
  const int64_t chunks = made.chunks, *at = made.at;
  int32_t splits = (int32_t)made.splits;
  (void)at, (void)splits;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {{
    const int64_t first = chunk * made.tokens;
    const int64_t tokens = all - first < made.tokens ? all - first : made.tokens;
    int32_t tokens32 = (int32_t)tokens;
    (void)tokens32;
{workspace}{pointers}{launches}  }}
{finish}  return 0;
}}
"""
