"""Pretrained decoders of transformers with π-Attention: exact, bounded, saved and restored."""

import io
import json
import re
import shutil
import signal
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from small_models import padded_over_two_devices
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pi_attention import PiPattern, coordinated_heads
from pi_attention.convert import PiConvertedForCausalLM, convert, dense_gains, neediest, register
from pi_attention.convert.conversion import need_convertible
from pi_attention.masks import dense_mask
from pi_attention.models import PiCache, PiConfig, PiStaticCache
from pi_attention.stack import DENSE

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
HYBRID = {
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, HYBRID | {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, HYBRID),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
PATTERN = PiPattern(4, 5, 3, sinks=2)
PHASES = coordinated_heads(4, 3, heads=4, sinks=2)


def pretrained(family="llama", **changed):
    config, model, more = FAMILIES[family]
    torch.manual_seed(0)
    made = model(config(**SIZES | more | changed)).double().eval()
    if family == "gpt_oss":
        made.set_experts_implementation("eager")  # the grouped product knows no float64
    return made


def prompt(batch=2, length=40):
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[*(family for family in FAMILIES if family != "gpt_oss"), "llama, phases"])
def converted(request):
    family, _, phases = request.param.partition(", ")
    model = convert(pretrained(family), PHASES if phases else PATTERN, gate=True)
    for name, parameter in model.named_parameters():
        if "pi_gate" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "pattern", [PATTERN, PHASES, PiPattern(6, (3, 5, 7, 11), 4), PiPattern(3, (4, 6, 4, 6), None, phase=(1, 5, 3, 0))]
)
def test_the_first_forward_is_masked_softmax_with_the_same_weights(family, pattern):
    model, ids = pretrained(family), prompt()
    mask = torch.where(dense_mask(pattern, 40, 40), 0.0, -torch.inf).double()
    want = model(ids, attention_mask=mask.expand(2, -1, 40, 40)).logits
    torch.testing.assert_close(convert(model, pattern, gate=True)(ids).logits, want)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sink_logits_are_those_of_eager_attention(family):
    model, ids = pretrained(family), prompt()
    model.set_attn_implementation("eager")
    want = model(ids).logits
    for dense in (PiPattern(64, 7, 4), PiPattern(3, 1, 64)):
        torch.testing.assert_close(convert(deepcopy(model), dense, gate=True)(ids).logits, want, rtol=1e-4, atol=1e-4)

    model = pretrained(family, layer_types=["full_attention"] * 3)
    model.set_attn_implementation("eager")
    mask = torch.where(dense_mask(PATTERN, 40, 40), 0.0, -torch.inf).double().expand(2, -1, 40, 40)
    masked = model(ids, attention_mask=mask)
    assert (masked.logits - model(ids).logits).abs().max() > 1
    wanted = [parameter for name, parameter in model.named_parameters() if "self_attn" in name]
    gradients = torch.autograd.grad(masked.logits.pow(2).mean(), wanted)
    out = convert(model, PATTERN, gate=False)(ids)
    torch.testing.assert_close(out.logits, masked.logits, rtol=1e-4, atol=1e-4)
    for got, want in zip(torch.autograd.grad(out.logits.pow(2).mean(), wanted), gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_gpt_oss_decodes_saves_and_loads(tmp_path):
    """In fp32, in which its experts compute: with the bounded cache as without, and from the folder as before."""
    model, ids = convert(pretrained("gpt_oss").float(), PATTERN, gate=True), prompt()
    want = model(ids, use_cache=False).logits
    cache, logits = None, []
    for part in ids.split([13, 1, 20, 6], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), want, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, want, rtol=1e-3, atol=1e-3)
    assert [pattern.window for pattern in loaded.config.patterns()] == [6, 4, 6]


def test_layers_with_a_window_of_their_own_keep_it():
    model, ids = pretrained("gemma3"), prompt(length=8)  # no layer sees beyond the pattern's window and sinks yet
    want = model(ids).logits
    torch.testing.assert_close(convert(model, PiPattern(8, 5, 3), gate=True)(ids).logits, want)
    assert [p.window for p in convert(pretrained("gemma3"), PATTERN, gate=True).config.patterns()] == [6, 4, 6]


