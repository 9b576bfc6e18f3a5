"""Whether PyTorch differentiates or maps in another way than reverse mode."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func (grad, jvp, vmap, jacrev …) is active."""
    return getattr(forward_ad, "_current_level", -1) >= 0 or _in_functional_transform()


def _in_functional_transform() -> bool:
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0


# As torch.compiler.assume_constant_result does, which takes a second to import: the compiler calls this function while
# it traces. What it traces is compiled for one stack of transforms.
_in_functional_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]
