"""A converted model against its dense original under transformers' continuous batching: tokens/s, first token, cache.

    python -m benchmarks.throughput --out benchmarks/results/throughput-nvidia-h200.json --minutes 60
    python -m benchmarks.throughput --out toy.json --toy            # on a CPU, in seconds

Models have random weights of real shapes. Both run under the same manager and settings, in turn. A row is written when
its cell is measured; the same command goes on where an earlier one stopped. The converted model's texts must be those
of `generate`, in float32; else nothing is timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import in_lines, machine
from pi_attention import PiPattern
from pi_attention.convert import convert
from pi_attention.files import replacing
from pi_attention.models.continuous import KNOWN, need_known_version

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "toy": {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
"""As SmolLM2-135M and Llama 3.2 1B have them."""
WARM_UP = 16
"""Tokens of each text in the turn that is not timed."""
COMPARED = 8
"""Requests of a cell in the turn that is not timed, and those whose texts are compared with those of `generate`."""


def pattern_of(shape: str) -> PiPattern:
    """Of the converted model."""
    return PiPattern(8, 5, 4, sinks=2) if shape == "toy" else PiPattern(256, 256, 16, sinks=4)


def original(shape: str, longest: int, dtype: torch.dtype, device: str) -> Any:
    """A dense Llama with random weights, large enough that other keys give another text."""
    sizes = SHAPES[shape]
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=longest,
        initializer_range=sizes["hidden_size"] ** -0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def converted(shape: str, longest: int, dtype: torch.dtype, device: str) -> Any:
    """The same with π-Attention, and gates that weigh each token in their own way."""
    model = convert(original(shape, longest, dtype, device), pattern_of(shape), gate=True).to(device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name and "gate_proj" not in name:
                weight.normal_(std=0.5)
    return model.eval()


def prompts_of(shape: str, requests: int, tokens: int) -> list[list[int]]:
    """Random prompts, the same in each run."""
    generator = torch.Generator().manual_seed(requests * tokens)
    return torch.randint(3, SHAPES[shape]["vocab_size"], (requests, tokens), generator=generator).tolist()


def checked(options: argparse.Namespace, shape: str, requests: int, tokens: int, deadline: float) -> dict[str, int]:
    """Some requests of a cell in float32 against `generate`; counts, or `Failed`."""
    from benchmarks.managed import compare, serve

    exact = converted(shape, options.longest, torch.float32, options.device)
    prompts = prompts_of(shape, requests, tokens)[:COMPARED]
    return compare(exact, prompts, serve(exact, prompts, options.new, options.batch_tokens, deadline).texts)


def cell(options: argparse.Namespace, shape: str, requests: int, tokens: int, deadline: float) -> dict[str, Any]:
    """One row: the texts are checked, then both models are timed in turn.

    Raises:
        OutOfTime: before both were timed.
        Failed: a text is wrong.
    """
    from benchmarks.managed import Failed, OutOfTime, Run, figures, serve

    row: dict[str, Any] = {"model": shape, "prompt": tokens, "requests": requests}
    row["float32 texts"] = checked(options, shape, requests, tokens, deadline)
    dtype = torch.float32 if options.toy else torch.bfloat16
    models = {make.__name__: make(shape, options.longest, dtype, options.device) for make in (original, converted)}
    prompts, runs = prompts_of(shape, requests, tokens), dict[str, list[Run]]()
    for turn in range(options.repeats + 1):
        for name, model in models.items():
            if name in row:
                continue  # it failed
            # the first turn finds what fails, and compiles the kernels of forwards that read and decode at once
            new, asked = (options.new, prompts) if turn else (min(options.new, WARM_UP), prompts[:COMPARED])
            limit = min(deadline, time.monotonic() + 60 * options.run_minutes)
            try:
                runs.setdefault(name, []).append(serve(model, asked, new, options.batch_tokens, limit))
            except Failed as error:
                row[name] = {"failed": str(error).splitlines()[0][:200]}
            except OutOfTime:
                if limit == deadline:
                    raise
                row[name] = {"failed": f"more than {options.run_minutes:g} minutes"}
    return row | {name: figures(runs[name][1:]) for name in models if name not in row}


def head(options: argparse.Namespace) -> dict[str, Any]:
    """What rows of one file have in common."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    return {
        "device": device,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "pattern": str(pattern_of(options.models[0])),
        "dtype": "float32" if options.toy else "bfloat16",
        "new tokens": options.new,
        "batch tokens": options.batch_tokens,
    }


