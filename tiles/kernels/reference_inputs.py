"""Inputs of the references: how they are drawn, and the precision that references compute in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tiles.kernels.spec import Argument

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def wide(streams: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Stream values in the coefficients' precision: float32, or float64 where the coefficients are float64."""
    return streams.to(coefficients.dtype)


def fresh(seed: int) -> torch.Generator:
    """A generator for one draw of inputs."""
    return torch.Generator("cpu").manual_seed(seed)


def draw(random: torch.Generator, dtype: str, *shape: int) -> torch.Tensor:
    """Standard normal values on the CPU."""
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu").to(DTYPES[dtype])


def uniform(random: torch.Generator, *shape: int) -> torch.Tensor:
    """Float32 values, uniform in [0, 1), on the CPU."""
    return torch.rand(shape, generator=random, dtype=torch.float32, device="cpu")


def in_float64(values: dict[str, object]) -> dict[str, object]:
    """The same values with every tensor in float64, for a float64 reference."""
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def in_order(values: dict[str, Any], arguments: Sequence[Argument]) -> dict[str, Any]:
    """The values that are arguments, in call order."""
    return {argument.name: values[argument.name] for argument in arguments if argument.name in values}
