"""Which layers of a pretrained model should stay dense, when the others become windows with sinks.

    python -m benchmarks.layers MODEL_DIR --text FILE --chosen-on FILE [--length 2048] [--counts 3 5 10]

Two rules choose on one text: layers that, dense alone, give most of the loss back, and layers that, converted alone,
cost most. Then the perplexity on chunks of another text where so many layers stay dense: those chosen, or layers at
equal distances. Layers with a sliding window of their own keep it. Nothing is trained. Writes
results/layers-<name>.json.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.conversion import BUDGET, SINKS, begun, computed_on, losses, model_of, summary
from benchmarks.timing import write
from pi_attention import PiPattern
from pi_attention.convert import convert, dense_gains, neediest
from pi_attention.convert.config import free_layers
from pi_attention.stack import DENSE


def chunks(path: Path, tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """The first tokens of a text, in so many chunks of `length`."""
    tokens = tokenizer(path.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    if len(tokens) < length * count:
        raise ValueError(f"{path} has {len(tokens)} tokens, fewer than {count} chunks of {length}.")
    return list(tokens[: length * count].split(length))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="evaluated")
    parser.add_argument("--chosen-on", type=Path, required=True, help="text on which layers are chosen")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a chunk")
    parser.add_argument("--chunks", type=int, default=16, help="evaluated")
    parser.add_argument("--blocks", type=int, default=4, help="chunks on which layers are chosen")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 5, 10], help="of dense layers")
    parser.add_argument("--bos", action="store_true", help="each chunk begins with the tokenizer's BOS, as Gemma needs")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    held_out = chunks(options.text, tokenizer, options.length, options.chunks)
    seen = chunks(options.chosen_on, tokenizer, options.length, options.blocks)
    if options.bos:
        held_out, seen = (begun(text, tokenizer.bos_token_id) for text in (held_out, seen))
    model, pattern = model_of(options.model, None), PiPattern(BUDGET - SINKS, 1, 0, sinks=SINKS)
    free = len(free_layers(model.config))
    if max(options.counts) >= free:
        raise ValueError(f"counts={options.counts} leave none of {free} layers to convert.")

    def loss(tried: Any) -> float:
        return statistics.fmean(losses(tried, seen))

    gains = dense_gains(model, pattern, loss)
    dense_loss = loss(convert(model, DENSE))
    costs = {layer: loss(convert(model, pattern, layers=[layer])) - dense_loss for layer in gains}
    rows: list[dict[str, Any]] = []
    head: dict[str, Any] = {"model": options.model.name, "text": options.text.name, "chosen on": options.chosen_on.name}
    head |= {"device": computed_on(), "budget": BUDGET, "S": options.length, "blocks": options.blocks}
    head |= {"layers": list(gains), "nats given back": [round(value, 5) for value in gains.values()]}
    head |= {"nats that it costs": [round(value, 5) for value in costs.values()], "rows": rows}
    dense: list[float] = []

    def add(name: str, kept: list[int] | None) -> None:
        """Evaluate with these layers dense; all of them if None."""
        layers = None if kept is None else [layer for layer in gains if layer not in kept]
        found = losses(convert(model, DENSE if kept is None else pattern, layers=layers), held_out)
        dense.extend(found if kept is None else [])
        rows.append({"dense layers": name, "kept": kept, **summary(found, dense)})
        print(rows[-1], flush=True)
        write(f"layers-{options.model.name}", head)

    add("all", None)
    add("none", [])
    for count in options.counts:
        add(f"{count} that give most back", neediest(gains, count))
        add(f"{count} that cost most", neediest(costs, count))
        step = len(gains) // count
        for first in dict.fromkeys((0, step // 2, step - 1)) if step > 1 else ():
            add(f"{count}, one in {step} from {first}", list(gains)[first::step][:count])


if __name__ == "__main__":
    main()
