"""Read a whole book through a converted model, chunk by chunk, with a cache that stops growing.

    python examples/stream_book.py --model runs/converted --book book.txt

The folder is one that `pi-attention convert` wrote. Sinks move along with the text, so that a book may be longer than
the context that the model was pretrained for. Without --model a small Llama with random weights is converted.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pi_attention import PiPattern
from pi_attention.accelerator import best_device
from pi_attention.convert import convert
from pi_attention.data.corpus import load_documents
from pi_attention.data.tokenizers import byte_tokenizer


def load(name: str):
    """A converted model and its tokenizer."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=512, **sizes))
    return convert(dense, PiPattern(window=64, period=32, skips=8, sinks=4)), byte_tokenizer()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--book", default="shakespeare", help="a text file, or the bundled corpus")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a call")
    parser.add_argument("--tokens", type=int, default=4096, help="most tokens to read")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load(options.model)
    model = model.to(best_device()).eval()
    text = load_documents(options.book)[0][: 20 * options.tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens].to(model.device)

    cache, seen, total = model.new_cache(), 0, 0.0
    last = None  # the logits after the chunk before, which predict the first token of the next
    for chunk in ids.split(options.chunk, dim=1):
        logits = model(chunk, past_key_values=cache, use_cache=True).logits
        before = logits[:, :-1] if last is None else torch.cat([last, logits[:, :-1]], dim=1)
        targets = chunk[:, 1:] if last is None else chunk
        total += F.cross_entropy(before.flatten(0, 1), targets.flatten(), reduction="sum").item()
        seen, last = seen + targets.shape[1], logits[:, -1:]
        kept = max(layer.keys.shape[2] for layer in cache.layers)
        print(
            f"{seen + 1:>8,} tokens read  perplexity {math.exp(total / seen):8.2f}  cache {kept:,} tokens", flush=True
        )


if __name__ == "__main__":
    main()
