"""Compiled kernels, loaded and called on torch tensors without TileLang or a compiler.

On a CUDA device they need the NVIDIA driver and nothing else: calls go to torch's current stream and never synchronise,
so they can be captured in a CUDA graph once `load`, or a first call, has loaded the code.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise, zip_longest
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tiles.compiler.cpu_launcher import ENTRY
from tiles.compiler.cuda_launcher import ALIGNMENT, LOAD, MISALIGNED, TOOLKIT, WORKSPACE
from tiles.errors import BadInput
from tiles.kernels.reference_inputs import DTYPES
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import TOKENS, Argument, KernelSpec, Problem
from tiles.runtime.cpu_memory_pool import MEMORY_POOL
from tiles.runtime.cuda_status import is_final, status_text

Value = torch.Tensor | float | None

MIN_SLICE_BYTES = 64 * 1024
"""Smallest slice of tokens that pays for waking another thread (about 5 µs at 10 GB/s)."""


class LoadError(RuntimeError):
    """A binary does not load here; the text says why."""


class LoadedKernel:
    """A kernel ready to run on this machine, on a device of its kind.

    A call takes the inputs, scalars and updated tensors of `spec.arguments(problem)` in that order (contiguous tensors
    on one device, any leading dimensions in the place of tokens; None for an updated one that holds nothing yet, which
    is then made) and returns all results in that order, with the same leading dimensions, partials summed over slices.
    """

    def __init__(self, path: Path, problem: Problem) -> None:
        self.problem = problem
        library = self._library = _library(path)
        self.kind: Literal["cpu", "cuda"] = "cuda" if hasattr(library, WORKSPACE) else "cpu"
        self.spec: KernelSpec = kernel_spec(problem.op, problem.direction)
        self.arguments = self.spec.arguments(problem)
        self._launch = _entry(library, self.kind)
        self._workspace = _workspace(library) if self.kind == "cuda" else None
        self._tensors = [argument for argument in self.arguments if not argument.is_scalar]
        self._scalars = [argument for argument in self.arguments if argument.is_scalar]
        self._flags = flags_of(self.arguments)
        self._dims = len(self.arguments[0].shape) - 1
        self._inputs = sum(argument.role == "input" for argument in self.arguments)
        self._partials = sum(argument.role == "partial" for argument in self.arguments)
        self._pointers: Any = ctypes.c_void_p * len(self._tensors)
        self._floats: Any = ctypes.c_float * len(self._scalars)
        self._token_bytes = max(1, sum(arg.nbytes(2) - arg.nbytes(1) for arg in self._tensors))
        self._layout = lru_cache(maxsize=64)(self._layout_of)

    @property
    def device(self) -> torch.device:
        """The device that it runs on: the CPU, or the current CUDA device."""
        return CPU if self.kind == "cpu" else torch.device("cuda", torch.cuda.current_device())

    @property
    def toolkit(self) -> int:
        """The CUDA toolkit that built the kernel, as 1000 · major + 10 · minor; 0 where it is not known."""
        return int(getattr(self._library, TOOLKIT)()) if self.kind == "cuda" else 0

    def __call__(self, *inputs: Value, out: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, ...]:
        """Run on the default number of slices; `out`, which the caller has checked, is for the first outputs."""
        tensors, scalars = self._split(inputs)
        leading = leading_shape(tensors[0], self._dims) if isinstance(tensors[0], torch.Tensor) else torch.Size((0,))
        layout = self._layout(leading, self.slices(leading.numel()))
        self._check(tensors, layout)
        return self._run(tensors, scalars, layout, out)

    def slices(self, tokens: int) -> int:
        """The number of token slices of a call: on a CPU one for each of torch's threads, fewer when there is little to
        do; on CUDA one, since the launcher splits the tokens itself."""
        if self.kind == "cuda":
            return 1
        worth = tokens * self._token_bytes // MIN_SLICE_BYTES
        return max(1, min(torch.get_num_threads(), tokens, worth))

    def workspace(self, tokens: int) -> int:
        """Bytes of device memory that a call needs besides its arguments; 0 for a CPU kernel."""
        return int(self._workspace(tokens)) if self._workspace else 0

    def load(self, device: torch.device) -> None:
        """Load all code on a CUDA device, as the first call there would; for a CPU there is nothing to do.

        Raises `LoadError` where that fails always. What may work later (out of memory, inside of a capture) is left to
        the next call.
        """
        if self.kind == "cpu":
            return
        with torch.cuda.device(device):
            index = torch.cuda.current_device() if device.index is None else device.index
            status = int(getattr(self._library, LOAD)(index))
        if is_final(status):
            raise LoadError(status_text(status, self.toolkit))

    def run(
        self, given: Sequence[Value], tokens: int, slices: int, out: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, ...]:
        """Run on exactly `slices` slices."""
        return self._run(*self._split(given), self._layout((tokens,), slices), out)

    def _run(
        self, tensors: list[Any], scalars: Sequence[float], layout: _Layout, out: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        device, updated = tensors[0].device, tensors[self._inputs :]
        if updated:
            scalars = [*scalars, *(float(tensor is not None) for tensor in updated)]
        results = []
        for given, (shape, dtype, pooled) in zip_longest((*updated, *out), layout.results):
            if given is not None:
                results.append(given)
            elif pooled:
                results.append(MEMORY_POOL.empty(shape, dtype))
            else:
                results.append(torch.empty(shape, dtype=dtype, device=device))
        self._start(tensors[: self._inputs] + results, scalars, layout.tokens, layout.slices)
        if layout.slices > 1 and self._partials:
            results[-self._partials :] = map(summed, results[-self._partials :])
        return tuple(results)

    def launch(self, inputs: dict[str, Value], results: dict[str, torch.Tensor], tokens: int, slices: int) -> None:
        """Write `results` (partials of [slices, ...] elements) from `inputs`; the caller owns every tensor. A result
        that is updated holds something where `inputs` has it too.

        Raises `BadInput` for a result on a CUDA device that does not begin at a multiple of 32 bytes.
        """
        named: dict[str, Any] = inputs | results
        named |= {flag: float(updated in inputs) for flag, updated in self._flags.items()}
        tensors, scalars = ([named[argument.name] for argument in kind] for kind in (self._tensors, self._scalars))
        self._start(tensors, scalars, tokens, slices)

    def _split(self, given: Sequence[Value]) -> tuple[list[Any], Sequence[Any]]:
        """The tensors that a caller passes, inputs and then updated ones, and the scalars, which come between them."""
        first, end = self._inputs, self._inputs + len(self._scalars) - len(self._flags)
        return [*given[:first], *given[end:]], given[first:end]

    def _start(self, tensors: Sequence[torch.Tensor], scalars: Sequence[float], tokens: int, slices: int) -> None:
        """Run on all tensors, inputs and results, in the order of the arguments."""
        pointers, floats = self._pointers(*[tensor.data_ptr() for tensor in tensors]), self._floats(*scalars)
        if self.kind == "cpu":
            status = self._launch(pointers, floats, tokens, slices)
        else:
            status = self._on_cuda(pointers, floats, tokens, tensors[-1].device)
            if status == MISALIGNED:
                self._start(self._aligned(tensors), scalars, tokens, slices)
                return
        if status != 0:
            raise RuntimeError(f"{self.spec.name} failed: {self._status_text(status)}")

    def _aligned(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All tensors, those inputs copied that do not begin where vectors may, such as views from an odd element."""
        for argument, tensor in zip(self._tensors[self._inputs :], tensors[self._inputs :], strict=True):
            if past := tensor.data_ptr() % ALIGNMENT:
                raise BadInput(
                    f"{self.spec.name}: {argument.name} is written in place and must begin at a multiple of "
                    f"{ALIGNMENT} bytes, got one that begins {past} bytes past it: pass a tensor that is no such view"
                )
        return [tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor for tensor in tensors]

    def _status_text(self, status: int) -> str:
        """The meaning of a launcher's status."""
        if self.kind == "cuda":
            return status_text(status, self.toolkit)
        return f"the kernel returned {status}: rebuild the kernel cache with `mhc-tune tune`"

    def _on_cuda(self, pointers: Any, scalars: Any, tokens: int, device: torch.device) -> int:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            size = self.workspace(tokens)
            # Held until the launch returns, which releases the GIL: between two kernels of this call may come those of
            # another thread on this stream. Work that comes after the call may have the memory.
            space = torch.empty(size, dtype=torch.uint8, device=device) if size else None
            address = None if space is None else space.data_ptr()
            return int(self._launch(pointers, scalars, tokens, stream, address, device.index))

    def _check(self, tensors: Sequence[Any], layout: _Layout) -> None:
        """Check every tensor that the caller passes: a wrong pointer would corrupt memory."""
        first = tensors[0]
        device = first.device if isinstance(first, torch.Tensor) and first.device.type == self.kind else None
        for value, (argument, shape, dtype) in zip(tensors, layout.given, strict=True):
            if value is None and argument.role == "updated":
                continue
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{self.spec.name}: {argument.name} must be a tensor, got {value!r}")
            if value.shape != shape or value.dtype != dtype or value.device != device or not value.is_contiguous():
                raise ValueError(
                    f"{self.spec.name}: {argument.name} must be a contiguous {argument.dtype} {self.kind} tensor of "
                    f"shape {shape}, on one device with the others, got {value.dtype} {tuple(value.shape)} on "
                    f"{value.device}"
                )

    def _layout_of(self, leading: tuple[int, ...], slices: int) -> _Layout:
        rows = () if slices == 1 else (slices,)  # a partial of a single slice is the result itself
        given = [argument for argument in self._tensors if is_given(argument)]
        made = [argument for argument in self._tensors if is_result(argument)]
        shapes = [(*(rows if a.role == "partial" else ()), *with_leading(a, leading)) for a in made]
        dtypes = [DTYPES[argument.dtype] for argument in made]
        pooled = [self.kind == "cpu" and MEMORY_POOL.pools(*each) for each in zip(shapes, dtypes, strict=True)]
        return _Layout(
            prod(leading),
            slices,
            tuple((argument, with_leading(argument, leading), DTYPES[argument.dtype]) for argument in given),
            tuple(zip(shapes, dtypes, pooled, strict=True)),
        )


