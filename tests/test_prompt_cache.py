"""A prompt that was read is saved, and goes on in a later process as if that had read it; other files are refused."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import telling
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from pi_attention import PiPattern
from pi_attention.convert import convert
from pi_attention.data.tokenizers import byte_tokenizer
from pi_attention.models import PiCache, PiConfig, PiForCausalLM, load_prompt_cache, save_prompt_cache
from pi_attention.tasks.generation import generate_text

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
PLAIN = {"window": 5, "period": 4, "skips": 3}
GREEDY = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}


def own(**settings):
    return lambda: PiForCausalLM(PiConfig(**SIZES | PLAIN | {"gate": True} | settings))


def llama(context, **pattern):
    config = LlamaConfig(**SIZES, max_position_embeddings=context)
    return lambda: convert(LlamaForCausalLM(config), PiPattern(**PLAIN | pattern), gate=True)


MODELS = {
    "pi": own(),
    "pi: sinks": own(sinks=3),
    "pi: periods and phases of heads": own(period=[1, 5, 16, 7], phase=[0, 2, 3, 1], skips=4, sinks=2),
    "pi: layers of many kinds": own(layer_patterns=["local", {"sinks": 3}, "dense"], num_hidden_layers=3),
    "pi: a window of one token": own(window=1, period=1, skips=0),
    "pi: skips without end": own(skips=None, sinks=1),
    "pi: bytes": own(vocab_size=257, sinks=3, pad_token_id=256),
    "llama": llama(400),
    "llama: sinks": llama(400, sinks=3),
    "llama: sinks that move": llama(30, sinks=3),
}


def model_of(name):
    torch.manual_seed(0)
    return telling(MODELS[name]())


def batch_of(length, padded=5):
    ids = torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, :padded] = 0
    return ids * mask, mask


def read(model, ids, mask=None, **options):
    """The cache of a prompt."""
    return model.generate(ids, attention_mask=mask, max_new_tokens=1, **GREEDY, **options).past_key_values


@pytest.fixture
def saved(tmp_path):
    """A model, and the file of a prompt that it has read."""
    model, (ids, _) = model_of("pi: sinks"), batch_of(30)
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(read(model, ids), path, model, ids)
    return model, path


@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "pi: bytes"])
def test_a_saved_prompt_goes_on_as_one_generate_of_the_whole(name, padded, tmp_path):
    model, path = model_of(name), tmp_path / "new" / "prompt.safetensors"
    ids, mask = batch_of(60, padded)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=20, **GREEDY).sequences
    assert not torch.equal(whole[0, 60:], whole[1, 60:])
    cache = read(model, ids[:, :41], mask[:, :41], prefill_chunk_size=7)
    save_prompt_cache(cache, path, model, ids[:, :41], mask[:, :41] if padded else None)
    again = model_of(name)
    for max_length in (None, None if "move" in name else 80):
        prompt = load_prompt_cache(path, again, max_length=max_length)
        assert torch.equal(prompt.input_ids, ids[:, :41]) and prompt.cache.get_seq_length() == 41
        assert (prompt.attention_mask is None) == (not padded)
        got = again.generate(ids, attention_mask=mask, past_key_values=prompt.cache, max_new_tokens=20, **GREEDY)
        assert torch.equal(got.sequences, whole)


def test_a_static_cache_and_a_text_that_was_generated_go_on(tmp_path):
    model, path = model_of("llama: sinks"), tmp_path / "text"
    ids, mask = batch_of(30)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=40, **GREEDY).sequences
    out = model.generate(ids, attention_mask=mask, max_new_tokens=15, cache_implementation="static", **GREEDY)
    of_text = torch.cat([mask, mask.new_ones(2, 15)], dim=1)
    save_prompt_cache(out.past_key_values, path, model, out.sequences, of_text)
    prompt = load_prompt_cache(path, model)
    assert prompt.input_ids.shape[1] == prompt.cache.get_seq_length() + 1
    more = {"attention_mask": prompt.attention_mask, "past_key_values": prompt.cache, "max_new_tokens": 25}
    assert torch.equal(model.generate(prompt.input_ids, **more, **GREEDY).sequences, whole)


@pytest.mark.parametrize("name", ["pi: sinks", "llama: sinks"])
def test_packed_documents_go_on_with_their_last(name, tmp_path):
    model, path = model_of(name), tmp_path / "packed"
    ids, _ = batch_of(70)
    position = torch.cat([torch.arange(22), torch.arange(48)])[None].expand(2, -1)
    with torch.no_grad():
        whole = model(ids, position_ids=position).logits[:, 40:]
        cache = model(ids[:, :40], position_ids=position[:, :40], use_cache=True).past_key_values
        save_prompt_cache(cache, path, model, ids[:, :40])
        cache = load_prompt_cache(path, model).cache
        for end in (41, 50, 70):
            past = cache.get_seq_length()
            new = model(ids[:, past:end], position_ids=position[:, past:end], past_key_values=cache).logits
            torch.testing.assert_close(new, whole[:, past - 40 : end - 40], rtol=1e-4, atol=1e-4)


def test_speculation_goes_on_from_a_saved_prompt(saved):
    model, path = saved
    prompt = load_prompt_cache(path, model)
    ids = torch.cat([prompt.input_ids[:1], torch.tensor([[7, 8, 7]])], dim=1)
    whole = model.generate(ids, max_new_tokens=40, **GREEDY).sequences
    prompt.cache.batch_select_indices(torch.tensor([0]))
    prompt.cache.activate_past_recording()
    more = {"past_key_values": prompt.cache, "max_new_tokens": 40, "prompt_lookup_num_tokens": 4}
    assert torch.equal(model.generate(ids, **more, **GREEDY).sequences, whole)


def test_another_process_goes_on(saved, tmp_path):
    model, path = saved
    model.save_pretrained(tmp_path / "model")
    program = f"""
