"""The C function that every CUDA kernel exports. It needs the NVIDIA driver alone: no CUDA runtime, no TVM.

The artifact is a shared library that carries the cubin in its read-only data. The driver (`libcuda.so.1`, which torch
has in the process anyway) is looked up at the first launch. The cubin is loaded through the driver's library interface,
which belongs to no context, so one loaded kernel serves every device of the process; launches go to the caller's
stream and wait for nothing.

One call may be several launches: a program of several kernels, chunks of tokens one after the other, and the sum over
splits at the end. What lies between them is kept in a workspace that the caller brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tiles.compiler.cpu_launcher import ENTRY
from tiles.kernels.spec import DTYPE_BYTES, TOKENS, Argument

IMAGE = "kernel.cubin"
"""The file that the host part includes when it is assembled."""

WORKSPACE = "mhc_workspace"
"""The C function that tells the bytes of workspace that a call needs. Only libraries of CUDA kernels have it."""

NO_DRIVER, OLD_DRIVER, TOO_MANY_TOKENS = -1, -2, -3
"""What the launcher returns besides the driver's own codes, which are positive; 0 is success."""

SPLITS = "splits"
"""The size in programs that sum over tokens: how many thread blocks share the tokens, each with sums of its own."""

SUM_KERNEL, SUM_THREADS = "mhc_sum_splits", 256


@dataclass(frozen=True)
class Launch:
    """How one CUDA kernel is launched: plain data out of TileLang's lowering.

    Fields:
        kernel: its symbol in the cubin.
        parameters: its parameters' names in order: tensors, scalars, workspace, and the sizes `tokens` and `splits`.
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


@dataclass(frozen=True)
class Plan:
    """All launches of a call.

    Fields:
        launches: the program's kernels in order.
        workspace: tensors between them: name, and bytes as a C expression of `tokens`.
        most_splits, split_tokens: a program that sums over tokens gets one split for each `split_tokens` of them, at
            most `most_splits`, whatever the device, so that results repeat bit for bit on all of them.
        chunk_tokens: all kernels run on so many tokens before the next ones are touched, so that these stay in the L2
            cache; 0 takes all tokens at once.
        use_pdl: 1 if each kernel after a chunk's first starts while the one before ends; it waits for that one itself.
        token_elements: the most elements that a dimension of a tensor has for each token; TileLang counts in int32.
    """

    launches: tuple[Launch, ...]
    workspace: tuple[tuple[str, str], ...] = ()
    most_splits: int = 64
    split_tokens: int = 128
    chunk_tokens: int = 0
    use_pdl: int = 0
    token_elements: int = 1

    @property
    def splits(self) -> bool:
        """Whether the program is one that sums over tokens."""
        return any(SPLITS in launch.parameters for launch in self.launches)


def with_cuda_launcher(source: str, plan: Plan, arguments: Sequence[Argument]) -> str:
    """One text for two compilers: TileLang's CUDA code for nvcc, the launcher for the C++ compiler."""
    partials = [argument for argument in arguments if argument.role == "partial"] if plan.splits else []
    device = source + _sum_kernel(partials, plan.use_pdl) if partials else source
    return f"#ifdef __CUDACC__\n{device}\n#else\n{_host(plan, arguments, partials)}\n#endif\n"


def _sum_kernel(partials: Sequence[Argument], use_pdl: int) -> str:
    """Sums every partial over its splits, in order: one kernel for all of them."""
    parameters = ", ".join(f"const float *of_{a.name}, float *{a.name}" for a in partials)
    steps = "".join(
        f"  if (at < {size}) {{ {name}[at] = mhc_sum(of_{name} + at, {size}, splits); return; }}\n  at -= {size};\n"
        for name, size in ((argument.name, prod(argument.sized(1))) for argument in partials)
    )
    return (
        "\nstatic __device__ float mhc_sum(const float *first, long long stride, int splits) {\n"
        "  float total = 0;\n"
        "  for (int split = 0; split < splits; ++split) total += first[split * stride];\n"
        "  return total;\n}\n"
        f'extern "C" __global__ void __launch_bounds__({SUM_THREADS}) {SUM_KERNEL}({parameters}, int splits) {{\n'
        f"{'  cudaGridDependencySynchronize();' * use_pdl}\n"
        f"  long long at = blockIdx.x * {SUM_THREADS}ll + threadIdx.x;\n{steps}}}\n"
    )


