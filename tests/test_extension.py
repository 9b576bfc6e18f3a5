"""Layers of a converted model that see beyond the pretrained context turn slower, and the others as before."""

import pytest
import small_models
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
)

from pi_attention import PiPattern, coordinated_heads
from pi_attention.cli.main import parse
from pi_attention.cli.runs import known_context
from pi_attention.convert import convert
from pi_attention.convert.extension import check_extension
from pi_attention.data.tokenizers import byte_tokenizer
from pi_attention.models.card import card_text
from pi_attention.models.fingerprint import difference, fingerprint
from pi_attention.stack import DENSE

KNOWN, LONGER = 32, 128
SIZES = small_models.SIZES | {"max_position_embeddings": KNOWN, "initializer_range": 0.3}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
WINDOW = PiPattern(8, 1, 0, sinks=2)


def pretrained(family="llama"):
    config, model, more = FAMILIES[family]
    torch.manual_seed(0)
    return model(config(**SIZES | more)).double().eval()


def extended(pattern=WINDOW, family="llama"):
    """The layer in the middle stays dense."""
    return convert(pretrained(family), pattern, layers=[0, 2], extend_to=LONGER)


def prompt(batch=2, length=100):
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def base(family, theta_times):
    """The pretrained model with a rotary embedding of another base."""
    model = pretrained(family)
    model.config.rope_parameters["rope_theta"] *= theta_times
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_layers_turn_as_with_the_larger_base(family):
    times = (LONGER / KNOWN) ** (8 / 6)  # of 8 features; the slowest turns as far over 128 tokens as over 32
    whole = convert(pretrained(family), DENSE, extend_to=LONGER)
    wanted = base(family, times)(prompt()).logits
    assert torch.allclose(whole(prompt()).logits, wanted, atol=1e-9)
    assert not torch.allclose(pretrained(family)(prompt()).logits, wanted, atol=1e-3)
    assert whole.slower_rotary.inv_freq[-1].item() == pytest.approx(
        whole.model.model.rotary_emb.inv_freq[-1].item() / 4
    )


@pytest.mark.parametrize("pattern", [WINDOW, coordinated_heads(4, 4, 4)])
def test_only_layers_that_see_beyond_the_pretraining_turn_slower(pattern):
    angles = []
    model = extended(pattern)
    for layer in model.model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: angles.append(kwargs["position_embeddings"][0]), with_kwargs=True
        )
    model(prompt(), use_cache=False)
    first, middle, last = angles
    usual = model.model.model.rotary_emb(first, torch.arange(100)[None])[0]
    assert torch.equal(first, usual) and torch.equal(last, usual) and not torch.allclose(middle, usual)


def test_sinks_of_layers_that_turn_slower_move_by_their_angles_beyond_the_new_context():
    pattern, ids = PiPattern(8, 8, 10, sinks=2), prompt(2, 200)
    found = convert(pretrained(), pattern, extend_to=LONGER)
    longer = base("llama", (LONGER / KNOWN) ** (8 / 6))
    longer.config.max_position_embeddings = LONGER
    wanted = convert(longer, pattern)(ids, use_cache=False).logits
    assert torch.allclose(found(ids, use_cache=False).logits, wanted, atol=1e-9)
    cache = found.new_cache()
    parts = [found(part, past_key_values=cache, use_cache=True).logits for part in ids.split([90, 1, 60, 49], dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), wanted, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    model = extended(family=family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.extend_to == LONGER
    assert torch.equal(loaded(prompt()).logits, model(prompt()).logits)
    assert not any("slower_rotary" in name for name in model.state_dict())


def test_any_split_into_calls_gives_the_same():
    model, ids = extended(), prompt()
    wanted = model(ids, use_cache=False).logits
    cache, found = None, []
    for part in ids.split([40, 1, 1, 30, 28], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    assert torch.allclose(torch.cat(found, dim=1), wanted, atol=1e-9)


def test_generation_is_the_same_with_padding_and_with_a_static_cache():
    model, ids = extended(PiPattern(8, 1, 0)), prompt(1, 50)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, **options)[:, 50:]
    assert torch.equal(model.generate(ids, cache_implementation="static", **options)[:, 50:], wanted)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids], dim=1)
    assert torch.equal(model.generate(padded, attention_mask=padded.ne(0).long(), **options)[:, 57:], wanted)


def test_gradients_are_the_same_with_checkpointing():
    found = []
    for checkpointed in (False, True):
        model = extended().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(prompt(), labels=prompt(), use_cache=False).loss.backward()
        found.append(model.get_input_embeddings().weight.grad)
    assert torch.allclose(*found, atol=1e-12)


