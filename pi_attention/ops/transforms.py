"""Whether PyTorch differentiates or maps in another way than reverse mode."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func (grad, jvp, vmap, jacrev …) is active."""
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    # a compiler that traces has transforms of its own on the stack
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
