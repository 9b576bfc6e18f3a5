"""`pi-attention generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from pi_attention.units import counted


@dataclass
class Generate:
    """Continue a text, printed as it is generated. What it cost goes to stderr."""

    run: Annotated[Path, tyro.conf.Positional] = Path("runs/pi")
    """Folder of a run, or a saved model."""
    prompt: str | None = None
    """Text to continue; by default the first tokens of the run's own sample, or a line break where it has none."""
    max_new_tokens: int = 400
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Sampling temperature. 0 takes the likeliest token."""
    top_k: int = 50
    """Sample among this many of the likeliest tokens. 0 samples among all."""
    seed: int = 0
    """Seed of the sampling."""
    prompt_cache: Path | None = None
    """File that keeps what the model remembers of the prompt. A later prompt that begins with it goes on from there."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        from pi_attention.accounting import cache_tokens
        from pi_attention.cli.runs import load_run, opening
        from pi_attention.cli.terminal import as_typed, make_console
        from pi_attention.tasks.generation import generate_text

        model, tokenizer = load_run(self.run)
        result = generate_text(
            model,
            tokenizer,
            opening(self.run, tokenizer) if self.prompt is None else as_typed("prompt", self.prompt),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
            stream=True,
            prompt_cache=self.prompt_cache,
        )
        most = max(cache_tokens(pattern, 10**9) for pattern in model.config.patterns())
        bound = (
            f"never more than {most:,} tokens a layer are kept"
            if most < 10**9
            else "a layer that sees everything keeps every token"
        )
        make_console(stderr=True).print(
            f"\n{counted(result.new_tokens, 'token')}, {result.new_tokens / result.seconds:.1f} tokens/s, "
            f"cache {result.cache_bytes / 2**20:.2f} MiB ({bound})"
        )
        return 0