import torch
from pi_attention.models import PiForCausalLM, load_prompt_cache
model = PiForCausalLM.from_pretrained({str(tmp_path / "model")!r})
prompt = load_prompt_cache({str(path)!r}, model)
ids = torch.cat([prompt.input_ids, torch.full((2, 1), 7)], dim=1)
text = model.generate(ids, past_key_values=prompt.cache, max_new_tokens=20, do_sample=False, pad_token_id=0)
print(text.tolist())
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    ids = torch.cat([batch_of(30)[0], torch.full((2, 1), 7)], dim=1)
    assert printed.strip() == str(model.generate(ids, max_new_tokens=20, **GREEDY).sequences.tolist())


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("pi: layers of many kinds", None),
        ("pi: layers of many kinds", "static"),
        ("llama: sinks", "static"),
        ("llama: sinks that move", None),
    ],
)
def test_a_prompt_in_chunks_is_the_whole_prompt(name, implementation):
    model, (ids, mask) = model_of(name), batch_of(60)
    options = {"attention_mask": mask, "max_new_tokens": 20, "cache_implementation": implementation}
    whole = model.generate(ids, **options, **GREEDY).sequences
    for size in (1, 13, 100):
        assert torch.equal(model.generate(ids, **options, prefill_chunk_size=size, **GREEDY).sequences, whole)


def test_a_file_holds_what_later_tokens_see_whatever_the_length_of_the_prompt(tmp_path):
    model, sizes = model_of("pi: sinks"), []
    for length in (100, 400):
        ids, _ = batch_of(length)
        save_prompt_cache(read(model, ids), tmp_path / "file", model, ids)
        with safe_open(tmp_path / "file", framework="pt") as file:
            sizes.append({name: file.get_slice(name).get_shape() for name in file.keys() if name != "input_ids"})  # noqa: SIM118
    assert sizes[0] == sizes[1]
    assert sizes[0]["layers.0.states"] == [2, 2, 2, 3 + model.config.pattern.reach, 8]


