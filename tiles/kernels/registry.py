"""The registry of kernel families: every sub-package of `tiles.kernels` that holds a `FAMILY`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from tiles import kernels
from tiles.errors import BadInput
from tiles.kernels.spec import Direction, KernelFamily, KernelSpec


@cache
def families() -> tuple[KernelFamily, ...]:
    """All families, in the order of their folders' names; those that are made of others come after them."""
    names = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg)
    found = [importlib.import_module(f"tiles.kernels.{name}").FAMILY for name in names]
    return tuple(sorted(found, key=lambda family: bool(family.parts)))


@cache
def kernel_specs() -> dict[tuple[str, str], KernelSpec]:
    """All kernels by (op, direction)."""
    return {(spec.op, spec.direction): spec for family in families() for spec in family.kernels}


def kernel_spec(op: str, direction: Direction) -> KernelSpec:
    """The kernel of an op and direction; raises `BadInput` for one that no family has."""
    try:
        return kernel_specs()[op, direction]
    except KeyError:
        known = ", ".join(spec.name for spec in kernel_specs().values())
        raise BadInput(f"no kernel {op}.{direction}: choose one of {known}") from None
