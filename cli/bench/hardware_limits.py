"""What an op is held against besides other implementations of it: a copy of as many bytes, torch's bare matmul.

They are timed in the same interleaved rounds as the op, so that what slows the machine for a while slows both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cli.bench.cases import Case
from cli.bench.implementation import Contender

NAMES = ("copy", "matmul")
COPIES = ("aggregate", "merge")


def contender(name: str, case: Case, directions: Sequence[str]) -> Iterator[Contender]:
    """The yardstick of a case's forward, where it has one.

    `copy`, of aggregate and merge: `Tensor.copy_` that reads half of the op's bytes and writes the other half.
    `matmul`, of project in float32: x̄·phiᵀ alone, without the norm that project computes too.
    """
    if "forward" not in directions:
        return
    if name == "copy" and case.op in COPIES:
        half = case.traffic["forward"].bytes // 8
        source, target = (torch.ones(half, device=case.inputs[0].device) for _ in range(2))
        yield Contender(name, lambda *_: (target.copy_(source),), "as many bytes", ("forward",))
    if name == "matmul" and case.op == "project" and case.dtype == "float32":
        yield Contender(name, lambda x, phi: (x.flatten(1) @ phi.T,), "without the norm", ("forward",))