OTHERS = {
    "model PiForCausalLM": llama(400),
    'pattern .*"window": 5.*"window": 6': own(window=6, sinks=3),
    "dtype float32, .* bfloat16": lambda: own(sinks=3)().bfloat16(),
    "rms_norm_eps=1e-06, .* 0.001": own(sinks=3, rms_norm_eps=1e-3),
    "vocab_size=99": own(sinks=3, vocab_size=100),
    "other weights": own(sinks=3),
}


@pytest.mark.parametrize("difference", OTHERS)
def test_the_cache_of_another_model_is_refused_by_what_differs(difference, saved):
    with pytest.raises(ValueError, match=f"cache of another model, with {difference}"):
        load_prompt_cache(saved[1], OTHERS[difference]())


def test_a_step_of_training_makes_another_model(saved):
    model, path = saved
    model.save_pretrained(path.parent)
    load_prompt_cache(path, PiForCausalLM.from_pretrained(path.parent, attn_implementation="eager"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.001)
    with pytest.raises(ValueError, match="other weights"):
        load_prompt_cache(path, model)


def test_damaged_and_foreign_files_are_refused(saved):
    model, path = saved
    whole, other = path.read_bytes(), path.with_name("other")
    for end in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        other.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"other' is damaged, or no prompt cache"):
            load_prompt_cache(other, model)
    start = 8 + int.from_bytes(whole[:8], "little")
    for place, what in ((len(whole) - 1, "bytes of"), (start, "bytes of"), (whole.index(b"length"), "header has")):
        other.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(
            ValueError, match=f"other' is damaged, (its )?(the )?{what}.* changed: read the prompt again"
        ):
            load_prompt_cache(other, model)
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="is no prompt cache: give a file that save_prompt_cache wrote"):
        load_prompt_cache(other, model)
    save_file({"x": torch.zeros(2)}, other, {"format": "pi-attention prompt cache 2"})
    with pytest.raises(ValueError, match="is a pi-attention prompt cache 2, and this version reads"):
        load_prompt_cache(other, model)
    torch.save({"x": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="is damaged, or no prompt cache"):
        load_prompt_cache(other, model)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_prompt_cache(path.with_name("none"), model)


def test_an_edit_of_any_column_makes_another_model(tmp_path):
    model = PiForCausalLM(PiConfig(**SIZES | PLAIN | {"vocab_size": 500, "gate": True})).eval()
    ids, path = batch_of(9)[0], tmp_path / "file"
    save_prompt_cache(read(model, ids), path, model, ids)
    weight = model.model.embed_tokens.weight
    for columns in (slice(0, None, 2), slice(1, None, 2), slice(31, None), slice(0, 1)):
        before = weight.detach().clone()
        with torch.no_grad():
            weight[:, columns] += 0.5
        with pytest.raises(ValueError, match="other weights"):
            load_prompt_cache(path, model)
        weight.data.copy_(before)
    load_prompt_cache(path, model)


@pytest.mark.parametrize("name", ["pi: sinks", "llama: sinks"])
def test_what_is_no_causal_model_or_no_tokens_is_named(name, tmp_path):
    model, ids, path = model_of(name), batch_of(9)[0], tmp_path / "file"
    cache = read(model, ids)
    for part in (model.model, None):
        with pytest.raises(TypeError, match=f"model is a {type(part).__name__}: pass the causal model"):
            save_prompt_cache(cache, path, part, ids)
    for tokens in (None, [[1, 2]]):
        with pytest.raises(TypeError, match=rf"input_ids must be a Tensor \[B, T\], got {type(tokens).__name__}"):
            save_prompt_cache(cache, path, model, tokens)
    assert not path.exists()
    save_prompt_cache(cache, path, model, ids)
    for part in (model.model, None):
        with pytest.raises(TypeError, match=f"model is a {type(part).__name__}: pass the causal model"):
            load_prompt_cache(path, part)


@pytest.mark.parametrize(
    ("setting", "value"), [("cache_implementation", "static"), ("num_beams", 2), ("num_return_sequences", 2)]
)
def test_settings_that_no_prompt_cache_serves_are_named_before_a_file_is_written(setting, value, tmp_path):
    model, path = model_of("pi: bytes"), tmp_path / "prompt"
    setattr(model.generation_config, setting, value)
    with pytest.raises(ValueError, match=f"prompt_cache cannot serve {setting}={value!r} of the model's generation"):
        generate_text(model, byte_tokenizer(), "a manual", max_new_tokens=2, prompt_cache=path)
    assert not path.exists()


def test_errors_of_a_file_name_the_argument_that_was_given(saved):
    model, path = saved
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"prompt_cache='.*' is damaged"):
        generate_text(model_of("pi: bytes"), byte_tokenizer(), "a manual", prompt_cache=path)
    with pytest.raises(ValueError, match=r"^path='.*' is damaged"):
        load_prompt_cache(path, model)


