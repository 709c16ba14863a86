"""The C function that every CUDA kernel exports. It needs the NVIDIA driver alone: no CUDA runtime, no TVM.

The artifact is a shared library that carries the cubin in its read-only data. The driver (`libcuda.so.1`, which torch
has in the process anyway) is looked up at the first launch. The cubin is loaded through the driver's library interface,
which belongs to no context, so one loaded kernel serves every device of the process; the launch goes to the caller's
stream and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiles.family import TOKENS, Argument
from tiles.launcher import ENTRY

IMAGE = "kernel.cubin"
"""The file that the host part includes when it is assembled."""

ON_CUDA = "mhc_on_cuda"
"""A symbol that tells a CUDA kernel's library from a CPU kernel's."""

NO_DRIVER, OLD_DRIVER, TOO_MANY_TOKENS = -1, -2, -3
"""What the launcher returns besides the driver's own codes, which are positive; 0 is success."""


@dataclass(frozen=True)
class Launch:
    """How a CUDA kernel is launched: plain data out of TileLang's lowering.

    Fields:
        kernel: its symbol in the cubin.
        parameters: its parameters' names in order: tensors, scalars, and the sizes `tokens` and `splits`.
        grid: thread blocks along x, y and z, C expressions of `tokens` and `splits`.
        block: threads along x, y and z.
        shared_bytes: dynamic shared memory.
        cluster: thread blocks of a cluster along each axis, or nothing.
    """

    kernel: str
    parameters: tuple[str, ...]
    grid: tuple[str, ...]
    block: tuple[int, ...]
    shared_bytes: int
    cluster: tuple[int, ...] = ()


def with_cuda_launcher(source: str, launch: Launch, arguments: Sequence[Argument]) -> str:
    """One text for two compilers: TileLang's CUDA code for nvcc, the launcher for the C++ compiler."""
    return f"#ifdef __CUDACC__\n{source}\n#else\n{_host(launch, arguments)}\n#endif\n"


def _host(launch: Launch, arguments: Sequence[Argument]) -> str:
    tensors = [argument.name for argument in arguments if argument.role != "scalar"]
    scalars = [argument.name for argument in arguments if argument.role == "scalar"]
    addresses = {TOKENS: "&tokens32", "splits": "&splits"}
    addresses |= {name: f"&tensors[{index}]" for index, name in enumerate(tensors)}
    addresses |= {name: f"(void *)&scalars[{index}]" for index, name in enumerate(scalars)}
    parameters = ", ".join(addresses[name] for name in launch.parameters)
    cluster = [*launch.cluster, 1, 1, 1][:3]
    return _HOST.format(
        entry=ENTRY,
        mark=ON_CUDA,
        image=IMAGE,
        kernel=launch.kernel,
        parameters=parameters,
        grid=", ".join(f"(unsigned)({extent})" for extent in launch.grid),
        block=", ".join(map(str, launch.block)),
        cluster=", ".join(map(str, cluster)),
        clustered=int(bool(launch.cluster)),
        shared=launch.shared_bytes,
        no_driver=NO_DRIVER,
        old_driver=OLD_DRIVER,
        too_many=TOO_MANY_TOKENS,
    )


# The declarations restate the few of the driver's API (cuda.h, CUDA 12) that a launch needs, so that no CUDA header is
# needed: CUlaunchConfig with its attributes, attribute 4 is the cluster's dimensions, function attribute 8 the largest
# dynamic shared memory. Above 48 KiB a kernel has to ask for it, once for each device.
_HOST = """\
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
  union {{ unsigned cluster[3]; char value[64]; }};
}};
struct Config {{
  unsigned grid[3], block[3], shared;
  void *stream;
  Attribute *attributes;
  unsigned count;
}};

int (*load_library)(void **, const void *, int *, void **, unsigned, int *, void **, unsigned);
int (*get_kernel)(void **, void *, const char *);
int (*set_attribute)(int, int, void *, int);
int (*current_device)(int *);
int (*launch_kernel)(const Config *, void *, void **, void **);

pthread_once_t once = PTHREAD_ONCE_INIT;
int loaded = 0;
void *kernel = nullptr;
uint64_t prepared = 0;

template <typename Function>
bool find(void *driver, const char *name, Function &function) {{
  function = (Function)dlsym(driver, name);
  return function != nullptr;
}}

void load() {{
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (!driver) {{ loaded = {no_driver}; return; }}
  if (!find(driver, "cuLibraryLoadData", load_library) || !find(driver, "cuLibraryGetKernel", get_kernel) ||
      !find(driver, "cuKernelSetAttribute", set_attribute) || !find(driver, "cuCtxGetDevice", current_device) ||
      !find(driver, "cuLaunchKernelEx", launch_kernel)) {{ loaded = {old_driver}; return; }}
  void *library = nullptr;
  loaded = load_library(&library, mhc_image, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (!loaded) loaded = get_kernel(&kernel, library, "{kernel}");
}}

int prepare() {{
  if ({shared} <= 48 * 1024) return 0;
  int device = 0, failed = current_device(&device);
  if (failed) return failed;
  const uint64_t bit = device < 64 ? (uint64_t)1 << device : 0;
  if (__atomic_load_n(&prepared, __ATOMIC_ACQUIRE) & bit) return 0;
  failed = set_attribute(8, {shared}, kernel, device);
  if (!failed) __atomic_fetch_or(&prepared, bit, __ATOMIC_RELEASE);
  return failed;
}}

}}  // namespace

extern "C" const char {mark} = 1;

extern "C" int32_t {entry}(void **tensors, const float *scalars, int64_t tokens, int32_t splits, void *stream) {{
  pthread_once(&once, load);
  if (loaded) return loaded;
  if (tokens > INT32_MAX) return {too_many};
  int32_t tokens32 = (int32_t)tokens;
  Attribute attribute = {{}};
  attribute.id = 4;
  const unsigned cluster[3] = {{{cluster}}};
  for (int axis = 0; axis < 3; ++axis) attribute.cluster[axis] = cluster[axis];
  Config config = {{{{{grid}}}, {{{block}}}, {shared}, stream, &attribute, {clustered}}};
  if (!config.grid[0] || !config.grid[1] || !config.grid[2]) return 0;
  if (int failed = prepare()) return failed;
  void *parameters[] = {{{parameters}}};
  return launch_kernel(&config, kernel, parameters, nullptr);
}}
"""
