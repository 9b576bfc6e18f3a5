"""Give a pretrained decoder π-Attention, and fine-tune it by LoRA: its gates in full, adapters on its projections.

    pip install peft
    python examples/convert_lora.py --model HuggingFaceTB/SmolLM2-135M --steps 200 --out runs/lora

Without --model it makes a small Llama with random weights, which shows the steps and nothing of quality.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pi_attention import coordinated_heads
from pi_attention.accelerator import best_device
from pi_attention.convert import convert
from pi_attention.data.corpus import load_documents
from pi_attention.data.packing import PackedBlocks
from pi_attention.data.tokenizers import byte_tokenizer


def pretrained(name: str):
    """A decoder and its tokenizer."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=2048, **sizes)), byte_tokenizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    options = parser.parse_args()
    torch.manual_seed(0)
    dense, tokenizer = pretrained(options.model)
    pattern = coordinated_heads(32, 128, dense.config.num_attention_heads, sinks=4)
    model = convert(dense, pattern, gate=True).to(best_device())

    adapters = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], modules_to_save=["pi_gate"])
    tuned = get_peft_model(model, adapters)
    tuned.print_trainable_parameters()
    blocks = PackedBlocks(load_documents("shakespeare"), tokenizer, options.context)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
    for step in range(options.steps):
        block = {name: tensor[None].to(model.device) for name, tensor in blocks[step % len(blocks)].items()}
        loss = tuned(**block, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.3f}", flush=True)

    merged = tuned.merge_and_unload()  # a converted model again, with the adapters in its weights
    merged.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"saved in {options.out}; next: pi-attention generate {options.out}")


if __name__ == "__main__":
    main()
