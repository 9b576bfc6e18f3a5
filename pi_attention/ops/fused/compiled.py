"""Launch compiled kernels with little host time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
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
        absent: how many of the kernel's tensors are compiled out: the last ones, which a launch leaves out.
    """

    def __init__(
        self,
        kernel: Kernel,
        programs: int,
        strides: tuple[int, ...],
        numbers: tuple[int | float, ...],
        constants: Constants,
        absent: int = 0,
    ) -> None:
        self.kernel, self.programs, self.constants = kernel, programs, constants
        narrow = max(map(abs, (*strides, *numbers)), default=0) <= INT32_MAX
        self.key = (constants.key, _traits(strides)) if narrow else None
        self.tail = (*[None] * absent, *strides, *numbers)
        self.arguments = (*self.tail, *constants.values.values())
        self.launch: Any = None

    def __call__(self, tensors: Sequence[Any]) -> None:
        """Launch on the current device and stream, where the tensors lie, or those of the tensor descriptors."""
        if self.launch is not None and not knobs.runtime.launch_enter_hook.calls:
            addresses = _addresses(tensors)
            if addresses is not None:
                launch, function_and_options, current_stream, device = self.launch
                stream = current_stream(device)
                launch(self.programs, 1, 1, stream, *function_and_options, *addresses, *self.arguments)
                return
        self._first(tensors)

    def _first(self, tensors: Sequence[Any]) -> None:
        """By Triton's own launch, unless the kernel was compiled for another length; remember its compiled form."""
        constants = self.constants
        bases = [x if isinstance(x, Tensor) else x.base for x in tensors]
        fit = self.key is not None and not torch.compiler.is_compiling() and _addresses(bases) is not None
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
            self.launch = *_launcher(compiled), _stream_finder(), bases[0].device.index


def _stream_finder() -> Any:
    """Triton's function from a device's index to its current stream."""
    return triton.runtime.driver.active.get_current_stream


def _launcher(compiled: Any) -> tuple[Any, tuple[Any, ...]]:
    """What launches a compiled kernel, and its arguments between the stream and those of the kernel.

    `CudaLauncher` finds scratch memory for a kernel, and then calls its `launch`, written in C. Our kernels want none.
    """
    run, rest = compiled.run, (compiled.packed_metadata, None, None, None)  # no hooks
    nvidia = type(run).__name__ == "CudaLauncher"  # not imported: Triton for AMD need not have it
    if nvidia and not run.global_scratch_size and not run.profile_scratch_size:
        return run.launch, (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest)
    return run, (compiled.function, *rest)


def _addresses(tensors: Sequence[Any]) -> list[Any] | None:
    """Of tensors; None where one is no multiple of 16, for which the kernels were compiled. A descriptor stays one."""
    try:
        addresses = pointers = [*map(Tensor.data_ptr, tensors)]
    except TypeError:  # tensor descriptors: a long call, in which the host hardly counts
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in tensors]
        pointers = [x for x in addresses if isinstance(x, int)]
    return addresses if gcd(*pointers) % 16 == 0 else None
