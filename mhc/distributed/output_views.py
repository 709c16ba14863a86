"""Module outputs that are no views, as PyTorch's FSDP2 and pipelines need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mhc.modules.unview import unview


def unview_outputs(module: nn.Module) -> None:
    """Have `module` return tensors that are no views in autograd's sense (`mhc.modules.unview`)."""
    module.register_forward_hook(_unview)


def _unview(module: nn.Module, inputs: Any, result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_unview(module, inputs, value) for value in result)
    return unview(result) if isinstance(result, torch.Tensor) else result
