import json
import math

import pytest
import torch
import transformers
from accelerate import dispatch_model
from small_models import padded_over_two_devices
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from pi_attention import PiPattern, coordinated_heads
from pi_attention.masks import dense_mask
from pi_attention.models import PiCache, PiConfig, PiForCausalLM, PiForMaskedLM, PiModel, PiStaticCache
from pi_attention.models.cache_argument import CACHE, takes_cache
from pi_attention.segments import segments_of_batch

ROTARY_ROUNDING = {"rtol": 1e-4, "atol": 1e-4}  # rotary embedding is relative, but its angles are fp32
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "gate": True,
}
CONFIGS = {
    "pi": {"window": 4, "period": 5, "skips": 3},
    "mixed": {"window": 4, "period": [3, 5, 7, 9], "skips": 2, "sinks": 2, "layer_patterns": ["pi", "local", "dense"]},
    "mass": {"window": 4, "period": 5, "skips": 3, "fusion": "mass", "qk_norm": True, "tie_word_embeddings": True},
    "phases": {
        "window": 3,
        "period": [4, 4, 6, 6],
        "skips": 3,
        "phase": [1, 3, 0, 5],
        "fusion": "mass",
        "layer_patterns": ["pi", {"period": 4, "skips": None, "phase": [0, 1, 2, 3]}, {"window": 5, "sinks": 1}],
    },
    "scores": {"window": 4, "period": 5, "skips": 3, "sinks": 1, "sink_logit": True, "softcap": 1.5},
    "no-gate": {"window": 4, "period": 5, "skips": 3, "gate": False, "layer_patterns": ["pi", {"period": 2}, "dense"]},
}


def config_of(name="pi", **more):
    return PiConfig(**SIZES | CONFIGS[name] | more)


def make(name="pi", **more):
    torch.manual_seed(0)
    model = PiForCausalLM(config_of(name, **more)).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 or "sink_logit" in name:
            torch.nn.init.normal_(p, std=0.25)
    return model.double()


@pytest.fixture(params=CONFIGS)
def model(request):
    return make(request.param)


def prompt(batch=2, length=60):
    return torch.randint(0, 64, (batch, length))


@pytest.mark.parametrize("split", [(60,), (1,) * 60, (13, 1, 1, 20, 5, 20)], ids=["whole", "tokens", "chunks"])
def test_cached_equals_uncached(model, split):
    ids = prompt()
    cache, logits = None, []
    for part in ids.split(split, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("name", ["pi", "mass", "no-gate"])
def test_the_library_s_own_cache_is_exact_too(name):
    model, ids = make(name), prompt()
    cache = DynamicCache(config=model.config)
    logits = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(7, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits)


def test_the_library_s_own_cache_is_refused_with_sinks():
    model = make("mixed")
    with pytest.raises(ValueError, match="sinks"):
        model(prompt(), past_key_values=DynamicCache(config=model.config))


def test_a_token_reaches_exactly_what_the_layers_hop():
    model = make("no-gate")
    embeddings = model.model.embed_tokens(prompt(1)).detach().requires_grad_()
    hidden = model(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True).hidden_states[-1]
    (grad,) = torch.autograd.grad(hidden[0, -1].sum(), embeddings)
    reached = {59}
    for pattern in reversed(model.config.patterns()):
        reached |= {k for q in reached for band in pattern.keys(q, 60) for k in band}
    assert set((grad[0].abs().sum(dim=-1) > 0).nonzero().flatten().tolist()) == reached


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_positions", [False, True])
def test_padding_changes_no_logit(model, side, with_positions):
    ids, pad = prompt(2, 40), 13
    mask = torch.ones(2, 40, dtype=torch.long)
    real = slice(pad, None) if side == "left" else slice(0, 40 - pad)
    mask[1, :] = 0
    mask[1, real] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0) if with_positions else None
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0], model(ids[:1]).logits[0])
    torch.testing.assert_close(logits[1, real], model(ids[1:, real]).logits[0], **ROTARY_ROUNDING)
    assert logits.isfinite().all()


@pytest.mark.parametrize("use_cache", [None, False])
def test_packed_documents_do_not_leak_by_default(model, use_cache):
    ids, lengths = prompt(1, 45), [12, 1, 32]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    separate = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    for mask in (None, torch.ones_like(ids)):
        packed = model(ids, position_ids=positions, attention_mask=mask, use_cache=use_cache).logits
        torch.testing.assert_close(packed, separate)
    by_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].int()
    torch.testing.assert_close(model(ids, segment_ids=by_ids).logits, separate, **ROTARY_ROUNDING)


