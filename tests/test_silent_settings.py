"""Settings that say one thing and would do another: averages, sizes, layouts, words of configurations."""

import time
from importlib import import_module

import pytest
import torch
from test_convert import PATTERN, pretrained, prompt
from torch import nn
from transformers import AutoConfig, GenerationMixin, Trainer, TrainingArguments

from pi_attention import PiPattern, pi_attention, segments_from_cu_seqlens, segments_from_mask
from pi_attention.convert import convert, register
from pi_attention.models import (
    PiCache,
    PiConfig,
    PiForCausalLM,
    PiForMaskedLM,
    PiForSequenceClassification,
    PiForTokenClassification,
    PiStaticCache,
)
from pi_attention.pattern import MOST_TOKENS

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
BASE = SIZES | {"window": 3, "period": 4, "skips": 2, "gate": True}


def rows(kind, count=8):
    found = []
    for i in range(count):
        ids = torch.randint(1, 50, (24,))
        labels = ids % 2 if kind is PiForTokenClassification else ids.clone()
        labels[: 3 * i] = -100
        if kind is PiForSequenceClassification:
            labels = torch.tensor(i % 2)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def step(kind, data, batch, accumulate, folder):
    torch.manual_seed(0)
    model = kind(PiConfig(**BASE, causal=kind is not PiForMaskedLM, classifier_dropout=0.0))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=1e9,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        lr_scheduler_type="constant",
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return model.state_dict()


@pytest.mark.parametrize("kind", [PiForCausalLM, PiForMaskedLM, PiForTokenClassification, PiForSequenceClassification])
@pytest.mark.parametrize(("batch", "accumulate"), [(2, 4), (1, 8), (3, 3)])
def test_accumulated_batches_are_the_batch(kind, batch, accumulate, tmp_path):
    data = rows(kind)
    whole, parts = step(kind, data, 8, 1, tmp_path), step(kind, data, batch, accumulate, tmp_path)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-5, atol=1e-6)


def test_a_part_without_labels_has_no_loss_and_a_gradient():
    model = PiForTokenClassification(PiConfig(**BASE)).eval()
    ids = torch.randint(1, 50, (2, 9))
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=5).loss
    loss.backward()
    assert loss == 0 and model.score.weight.grad.abs().max() == 0
    assert model(input_ids=ids, labels=ids % 2, return_dict=False)[0] == model(input_ids=ids, labels=ids % 2).loss


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("segmented", [False, True])
def test_more_sinks_than_tokens_are_as_many_as_tokens(impl, segmented):
    query = torch.randn(1, 2, 40, 8)
    ids = segments_from_mask(torch.tensor([[0] * 3 + [1] * 37])) if segmented else None
    many, all_of_them = (
        pi_attention(query, query, query, PiPattern(4, 4, 2, sinks=sinks), segment_ids=ids, impl=impl)
        for sinks in (2**40, 40)
    )
    torch.testing.assert_close(many, all_of_them)


def test_the_cost_of_sinks_follows_the_length():
    query = torch.randn(1, 2, 256, 16)
    ids = segments_from_mask(torch.tensor([[0] * 3 + [1] * 253]))
    taken = []
    for sinks in (256, 200_000):
        begun = time.perf_counter()
        pi_attention(query, query, query, PiPattern(16, 16, 4, sinks=sinks), segment_ids=ids)
        taken.append(time.perf_counter() - begun)
    assert taken[1] < 20 * taken[0] + 1  # 800 times the memory otherwise


