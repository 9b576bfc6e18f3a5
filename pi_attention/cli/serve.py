"""`pi-attention serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from pi_attention.describe import by_layers, in_words
from pi_attention.paths import need_file

if TYPE_CHECKING:
    from pi_attention.serving.requests import Limits


@dataclass
class Serve:
    """Serve a model over HTTP, as OpenAI's clients ask."""

    run: Annotated[Path, tyro.conf.Positional] = Path("runs/pi")
    """Folder of a run, or a saved model."""
    host: str = "127.0.0.1"
    """Address to listen on; by default only this machine reaches it."""
    port: int = 8000
    """Port to listen on; 0 takes any that is free."""
    model_name: str = ""
    """Name of the model in requests; the folder's when empty."""
    requests: int = 32
    """Requests that run at once; the cache has room for all of them."""
    waiting: int = 256
    """Further requests that may wait; more are refused."""
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt; the model's context when None."""
    max_new_tokens: int = 1024
    """Most tokens that a request may ask for."""
    batch_tokens: int = 512
    """Tokens of a forward, by which long prompts are cut."""
    chat_template: Path | None = None
    """File with a Jinja template for chats; the tokenizer's own when None."""

    def execute(self, console: Console) -> int:
        """Run the command; the exit code."""
        from pi_attention.cli.runs import model_folder
        from pi_attention.serving.needs import need_server

        model_folder(self.run)
        if self.chat_template is not None:
            need_file("chat_template", self.chat_template, "a Jinja template")
        need_server()
        from pi_attention.serving.server import LOCAL, ending_at_sigterm, is_local, listen, serve

        local = is_local(self.host)
        with listen(self.host, self.port) as listening, ending_at_sigterm():
            from transformers.utils import logging

            from pi_attention.serving.app import build_app

            engine = self._engine()
            try:
                where = f"[{self.host}]" if ":" in self.host else self.host
                console.print(f"http://{where}:{listening.getsockname()[1]} {self._told(engine)}", soft_wrap=True)
                if not local:
                    console.print("Other machines reach this address, and no key is asked for.", soft_wrap=True)
                logging.set_verbosity_error()  # transformers warns of each request
                serve(build_app(engine, [*LOCAL, where] if local else ["*"]), listening, engine.stop_answers)
            finally:
                engine.close()
        return 0

    def _engine(self) -> Any:
        """The model, loaded and running."""
        from pi_attention.cli.runs import load_run
        from pi_attention.serving.engine import Engine
        from pi_attention.serving.handlers import read_template

        template = None if self.chat_template is None else read_template(self.chat_template)
        model, tokenizer = load_run(self.run)
        if template is not None:
            tokenizer.chat_template = template
        name = self.model_name or self.run.resolve().name
        return Engine(model, tokenizer, name, self.limits(model.config), self.requests, self.batch_tokens)

    def limits(self, config: Any) -> Limits:
        """Of a request to a model."""
        from pi_attention.cli.runs import known_context
        from pi_attention.convert.extension import far_layers
        from pi_attention.serving.requests import Limits

        context = known_context(config)
        prompt = self.max_prompt_tokens or context
        ends = prompt <= context and bool(far_layers(config.patterns(), context))
        return Limits(prompt, self.max_new_tokens, context, self.requests + self.waiting, ends)

    def _told(self, engine: Any) -> str:
        """The line of a server that is ready."""
        from pi_attention.serving.memory import request_bytes

        model, limits = engine.model, engine.limits
        layers = by_layers(model.config.patterns()).items()
        patterns = "; ".join(f"{where}: {in_words(pattern)}" for pattern, where in layers)
        most = request_bytes(model, limits.request_tokens)
        together = f", together {limits.request_tokens:,}" if limits.ends_at_context else ""
        return (
            f"serves {engine.name!r}: {type(model).__name__} of {model.num_parameters():,} parameters, {model.device}; "
            f"{patterns}; cache {most:,} bytes a request at most, {self.requests} requests at once; "
            f"prompts up to {limits.prompt_tokens:,} tokens, {limits.new_tokens:,} new ones{together}"
        )
