"""`pi-attention env`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console


@dataclass
class Env:
    """Versions, device, the implementation taken here and why, for an issue."""

    def execute(self, console: Console) -> int:
        """Print them; 0."""
        from pi_attention.environment import environment_text

        console.print(environment_text(), soft_wrap=True)
        return 0
