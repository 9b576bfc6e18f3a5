"""Uses an installed wheel as its first user would: `python check_wheel.py core | models | train | serve | all`."""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from urllib.request import Request, urlopen

BIN = Path(sys.executable).parent
SMALL = """
--context 64 --hidden-size 32 --layers 1 --heads 2 --steps 2 --eval-blocks 1 --batch-size 1
""".split()  # noqa: SIM905


def command(*arguments: str, code: int = 0) -> str:
    """What `pi-attention` prints; its exit code must be `code`."""
    done = subprocess.run([BIN / "pi-attention", *arguments], capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert (done.returncode != 0) == (code != 0), f"{arguments}: exit code {done.returncode}\n{told}"
    assert "Traceback" not in told, told
    return told


def check_core() -> None:
    """The operator, the layer, a decoding cache, and what the command can say without any extra."""
    import torch

    import pi_attention
    from pi_attention import PiPattern
    from pi_attention.cache import LayerCache
    from pi_attention.nn import PiAttention

    assert "site-packages" in pi_attention.__file__, f"not the installed package: {pi_attention.__file__}"
    assert pi_attention.__version__ == version("pi-attention")
    assert (Path(pi_attention.__file__).parent / "py.typed").is_file()
    layer = PiAttention(64, 4, PiPattern(8, 8, 2))
    x = torch.randn(1, 50, 64)
    layer(x).sum().backward()
    cache = LayerCache(layer.pattern)
    with torch.no_grad():
        parts = [layer(part, cache=cache) for part in x.split([40, 1, 9], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), layer(x))
    assert f"pi-attention {version('pi-attention')}" in command("--version").splitlines()
    assert "auto" in command("env")


def check_models() -> None:
    """A Hugging Face model, saved and loaded, and a converted one."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from pi_attention import PiPattern
    from pi_attention.convert import convert
    from pi_attention.models import PiConfig, PiForCausalLM

    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = torch.randint(1, 100, (1, 30))
    made = PiForCausalLM(PiConfig(**sizes, window=8, period=8, skips=2)).eval()
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64)).eval()
    for model in (made, convert(llama, PiPattern(8, 8, 2, sinks=2))):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
        assert model.generate(ids, max_new_tokens=5, pad_token_id=0).shape == (1, 35)


def check_train() -> None:
    """Every command that the wheel offers, on the corpus that it brings."""
    offered = command("--help")
    assert "experiment" not in offered, "a command that the wheel cannot serve"
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "run")
        command("train", "--out", run, *SMALL)
        command("eval", run)
        command("generate", run, "--max-new-tokens", "4")
        command("inspect", run)
        command("plan", "--context", "1024", "--layers", "2")


def check_serve() -> None:
    """A run over HTTP, until it is told to end."""
    with tempfile.TemporaryDirectory() as folder:
        command("train", "--out", folder + "/run", *SMALL)
        started = [BIN / "pi-attention", "serve", folder + "/run", "--port", "0"]
        with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            asked = Request(
                f"{address}/v1/completions", b'{"prompt": "It", "max_tokens": 4}', {"Content-Type": "application/json"}
            )
            with urlopen(asked, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] == 4
            server.terminate()
        assert server.returncode == 0, server.returncode


if __name__ == "__main__":
    check_core()
    if sys.argv[1] == "core":
        assert "pi-attention[train]" in command("train", code=1)
    else:
        check_models()
    if sys.argv[1] in ("train", "all"):
        check_train()
    if sys.argv[1] in ("serve", "all"):
        check_serve()