def test_the_last_packed_document_can_be_continued(model):
    ids, lengths = prompt(1, 60), [22, 38]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cache = PiCache(model.config.patterns())
    logits = [
        model(ids[:, a:b], position_ids=positions[:, a:b], past_key_values=cache, use_cache=True).logits
        for a, b in [(0, 30), *((t, t + 1) for t in range(30, 60))]
    ]
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, 22:], model(ids[:, 22:]).logits)


@pytest.mark.parametrize(
    "mode", [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_generation_with_the_cache_equals_without(model, mode):
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"max_new_tokens": 50, "use_cache": use_cache, "pad_token_id": 0} | mode
        runs.append(model.generate(prompt(2, 9) * 0 + torch.arange(9), **options))
    assert torch.equal(*runs)


def test_left_padded_generation_equals_separate(model):
    ids, mask = prompt(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :17] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=40, pad_token_id=0)
    # with a mask, or a token of the prompt that is the padding's would be taken for padding
    alone = model.generate(ids[1:, 17:], attention_mask=mask[1:, 17:], max_new_tokens=40, pad_token_id=0)
    assert torch.equal(together[1, 17:], alone[0])


@pytest.mark.parametrize(
    ("row", "positions"),
    [("0011111100", None), ("1111111111", "0123456789"), ("0011111111", "1101234567"), ("1110001111", "0120000123")],
    ids=["both sides", "no padding", "positions of generate", "a document behind padding"],
)
def test_padding_beside_a_text_is_not_warned_of(row, positions, recwarn):
    mask, at = (None if x is None else torch.tensor([[*map(int, x)]]) for x in (row, positions))
    make()(prompt(1, 10), attention_mask=mask, position_ids=at)
    assert not [warning for warning in recwarn if "attention_mask" in str(warning.message)]


@pytest.mark.parametrize("positions", [None, "0123116789", "0123114567"])
def test_padding_inside_a_text_is_warned_of(positions):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
    at = None if positions is None else torch.tensor([[*map(int, positions)]])
    with pytest.warns(UserWarning, match="attention_mask has padding between tokens of a row"):
        make()(prompt(1, 10), attention_mask=mask, position_ids=at)
    with pytest.warns(UserWarning, match="attention_mask has padding between tokens of a row"):
        make().generate(prompt(1, 6), attention_mask=mask[:, :6], max_new_tokens=2)  # padded on the right


def test_a_mask_of_another_batch_is_refused():
    mask = torch.ones(2, 10)
    mask[1, :5] = 0
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 10\]"):
        make()(prompt(1, 10), attention_mask=mask)


def test_speculative_generation_equals_greedy(model):
    ids = prompt(1, 9).repeat(1, 4)
    greedy = model.generate(ids, max_new_tokens=40, pad_token_id=0, do_sample=False)
    lookup = model.generate(ids, max_new_tokens=40, pad_token_id=0, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(greedy, lookup)


def test_cache_memory_is_bounded_in_generation():
    model = make("pi")
    sizes = []
    for length in (100, 300):
        out = model.generate(prompt(1, 9), max_new_tokens=length, return_dict_in_generate=True, pad_token_id=0)
        assert isinstance(out.past_key_values, PiCache)
        sizes.append(out.past_key_values.nbytes)
    assert sizes[0] == sizes[1]


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, PiForCausalLM)
    ids = prompt()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.patterns() == model.config.patterns()
    reaches = [p.reach for p in config.patterns() if (p.reach or 1000) < 1000 and not p.sinks]
    assert config.sliding_window == (max(reaches) + 1 if reaches else None)


def test_a_checkpoint_without_gates_loads_with_a_fresh_gate(tmp_path):
    make("pi", gate=False).save_pretrained(tmp_path)
    config = PiConfig.from_pretrained(tmp_path, gate=True)
    loaded = PiForCausalLM.from_pretrained(tmp_path, config=config)
    gate = loaded.model.layers[0].self_attn.gate
    assert (gate.fc_out.weight == 0).all() and gate.fc_in.weight.abs().max() < 1
    torch.testing.assert_close(gate.fc_out.bias, torch.full((4,), math.log(4 / 3), dtype=gate.fc_out.bias.dtype))


def test_a_gate_without_skips_is_warned_of_and_costs_nothing():
    with pytest.warns(UserWarning, match="gate=True weighs skips, and no layer has any"):
        config = PiConfig(**SIZES, window=4, skips=0)
    assert not config.has_gates and config.sizes() == PiConfig(**SIZES | {"gate": False}, window=4, skips=0).sizes()
    assert config_of("mixed").has_gates and not config_of("no-gate").has_gates