@pytest.mark.parametrize("split", [(40,), (1,) * 40, (13, 1, 20, 6)], ids=["whole", "tokens", "chunks"])
@pytest.mark.parametrize("padding", [0, 7])
def test_cached_equals_uncached_and_padding_changes_nothing(converted, split, padding):
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = converted(ids[:1, padding:], use_cache=False).logits[0]
    cache, first, logits = None, 0, []
    for tokens in split:
        new = slice(first, first + tokens)
        seen = mask[:, : new.stop] if padding else None
        given = positions[:, new] if padding else None
        out = converted(ids[:, new], attention_mask=seen, position_ids=given, past_key_values=cache, use_cache=True)
        cache, first = out.past_key_values, new.stop
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1)[0, padding:], want)
    assert isinstance(cache, PiCache)
    assert all(layer.keys.shape[2] <= 20 + max(split) for layer in cache.layers)


@pytest.mark.parametrize("mode", [{"do_sample": False}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generation_with_the_bounded_cache_equals_without(converted, mode):
    options = {"max_new_tokens": 24, "eos_token_id": None} | mode
    got = converted.generate(prompt()[:1, :12], **options)
    greedy = {"prompt_lookup_num_tokens": None}  # speculation needs a cache, and gives what greedy search gives
    want = converted.generate(prompt()[:1, :12], **options | (greedy if len(mode) == 1 else {}), use_cache=False)
    assert torch.equal(got, want)


def test_saved_and_restored_by_the_auto_class(converted, tmp_path):
    ids = prompt()
    converted.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert type(loaded) is PiConvertedForCausalLM
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(ids).logits, converted(ids).logits, atol=1e-5, rtol=1e-5)  # fp32 rotary buffers
    assert loaded.config.patterns() == converted.config.patterns()


def test_packed_documents_do_not_leak(converted):
    ids = prompt(batch=1)
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    for use_cache in (None, False):
        got = converted(ids, position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(got[:, 15:], converted(ids[:, 15:]).logits)


def test_gates_learn_and_gradient_checkpointing_agrees():
    model = convert(pretrained(), PATTERN, gate=True).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(prompt(), labels=prompt()).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert any("pi_gate.fc_out" in name and grad.abs().sum() > 0 for name, grad in grads[0].items())
    torch.testing.assert_close(*grads)


def test_lora_on_projections_with_the_gate_trained(tmp_path):
    peft = pytest.importorskip("peft")
    model = convert(pretrained(), PATTERN, gate=True)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["pi_gate"])
    )
    adapted(input_ids=prompt(), labels=prompt()).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in trained) and any("pi_gate" in name for name in trained)
    want = adapted(input_ids=prompt()).logits
    torch.testing.assert_close(adapted.merge_and_unload()(prompt()).logits, want)


def test_a_name_in_transformers_without_gate_or_bounded_cache(tmp_path):
    model, ids = pretrained(), prompt()
    model.save_pretrained(tmp_path)
    want = convert(pretrained(), PATTERN, gate=False)(ids).logits
    register(PATTERN)
    try:
        named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="pi", dtype=torch.float64)
        torch.testing.assert_close(named(ids).logits, want, atol=1e-5, rtol=1e-5)
        got = named.generate(ids[:1, :12], max_new_tokens=30, do_sample=False)
        assert torch.equal(got, named.generate(ids[:1, :12], max_new_tokens=30, do_sample=False, use_cache=False))
        with pytest.raises(NotImplementedError, match="static cache"):
            named.generate(ids[:1], max_new_tokens=3, cache_implementation="static")
        with pytest.raises(NotImplementedError, match="padding mask"):
            named(ids, attention_mask=torch.ones(2, 1, 40, 40))
    finally:
        register()
    with pytest.raises(ValueError, match="needs a pattern"):
        named(ids)


def test_a_model_whose_conversion_is_in_use_is_not_converted_again():
    """Both would share a configuration, and the first would be saved with the pattern of the second."""
    model = pretrained()
    first = convert(model, PATTERN)
    with pytest.raises(ValueError, match="an earlier conversion that is in use"):
        convert(model, PHASES)
    with pytest.raises(ValueError, match="an earlier conversion that is in use"):
        convert(LlamaForCausalLM(model.config), PHASES)
    with pytest.raises(ValueError, match="an earlier conversion that is in use"):
        convert(model, PATTERN, gate=True)  # the first would get gates, and be saved without them
    assert first.config.patterns() == [PATTERN] * 3 and len(first.state_dict()) == len(model.state_dict())
    del first
    assert convert(model, PHASES).config.patterns() == [PHASES] * 3


