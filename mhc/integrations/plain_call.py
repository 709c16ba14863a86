"""Calls of modules that are the forward of their class and nothing else, so that an op may do the same work."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

from mhc.modules.stack import has_hooks


def is_plain_call(module: nn.Module) -> bool:
    """Whether a call of the module would run the forward of its class alone: no hooks, no other forward."""
    everywhere = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    return "forward" not in vars(module) and not has_hooks(module) and not any(everywhere)