def earlier(path: Path, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run.

    Raises:
        SystemExit: they were measured otherwise.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    for name, value in common.items():
        if found.get(name) != value:
            raise SystemExit(f"--out {path}: its {name} is {found.get(name)!r}, here {value!r}: name another file.")
    return found["rows"]


def measure(options: argparse.Namespace) -> None:
    """Measure what the file lacks, the small cells first, until the budget is spent."""
    from benchmarks.managed import Failed, OutOfTime

    common = head(options)
    rows = earlier(options.out, common)
    deadline = time.monotonic() + 60 * options.minutes
    done = {(row["model"], row["prompt"], row["requests"]) for row in rows}
    cells = sorted(product(options.models, options.prompts, options.requests), key=lambda x: x[1] * x[2])
    for shape, tokens, requests in cells:
        if (shape, tokens, requests) in done:
            continue
        try:
            rows.append(cell(options, shape, requests, tokens, deadline))
        except OutOfTime:
            print(f"--minutes {options.minutes:g} are spent; {shape}, {requests} × {tokens} is not measured.")
            return
        except Failed as error:
            raise SystemExit(f"{shape}, {requests} × {tokens}: {error}; no row is written.") from error
        print(json.dumps(rows[-1]), flush=True)
        with replacing(options.out) as partial:
            partial.write_text(in_lines({"machine": machine()} | common | {"rows": rows}))


def need_gpu(toy: bool) -> None:
    """Say in one line what is missing.

    Raises:
        SystemExit: something is.
    """
    try:
        need_known_version()
        known = True
    except NotImplementedError:
        known = False
    if known and (toy or (torch.cuda.is_available() and importlib.util.find_spec("triton"))):
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    raise SystemExit(
        f"benchmarks.throughput needs transformers {', '.join(KNOWN)} (pip install 'transformers=={KNOWN[-1]}.*'), and "
        f"without --toy a CUDA GPU with triton; here: transformers {transformers.__version__}, {device}."
    )


def positive(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="result file; rows that it has are not measured again")
    parser.add_argument("--minutes", type=float, default=math.inf, help="budget; no limit by default")
    parser.add_argument(
        "--run-minutes", type=float, default=5, help="a model that takes longer for one run is given up"
    )
    parser.add_argument("--toy", action="store_true", help="a tiny model and short prompts, on the CPU")
    parser.add_argument("--models", nargs="+", choices=["smollm2-135m", "llama-1b"], help="both by default")
    parser.add_argument("--requests", type=positive, nargs="+", default=None, help="1 8 64 by default")
    parser.add_argument("--prompts", type=positive, nargs="+", default=None, help="2048 8192 32768 tokens by default")
    parser.add_argument("--new", type=positive, default=None, help="tokens of each text; 128 by default")
    parser.add_argument("--batch-tokens", type=positive, default=1024, help="of a forward")
    parser.add_argument("--repeats", type=positive, default=3, help="timed runs, of which medians are taken")
    options = parser.parse_args(arguments)
    need_gpu(options.toy)
    options.device = "cpu" if options.toy else "cuda"
    options.models = ["toy"] if options.toy else options.models or ["smollm2-135m", "llama-1b"]
    options.requests = options.requests or ([1, 3] if options.toy else [1, 8, 64])
    options.prompts = options.prompts or ([20, 60] if options.toy else [2048, 8192, 32768])
    options.new = options.new or (8 if options.toy else 128)
    reach = pattern_of(options.models[0]).reach
    assert reach is not None
    options.longest = max(max(options.prompts) + options.new, reach + 1)
    measure(options)


if __name__ == "__main__":
    main()
