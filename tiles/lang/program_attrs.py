"""What a program tells the compiler and the CUDA launcher about itself, as attributes of its function."""

from __future__ import annotations

from typing import Any

CHECKED = "mhc.checked"
"""Every access is to be checked against the tensors' bounds: for programs that copy whole tiles."""

PLANNED = {
    "mhc.most_splits": "most_splits",
    "mhc.split_tokens": "split_tokens",
    "mhc.chunk_tokens": "chunk_tokens",
    "mhc.overlap": "overlap",
}
"""Attributes that become fields of `tiles.compiler.cuda_launcher.Plan`."""


def checked(program: Any, **planned: int) -> Any:
    """The program with checked accesses, and with these fields of its `Plan`."""
    facts = {CHECKED: 1} | {f"mhc.{name}": value for name, value in planned.items()}
    assert set(facts) <= {CHECKED, *PLANNED}
    for name, value in facts.items():
        program = program.with_attr(name, value)
    return program