def test_adapters_stand_on_the_projections_of_every_make_of_attention():
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    from pi_attention.training.finetune import projections

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=1))
    for model, names in ((neox, {"query_key_value", "dense"}), (gpt2, {"c_attn", "c_proj"})):
        assert {name.split(".")[-1] for name in projections(convert(model, PATTERN))} == names
    gated = projections(convert(pretrained(), PATTERN, gate=True))
    assert len(gated) == 4 * 3 and {name.split(".")[-1] for name in gated} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ValueError, match="finds no projections"):
        projections(torch.nn.Linear(2, 2))


def test_a_context_beyond_learned_positions_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    from pi_attention.cli.pretrained import need_positions

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    gpt2 = convert(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)), PATTERN)
    need_positions(gpt2, 64)
    with pytest.raises(ValueError, match="context=65 is more than the 64 positions that the model has learned"):
        need_positions(gpt2, 65)
    need_positions(convert(pretrained(), PATTERN), 1000)  # rotary embeddings have no table


def test_the_command_makes_windows_with_sinks_unless_told():
    from pi_attention.cli.convert import Convert

    assert Convert()._pattern(6) == PiPattern(1020, 1, 0, sinks=4)
    assert Convert(window=204, skips=816)._pattern(6) == coordinated_heads(204, 816, 6, sinks=4)
    assert Convert(window=8, period=(2,), skips=4, sinks=0)._pattern(6) == PiPattern(8, 2, 4)


def test_a_gate_without_a_place_is_refused_before_anything_is_measured():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64))
    with pytest.raises(NotImplementedError, match="GPTNeoXForCausalLM has no attention with q_proj"):
        need_convertible(model, PATTERN, gate=True)
    need_convertible(model, PATTERN, gate=False)
    assert model.config._attn_implementation != "pi"


def test_the_layer_that_gives_most_back_stays_dense():
    """What one layer of three attends to is multiplied by zero: dense or not, it gives nothing back."""
    model = pretrained()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.zero_()
    ids, narrow, others = prompt(), PiPattern(2, 1, 0), [deepcopy(model) for _ in range(2)]

    def loss(tried):
        return tried(ids, labels=ids, use_cache=False).loss.item()

    with torch.no_grad():
        gains = dense_gains(model, narrow, loss)
        converted = convert(model, narrow, layers=[1, 2])
        alone = loss(convert(others[0], narrow)) - loss(convert(others[1], narrow, layers=[1, 2]))
    assert list(gains) == [0, 1, 2] and abs(gains[1]) < 1e-9 < abs(gains[0])
    assert gains[0] == pytest.approx(alone, abs=1e-9)
    assert converted.config.patterns() == [DENSE, narrow, narrow]
    assert neediest({0: 0.5, 3: 0.1, 4: 0.7}, 2) == [0, 4] and neediest(gains, 0) == []
    with pytest.raises(ValueError, match="count=3 leaves none of 3 layers to convert"):
        neediest(gains, 3)


def test_only_layers_that_can_take_the_pattern_are_asked():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    gains = dense_gains(pretrained("gemma3", layer_types=kinds), PATTERN, lambda tried: 0.0)
    assert gains == {0: 0.0, 2: 0.0}
    with pytest.raises(ValueError, match=r"layers that can take the pattern are \[1\]: there is none to choose"):
        dense_gains(pretrained("gemma3"), PATTERN, lambda tried: 0.0)
    with pytest.raises(TypeError, match="model must be a PreTrainedModel"):
        dense_gains(torch.nn.Linear(2, 2), PATTERN, lambda tried: 0.0)
    with pytest.raises(ValueError, match="a gain is NaN"):
        neediest({0: float("nan"), 1: 0.2}, 1)