def test_gradients_with_and_without_checkpointing(model):
    ids = prompt()
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_loss_is_the_mean_over_next_tokens():
    model, ids = make(), prompt()
    labels = ids.clone()
    labels[:, :10] = -100
    out = model(ids, labels=labels)
    want = torch.nn.functional.cross_entropy(out.logits[:, 9:-1].flatten(0, 1).float(), ids[:, 10:].flatten())
    torch.testing.assert_close(out.loss.float(), want)


def test_logits_to_keep():
    model, ids = make(), prompt()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3, 5])).logits, logits[:, [3, 5]])


def test_eager_is_the_reference(model):
    ids = prompt()
    logits = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, logits)
    assert model.model.layers[0].self_attn.impl == "reference"


def test_hidden_states_are_recorded():
    out = make()(prompt(), output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 60, 32)] * 4


def test_an_implementation_that_would_compute_something_else_is_refused():
    model = make()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="would not compute"):
        model(prompt())


def test_wrong_arguments_are_named():
    model = make()
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(prompt(), attention_mask=torch.ones(2, 1, 60, 60))
    with pytest.raises(ValueError, match="either input_ids"):
        model()
    with pytest.raises(ValueError, match="layer_patterns"):
        PiConfig(**SIZES, layer_patterns=["full"])
    with pytest.raises(TypeError, match="layer_patterns must be a list"):
        PiConfig(**SIZES, layer_patterns="dense")
    with pytest.warns(UserWarning, match="the last 1 are not used"):
        PiConfig(**SIZES | {"num_hidden_layers": 2}, layer_patterns=["local", "local", "dense"])
    with pytest.raises(ValueError, match="entries"):
        PiConfig(**SIZES, period=[3, 4])
    with pytest.raises(ValueError, match="phase has 2 entries but there are 4 query heads"):
        PiConfig(**SIZES, period=2, phase=[0, 1])
    with pytest.raises(ValueError, match=r"phase=\[0, 1\] needs a period"):
        PiConfig(**SIZES, phase=[0, 1])
    with pytest.raises(ValueError, match="phase=4 must be smaller than the period of its head, 4"):
        PiConfig(**SIZES, period=4, phase=4)
    with pytest.raises(ValueError, match=r"phase\[2\]=2 must be smaller"):
        PiConfig(**SIZES, period=4, layer_patterns=[{"period": 2, "phase": [0, 1, 2, 3]}])
    with pytest.raises(ValueError, match="'periods' is no field of a pattern"):
        PiConfig(**SIZES, layer_patterns=[{"periods": 2}])
    with pytest.raises(ValueError, match="fusion"):
        PiConfig(**SIZES, fusion="add")


@pytest.mark.parametrize("name", ["mixed", "phases"])
def test_config_survives_json(name):
    config = config_of(name)
    again = PiConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.patterns() == config.patterns() and again.to_dict() == config.to_dict()
    assert PiConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
    if name == "mixed":
        assert config.pattern == PiPattern(4, (3, 5, 7, 9), 2, sinks=2)


def test_heads_are_coordinated_where_no_period_is_given():
    for heads, phase in ((4, (0, 1, 2, 3)), (8, (0, 1, 2, 3) * 2), (3, (0, 1, 2)), (1, (0,))):
        config = PiConfig(hidden_size=48, num_attention_heads=heads, window=8, skips=5, sinks=1)
        assert config.pattern == coordinated_heads(8, 5, heads, sinks=1) and config.pattern.phase == phase
        assert not config.gate and PiConfig.from_dict(config.to_dict()).patterns() == config.patterns()
    assert PiConfig(**SIZES, period=128).pattern == PiPattern(32, 128, 112)
    assert PiConfig(**SIZES, skips=0).base_model_tp_plan and PiConfig(**SIZES, skips=0).pattern == PiPattern(32, 1, 0)
    layers = PiConfig(**SIZES, layer_patterns=["pi", {"period": 2}, {"window": 5}])
    assert [p.phase for p in PiConfig.from_dict(layers.to_dict()).patterns()] == [(0, 1, 2, 3), 0, (0, 1, 2, 3)]
    assert PiConfig(**SIZES, causal=False).pattern.phase == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="phase=1 needs a period"):
        PiConfig(**SIZES, phase=1)


