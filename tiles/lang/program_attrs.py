"""Attributes of a program's function: what the compiler and the CUDA launcher are told about it."""

from __future__ import annotations

from typing import Any

CHECKED = "mhc.checked"
"""Every access is to be checked against the tensors' bounds: for programs that copy whole tiles."""

PLANNED = {
    "mhc.most_splits": "most_splits",
    "mhc.split_tokens": "split_tokens",
    "mhc.chunk_tokens": "chunk_tokens",
    "mhc.use_pdl": "use_pdl",
}
"""Attributes that become fields of `tiles.compiler.cuda_launcher.Plan`."""


def with_attributes(program: Any, **values: int) -> Any:
    """The program with these attributes: `checked`, or fields of its `Plan`."""
    named = {f"mhc.{name}": value for name, value in values.items()}
    assert set(named) <= {CHECKED, *PLANNED}
    for name, value in named.items():
        program = program.with_attr(name, value)
    return program