def test_inspect_reads_a_configuration_without_key_heads(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from pi_attention.cli.inspect import Inspect

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64))
    convert(model, PATTERN).save_pretrained(tmp_path / "neox")
    assert Inspect(run=tmp_path / "neox", context=64)._describe() == ([PATTERN], 64, 4, 4, 8)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="layers"):
        convert(pretrained(), PATTERN, layers=[7], gate=True)
    with pytest.raises(ValueError, match="causal"):
        convert(pretrained(), PiPattern(4, 5, 3, causal=False), gate=True)
    with pytest.raises(ValueError, match="earlier conversion"):
        convert(convert(pretrained(), PATTERN, gate=True).model, PATTERN, gate=True)
    with pytest.raises(ValueError, match="earlier conversion"):
        convert(convert(pretrained(), PATTERN, gate=False), PATTERN, gate=True)
    with pytest.raises(ValueError, match="gate=True weighs skips"):
        convert(pretrained(), PiPattern(4, 1, 0, sinks=2), gate=True)
    with pytest.raises(ValueError, match="layers=\\[0, 1\\] holds 0, which keeps a sliding window of 6: leave it out"):
        convert(pretrained("gemma3"), PATTERN, layers=[0, 1])
    with pytest.warns(UserWarning, match="all layers keep their sliding window of 8"):
        convert(pretrained("mistral", sliding_window=8), PATTERN)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        convert("llama", PATTERN, gate=True)
    with pytest.raises(TypeError, match="PiPattern"):
        convert(pretrained(), None, gate=True)
    with pytest.raises(ValueError, match="no causal language model"):
        convert(pretrained().model, PATTERN, gate=True)
    with pytest.raises(ValueError, match="new_cache"):
        model = convert(pretrained(), PATTERN, gate=True)
        from transformers import DynamicCache

        model(prompt(), past_key_values=DynamicCache())


def test_a_model_that_takes_no_gate_is_left_as_it_was():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=1))
    with pytest.raises(NotImplementedError, match="gate=False"):
        convert(model, PATTERN, gate=True)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model.config, "pi_attention")


def test_command_converts_fine_tunes_saves_and_generates(tmp_path, monkeypatch, capsys):
    from transformers import PreTrainedTokenizerFast

    from pi_attention.cli.main import main
    from pi_attention.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = LlamaConfig(**SIZES | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 60)
    options = ["--window", "8", "--period", "8", "--skips", "4", "--phase", "0", "2", "4", "6"]
    options += ["--context", "64", "--data", str(text)]
    options += ["--gate", "--finetune-steps", "3", "--part", "gates", "--eval-blocks", "2"]

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["pi-attention", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code

    command = ["convert", "--model", tmp_path / "llama", "--out", tmp_path / "pi", *options]
    assert run(*command) == 0
    printed = capsys.readouterr().out
    assert "dense: perplexity" in printed and "after 3 steps of gates: perplexity" in printed
    assert "step 3/3  loss " in printed and "{" not in printed
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pi")
    assert saved.config.patterns() == [PiPattern(8, 8, 4, sinks=4, phase=(0, 2, 4, 6))] * 3
    gates = [p for name, p in saved.named_parameters() if "pi_gate.fc_out.weight" in name]
    assert len(gates) == 3 and all(gate.abs().sum() > 0 for gate in gates)
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "llama").state_dict()
    assert all(torch.equal(saved.model.state_dict()[name], weight) for name, weight in llama.items())
    assert run("generate", tmp_path / "pi", "--max-new-tokens", 5) == 0
    assert run("inspect", tmp_path / "pi") == 0 and "the first 4" in capsys.readouterr().out
    assert run(*command) == 2  # the folder holds a model
    assert "holds a model already" in " ".join(capsys.readouterr().err.split())
    assert run("convert") == 2


