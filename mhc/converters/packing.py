"""Helpers of the converters: finding a module's tensors, checking shapes, transposing the res block."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from mhc.checks import check_problem
from tiles.errors import BadInput

State = Mapping[str, torch.Tensor]
Modules = dict[str, dict[str, torch.Tensor]]
"""The tensors of each module by their names inside it."""


def find_modules(state: State, pattern: re.Pattern[str], layout: str) -> tuple[Modules, dict[str, torch.Tensor]]:
    """The modules whose keys match `pattern` (groups `module` and `part`), and all other tensors.

    Raises `BadInput` where nothing matches; `layout` names what was expected.
    """
    modules: Modules = {}
    others = {}
    for key, tensor in state.items():
        if match := pattern.fullmatch(key):
            modules.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            others[key] = tensor
    if not modules:
        seen = f"{len(state)} tensors, the first {next(iter(state))}" if state else "no tensors"
        raise BadInput(f"state must hold {layout}, got {seen}: take the converter of its own layout")
    return modules, others


def check_parts(module: str, parts: State, rows: Mapping[str, int], streams: int) -> None:
    """Raise `BadInput` unless a module has all parts of `rows`: a matrix [rows, streams · width] first, with a width
    that kernels support, then vectors [rows].
    """
    matrix, *vectors = rows
    for part in rows:
        if part not in parts:
            raise BadInput(f"{module} needs {', '.join(rows)}, got {', '.join(parts)}: pass {part} with them")
    width = parts[matrix].numel() // (rows[matrix] * streams)
    expected = {matrix: (rows[matrix], streams * width), **{part: (rows[part],) for part in vectors}}
    for part, shape in expected.items():
        if parts[part].shape != shape:
            wanted = f"({rows[matrix]}, {streams} · width)" if part == matrix else f"({rows[part]},)"
            raise BadInput(
                f"{part} of {module} must be {wanted} at {streams} streams, got {tuple(parts[part].shape)}: "
                "pass the checkpoint's own stream count"
            )
    check_problem(streams, width)


def outputs(streams: int) -> int:
    """N = n² + 2n, the rows of phi; raises `BadInput` for an unsupported stream count."""
    check_problem(streams)
    return streams * streams + 2 * streams


def transpose_res(packed: torch.Tensor, streams: int) -> torch.Tensor:
    """phi [N, K] or bias [N] with the res block transposed: its entry (i, j) goes to (j, i). Its own inverse."""
    gates, res = packed.split((2 * streams, streams * streams))
    return torch.cat((gates, res.unflatten(0, (streams, streams)).transpose(0, 1).flatten(0, 1)))
