"""Compilation: family + problem + schedule + target -> artifact. With the programs, all that imports TileLang.

An artifact is a shared library that exports one C function: `tiles.compiler.cpu_launcher` on a CPU,
`tiles.compiler.cuda_launcher` with the cubin inside for CUDA.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from tiles.compiler.cpu_elements import ELEMENTS
from tiles.compiler.cpu_epilogue import epilogues
from tiles.compiler.cpu_launcher import with_launcher
from tiles.compiler.cpu_prelude import PRELUDE
from tiles.compiler.cpu_streams import stream_functions
from tiles.compiler.cuda_launcher import IMAGE, SPLITS, Launch, Plan, with_cuda_launcher
from tiles.errors import BadInput
from tiles.kernels.occupancy import REGISTER_FILE, multiprocessor
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import DTYPE_BYTES, TOKENS, Argument, KernelSpec, Problem
from tiles.lang.program_attrs import CHECKED, PLANNED
from tiles.target import Target

# -ffast-math less what would break us: it assumes away NaN and infinity, and linking with it makes every thread of
# the process flush subnormals. What stays lets sums be vectorised, in an order that is fixed at compile time.
CPU_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fno-strict-aliasing",  # TileLang reinterprets floats through pointers
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-fno-tree-reassoc",  # it would break chains of multiply-adds into products and sums
    "-freciprocal-math",
    "-ffp-contract=fast",
)

_RESOURCES = re.compile(
    r"(?P<stack>\d+) bytes stack frame, "
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads"
)
_SUMMED = ("stack", "spill_stores", "spill_loads")
_COMPILED = re.compile(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.DOTALL)
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_RELEASE = re.compile(r"release (\d+\.\d+)")


_THEIR_FOLDERS = ("TILELANG_CACHE_DIR", "XDG_CACHE_HOME")

_UNCHECKED = "tl.disable_safe_memory_legalize"
"""Most programs clamp their indices themselves: bounds checked in every iteration would cost more than the loads."""

_PASSES = {
    "tl.disable_tma_lower": True,  # its descriptors would have to be made at every launch; cp.async needs none
    "tl.disable_warp_specialized": True,
}


CUDA_TOOLKIT = "cuda_toolkit"
"""In a record's provenance: the release of the CUDA toolkit that built the kernel. CPU kernels and older records lack
it."""


class CompileError(RuntimeError):
    """A kernel does not compile; the text names it and ends with the compiler's own words."""


@dataclass(frozen=True)
class Artifact:
    """Compiled code: `source` is what the C++ or CUDA compiler was given, `details` what it reported, `toolkit` the
    release of the CUDA toolkit that it is of (13.0), or nothing."""

    target: Target
    source: str
    binary: bytes
    details: dict[str, int] = field(default_factory=dict)
    toolkit: str = ""

    @property
    def made_with(self) -> dict[str, str]:
        """What a record's provenance says of the compiler: the CUDA toolkit, which decides the oldest driver."""
        return {CUDA_TOOLKIT: self.toolkit} if self.toolkit else {}


def why_no_compiler(target: Target) -> str | None:
    """What is missing to compile for `target` on this machine, or None."""
    if importlib.util.find_spec("tilelang") is None:
        return "tilelang is not installed: pip install tilelang"
    if _cxx() is None:
        return "no C++ compiler is on PATH: install g++ or set CXX"
    if target.kind == "cuda" and shutil.which("nvcc") is None:
        return "nvcc is not on PATH: install the CUDA toolkit"
    return None


def import_tilelang() -> Any:
    """The module tilelang. At its first import it and TVM look for folders of their own in the home folder, which may
    be missing or read-only, and make some; nothing of ours goes there, so they are made elsewhere and dropped again."""
    if "tilelang" not in sys.modules:
        before = {name: os.environ.get(name) for name in _THEIR_FOLDERS}
        with tempfile.TemporaryDirectory(prefix="mhc-tune-") as folder:
            os.environ |= dict.fromkeys(_THEIR_FOLDERS, folder)
            try:
                with warnings.catch_warnings():  # where warnings are errors, theirs would end ours
                    warnings.simplefilter("ignore")
                    importlib.import_module("tilelang")
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.update({name: value})
    return sys.modules["tilelang"]