def test_a_static_cache_has_no_slots_for_sinks_that_cannot_be_forgotten():
    config = PiConfig(**BASE, sinks=10**6)
    cache = PiStaticCache(config.patterns(), 50)
    assert cache.layers[0].storage.slots == 50
    model, ids = PiForCausalLM(config).eval(), torch.randint(1, 50, (1, 40))
    got = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, 18], dim=1)], dim=1)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ((MOST_TOKENS + 1, 1, 0), "window"),
        ((4, MOST_TOKENS + 1, 1), "period"),
        ((4, (2, 2**70), 1), "period"),
        ((4, 2**40, 2**40), "reach"),
        ((4, 4, 2**63), "reach"),
    ],
)
def test_what_positions_cannot_count_is_refused_where_the_pattern_is_made(fields, name):
    with pytest.raises(ValueError, match=rf"{name}=\d+ is beyond 2\*\*62 tokens"):
        PiPattern(*fields)
    with pytest.raises(ValueError, match="sinks"):
        PiPattern(4, 4, 1, sinks=2**63)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize(
    "pattern",
    [PiPattern(2**62, 1, 0), PiPattern(4, 2**62, 1), PiPattern(4, 2**31 + 5, 7), PiPattern(4, 4, 2**58, sinks=2**61)],
    ids=str,
)
def test_large_fields_compute(pattern, impl):
    query = torch.randn(1, 2, 20, 8)
    out = pi_attention(query, query, query, pattern, impl=impl)
    small = PiPattern(
        *(min(x, 1000) for x in (pattern.window, pattern.period, pattern.skips)), sinks=min(pattern.sinks, 99)
    )
    torch.testing.assert_close(out, pi_attention(query, query, query, small, impl="reference"))


def test_tensors_of_other_layouts_are_refused_by_name():
    query = torch.randn(2, 2, 10, 8)
    jagged = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 5)], layout=torch.jagged)
    ragged = torch.nested.nested_tensor([torch.randn(2, n, 8) for n in (3, 5)])
    for wrong, kind in ((jagged, "nested"), (ragged, "nested"), (query.to_sparse(), "sparse_coo")):
        with pytest.raises(TypeError, match=rf"query is a .*{kind} tensor.*segments_from_cu_seqlens"):
            pi_attention(wrong, query, query, PATTERN)
        with pytest.raises(TypeError, match=rf"value is a .*{kind} tensor"):
            pi_attention(query, query, wrong, PATTERN)
    with pytest.raises(TypeError, match=r"gate is a .*sparse_coo"):
        pi_attention(query, query, query, PATTERN, gate=torch.zeros(2, 2, 10).to_sparse())
    with pytest.raises(TypeError, match=r"segment_ids is a .*sparse_coo"):
        pi_attention(query, query, query, PATTERN, segment_ids=torch.ones(2, 10, dtype=torch.int32).to_sparse())


def test_the_older_name_of_the_scaling_takes_the_base_too():
    config = PiConfig(**BASE, rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=1e6)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    assert config.rope_theta == 1e6