def test_a_later_conversion_of_the_same_weights_is_not_extended():
    wanted = convert(pretrained(), WINDOW, layers=[0, 2])(prompt()).logits
    model = pretrained()
    assert not torch.allclose(convert(model, WINDOW, layers=[0, 2], extend_to=LONGER)(prompt()).logits, wanted)
    assert torch.equal(convert(model, WINDOW, layers=[0, 2])(prompt()).logits, wanted)


@pytest.mark.parametrize(
    ("pattern", "layers", "extend_to", "error", "words"),
    [
        (WINDOW, [0], KNOWN, ValueError, "extend_to=32 is no more than the pretrained context of 32 .*: leave it out"),
        (WINDOW, None, 64, ValueError, "extend_to=64 is of layers that see beyond .* context of 32, and none does"),
        (WINDOW, [0], 64.0, TypeError, "extend_to must be an int"),
        (WINDOW, [0], True, TypeError, "extend_to must be an int"),
        (PiPattern(8, 8, 10), None, "64", TypeError, "extend_to must be an int"),
    ],
)
def test_what_cannot_be_extended_is_refused(pattern, layers, extend_to, error, words):
    model = pretrained()
    with pytest.raises(error, match=words):
        convert(model, pattern, layers=layers, extend_to=extend_to)
    assert not hasattr(model.config, "pi_attention") and not model.model.layers[0].self_attn._forward_pre_hooks


@pytest.mark.parametrize(
    "model",
    [
        lambda: LlamaForCausalLM(
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
        ),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8, layer_types=["full_attention"] * 3)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=KNOWN)),
    ],
)
def test_only_plain_rotary_embeddings_are_extended(model):
    with pytest.raises(NotImplementedError, match="extend_to=64 makes a plain rotary embedding turn slower"):
        check_extension(64, model().config, [DENSE])


@pytest.mark.parametrize(
    "config",
    [
        SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1]),
        Cohere2Config(**SIZES, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    ],
)
def test_layers_without_angles_are_not_extended(config):
    patterns = [PiPattern(8, 1, 0), DENSE, PiPattern(8, 1, 0)]
    with pytest.raises(NotImplementedError, match="have no rotary embedding: leave it out"):
        check_extension(64, config, patterns)


def test_a_model_that_tells_its_attention_nothing_is_refused_beyond_its_context():
    model = convert(NemotronForCausalLM(NemotronConfig(**SIZES, head_dim=8)), WINDOW)
    assert model(prompt(1, 20), use_cache=False).logits.isfinite().all()
    with pytest.raises(NotImplementedError, match="NemotronForCausalLM hands its attention no further arguments"):
        model(prompt(1, 40), use_cache=False)
    documents = torch.arange(20)[None] // 7 * 7
    with pytest.raises(NotImplementedError, match="no layer can be told where documents begin"):
        model(prompt(1, 20), segment_ids=documents, use_cache=False)
    assert model(prompt(1, 20), segment_ids=0 * documents, use_cache=False).logits.isfinite().all()


def test_a_cache_from_before_extensions_is_of_a_model_without_one(tmp_path):
    plain, longer = (fingerprint(model) for model in (convert(pretrained(), WINDOW, layers=[0, 2]), extended()))
    earlier = {**plain, "config": {name: x for name, x in plain["config"].items() if name != "extend_to"}}
    assert difference(earlier, plain) is None
    assert difference(earlier, longer) == "extend_to=None, and this one has 128"


def test_a_card_says_what_was_extended():
    said = card_text("model", extended().config, {})
    assert "beyond the pretrained context of 32 tokens, the rotary embedding turns slower, for 128 tokens." in said


def test_the_command_extends_a_model_and_says_what_it_cannot(tmp_path):
    tokenizer = byte_tokenizer()
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    command = ["convert", "--model", str(tmp_path / "llama"), "--data", str(tmp_path / "text.txt"), "--window", "8"]
    command += ["--out", str(tmp_path / "new"), "--eval-blocks", "1", "--extend-to", "128"]
    with pytest.raises(ValueError, match="context=256 is more than extend_to=128"):
        parse([*command, "--context", "256"]).execute(Console(quiet=True))
    with pytest.raises(ValueError, match="and none does: leave it out, or let some layers stay dense"):
        parse([*command, "--context", "64"]).execute(Console(quiet=True))
    with pytest.raises(ValueError, match="in the pretrained context of 32, and window=30 with sinks=4 covers it"):
        parse([*command, "--context", "64", "--dense-layers", "1", "--window", "30"]).execute(Console(quiet=True))
    with pytest.warns(UserWarning, match="context=32 is within the pretrained context of 32, so that nothing"):
        parse([*command, "--context", "32", "--layers", "0", "--out", str(tmp_path / "short")]).execute(
            Console(quiet=True)
        )
    assert parse([*command, "--context", "64", "--dense-layers", "1"]).execute(Console(quiet=True)) == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert known_context(saved.config) == 128 and sum(pattern == DENSE for pattern in saved.config.patterns()) == 1
