"""The C function that every CUDA kernel exports. It needs the NVIDIA driver alone: no CUDA runtime, no TVM.

The artifact is a shared library that carries the cubin in its read-only data. The driver (`libcuda.so.1`, which torch
has in the process anyway) is looked up when the cubin is loaded, through the driver's library interface, which belongs
to no context: one library serves every device of the process. On each device all kernels of a library are loaded
together, before the first launch there: a kernel that is first needed inside of a graph's capture could not be loaded
then. A load that fails is tried again by the next call. Launches go to the caller's stream and wait for nothing.

One call may be several launches: a program of several kernels, chunks of tokens one after the other, and the sum over
splits at the end. What lies between them is kept in a workspace that the caller brings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tiles.compiler.cpu_launcher import ENTRY
from tiles.compiler.cuda_host import HOST
from tiles.kernels.spec import DTYPE_BYTES, TOKENS, Argument

IMAGE = "kernel.cubin"
"""The file that the host part includes when it is assembled."""

WORKSPACE = "mhc_workspace"
"""The C function that tells the bytes of workspace that a call needs. Only libraries of CUDA kernels have it."""

LOAD = "mhc_load"
"""The C function that loads all kernels on a device, as the first launch there would."""

TOOLKIT = "mhc_toolkit"
"""The C function that tells which CUDA toolkit compiled the kernels, as 1000 · major + 10 · minor; 0: not known."""

ALIGNMENT = 32
"""Every tensor begins at a multiple of so many bytes: kernels copy vectors of 16, from sm_100 on they load 32."""

NO_DRIVER, OLD_DRIVER, TOO_MANY_TOKENS, MISALIGNED = -1, -2, -3, -4
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
    tensors = [argument for argument in arguments if not argument.is_scalar]
    scalars = [argument.name for argument in arguments if argument.is_scalar]
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
    return HOST.format(
        entry=ENTRY,
        workspace_entry=WORKSPACE,
        load_entry=LOAD,
        toolkit_entry=TOOLKIT,
        tensors=len(tensors),
        alignment=ALIGNMENT,
        misaligned=MISALIGNED,
        image=IMAGE,
        names=", ".join(f'"{name}"' for name in kernels),
        count=len(kernels),
        shared=", ".join([*(str(launch.shared_bytes) for launch in plan.launches), *["0"] * bool(partials)]),
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
        f"      if (int failed = run({index}, grid, block, cluster, {int(bool(launch.cluster))}, {use_pdl}, stream,"
        " parameters)) return failed;\n    }\n"
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
        f"    if (int failed = run({index}, grid, block, grid, 0, {use_pdl}, stream, parameters)) return failed;\n"
        "  }\n"
    )