def _host(plan: Plan, arguments: Sequence[Argument], partials: Sequence[Argument]) -> str:
    tensors = [argument for argument in arguments if argument.role != "scalar"]
    scalars = [argument.name for argument in arguments if argument.role == "scalar"]
    places = {argument.name: index for index, argument in enumerate(tensors)}
    spaces = dict(plan.workspace) | {
        f"of_{a.name}": f"(chunks * splits > 1 ? chunks * splits * INT64_C({a.nbytes(1)}) : 0)" for a in partials
    }
    addresses = {TOKENS: "&tokens32", SPLITS: "&splits"}
    addresses |= {argument.name: f"&{argument.name}" for argument in tensors}
    addresses |= {name: f"(void *)&scalars[{index}]" for index, name in enumerate(scalars)}
    addresses |= {name: f"&{name}" for name, _ in plan.workspace}
    launches = [
        _launch_text(index, launch, addresses, plan.use_pdl if index else 0)
        for index, launch in enumerate(plan.launches)
    ]
    kernels = [launch.kernel for launch in plan.launches] + ([SUM_KERNEL] if partials else [])
    return _HOST.format(
        entry=ENTRY,
        workspace_entry=WORKSPACE,
        image=IMAGE,
        names=", ".join(f'"{name}"' for name in kernels),
        count=len(kernels),
        most_splits=plan.most_splits if plan.splits else 1,
        split_tokens=plan.split_tokens,
        chunk_tokens=plan.chunk_tokens,
        token_elements=plan.token_elements,
        offsets="".join(f"  at[{n}] = bytes; bytes += padded({size});\n" for n, size in enumerate(spaces.values())),
        spaces=max(1, len(spaces)),
        workspace="".join(f"    char *{name} = space + at[{n}];\n" for n, (name, _) in enumerate(plan.workspace)),
        pointers="".join(_pointer(a, places[a.name]) for a in tensors if a not in partials)
        + "".join(_partial(a, places[a.name], len(plan.workspace) + n) for n, a in enumerate(partials)),
        launches="".join(launches),
        finish=_finish(len(plan.launches), partials, places, len(plan.workspace), plan.use_pdl) if partials else "",
        no_driver=NO_DRIVER,
        old_driver=OLD_DRIVER,
        too_many=TOO_MANY_TOKENS,
    )


def _pointer(argument: Argument, place: int) -> str:
    """A tensor as a chunk sees it: where there is a row for every token, from the chunk's first row on."""
    rows = f" + first * INT64_C({argument.nbytes(2) - argument.nbytes(1)})" if TOKENS in argument.shape else ""
    return f"    char *{argument.name} = (char *)tensors[{place}]{rows};\n"


def _partial(argument: Argument, place: int, space: int) -> str:
    """Where a chunk's splits put their sums: in the workspace, or in the result where there is one split alone."""
    return (
        f"    char *{argument.name} = chunks * splits == 1 ? (char *)tensors[{place}]\n"
        f"        : space + at[{space}] + chunk * splits * INT64_C({argument.nbytes(1)});\n"
    )


def _launch_text(index: int, launch: Launch, addresses: dict[str, str], use_pdl: int) -> str:
    parameters = ", ".join(addresses[name] for name in launch.parameters)
    cluster = ", ".join(map(str, [*launch.cluster, 1, 1, 1][:3]))
    grid = ", ".join(f"(unsigned)({extent})" for extent in launch.grid)
    return (
        f"    {{\n      void *parameters[] = {{{parameters}}};\n"
        f"      const unsigned grid[3] = {{{grid}}}, block[3] = {{{', '.join(map(str, launch.block))}}};\n"
        f"      const unsigned cluster[3] = {{{cluster}}};\n"
        f"      if (int failed = run({index}, grid, block, cluster, {int(bool(launch.cluster))}, {use_pdl},"
        f" {launch.shared_bytes}, stream, parameters)) return failed;\n    }}\n"
    )


