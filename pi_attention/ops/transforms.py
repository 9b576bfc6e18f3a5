"""Whether PyTorch differentiates or maps in another way than reverse mode."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func (grad, jvp, vmap, jacrev …) is active.

    Inside of `torch.compile` too: the compiler takes the depth of the transforms for a constant of what it traces.
    """
    return getattr(forward_ad, "_current_level", -1) >= 0 or torch._C._functorch.get_dynamic_layer_stack_depth() > 0
