"""What a kernel computes, held against its float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tiles.kernels.spec import KernelSpec, Problem

Inputs = dict[str, Any]


def check_against_reference(
    spec: KernelSpec, problem: Problem, tokens: int, seed: int, run: Callable[[Inputs], dict[str, torch.Tensor]]
) -> None:
    """All results of `run`, within the kernel's own tolerance."""
    inputs = spec.inputs(problem, tokens, seed)
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    wanted = spec.reference(problem, wide)
    for name, got in run(inputs).items():
        rtol, atol = spec.tolerance(problem, name)
        torch.testing.assert_close(
            got.double(), wanted[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
