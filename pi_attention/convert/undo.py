"""A model that is changed in place is changed wholly or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from pi_attention.convert.gates import GATE


@contextmanager
def undone_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """Where the block raises, give the model its settings, its modules and their hooks back."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    configs = {id(part.config): (part.config, dict(vars(part.config))) for part in parts}
    attention = model.config._attn_implementation
    hooks = {module: list(module._forward_pre_hooks) for module in model.modules()}
    own = {module: dict(vars(module)) for module in parts}
    try:
        yield
    except BaseException:
        for module, known in hooks.items():
            _remove_gate(module)
            for hook in [name for name in module._forward_pre_hooks if name not in known]:
                del module._forward_pre_hooks[hook]
                module._forward_pre_hooks_with_kwargs.pop(hook, None)
        for module, attributes in own.items():
            if "_init_weights" not in attributes:
                vars(module).pop("_init_weights", None)
        model.set_attn_implementation(attention)
        for config, values in configs.values():
            vars(config).clear()
            vars(config).update(values)
        raise


def _remove_gate(module: nn.Module) -> None:
    if GATE in module._modules:
        del module._modules[GATE]