@pytest.mark.parametrize("part", ["gates", "lora"])
def test_a_fine_tune_that_is_interrupted_freezes_nothing(part, tmp_path, monkeypatch):
    from pi_attention.data.packing import PackedBlocks
    from pi_attention.data.tokenizers import load_tokenizer
    from pi_attention.training.finetune import finetune

    if part == "lora":
        pytest.importorskip("peft")
    tokenizer = load_tokenizer("bytes")
    model = convert(pretrained(vocab_size=len(tokenizer)), PATTERN, gate=True)
    names = [name for name, _ in model.named_parameters()]
    blocks = PackedBlocks(["To be, or not to be. " * 30], tokenizer, 32)

    def stop(line):
        raise KeyboardInterrupt

    def run():
        finetune(model, blocks, steps=2, part=part, learning_rate=1e-3, out=tmp_path, tell=stop)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.setattr("pi_attention.training.finetune.TrainingArguments", stop)  # before the first step
    with pytest.raises(TypeError):
        run()
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("padding", [0, 5])
def test_beyond_the_pretrained_context_the_sinks_move_along(family, padding):
    """The newest of a stream's logits are those of sinks that stand `context` tokens before it."""
    more = FAMILIES[family][2]
    context, length, reach = 30, 70, PATTERN.reach
    more = more | {"max_position_embeddings": context, "num_hidden_layers": 1}
    if "layer_types" in more:
        more["layer_types"] = ["full_attention"]
    stream = convert(pretrained(family, **more), PATTERN, gate=False)
    ids, mask = prompt(1, length), torch.ones(1, length, dtype=torch.long)
    mask[:, :padding] = 0
    cache = None
    for first, end in [(0, 20), (20, 27), *((t, t + 1) for t in range(27, length))]:
        out = stream(ids[:, first:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    assert cache.layers[0].near.most == context
    seen = torch.cat([ids[:, padding : padding + PATTERN.sinks], ids[:, -reach - 1 :]], dim=1)
    near = torch.arange(length - context, length - context + PATTERN.sinks)
    positions = torch.cat([near, torch.arange(length - reach - 1, length)])[None]
    one_segment = torch.zeros_like(seen, dtype=torch.int32)
    want = stream(seen, position_ids=positions, segment_ids=one_segment, use_cache=False)
    torch.testing.assert_close(out.logits[:, -1], want.logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.half().float()])
def test_rotary_frequencies_of_a_converted_model_stay_exact(cast):
    """Rounded to 16 bits they turn position 8,000 by another radian."""
    model = convert(pretrained().float(), PiPattern(4, 5, 3), gate=True)
    rotary = next(module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding"))
    x, positions = torch.zeros(1, 1, 64), torch.tensor([[8000]])
    want = rotary(x, positions)
    for got, exact in zip(cast(model) and rotary(x, positions), want, strict=True):
        assert torch.equal(got, exact)


class Packed(nn.Module):
    """A projection without a parameter, as packed weights are."""

    def __init__(self, linear):
        super().__init__()
        self.linear = [linear]

    def forward(self, x):
        return self.linear[0](x)


@pytest.mark.parametrize(
    "replacement", [lambda q: nn.Identity(), nn.Sequential, Packed], ids=["identity", "in", "packed"]
)
def test_a_replaced_projection_gets_its_gate(replacement):
    model = pretrained()
    for layer in model.model.layers:
        layer.self_attn.q_proj = replacement(layer.self_attn.q_proj)
    ids, want = prompt(), convert(deepcopy(model), PATTERN, gate=False)(prompt()).logits
    converted = convert(model, PATTERN, gate=True)
    assert {gate.dtype for name, gate in converted.named_parameters() if "pi_gate" in name} == {torch.float64}
    torch.testing.assert_close(converted(ids).logits, want)


@pytest.mark.filterwarnings("ignore")  # torch says that this way of quantising moves elsewhere
def test_a_dynamically_quantised_model_is_converted():
    model, ids = pretrained().float(), prompt()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    converted = convert(quantised, PATTERN, gate=True)
    want = convert(pretrained().float(), PATTERN, gate=True)(ids).logits
    assert (converted(ids).logits - want).abs().mean() < 0.2 * want.abs().mean()
    assert converted.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 43)


@pytest.mark.parametrize(
    ("layers", "error", "words"),
    [
        ([], ValueError, "converts nothing"),
        ([0.5], TypeError, "indices of layers"),
        ([True], TypeError, "indices of layers"),
        (1, TypeError, "indices of layers"),
        ("0", TypeError, "indices of layers"),
        ([0, 3], ValueError, "has layers 0 to 2"),
    ],
)
def test_layers_that_are_none_are_refused(layers, error, words):
    with pytest.raises(error, match=words):
        convert(pretrained(), PATTERN, layers=layers, gate=True)
    with pytest.raises(TypeError, match="gate must be True or False, got 'no'"):
        convert(pretrained(), PATTERN, gate="no")


def test_layers_in_any_form_are_saved(tmp_path):
    convert(pretrained(), PATTERN, layers=torch.tensor([2, 0, 2]), gate=True).save_pretrained(tmp_path)
    assert PiConvertedForCausalLM.from_pretrained(tmp_path).config.text_config.pi_attention["layers"] == [0, 2]


def test_all_layers_are_one_conversion_named_or_not():
    model = pretrained()
    earlier = convert(model, PATTERN)
    assert convert(model, PATTERN, layers=[2, 1, 0]).config.patterns() == earlier.config.patterns()


@pytest.fixture
def llama(tmp_path):
    """A saved model with its tokenizer, and the arguments of a short conversion into `new`."""
    from pi_attention.data.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    options = ["--window", "8", "--period", "8", "--skips", "4", "--context", "64", "--eval-blocks", "0"]
    return ["convert", "--out", str(tmp_path / "new"), "--data", str(tmp_path / "text.txt"), *options]


def test_the_command_converts_the_first_layer(llama, tmp_path):
    from pi_attention.cli.main import parse

    asked = [*llama, "--model", str(tmp_path / "llama"), "--layers", "0", "2"]
    assert parse(asked).execute(Console(quiet=True)) == 0
    patterns = AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.patterns()
    assert patterns == [PiPattern(8, 8, 4, sinks=4), DENSE, PiPattern(8, 8, 4, sinks=4)]


def test_the_command_keeps_the_dtype_of_weights_that_it_does_not_train(llama, tmp_path):
    from pi_attention.cli.main import parse

    folder = tmp_path / "llama"
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    assert parse([*llama, "--model", str(folder)]).execute(Console(quiet=True)) == 0
    saved, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "new", folder))
    assert saved.dtype == saved.config.text_config.dtype == torch.bfloat16
    assert all(map(torch.equal, saved.parameters(), before.parameters()))


