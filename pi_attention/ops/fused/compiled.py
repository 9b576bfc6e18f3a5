"""Launch compiled kernels with little host time. A tensor that is None is compiled out of its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

Launch = Callable[[Sequence[Any]], None]
"""Launches a kernel on the tensors of a call."""

INT32_MAX = 2**31 - 1
DIRECT = triton.__version__.startswith("3.6.")
"""Whether compiled kernels take the arguments that `Step` passes: an internal interface, tried on this version."""


class Constants:
    """The compile-time arguments of a kernel and its launch options."""

    def __init__(self, options: dict[str, int], **values: Any) -> None:
        self.options = options
        self.values = values
        self.key = (*options.items(), *values.items())


def _traits(strides: tuple[int, ...]) -> tuple[int, ...]:
    """What Triton compiles in of integers: whether each is 1, or a multiple of 16."""
    return tuple(1 if s == 1 else 16 if s % 16 == 0 else 0 for s in strides)


class Kernel:
    """A Triton kernel, and its compiled forms by a short key: a new length must not look for them among arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Any, Any] = {}


class Step:
    """One launch of a call's plan: everything but the tensors' addresses is known beforehand.

    Triton's own launch inspects every argument, about 100 µs for sixty of them, so it serves the first launch alone.
    Afterwards the compiled kernel is launched; with `DIRECT`, addresses go straight to its launcher. Rare cases
    (unaligned tensors, 64-bit integers) take Triton's own launch every time, and so do profilers' hooks.

    Args:
        kernel: what is launched.
        programs: how many programs.
        strides: integers of which Triton compiles in the traits.
        numbers: integers and floats of which it compiles in nothing but their width.
        constants: compile-time arguments, last in the kernel's order.
    """

    def __init__(
        self,
        kernel: Kernel,
        programs: int,
        strides: tuple[int, ...],
        numbers: tuple[int | float, ...],
        constants: Constants,
    ) -> None:
        self.kernel, self.programs, self.constants = kernel, programs, constants
        self.tail = (*strides, *numbers)
        narrow = max(map(abs, self.tail), default=0) <= INT32_MAX
        self.key = (constants.key, _traits(strides)) if narrow else None
        self.arguments = (*self.tail, *constants.values.values())
        self.launch: Any = None

    def __call__(self, tensors: Sequence[Any]) -> None:
        """Launch on the current device and stream, where the tensors lie, or those of the tensor descriptors."""
        if self.launch is not None and not knobs.runtime.launch_enter_hook.calls:
            addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in tensors]
            if not _unaligned(addresses):
                run, function, metadata, current_stream, device = self.launch
                stream = current_stream(device)
                run(self.programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *self.arguments)
                return
        self._first(tensors)

    def _first(self, tensors: Sequence[Any]) -> None:
        """By Triton's own launch, unless the kernel was compiled for another length; remember its compiled form."""
        constants = self.constants
        bases = [x if isinstance(x, Tensor) else x.base for x in tensors if x is not None]
        fit = (
            self.key is not None and not torch.compiler.is_compiling() and not _unaligned([x.data_ptr() for x in bases])
        )
        key = (self.key, bases[0].device, *[x.dtype for x in bases])
        compiled = self.kernel.compiled.get(key) if fit else None
        if compiled is not None:
            compiled[self.programs, 1, 1](*tensors, *self.arguments)
        else:
            grid = (self.programs, 1, 1)
            compiled = self.kernel.kernel[grid](*tensors, *self.tail, **constants.values, **constants.options)
        if not fit or compiled is None:  # the interpreter returns nothing
            return
        self.kernel.compiled[key] = compiled
        if DIRECT:
            current_stream, device = _stream_finder(), bases[0].device.index
            self.launch = compiled.run, compiled.function, compiled.packed_metadata, current_stream, device


def _stream_finder() -> Any:
    """Triton's function from a device's index to its current stream."""
    return triton.runtime.driver.active.get_current_stream


def _unaligned(addresses: Sequence[Any]) -> bool:
    """Whether an address is no multiple of 16, for which the kernels were compiled."""
    together = 0
    for address in addresses:
        if isinstance(address, int):
            together |= address
    return together & 15 != 0