def test_what_cannot_be_saved_is_refused_and_the_earlier_file_stays(saved, monkeypatch):
    model, path = saved
    ids, before = batch_of(30)[0], path.read_bytes()
    cache = read(model, ids)
    with pytest.raises(TypeError, match="cache is a DynamicCache: pass a PiCache"):
        save_prompt_cache(DynamicCache(), path, model, ids)
    with pytest.raises(ValueError, match="cache is empty"):
        save_prompt_cache(model.new_cache(), path, model, ids)
    with pytest.raises(ValueError, match=r"input_ids \(2, 29\) must be all the tokens of the cache, \[2, 30\]"):
        save_prompt_cache(cache, path, model, ids[:, 1:])
    with pytest.raises(ValueError, match="of the shape of input_ids"):
        save_prompt_cache(cache, path, model, ids, torch.ones(2, 29))
    with pytest.raises(ValueError, match="keeps the keys of"):
        save_prompt_cache(PiCache(own()().config.patterns()), path, model, ids)
    with pytest.raises(ValueError, match="is no file, but a folder"):
        save_prompt_cache(cache, path.parent, model, ids)

    def fails(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pi_attention.models.prompt_cache.save_file", fails)
    with pytest.raises(OSError, match="No space"):
        save_prompt_cache(cache, path, model, ids)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_cache_without_room_is_refused_when_it_is_loaded(saved):
    model, path = saved
    with pytest.raises(ValueError, match="max_length=30 leaves no room beside the 30 tokens"):
        load_prompt_cache(path, model, max_length=30)
    for wrong, error in ((0, ValueError), (-1, ValueError), (80.5, TypeError), ("80", TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"max_length must be .*{wrong!r}"):
            load_prompt_cache(path, model, max_length=wrong)
    ids, _ = batch_of(20)
    model.generate(ids, max_new_tokens=2, cache_implementation="static")  # no wrong size was kept
    moving = model_of("llama: sinks that move")
    save_prompt_cache(read(moving, ids), path, moving, ids)
    with pytest.raises(NotImplementedError, match="context of 30 tokens only"):
        load_prompt_cache(path, moving, max_length=40)


def test_a_text_is_the_same_with_a_file_of_its_prompt_that_is_new_or_there(tmp_path):
    model, tokenizer, path = model_of("pi: bytes"), byte_tokenizer(), tmp_path / "prompt"

    def text(prompt, **more):
        return generate_text(model, tokenizer, prompt, max_new_tokens=20, **more).text

    first, longer = "the manual of " * 5, "the manual of " * 5 + "what?"
    for temperature in (0, 1.0):
        path.unlink(missing_ok=True)
        for prompt in (first, first, longer):
            given = {"temperature": temperature, "seed": 3}
            assert text(prompt, **given, prompt_cache=path) == text(prompt, **given)
    with pytest.raises(ValueError, match=r"is of another text: let the prompt begin with the 69 tokens in it"):
        text("a manual of " * 9, prompt_cache=path)
    with pytest.raises(ValueError, match="prompt has one token"):
        text("a", prompt_cache=tmp_path / "other")
