"""Hardware limits that an op is compared with: a copy of as many bytes, and torch's matmul alone.

They are timed in the same interleaved rounds as the op, so that a slow phase of the machine affects both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cli.bench.cases import BenchCase
from cli.bench.implementation import Implementation

NAMES = ("copy", "matmul")
COPY_OPS = ("aggregate", "merge")


def implementations(name: str, case: BenchCase, directions: Sequence[str]) -> Iterator[Implementation]:
    """The limit of a case's forward, if it has one.

    `copy`, for aggregate and merge: `Tensor.copy_` that reads half of the op's bytes and writes the other half.
    `matmul`, for project in float32: x̄·phiᵀ alone, without the norm that project also computes.
    """
    if "forward" not in directions:
        return
    if name == "copy" and case.op in COPY_OPS:
        half = case.traffic["forward"].bytes // 8
        source, target = (torch.ones(half, device=case.inputs[0].device) for _ in range(2))
        yield Implementation(name, lambda *_: (target.copy_(source),), "as many bytes", ("forward",))
    if name == "matmul" and case.op == "project" and case.dtype == "float32":
        yield Implementation(name, lambda x, phi: (x.flatten(1) @ phi.T,), "without the norm", ("forward",))