def compile_kernel(problem: Problem, schedule: Any, target: Target) -> Artifact:
    """Compile one kernel; raises `BadInput` for a schedule that is not valid and `CompileError` for what fails."""
    spec = kernel_spec(problem.op, problem.direction)
    problem = spec.canonical(problem)
    why = spec.why_invalid(problem, schedule, target) or why_no_compiler(target)
    if why:
        raise BadInput(f"{problem.describe()}: {why}")
    source, plan = _lower(spec, problem, schedule, target)
    if plan is None:
        return Artifact(target, source, _compile_cpu(source, target, problem))
    return _compile_cuda(source, plan, target, problem)


def generate_source(spec: KernelSpec, problem: Problem, schedule: Any, target: Target) -> str:
    """The C++ or CUDA text of a kernel."""
    return _lower(spec, problem, schedule, target)[0]


def _lower(spec: KernelSpec, problem: Problem, schedule: Any, target: Target) -> tuple[str, Plan | None]:
    """The text of a kernel, and how it is launched on CUDA."""
    arguments = spec.arguments(problem)
    if target.kind == "cpu":
        return with_launcher(_program(spec, problem, schedule, target)[1], arguments), None
    source, plan = planned(spec, problem, schedule, target)
    return with_cuda_launcher(source, plan, arguments), plan


def planned(spec: KernelSpec, problem: Problem, schedule: Any, target: Target) -> tuple[str, Plan]:
    """A kernel's CUDA text without a launcher, and how it is launched."""
    program, source, module = _program(spec, problem, schedule, target)
    return source, _plan(program, module, spec.arguments(problem))


def _program(spec: KernelSpec, problem: Problem, schedule: Any, target: Target) -> tuple[Any, str, Any]:
    tilelang = import_tilelang()
    from tilelang.backend.target import determine_target

    from tiles.lang.dialect import dialect_for

    module, _, function = spec.builder.partition(":")
    for_target: dict[str, str] | str = "c" if target.kind == "cpu" else {"kind": "cuda", "arch": target.arch}
    resolved = determine_target(for_target, return_object=True)
    try:
        with resolved:
            program = getattr(importlib.import_module(module), function)(problem, schedule, dialect_for(target))
        unchecked = CHECKED not in (program.attrs or {})
        with resolved, tilelang.tvm.transform.PassContext(config=_PASSES | {_UNCHECKED: unchecked}):
            made = tilelang.lower(program, target=resolved)
    except Exception as error:  # TVM raises many types; all mean that this schedule does not lower
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CompileError(f"{problem.describe()} {asdict(schedule)}: TileLang refused: {last[0]}") from error
    source = str(made.kernel_source)
    return program, _without_tilelang(source) if target.kind == "cpu" else source, made.device_mod


def _plan(program: Any, module: Any, arguments: Sequence[Argument]) -> Plan:
    """The launches of a lowered CUDA program; what it takes besides its arguments is workspace."""
    named = {argument.name for argument in arguments}
    buffers = [program.buffer_map[parameter] for parameter in program.params if parameter in program.buffer_map]
    extra = [buffer for buffer in buffers if buffer.name not in named]
    lost = {argument.name for argument in arguments if not argument.is_scalar} - {buffer.name for buffer in buffers}
    if lost:  # TileLang renames a parameter that a program assigns to a name; the launcher would take it for workspace
        found = [buffer.name for buffer in extra]
        raise CompileError(f"a program must keep its parameters' names, got {found}: do not assign {sorted(lost)}")
    used = {parameter.name for function in module.functions.values() for parameter in function.params}
    in_order = sorted(module.functions.values(), key=lambda function: _place(function.attrs["global_symbol"]))
    facts = {name: int(value) for name, value in (program.attrs or {}).items() if name in PLANNED}
    return Plan(
        launches=tuple(_launch(function) for function in in_order),
        workspace=tuple((buffer.name, _nbytes(buffer)) for buffer in extra if buffer.name in used),
        token_elements=max(_token_elements(size) for buffer in buffers for size in buffer.shape),
        **{PLANNED[name]: value for name, value in facts.items()},
    )


