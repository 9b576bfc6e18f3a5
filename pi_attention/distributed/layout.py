"""How many ranks share what, and the mesh that they form."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Layout:
    """How many ranks share what.

    Args:
        dp: groups of ranks that work on different sequences.
        tp: ranks that share the heads and the features of each layer.
        cp: ranks that share a sequence.

    Example::

        layout = Layout.parse("dp=2,tp=1,cp=2")
    """

    dp: int = 1
    tp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "cp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def __str__(self) -> str:
        return f"dp={self.dp},tp={self.tp},cp={self.cp}"

    @staticmethod
    def parse(text: str) -> Layout:
        """A layout from text such as "dp=2,cp=4"; what is left out is 1.

        Raises:
            ValueError: the text is something else; the message says what.
        """
        known, sizes = [field.name for field in fields(Layout)], {}
        for part in filter(None, text.split(",")):
            name, _, size = part.strip().partition("=")
            if name not in known or not size.isdecimal():
                raise ValueError(f'parallel={text!r}: {part!r} is not one of dp=N, tp=N, cp=N, as in "dp=2,cp=4".')
            if name in sizes:
                raise ValueError(f"parallel={text!r} names {name} twice: give each once.")
            sizes[name] = int(size)
        return Layout(**sizes)

    @property
    def ranks(self) -> int:
        """dp · tp · cp."""
        return self.dp * self.tp * self.cp

    def mesh(self, kind: str) -> DeviceMesh:
        """The ranks as a mesh [dp, cp, tp]; tensor-parallel ranks are neighbours, since they talk the most.

        Raises:
            ValueError: the process group has another number of ranks.
        """
        if dist.get_world_size() != self.ranks:
            raise ValueError(
                f"parallel={self} needs {self.ranks} ranks, but {dist.get_world_size()} were started: "
                f"torchrun --nproc-per-node {self.ranks}, or another layout."
            )
        return init_device_mesh(kind, (self.dp, self.cp, self.tp), mesh_dim_names=("dp", "cp", "tp"))
