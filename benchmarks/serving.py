"""Many clients of `pi-attention serve` for minutes: every text is `generate`'s, and the server's memory stays flat.

    python -m benchmarks.serving [--model FOLDER] [--minutes 30] [--clients 64] [--write]

The server is a process of its own on the loopback. Clients send prompts of many lengths, read streams or whole answers,
and go away in the middle of one answer in ten. Without --model, two small models with random weights are served, whose
texts depend on every key. A wrong text, an error or a request that is not freed ends in exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import write
from pi_attention import PiPattern
from pi_attention.cli.runs import load_run
from pi_attention.convert import convert
from pi_attention.data.corpus import load_documents
from pi_attention.data.tokenizers import byte_tokenizer
from pi_attention.models import PiConfig, PiForCausalLM

CASES, LONGEST, NEW = 64, 300, 48
ABANDONED = 0.1
CONTEXT = 400
SIZES: dict[str, Any] = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": CONTEXT, "pad_token_id": 256, "eos_token_id": None}


def random_model(kind: str) -> Any:
    """A model of few weights, large ones, so that other keys give another text."""
    torch.manual_seed(0)
    heads = {"window": 8, "period": [1, 5, 16, 7], "phase": [0, 2, 3, 1], "skips": 4, "sinks": 3}
    if kind == "pi":
        model: Any = PiForCausalLM(PiConfig(**SIZES, **heads, gate=True))
    else:
        model = convert(LlamaForCausalLM(LlamaConfig(**SIZES)), PiPattern(**heads), gate=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "gate" in name and "gate_proj" not in name:
                weight.normal_(std=0.5)
            elif weight.dim() == 2:
                weight.mul_(4.0)
    return model


def cases_of(folder: Path) -> list[dict[str, Any]]:
    """Prompts of many lengths, and what `generate` continues each with."""
    model, tokenizer = load_run(folder)
    draw, text = random.Random(0), load_documents("shakespeare")[0]
    cases = []
    for _ in range(CASES):
        start, length, new = draw.randrange(len(text) - LONGEST), draw.randint(1, LONGEST), draw.randint(1, NEW)
        prompt = text[start : start + length]
        ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=model.device)
        out = model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        wanted = tokenizer.decode(out, skip_special_tokens=True)
        cases.append({"prompt": prompt, "max_tokens": new, "text": wanted, "tokens": len(out)})
    return cases


class Server:
    """`pi-attention serve` as a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "pi_attention.cli", "serve", str(folder), "--port", "0", *arguments]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # of small products, more wait for one another
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=one_thread)
        assert self.process.stdout is not None
        self.told = self.process.stdout.readline()
        found = re.match(r"http://[^ ]*:(\d+) ", self.told)
        if found is None:
            raise RuntimeError(f"the server did not start: exit code {self.process.wait()}")
        self.port = int(found[1])

    def rss(self) -> float:
        """MiB of the process in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def health(self) -> dict[str, Any]:
        """What the server says of itself."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())

    def stop(self) -> int:
        """The exit code after SIGTERM."""
        self.process.terminate()
        return self.process.wait(timeout=120)


def ask(port: int, case: dict[str, Any], stream: bool, leave: bool) -> str | None:
    """The text that the server answers, or None where the client left before it was whole."""
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"prompt": case["prompt"], "max_tokens": case["max_tokens"], "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    if leave and not stream:
        time.sleep(0.2)
        connection.close()
        return None
    response = connection.getresponse()
    if response.status != 200:
        raise HTTPException(f"{response.status}: {response.read()!r}")
    if not stream:
        return json.loads(response.read())["choices"][0]["text"]
    text = ""
    while (line := response.readline().strip()) != b"data: [DONE]":
        if leave and text:
            response.close()
            connection.close()
            return None
        if line:
            text += json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]
    return text


def load(folder: Path, seconds: float, clients: int, requests: int) -> dict[str, Any]:
    """Serve the folder under load; counts, tokens a second and memory."""
    cases = cases_of(folder)
    server = Server(folder, "--requests", str(requests), "--max-new-tokens", str(NEW))
    counts: Counter[str] = Counter()
    lock, begun, sizes = threading.Lock(), time.monotonic(), [server.rss()]

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() - begun < seconds:
            case, stream, leave = draw.choice(cases), draw.random() < 0.5, draw.random() < ABANDONED
            try:
                text = ask(server.port, case, stream, leave)
                outcome = "abandoned" if text is None else "right" if text == case["text"] else "wrong"
            except (OSError, HTTPException, ValueError, KeyError) as error:
                print(f"client {number}: {error!r}", file=sys.stderr)
                outcome = "failed"
                time.sleep(1)
            with lock:
                counts[outcome] += 1
                counts["new tokens"] += case["tokens"] if outcome == "right" else 0

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        sizes.append(server.rss())
    spent = time.monotonic() - begun
    time.sleep(2)
    left = server.health()
    quarter = max(1, len(sizes) // 4)
    most = [max(sizes[part * quarter : (part + 1) * quarter]) for part in range(4)]
    return {
        "clients": clients,
        "at once": requests,
        "minutes": round(spent / 60, 1),
        **{name: counts[name] for name in ("right", "wrong", "failed", "abandoned")},
        "new tokens/s": round(counts["new tokens"] / spent),
        "MiB in each quarter": [round(size, 1) for size in most],
        "left running": left.get("open", 0) + left.get("running", 0),
        "exit code": server.stop(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder; two small models with random weights by default")
    parser.add_argument("--minutes", type=float, default=30, help="for each model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=32, help="that run at once")
    parser.add_argument("--write", action="store_true", help="write results/serving-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        folders = {options.model.name: options.model} if options.model else {}
        for kind in () if options.model else ("pi", "converted"):
            folders[kind] = Path(made) / kind
            random_model(kind).save_pretrained(folders[kind])
            byte_tokenizer().save_pretrained(folders[kind])
        for name, folder in folders.items():
            rows.append({"model": name} | load(folder, 60 * options.minutes, options.clients, options.requests))
            print(json.dumps(rows[-1]), flush=True)
    if options.write:
        print(write("serving-cpu", {"rows": rows}))
    if any(row["wrong"] or row["failed"] or row["left running"] or row["exit code"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
