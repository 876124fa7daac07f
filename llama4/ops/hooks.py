"""What is called beside a module's own forward, or in place of it. Who computes what a module does without calling it
must know."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as global_hooks


def has_hook(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says, by a hook or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def has_global_hook() -> bool:
    """Whether a call of any module does."""
    return bool(
        global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or global_hooks._global_backward_hooks
        or global_hooks._global_backward_pre_hooks
    )