def _finish(index: int, partials: Sequence[Argument], places: dict[str, int], spaces: int, use_pdl: int) -> str:
    """The launch of the kernel that sums over splits."""
    elements = sum(prod(argument.sized(1)) for argument in partials)
    assert all(DTYPE_BYTES[argument.dtype] == 4 for argument in partials)
    pairs = "".join(
        f"    char *of_{a.name} = space + at[{spaces + n}], *{a.name} = (char *)tensors[{places[a.name]}];\n"
        for n, a in enumerate(partials)
    )
    parameters = ", ".join(f"&of_{a.name}, &{a.name}" for a in partials)
    return (
        f"  if (chunks * splits > 1) {{\n{pairs}    int32_t parts = (int32_t)(chunks * splits);\n"
        f"    void *parameters[] = {{{parameters}, &parts}};\n"
        f"    const unsigned grid[3] = {{{-(-elements // SUM_THREADS)}, 1, 1}}, block[3] = {{{SUM_THREADS}, 1, 1}};\n"
        f"    if (int failed = run({index}, grid, block, grid, 0, {use_pdl}, 0, stream, parameters)) return failed;\n"
        "  }\n"
    )


# The declarations restate the few of the driver's API (cuda.h, CUDA 12) that a launch needs, so that no CUDA header is
# needed: CUlaunchConfig with its attributes, attribute 4 is the cluster's dimensions, 6 allows a kernel to start before
# the one before it in the stream has ended, function attribute 8 is the largest dynamic shared memory. Above 48 KiB a
# kernel has to ask for it, once for each device.
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
int (*set_attribute)(int, int, void *, int);
int (*current_device)(int *);
int (*launch_kernel)(const Config *, void *, void **, void **);

pthread_once_t once = PTHREAD_ONCE_INIT;
int loaded = 0;
const char *const names[{count}] = {{{names}}};
void *kernels[{count}] = {{}};
uint64_t prepared[{count}] = {{}};

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
  for (int index = 0; index < {count} && !loaded; ++index) loaded = get_kernel(&kernels[index], library, names[index]);
}}

int prepare(int index, int shared) {{
  if (shared <= 48 * 1024) return 0;
  int device = 0, failed = current_device(&device);
  if (failed) return failed;
  const uint64_t bit = device < 64 ? (uint64_t)1 << device : 0;
  if (__atomic_load_n(&prepared[index], __ATOMIC_ACQUIRE) & bit) return 0;
  failed = set_attribute(8, shared, kernels[index], device);
  if (!failed) __atomic_fetch_or(&prepared[index], bit, __ATOMIC_RELEASE);
  return failed;
}}

int run(int index, const unsigned *grid, const unsigned *block, const unsigned *cluster, int clustered, int use_pdl,
        int shared, void *stream, void **parameters) {{
  if (!grid[0] || !grid[1] || !grid[2]) return 0;
  Attribute attributes[2] = {{}}, *next = attributes;
  if (clustered) {{
    next->id = 4;
    for (int axis = 0; axis < 3; ++axis) next->cluster[axis] = cluster[axis];
    ++next;
  }}
  if (use_pdl) next->id = 6, next->allowed = 1, ++next;
  Config config = {{{{grid[0], grid[1], grid[2]}}, {{block[0], block[1], block[2]}}, (unsigned)shared, stream,
                   attributes, (unsigned)(next - attributes)}};
  if (int failed = prepare(index, shared)) return failed;
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

extern "C" int32_t {entry}(void **tensors, const float *scalars, int64_t all, void *stream, char *space) {{
  pthread_once(&once, load);
  if (loaded) return loaded;
  if (all > INT32_MAX / {token_elements}) return {too_many};
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