def _place(symbol: Any) -> int:
    """TileLang numbers a program's kernels in their order: f_kernel, f_kernel_1, f_kernel_2."""
    number = str(symbol).rpartition("_")[2]
    return int(number) if number.isdigit() else 0


def _nbytes(buffer: Any) -> str:
    """The bytes of a tensor in C."""
    return " * ".join((str(DTYPE_BYTES[str(buffer.dtype)]), *(_c_expression(size) for size in buffer.shape)))


def _token_elements(size: Any) -> int:
    """k of a dimension of tokens · k; 1 for others."""
    return int(size.b.value) if type(size).__name__ == "Mul" else 1


def _launch(function: Any) -> Launch:
    """How a kernel of a lowered CUDA program is launched."""
    attributes = function.attrs
    extents = attributes["thread_extent"]
    return Launch(
        kernel=str(attributes["global_symbol"]),
        parameters=tuple(parameter.name for parameter in function.params),
        grid=tuple(_c_expression(extents[tag]) if tag in extents else "1" for tag in _tags("block")),
        block=tuple(int(extents[tag]) if tag in extents else 1 for tag in _tags("thread")),
        shared_bytes=int(attributes["dyn_shared_memory_buf"]) if "dyn_shared_memory_buf" in attributes else 0,
        cluster=tuple(int(size) for size in attributes["cluster_dims"]) if "cluster_dims" in attributes else (),
    )


def _tags(kind: str) -> tuple[str, ...]:
    """TVM's names of the three axes of a grid (block) or of a thread block (thread)."""
    return tuple(f"{kind}Idx.{axis}" for axis in "xyz")


def _c_expression(extent: Any) -> str:
    """A launch extent in C, over `tokens` and `splits`, which are not negative: C's division rounds down too."""
    if hasattr(extent, "value"):
        return f"INT64_C({int(extent.value)})"
    operator = {"Add": "+", "Sub": "-", "Mul": "*", "FloorDiv": "/"}.get(type(extent).__name__)
    if operator:
        return f"({_c_expression(extent.a)} {operator} {_c_expression(extent.b)})"
    if type(extent).__name__ == "Var" and extent.name in (TOKENS, SPLITS):
        return str(extent.name)
    raise CompileError(f"a launch extent must be arithmetic over tokens and splits, got {extent}")


def _without_tilelang(source: str) -> str:
    """The kernels use plain C types alone, so the text needs no header of TileLang's."""
    called = epilogues(source) + stream_functions(source)
    return source.replace("#include <tl_templates/cpp/common.h>", PRELUDE + (called and ELEMENTS + called))