def test_the_command_reads_another_field_of_the_records(llama, tmp_path):
    from pi_attention.cli.main import parse

    records = tmp_path / "text.jsonl"
    records.write_text(json.dumps({"content": "To be, or not to be, that is the question. " * 60}) + "\n")
    asked = [*llama, "--model", str(tmp_path / "llama"), "--data", str(records)]
    with pytest.raises(ValueError, match=r"set text_field to one of \['content'\]"):
        parse(asked).execute(Console(quiet=True))
    assert parse([*asked, "--text-field", "content"]).execute(Console(quiet=True)) == 0


def test_a_pretrained_model_is_evaluated_as_it_is_on_the_text_that_a_conversion_holds_out(llama, tmp_path):
    from pi_attention.cli.main import parse

    folder, text = str(tmp_path / "llama"), str(tmp_path / "text.txt")
    before = {path.name for path in (tmp_path / "llama").iterdir()}
    lines = {}
    commands = {
        "convert": [*llama, "--model", folder, "--eval-blocks", "4"],
        "before": ["eval", folder, "--data", text, "--held-out", "--context", "64", "--out", str(tmp_path / "before")],
        "after": ["eval", str(tmp_path / "new"), "--data", text, "--held-out", "--context", "64"],
        "all": ["eval", str(tmp_path / "new"), "--data", text, "--context", "64"],
    }
    for name, command in commands.items():
        console = Console(record=True, width=200, file=io.StringIO())
        assert parse([*command, "--limit", "4"] if command[0] == "eval" else command).execute(console) == 0
        lines[name] = console.export_text()
    dense, converted = re.findall(r"perplexity (\S+) a token \((\S+) tokens", lines["convert"])
    for (perplexity, tokens), name in ((dense, "before"), (converted, "after")):
        found, again = re.search(r"(\S+) tokens: .* perplexity (\S+) a token", lines[name]).groups()
        assert found == tokens and float(again) == pytest.approx(float(perplexity), abs=0.006)
    assert lines["all"] != lines["after"]
    assert {path.name for path in (tmp_path / "llama").iterdir()} == before
    for out in ([], ["--out", folder]):
        with pytest.raises(ValueError, match=r"run=.*llama.* is a pretrained model, whose folder is left as it is"):
            parse(["eval", folder, "--data", text, *out]).execute(Console(quiet=True))
    with pytest.raises(ValueError, match="split='validation' beside held_out=True"):
        parse([*commands["before"], "--split", "validation"]).execute(Console(quiet=True))
    said = json.loads((tmp_path / "before" / "eval.json").read_text())
    assert (said["model"], said["data"], said["held_out"]) == (folder, text, True)
    (tmp_path / "before" / "config.json").write_text((tmp_path / "llama" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"run=.*before.* has no tokenizer"):
        parse(["eval", str(tmp_path / "before"), "--data", text, "--out", str(tmp_path / "x")]).execute(
            Console(quiet=True)
        )
    with pytest.raises(ValueError, match="held_out=True is of data, and none is given"):
        parse(["eval", str(tmp_path / "new"), "--held-out"]).execute(Console(quiet=True))


@pytest.mark.parametrize(("converted", "said"), [(10.4, False), (11.2, True)])
def test_the_command_names_dense_layers_where_much_is_lost(converted, said, llama, tmp_path, monkeypatch):
    from pi_attention.cli import conversion
    from pi_attention.cli.main import parse

    perplexities = iter([10.0, converted])
    monkeypatch.setattr(
        conversion, "evaluate", lambda *_, **__: SimpleNamespace(perplexity=next(perplexities), tokens=99)
    )
    console = Console(record=True, width=200, file=io.StringIO())
    parse([*llama, "--model", str(tmp_path / "llama"), "--eval-blocks", "1"]).execute(console)
    hint = "That is 12% above dense attention. A few dense layers may give most of it back: --dense-layers 1"
    assert (hint in console.export_text()) == said


def test_without_a_period_the_command_gives_heads_that_share_the_distance(llama, tmp_path):
    from pi_attention.cli.main import parse

    period = llama.index("--period")
    asked = [*llama[:period], *llama[period + 2 :], "--model", str(tmp_path / "llama")]
    assert parse(asked).execute(Console(quiet=True)) == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert saved.config.patterns() == [coordinated_heads(8, 4, SIZES["num_attention_heads"], sinks=4)] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--period", "8", "9", "10"], "period has 3 entries but there are 4 query heads"),
        (["--context", "1024"], r"the held-out part of data='.*text\.txt', 10 % held out: the text has \d+ tokens"),
        (["--no-gate", "--part", "gates", "--finetune-steps", "1"], "part='gates', but gate=False leaves none"),
    ],
)
def test_a_conversion_that_cannot_be_is_refused_before_weights_are_read(options, words, llama, tmp_path):
    from pi_attention.cli.main import parse

    (tmp_path / "llama" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=words):
        parse([*llama, "--model", str(tmp_path / "llama"), *options]).execute(Console(quiet=True))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("file", "holds no config.json: give the hub name"),
        ("empty", "holds no config.json"),
        ("run", "holds no config.json.* The run's model is in '.*model'"),
        ("no-tokenizer", "has no tokenizer that can be loaded, save one there"),
        ("no-weights", "cannot be loaded as a causal language model"),
        ("no-json", "cannot be loaded, give the folder or the hub name"),
        ("ours", r"is a model of π-Attention already \(pi\)"),
        ("nobody/none", "model='nobody/none' cannot be loaded"),
        ("x" * 300, "model='xxx.* cannot be loaded"),
    ],
)
def test_a_pretrained_model_that_cannot_serve_is_named(kind, words, llama, tmp_path, monkeypatch, offline):
    from pi_attention.cli.main import parse

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("run/model", "no-tokenizer", "no-weights", "no-json"):
        shutil.copytree(tmp_path / "llama", tmp_path / name)
    for file in (tmp_path / "no-tokenizer").glob("token*"):
        file.unlink()
    (tmp_path / "no-weights" / "model.safetensors").unlink()
    (tmp_path / "no-json" / "config.json").write_text("{")
    PiConfig(num_hidden_layers=1).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=words):
        parse([*llama, "--model", kind]).execute(Console(quiet=True))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("part", ["gates", "lora", "all"])