class _Layout(NamedTuple):
    """What all calls with the same leading dimensions and number of slices share.

    Fields:
        given: every tensor that the caller passes, with its shape and dtype.
        results: shape and dtype of every result, and whether its memory is the pool's where it is made here.
    """

    tokens: int
    slices: int
    given: tuple[tuple[Argument, tuple[int, ...], torch.dtype], ...]
    results: tuple[tuple[tuple[int, ...], torch.dtype, bool], ...]


def leading_shape(first: torch.Tensor, dims: int) -> torch.Size:
    """The dimensions in the place of tokens: all but the last `dims` of a kernel's first argument."""
    return first.shape[: first.dim() - dims]


def has_tokens(argument: Argument) -> bool:
    """Whether a tensor has a row for each token."""
    return argument.shape[:1] == (TOKENS,)


def with_leading(argument: Argument, leading: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with these dimensions in the place of tokens."""
    shape = argument.sized(0)
    return (*leading, *shape[1:]) if has_tokens(argument) else shape


def is_given(argument: Argument) -> bool:
    """Whether the caller passes this argument."""
    return argument.role in ("input", "scalar", "updated")


def flags_of(arguments: Sequence[Argument]) -> dict[str, str]:
    """The flags, and the updated argument after each, which they are about."""
    return {argument.name: after.name for argument, after in pairwise(arguments) if argument.role == "flag"}


def is_result(argument: Argument) -> bool:
    """Whether the kernel writes this argument."""
    return argument.role in ("updated", "output", "partial")


CPU = torch.device("cpu")


def empty_result(argument: Argument, tokens: int, slices: int, device: torch.device = CPU) -> torch.Tensor:
    """An uninitialised tensor for a result; a partial has one row per slice: [slices, ...]."""
    shape = argument.sized(tokens)
    if argument.role == "partial":
        shape = (slices, *shape)
    if device.type == "cpu":
        return MEMORY_POOL.empty(shape, DTYPES[argument.dtype])
    return torch.empty(shape, dtype=DTYPES[argument.dtype], device=device)


def summed(partials: torch.Tensor) -> torch.Tensor:
    """The sum over slices, in an order that depends on their number alone, so that it is reproducible bit for bit."""
    total = partials[0]
    for index in range(1, partials.shape[0]):  # len is a function of Python, and slower
        total.add_(partials[index])
    return total


def run_reference(problem: Problem, *inputs: Value) -> tuple[torch.Tensor, ...]:
    """The torch reference with a kernel's calling convention; any device."""
    spec = kernel_spec(problem.op, problem.direction)
    arguments = spec.arguments(problem)
    given = [argument.name for argument in arguments if is_given(argument)]
    results = spec.reference(problem, dict(zip(given, inputs, strict=True)))
    return tuple(results[argument.name] for argument in arguments if is_result(argument))


def _library(path: Path) -> ctypes.CDLL:
    """A kernel's shared library. A CPU kernel needs OpenMP's symbols, which torch brought into the process."""
    try:
        library = _opened(path.absolute())  # a bare name would be looked for in the system's folders
        getattr(library, ENTRY)
    except (OSError, AttributeError) as error:
        raise LoadError(f"{path.name} does not load: {error}") from error
    return library


def _opened(path: Path) -> ctypes.CDLL:
    """The library of a file; through memory where its folder is on a file system that forbids running code (noexec)."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        if "failed to map segment" not in str(error):
            raise
    # It stays open: the dynamic linker knows libraries by name, and another one must not get the same.
    memory = os.memfd_create(path.name, os.MFD_CLOEXEC)
    with path.open("rb") as file:
        shutil.copyfileobj(file, os.fdopen(memory, "wb", closefd=False))
    return ctypes.CDLL(f"/proc/self/fd/{memory}")


def _entry(library: ctypes.CDLL, kind: str) -> Any:  # ctypes has no public name for a foreign function's type
    launch = getattr(library, ENTRY)
    slices, stream, space, device = ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32
    more = (slices,) if kind == "cpu" else (stream, space, device)
    pointers, floats = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_float)
    launch.argtypes = (pointers, floats, ctypes.c_int64, *more)
    launch.restype = ctypes.c_int32
    return launch


def _workspace(library: ctypes.CDLL) -> Any:
    size = getattr(library, WORKSPACE)
    size.argtypes, size.restype = (ctypes.c_int64,), ctypes.c_int64
    return size
