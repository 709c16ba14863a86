"""Calls of modules that are the forward of their class and nothing else, so that an op may do the same work."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_plain_call(module: nn.Module) -> bool:
    """Whether a call of the module would run the forward of its class alone: no hooks, no other forward."""
    if "forward" in vars(module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return not any(hooks) and not any(everywhere)