def test_an_interrupted_fine_tune_goes_on_to_the_same_result(part, llama, tmp_path):
    from pi_attention.cli.main import parse

    if part == "lora":
        pytest.importorskip("peft")
    options = ["--gate", "--finetune-steps", "8", "--part", part, "--save-every", "3", "--eval-blocks", "1"]
    options += ["--dense-layers", "1"]
    asked = [*llama, "--model", str(tmp_path / "llama"), *options]
    assert parse([*asked, "--out", str(tmp_path / "whole")]).execute(Console(quiet=True)) == 0

    def interrupted_after(step):
        console = Console(record=True, width=200, file=io.StringIO())
        usual = console.print

        def tell(line, **style):
            usual(line, **style)
            if str(line).startswith(f"step {step}/"):
                signal.raise_signal(signal.SIGINT)

        console.print = tell
        return console

    console, new = interrupted_after(4), tmp_path / "new"
    assert parse(asked).execute(console) == 130
    assert "Interrupted at step 5, saved. Go on: pi-attention convert --out" in console.export_text()
    assert not (new / "config.json").exists()
    with pytest.raises(FileExistsError, match="holds a fine-tune that was interrupted: add --resume, or delete"):
        parse(asked).execute(Console(quiet=True))
    with pytest.raises(ValueError, match="window=9 differs from 8 of the fine-tune in out="):
        parse(["convert", "--out", str(new), "--resume", "--window", "9"]).execute(Console(quiet=True))
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("question", "answer"))
    with pytest.raises(ValueError, match="gives other training tokens than the run"):
        parse(["convert", "--out", str(new), "--resume"]).execute(Console(quiet=True))
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    moved = str(tmp_path / "moved.txt")
    (tmp_path / "moved.txt").write_text(text)
    checkpoint = new / "finetune" / "checkpoint-6"  # as of a process that was killed while it wrote
    checkpoint.mkdir()
    console = interrupted_after(None)
    with pytest.warns(UserWarning, match="checkpoint-6 is damaged, it was not written to its end"):
        assert parse(["convert", "--out", str(new), "--resume", "--data", moved]).execute(console) == 0
    said = console.export_text()
    assert (
        "going on after step 5 of 8" in said
        and "step 6/8" in said
        and "step 5/8" not in said
        and "trying each" not in said
        and "untrained" not in said
    )
    assert not (new / "finetune").exists()
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "new"))
    assert one.config.patterns() == other.config.patterns()
    differ = [name for name, x in one.state_dict().items() if not torch.equal(x, other.state_dict()[name])]
    assert not differ
    cards = [(tmp_path / name / "README.md").read_text().replace(name, "") for name in ("whole", "new")]
    cards[1] = cards[1].replace("moved", "text")
    assert cards[0] == cards[1] and "| perplexity, dense |" in cards[0] and "| dense layers |" in cards[0]
    with pytest.raises(FileNotFoundError, match="holds a model that is finished"):
        parse(["convert", "--out", str(new), "--resume"]).execute(Console(quiet=True))
    with pytest.raises(FileNotFoundError, match="holds no fine-tune that was interrupted"):
        parse(["convert", "--out", str(tmp_path), "--resume"]).execute(Console(quiet=True))


