"""Small models with random weights, whose texts depend on what each layer sees."""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from pi_attention import PiPattern
from pi_attention.convert import convert
from pi_attention.models import PiConfig, PiForCausalLM, PiStaticCache

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "pad_token_id": 0,
    "eos_token_id": None,
}
HYBRID = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
PLAIN = {"window": 8, "period": 5, "skips": 4}
HEADS = {"window": 6, "period": [1, 5, 16, 7], "phase": [0, 2, 3, 1], "skips": 4}


def own(**settings):
    return lambda: PiForCausalLM(PiConfig(**SIZES | {"gate": True} | settings))


def converted(kind, config, pattern, gate=True, **more):
    return lambda: convert(kind(config(**SIZES | more)), PiPattern(**pattern), gate=gate)


def telling(model):
    """The model with gates that weigh each token in their own way, and weights large enough that other keys tell."""
    with torch.no_grad():
        for part, weight in model.named_parameters():
            if "gate" in part and "gate_proj" not in part:
                weight.normal_(std=0.5)
            elif part.endswith(".sinks") or "sink_logit" in part:
                weight.normal_(std=2.0)
            elif weight.dim() == 2:
                weight.mul_(4.0)
    return model.eval()


def prompts_of(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]


def padded_over_two_devices(model, ids, last, kind):
    """Call a model [2, 13] whose `last` modules and head are on a second device; the cache of this kind, or None."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for module in (*last, model.get_output_embeddings()):
        add_hook_to_module(module.to("meta"), AlignDevicesHook("meta", skip_keys=model._skip_keys_device_placement))
    size = [60] if kind is PiStaticCache else []
    past = None if kind is None else kind(model.config.patterns(), *size)
    with torch.no_grad():
        for first, end in ((0, 12), (12, 13)) if past is not None else ((0, 13),):
            given = {"attention_mask": mask[:, :end], "past_key_values": past, "use_cache": past is not None}
            assert model(ids[:, first:end], **given).logits.is_meta
    return past