def test_rope_theta_of_a_saved_configuration_is_one_setting(tmp_path):
    PiConfig(**BASE).save_pretrained(tmp_path)
    for config in (
        PiConfig.from_pretrained(tmp_path, rope_theta=1e6),
        AutoConfig.from_pretrained(tmp_path, rope_theta=1e6),
        PiConfig(**BASE, rope_theta=1e6),
        PiConfig(**BASE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    ):
        assert config.rope_theta == config.rope_parameters["rope_theta"] == 1e6
        frequencies = PiForCausalLM(config).model.rotary_emb.inv_freq
        torch.testing.assert_close(frequencies[1], torch.tensor(1e6 ** (-2 / 8)))
        config.save_pretrained(tmp_path / "again")
        assert PiConfig.from_pretrained(tmp_path / "again").rope_theta == 1e6
    assert PiConfig(**BASE).rope_theta == 1e4
    config = PiConfig(**BASE)
    config.rope_theta = 5e5
    assert config.rope_parameters["rope_theta"] == 5e5
    with pytest.raises(ValueError, match="one setting"):
        PiConfig(**BASE, rope_theta=1e4, rope_parameters={"rope_theta": 1e6})


def test_a_layer_with_sinks_is_not_called_sliding():
    assert PiConfig(**BASE).layer_types == ["sliding_attention"] and PiConfig(**BASE).sliding_window == 9
    with_sinks = PiConfig(**BASE, sinks=2)
    assert with_sinks.layer_types == ["full_attention"] and with_sinks.sliding_window is None
    mixed = PiConfig(**BASE | {"num_hidden_layers": 2}, layer_patterns=["pi", {"sinks": 3}, "dense"][:2])
    assert mixed.layer_types == ["sliding_attention", "full_attention"]


def test_continuous_batching_is_refused_for_a_model_that_only_names_us():
    register(PATTERN)
    model = pretrained().float()
    model.set_attn_implementation("pi")
    with pytest.raises(NotImplementedError, match='attn_implementation="pi": continuous batching'):
        model.generate_batch([[3, 4, 5]])
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.init_continuous_batching()
    register(PATTERN)  # once is enough
    assert GenerationMixin.init_continuous_batching.refuses == "pi"


class Quantised(nn.Linear):
    """A projection whose weights are stored in integers, as bitsandbytes and others store them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.step = float(linear.weight.abs().max()) / 127
        stored = (linear.weight.detach() / self.step).round().to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step)


def quantised(dtype):
    model = pretrained().to(dtype)
    for module in list(model.modules()):
        if hasattr(module, "q_proj"):
            module.q_proj = Quantised(module.q_proj)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_of_a_quantised_model_takes_its_compute_dtype(dtype):
    model, ids = quantised(dtype), prompt()
    converted = convert(model, PATTERN, gate=True)
    gates = [parameter for name, parameter in converted.named_parameters() if "pi_gate" in name]
    assert gates and {gate.dtype for gate in gates} == {dtype}
    assert converted(ids).logits.isfinite().all()
    assert converted.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 43)


@pytest.mark.parametrize("where", ["gates.FusionGate", "conversion.PiConvertedConfig", "model.initialise_gates_of"])
def test_a_conversion_that_fails_changes_nothing(where, monkeypatch):
    model, ids = pretrained(), prompt()
    want, before = model(ids).logits, dict(vars(model.config))
    modules = [name for name, _ in model.named_modules()]
    monkeypatch.setattr(f"pi_attention.convert.{where}", fail_later(where))
    with pytest.raises(TypeError, match="later"):
        convert(model, PATTERN, gate=True)
    monkeypatch.undo()
    assert dict(vars(model.config)) == before
    assert [name for name, _ in model.named_modules()] == modules
    torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0)
    assert convert(model, PATTERN, gate=True)(ids).logits.isfinite().all()


def fail_later(where):
    """Raise; of the gates, the second one, when the first has been added."""
    module, name = where.split(".")
    usual, calls = getattr(import_module(f"pi_attention.convert.{module}"), name), []

    def replacement(*args, **kwargs):
        calls.append(args)
        if where != "gates.FusionGate" or len(calls) == 2:
            raise TypeError("later")
        return usual(*args, **kwargs)

    return replacement


def test_a_changed_scaling_keeps_the_base_and_two_bases_are_refused(tmp_path):
    PiForCausalLM(PiConfig(**BASE, rope_theta=1e5)).save_pretrained(tmp_path)
    linear = {"rope_type": "linear", "factor": 2.0}
    for kind in (PiConfig, AutoConfig, PiForCausalLM):

        def parameters(kind=kind, **changes):
            found = kind.from_pretrained(tmp_path, **changes)
            return getattr(found, "config", found).rope_parameters

        assert parameters() == {"rope_type": "default", "rope_theta": 1e5}
        assert parameters(rope_parameters=linear) == linear | {"rope_theta": 1e5}
        assert parameters(rope_scaling=linear) == linear | {"rope_theta": 1e5}
        assert parameters(rope_parameters=linear, rope_theta=7.0) == linear | {"rope_theta": 7.0}
        assert parameters(rope_parameters=linear | {"rope_theta": 7.0}, rope_theta=7.0)["rope_theta"] == 7.0
        for name in ("rope_parameters", "rope_scaling"):
            with pytest.raises(ValueError, match=r"rope_theta=8\.0 and 7\.0 in rope_parameters are one setting"):
                parameters(rope_theta=8.0, **{name: linear | {"rope_theta": 7.0}})
    model = PiForCausalLM.from_pretrained(tmp_path, rope_parameters=linear)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq[1], torch.tensor(1e5 ** (-2 / 8) / 2))


@pytest.mark.parametrize(
    "make", [lambda: PiForCausalLM(PiConfig(**BASE)), lambda: convert(pretrained().float(), PATTERN, gate=True)]
)
def test_inputs_of_a_model_are_dense_tensors_of_the_usual_kinds(make):
    model, ids = make(), torch.ones(1, 3, dtype=torch.long)
    parts = [torch.arange(3), torch.arange(5)]
    for layout in (torch.jagged, torch.strided):
        with pytest.raises(TypeError, match=r"input_ids is a nested tensor: pass a dense one \[B, T\]"):
            model(torch.nested.nested_tensor(parts, layout=layout))
        with pytest.raises(TypeError, match=r"inputs is a nested tensor: pass a dense one \[B, T\]"):
            model.generate(torch.nested.nested_tensor(parts, layout=layout), max_new_tokens=2)
    with pytest.raises(TypeError, match=r"attention_mask is a torch\.sparse_coo tensor"):
        model(ids, attention_mask=torch.ones(1, 3).to_sparse())
    for wrong, error, words in (
        ({"input_ids": [[1, 2]]}, TypeError, r"input_ids must be a Tensor \[B, T\], got list"),
        ({"input_ids": ids[0]}, ValueError, r"input_ids must be \[B, T\] with at least one token, got shape \(3,\)"),
        ({"input_ids": ids[:, :0]}, ValueError, "at least one token"),
        ({"input_ids": ids.float()}, TypeError, r"input_ids has dtype torch\.float32: cast it to int64"),
        ({"input_ids": ids, "position_ids": ids[0]}, ValueError, r"position_ids must be \[B or 1, T\]"),
        ({"input_ids": ids, "position_ids": ids / 2}, TypeError, "position_ids has dtype"),
        ({"input_ids": ids, "attention_mask": [[1, 1, 1]]}, TypeError, "attention_mask must be a Tensor"),
        ({"input_ids": ids, "segment_ids": ids[0]}, ValueError, r"segment_ids must be \[B, cached \+ T\]"),
        ({"input_ids": ids, "segment_ids": ids / 2}, TypeError, r"segment_ids has dtype torch\.float32: cast it to"),
    ):
        with pytest.raises(error, match=words):
            model(**wrong)


@pytest.mark.parametrize(
    "make", [lambda: PiForCausalLM(PiConfig(**BASE)), lambda: convert(pretrained().float(), PATTERN, gate=True)]
)
def test_padding_counts_beside_segment_ids(make):
    model, ids = make().eval(), torch.randint(3, 50, (2, 12))
    mask, segments = torch.ones_like(ids), torch.zeros(2, 12, dtype=torch.int32)
    mask[1, :5] = 0
    segments[:, 8:] = 1
    both = model(ids, attention_mask=mask, segment_ids=segments).logits
    want = model(ids, segment_ids=segments.masked_fill(mask == 0, -1)).logits
    torch.testing.assert_close(both, want, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"attention_mask \(2, 12\) and segment_ids \(2, 11\) must have one shape"):
        model(ids, attention_mask=mask, segment_ids=segments[:, 1:])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1"),
        ({"intermediate_size": -3}, "intermediate_size must be at least 1"),
        ({"max_position_embeddings": -5}, "max_position_embeddings must be at least 1"),
        ({"hidden_size": 16.0}, r"hidden_size must be an int, got 16\.0"),
        ({"rope_theta": 0}, "rope_theta must be a finite number above 0, got 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be a finite number above 0"),
        ({"rope_parameters": {"rope_type": "nope"}}, "rope_type='nope' is unknown: use one of .*yarn"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be a dict"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a finite number, at least 0"),
        ({"gate": "no"}, "gate must be True or False, got 'no'"),
        ({"qk_norm": 1}, "qk_norm must be True or False, got 1"),
        ({"sink_logit": 1}, "sink_logit must be True or False, got 1"),
        ({"softcap": 0}, "softcap must be finite and above 0, got 0"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, words):
    with pytest.raises((TypeError, ValueError), match=words):
        PiConfig(**BASE | settings)


def test_settings_that_do_nothing_are_told(recwarn):
    PiConfig(**BASE, my_own_note="kept", architectures=["PiForCausalLM"], dtype="float32")
    assert not [warning for warning in recwarn if "no setting" in str(warning.message)]
    with pytest.warns(UserWarning, match="PiConfig has no setting 'windw', which does nothing: did you mean window"):
        PiConfig(**BASE, windw=3)
    with pytest.warns(UserWarning, match="no setting 'attention_dropout', which does nothing, leave it out"):
        PiConfig(**BASE, attention_dropout=0.5)


def test_what_follows_from_the_settings_is_refused_with_a_remedy(tmp_path):
    config = PiConfig(**BASE)
    assert PiConfig(**BASE | config.pattern.to_dict()).pattern == config.pattern
    config.save_pretrained(tmp_path)
    for make in (
        lambda **given: PiConfig(**BASE, **given),
        lambda **given: PiConfig.from_pretrained(tmp_path, **given),
    ):
        with pytest.raises(
            TypeError, match=r"works 'pattern' out from its settings: give window.*PiConfig\(\*\*pattern.to_dict"
        ):
            make(pattern=config.pattern)
        with pytest.raises(TypeError, match="works 'has_gates' out from its settings: give gate"):
            make(has_gates=True)


@pytest.mark.parametrize("kind", [PiCache, lambda patterns: PiStaticCache(patterns, 40)], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "make", [lambda: PiForCausalLM(PiConfig(**BASE)), lambda: convert(pretrained().float(), PATTERN, gate=True)]
)
def test_a_cache_of_another_pattern_is_refused(make, kind):
    model, ids = make().eval(), torch.randint(3, 50, (1, 20))
    right = model.config.patterns()
    for patterns in ([], [*right, right[0]], [PiPattern(1, 1, 0)] * len(right)):
        with pytest.raises(ValueError, match="past_key_values keeps the keys of"):
            model(ids, past_key_values=kind(patterns), use_cache=True)
    want = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, past_key_values=kind(right), use_cache=True).logits, want)


def test_a_tuple_is_no_cache():
    with pytest.raises(TypeError, match="past_key_values must be a Cache of transformers, got tuple"):
        PiForCausalLM(PiConfig(**BASE))(torch.ones(1, 3, dtype=torch.long), past_key_values=((torch.zeros(1),) * 2,))


def test_a_scale_is_a_finite_number():
    query = torch.randn(1, 2, 8, 4)
    for wrong in (torch.tensor(0.5, requires_grad=True), "x", True):
        with pytest.raises(TypeError, match="scale must be a float, got"):
            pi_attention(query, query, query, PATTERN, scale=wrong)
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be finite, got"):
            pi_attention(query, query, query, PATTERN, scale=wrong)


@pytest.mark.parametrize(
    ("lengths", "error"),
    [([0, 5, 3], ValueError), ([-1, 5], ValueError), ([1, 5], ValueError), ([0, 9], ValueError), ([0, 5.5], TypeError)],
)
def test_lengths_that_are_no_sums_are_refused(lengths, error):
    with pytest.raises(error, match="cu_seqlens must"):
        segments_from_cu_seqlens(torch.tensor(lengths), 8)


def test_a_mask_to_be_added_is_no_padding_mask():
    with pytest.raises(ValueError, match="attention_mask holds negative numbers"):
        segments_from_mask(torch.tensor([[0.0, -1e9]]))
    with pytest.raises(TypeError, match="attention_mask must be a Tensor"):
        segments_from_mask([[1, 1]])