def test_a_pattern_gives_a_config_its_fields():
    patterns = coordinated_heads(4, 3, heads=4, sinks=2), PiPattern(4, (5, 10, 5, 10), 2, causal=False, ring=True)
    for pattern in patterns:
        assert PiConfig(**SIZES, **pattern.to_dict()).patterns() == [pattern] * 3
    ring = PiConfig(**SIZES, **patterns[1].to_dict(), layer_patterns=["local", {"phase": (1, 2, 3, 4)}, "dense"])
    assert ring.patterns()[:2] == [
        PiPattern(4, 1, 0, causal=False, ring=True),
        PiPattern(4, (5, 10, 5, 10), 2, causal=False, ring=True, phase=(1, 2, 3, 4)),
    ]
    plain = PiConfig(**SIZES, window=4, period=5, skips=3, phase=2, layer_patterns=["pi", "local"])
    assert plain.patterns() == [PiPattern(4, 5, 3, phase=2), PiPattern(4, 1, 0), PiPattern(4, 5, 3, phase=2)]


def test_heads_that_differ_have_no_tensor_parallel_plan_of_transformers():
    for differ, same in (
        ({"period": [4, 5, 6, 7]}, {"period": 4}),
        ({"period": 4, "phase": [0, 1, 2, 3]}, {"period": 4, "phase": 3}),
    ):
        assert PiConfig(**SIZES, **differ).base_model_tp_plan is None
        assert PiConfig(**SIZES, layer_patterns=["pi", differ]).base_model_tp_plan is None
        assert PiForCausalLM(PiConfig(**SIZES, **differ)).tp_plan == {}
        assert PiForMaskedLM(PiConfig(**SIZES, **differ, causal=False)).tp_plan == {}
        plan = PiForCausalLM(PiConfig(**SIZES, **same)).tp_plan
        assert {"lm_head", "model.layers.*.self_attn.q_proj"} <= set(plan)


@pytest.mark.parametrize("name", ["pi", "mixed"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_shapes_are_found_on_the_device_without_values(name, use_cache):
    with torch.device("meta"):
        model, ids = PiForCausalLM(config_of(name)), torch.zeros(2, 12, dtype=torch.long)
        inputs = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(12)[None]}
    out = model(ids, labels=ids, use_cache=use_cache, **inputs)
    out.loss.backward()
    assert out.logits.shape == (2, 12, 64) and model.model.embed_tokens.weight.grad.is_meta


def test_plain_batches_need_no_segments():
    assert segments_of_batch(None, None, 0, 2, 5) is None
    assert segments_of_batch(torch.ones(2, 8), torch.arange(3, 8)[None], 3, 2, 5) is None
    packed = segments_of_batch(None, torch.tensor([[0, 1, 0, 1, 2]]), 0, 1, 5)
    assert packed.tolist() == [[1, 1, 2, 2, 2]]


def test_compiled_model_agrees():
    torch._dynamo.reset()
    model = make().float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (40, 50, 60):
        ids = prompt(2, length)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    whole = compiled(ids, use_cache=True)  # makes the cache in the graph
    torch.testing.assert_close(whole.logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert whole.past_key_values.get_seq_length() == 60


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"])
def test_heads_are_found_by_the_auto_classes_and_reload(head, tmp_path):
    config = config_of(causal=head != "MaskedLM", pad_token_id=0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    assert type(model).__name__ == f"PiFor{head}"
    ids = prompt()
    labels = {"SequenceClassification": torch.zeros(2, dtype=torch.long), "QuestionAnswering": None}
    targets = labels.get(head, torch.ones(2, 60, dtype=torch.long))
    out = model(ids, labels=targets) if targets is not None else model(ids)
    assert targets is None or out.loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, f"AutoModelFor{head}").from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids)[0], model(ids)[0])


def test_a_bidirectional_model_sees_both_sides_and_no_causal_head_takes_it():
    model = PiModel(config_of(causal=False)).double().eval()
    ids = prompt(1)
    changed = ids.clone()
    changed[0, 30] = (ids[0, 30] + 1) % 64
    moved = (model(ids)[0] - model(changed)[0]).abs().amax(dim=-1)[0] > 0
    assert moved[:30].any() and moved[31:].any()
    with pytest.raises(ValueError, match="causal"):
        PiForCausalLM(config_of(causal=False))
    with pytest.raises(ValueError, match="bidirectional"):
        PiForMaskedLM(config_of())


def test_attention_maps_are_those_of_the_output():
    config = config_of()
    config._attn_implementation = "eager"
    model = PiForCausalLM(config).double().eval()
    out = model(prompt(), output_attentions=True)
    assert len(out.attentions) == config.num_hidden_layers
    for attention, pattern in zip(out.attentions, config.patterns(), strict=True):
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
        assert not attention[~dense_mask(pattern, 60, 60).expand_as(attention)].any()