def _cxx() -> list[str] | None:
    """The C++ compiler's command; `CXX` may hold arguments, or a program in front as in `ccache g++`."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["g++", "clang++", "c++"]:
        program, *arguments = shlex.split(candidate) or [""]
        if found := shutil.which(program):
            return [found, *arguments]
    return None


def _compile_cpu(source: str, target: Target, problem: Problem) -> bytes:
    """Compile with OpenMP and link without it: the symbols come from torch (`tiles.compiler.cpu_launcher`)."""
    march = [f"-march={target.arch}"] if platform.machine() == "x86_64" else []
    tune = ["-mtune=native"] if platform.machine() == "x86_64" else []
    compiler = _cxx()
    assert compiler
    with tempfile.TemporaryDirectory(prefix="mhc-tune-") as folder:
        text, obj, library = (Path(folder) / name for name in ("kernel.cpp", "kernel.o", "kernel.so"))
        text.write_text(source, encoding="utf-8")
        _run([*compiler, *CPU_FLAGS, *march, *tune, "-c", str(text), "-o", str(obj)], problem)
        _run([*compiler, "-shared", str(obj), "-o", str(library)], problem)
        return library.read_bytes()


def _compile_cuda(source: str, plan: Plan, target: Target, problem: Problem) -> Artifact:
    import_tilelang()
    from tilelang.env import CUTLASS_INCLUDE_DIR, TILELANG_TEMPLATE_PATH

    compiler = _cxx()
    assert compiler
    with tempfile.TemporaryDirectory(prefix="mhc-tune-") as folder:
        text, cubin, library = (Path(folder) / name for name in ("kernel.cu", IMAGE, "kernel.so"))
        text.write_text(source, encoding="utf-8")
        said = _run(
            [
                *("nvcc", "-cubin", "-O3", "-std=c++17", f"-arch={target.arch}", "-lineinfo", "-Xptxas=-v"),
                *(f"-I{TILELANG_TEMPLATE_PATH}", f"-I{CUTLASS_INCLUDE_DIR}", "--expt-relaxed-constexpr"),
                *(str(text), "-o", str(cubin)),
            ],
            problem,
        )
        release = _toolkit_release(shutil.which("nvcc") or "nvcc")
        major, _, minor = release.partition(".")
        host = [*compiler, "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-shared", str(text), "-o", str(library)]
        toolkit = f"-DMHC_TOOLKIT={1000 * int(major or 0) + 10 * int(minor or 0)}"
        _run([*host, toolkit, "-ldl", "-pthread"], problem, folder)
        return Artifact(target, source, library.read_bytes(), _heaviest(said, plan, target), release)


@cache
def _toolkit_release(nvcc: str) -> str:
    """The release of the CUDA toolkit that an nvcc is of, such as 13.0, or nothing where it does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = _RELEASE.search(said)
    return found[1] if found else ""


def _heaviest(said: str, plan: Plan, target: Target) -> dict[str, int]:
    """What ptxas reports of the kernel whose thread blocks take most of a multiprocessor; spills and stack of all."""
    reports = {name: _resources(text) for name, text in _COMPILED.findall(said)}
    found = [
        reports[launch.kernel] | {"threads": prod(launch.block), "dynamic_shared_bytes": launch.shared_bytes}
        for launch in plan.launches
    ]
    limits = multiprocessor(target.arch)

    def share(used: dict[str, int]) -> float:
        shared = used["static_shared_bytes"] + used["dynamic_shared_bytes"]
        return max(used["registers"] * used["threads"] / REGISTER_FILE, shared / limits.shared_bytes)

    return max(found, key=share) | {name: sum(used[name] for used in found) for name in _SUMMED}


def _resources(said: str) -> dict[str, int]:
    """Registers, stack, spills and static shared memory, as ptxas reports them for one kernel."""
    details: dict[str, int] = {"registers": 0, "stack": 0, "spill_stores": 0, "spill_loads": 0}
    if used := _USED.search(said):
        details["registers"] = int(used[1])
    if spills := _RESOURCES.search(said):
        details |= {name: int(value) for name, value in spills.groupdict().items()}
    shared = _SHARED.search(said)
    details["static_shared_bytes"] = int(shared[1]) if shared else 0
    return details


def _run(command: list[str], problem: Problem, folder: str | None = None) -> str:
    """Run a compiler (in `folder`); its output, or `CompileError` with the end of it."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    except OSError as error:
        raise CompileError(f"{problem.describe()}: {command[0]} does not start: {error}") from error
    if done.returncode != 0:
        raise CompileError(f"{problem.describe()}: {Path(command[0]).name} failed: {done.stderr[-2000:].strip()}")
    return done.stdout + done.stderr