@pytest.mark.parametrize("other_files", [False, True])
def test_an_interrupted_conversion_leaves_nothing(other_files, llama, tmp_path, monkeypatch):
    from pi_attention.cli.main import parse

    new = tmp_path / "new"
    if other_files:
        new.mkdir()
        (new / "notes.txt").write_text("mine")
    command = parse([*llama, "--model", str(tmp_path / "llama")])

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            command.execute(Console(quiet=True))
    assert sorted(tmp_path.rglob("*")) == before
    assert command.execute(Console(quiet=True)) == 0
    assert AutoModelForCausalLM.from_pretrained(new).config.patterns()[0].window == 8
    assert not other_files or (new / "notes.txt").read_text() == "mine"
    assert (new / "README.md").read_text().count("# new\n") == 1
    assert not list(tmp_path.rglob(".partial*")) and not (new / "trainer").exists()


@pytest.mark.parametrize("context", [64, 10], ids=["within the context", "beyond it"])
@pytest.mark.parametrize("cache", [None, PiCache, PiStaticCache])
def test_a_padded_batch_passes_from_one_device_of_a_model_to_the_next(cache, context):
    """As with device_map="auto" on two GPUs: accelerate moves tensors among a layer's arguments, and no others."""
    model = convert(pretrained(max_position_embeddings=context), PiPattern(4, 3, 2, sinks=2), gate=True)
    decoder = model.model.model
    padded_over_two_devices(model, prompt(length=13), [decoder.layers[-1], decoder.norm], cache)