def test_scaled_rotary_embedding_stretches_positions():
    plain, scaled = config_of(), config_of(rope_parameters={"rope_type": "linear", "factor": 2.0})
    torch.manual_seed(0)
    model = PiForCausalLM(plain).eval()
    other = PiForCausalLM(scaled).eval()
    other.load_state_dict(model.state_dict())
    ids, one = prompt(1), torch.zeros(1, 60, dtype=torch.int32)
    want = model(ids, segment_ids=one, use_cache=False).logits
    even = torch.arange(0, 120, 2)[None]
    got = other(ids, position_ids=even, segment_ids=one, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_masks_of_four_dimensions_are_refused():
    with pytest.raises(ValueError, match="padding mask of all tokens"):
        PiForCausalLM(config_of())(prompt(1, 10), attention_mask=torch.ones(1, 1, 10, 10))


def test_heads_that_do_not_divide_the_features_are_named():
    with pytest.raises(ValueError, match="hidden_size=60 must be a multiple of num_attention_heads=7"):
        PiConfig(hidden_size=60, num_attention_heads=7)
    assert PiConfig(hidden_size=60, num_attention_heads=7, head_dim=8).head_dim == 8


@pytest.mark.parametrize("given", ["labels", "shift_labels"])
@pytest.mark.parametrize("name", ["pi", "mass"])
def test_the_loss_by_slices_is_the_loss_and_its_logits_never_exist_together(name, given):
    ids = prompt()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    found = []
    for size in (None, 7):
        model, seen = make(name, loss_slice=size).train(), []
        model.lm_head.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out.shape[0]))
        if size is None:
            logits = model(ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten())
        elif given == "labels":
            out = model(ids, labels=labels, use_cache=False)
            loss = out.loss
            assert out.logits is None
        else:
            out = model(ids, labels=ids, shift_labels=shifted, num_items_in_batch=torch.tensor(3), use_cache=False)
            loss = out.loss * 3 / (shifted != -100).sum()
        loss.backward()
        assert size is None or (max(seen) == size and sum(seen) == 2 * ids.numel())  # each again in the backward pass
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert model(ids).logits.shape == (2, 60, 64)
    with pytest.raises(ValueError, match="loss_slice must be at least 1, got 0"):
        make(name, loss_slice=0)


def test_a_cache_that_holds_keys_is_initialized():
    model = make()
    cache = model.new_cache()
    assert not cache.is_initialized
    model(torch.randint(model.config.vocab_size, (1, 9)), past_key_values=cache, use_cache=True)
    assert cache.is_initialized


def test_a_cache_goes_by_the_library_s_name_too(monkeypatch):
    small = make("pi")
    cache = small.new_cache()
    out = small(prompt(1, 9), use_cache=True, **{CACHE: cache})
    assert getattr(out, CACHE) is cache and cache.get_seq_length() == 9
    monkeypatch.setattr("pi_attention.models.cache_argument.CACHE", "cache")
    named = takes_cache(lambda self, past_key_values=None: past_key_values)
    assert named(small, cache=cache) is named(small, past_key_values=cache) is named(small, cache) is cache
    assert named(small, cache=None, past_key_values=cache) is named(small, cache=cache, past_key_values=None) is cache
    assert named(small, cache=None) is None
    with pytest.raises(TypeError, match="are one argument"):
        named(small, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_model_on_several_devices_keeps_its_cache(model, offloaded, tmp_path):
    """As with device_map="auto": hooks move what each layer gets to its device, but the cache stays the same one."""
    ids = prompt(length=13)
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    places = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places |= {f"layers.{layer}": "disk" if offloaded and layer == 1 else "cpu" for layer in range(3)}
    places = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    if offloaded:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off")
    else:
        skipped = model._skip_keys_device_placement
        model = dispatch_model(model, places, main_device="cpu", force_hooks=True, skip_keys=skipped)
    with torch.no_grad():
        assert getattr(model(ids, use_cache=True), CACHE).get_seq_length() == 13
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), want)


@pytest.mark.parametrize("cache", [None, PiCache, PiStaticCache])
def test_a_padded_batch_passes_from_one_device_to_the_next(model, cache):
    """Tensors that layers share are made on the first device, and the last layers are on another one."""
    past = padded_over_two_devices(model, prompt(length=13), [model.model.layers[-1], model.model.norm], cache)
    assert past is None or past.get_seq_length() == 13
