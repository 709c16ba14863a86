"""Runs a CUDA program's text on this CPU: the same program, spelled in the CPU's dialect (`tiles.lang.tensor_cores`).

What it shows is the maths and the indices: tiles, parts, splits, tails, workspace. What it cannot show is how threads
share the work.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from against_reference import check_against_reference

from tiles.compiler.compile import CPU_FLAGS, lowered
from tiles.kernels.reference_inputs import DTYPES
from tiles.kernels.registry import kernel_spec
from tiles.kernels.spec import Problem
from tiles.runtime.loaded_kernel import is_given, is_result
from tiles.target import Target

_NUMBERS = itertools.count()
CPU = Target("cpu", "x86-64-v3")
_SIGNATURE = re.compile(r"int32_t (\w+_kernel)\(([^)]*)\)")


class Simulated:
    """A kernel with a CUDA schedule that runs here."""

    def __init__(self, folder: Path, problem: Problem, schedule: Any) -> None:
        self.spec = kernel_spec(problem.op, problem.direction)
        self.problem = self.spec.canonical(problem)
        program, source = lowered(self.spec, self.problem, schedule, CPU)
        name = f"{next(_NUMBERS)}"
        text, library = folder / f"{name}.cpp", folder / f"{name}.so"
        text.write_text(source)
        flags = [flag for flag in CPU_FLAGS if flag != "-O3"]
        subprocess.run(["g++", "-O1", "-march=x86-64-v3", *flags, "-shared", str(text), "-o", str(library)], check=True)
        kernel, parameters = _SIGNATURE.search(source).groups()
        self.call = getattr(ctypes.CDLL(str(library)), kernel)
        self.parameters = [parameter.split()[-1] for parameter in parameters.split(", ")]
        # What is stored as uint16 here is of the streams' dtype.
        self.workspace = {
            buffer.name: "float32" if str(buffer.dtype) == "float32" else problem.dtype
            for buffer in program.buffer_map.values()
        }
        self.shapes = {buffer.name: [str(size) for size in buffer.shape] for buffer in program.buffer_map.values()}

    def run(self, inputs: dict[str, Any], tokens: int, splits: int = 1) -> dict[str, torch.Tensor]:
        """All results; partials summed over splits. Results and workspace start out as NaN."""
        arguments = {argument.name: argument for argument in self.spec.arguments(self.problem)}
        sizes = {"tokens": tokens, "splits": splits}
        values: dict[str, Any] = dict(inputs)
        for name, shape in self.shapes.items():
            if name not in arguments or not is_given(arguments[name]):
                dtype = DTYPES[arguments[name].dtype if name in arguments else self.workspace[name]]
                values[name] = torch.full([eval(size, sizes) for size in shape], torch.nan, dtype=dtype)
            elif arguments[name].role == "updated":
                values[name] = inputs[name].clone()
        passed = [
            ctypes.c_void_p(values[name].data_ptr())
            if isinstance(values.get(name), torch.Tensor)
            else ctypes.c_float(values[name])
            if name in values
            else ctypes.c_int32(sizes[name])
            for name in self.parameters
        ]
        assert self.call(*passed) == 0
        return {
            name: values[name].sum(0) if argument.role == "partial" else values[name].view(argument.sized(tokens))
            for name, argument in arguments.items()
            if is_result(argument)
        }

    def check(self, tokens: int, seed: int, splits: int = 1) -> None:
        """A run against the float64 reference, within the kernel's own tolerance."""
        check_against_reference(self.spec, self.problem, tokens, seed, lambda inputs: self.run(inputs, tokens, splits))
