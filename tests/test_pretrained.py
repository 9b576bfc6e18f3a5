"""Forms of a pretrained decoder spend the same keys, and its losses by slices and pass keys are what they are said."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments import pass_keys, pretrained
from experiments.decoders import decoder_of, tokenizer_of
from experiments.pass_keys import DEPTHS, asked, needles
from experiments.pretrained import ALIKE, ALL_SKIPS, BEST, CHOSEN, Sliced, decoder, forms, neighbours
from pi_attention.stack import DENSE


def settings_of(variant, keys=24):
    return {"pretrained": "toy-decoder", "variant": variant, "keys": keys, "context": 512}


def test_forms_spend_the_same_keys():
    made = forms(1024, 9)
    for name, form in made.items():
        if form.pattern != DENSE and name != ALL_SKIPS:
            assert form.pattern.window + form.pattern.skips + form.pattern.sinks == 1024
        beyond = name in ("dense", ALL_SKIPS, "single period + sinks") or "1 in" in name or "chosen" in name
        assert form.sees_beyond(8192) == beyond
    assert made[f"{ALIKE} + dense, 1 in 6"].layers(12) == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]
    assert made[f"{ALIKE} + dense, 1 in 6"].patterns(6)[2:4] == [made[ALIKE].pattern, DENSE]
    gains = {layer: float(layer % 2) for layer in range(12)}
    assert made[f"{ALIKE} + {CHOSEN} chosen dense"].layers(12, gains) == [0, 2, 4, 6, 8, 10, 11]
    apart, spread = (made[name].patterns(30) for name in (BEST, f"{ALIKE} + dense, 1 in 6"))
    assert apart.count(DENSE) == spread.count(DENSE)
    assert made[ALIKE].layers(12) is None and made["dense"].patterns(2) == [DENSE, DENSE]


def test_only_what_sees_beyond_the_pretraining_turns_slower(made_up):
    slowest = {}
    for name in ("dense", ALIKE):
        model = decoder(settings_of(name), made_up)
        core = getattr(model, "model", model)
        slowest[name] = next(m for m in core.modules() if hasattr(m, "inv_freq")).inv_freq[-1].item()
    assert slowest["dense"] == pytest.approx(slowest[ALIKE] / 4)  # 512 tokens after 128


def test_chosen_layers_may_turn_slower_alone(made_up):
    """Dense layers of the two forms see the same angles, and the windows those of the pretraining."""
    seen = {}
    for name in (ALIKE, f"{ALIKE} + {CHOSEN} chosen dense", BEST):
        model = decoder(settings_of(name) | {"corpus": "shakespeare"}, made_up)
        angles = seen.setdefault(name, [])
        for layer in model.model.base_model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, angles=angles: angles.append(kwargs["position_embeddings"][0]), with_kwargs=True
            )
        with torch.no_grad():
            model(input_ids=torch.randint(256, (1, 200)), use_cache=False)
        dense = [pattern == DENSE for pattern in model.config.patterns()]
    window, slower, apart = seen.values()
    assert 0 < sum(dense) < len(dense)
    for layer, whole in enumerate(dense):
        assert torch.equal(apart[layer], (slower if whole else window)[layer])
        assert not torch.equal(slower[layer], window[layer])


def test_losses_by_slices_are_those_of_the_logits(made_up, monkeypatch):
    monkeypatch.setattr(pretrained, "SLICE", 10)
    model = decoder(settings_of("coordinated heads + sinks"), made_up).eval()
    ids = torch.randint(256, (2, 64))
    wanted = F.cross_entropy(model(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    found = Sliced(model).losses(ids)
    assert torch.allclose(found, wanted, atol=1e-5)
    head = model.get_output_embeddings().weight
    grads = [torch.autograd.grad(loss.mean(), head)[0] for loss in (found, wanted)]
    assert torch.allclose(*grads, atol=1e-6)


def test_pass_keys_stand_at_their_depth_and_are_counted(made_up):
    tokenizer = tokenizer_of("toy-decoder", made_up)
    text = np.frombuffer(b"static int x;\n" * 50, np.uint8)
    for depth in DEPTHS:
        ids, answer = asked([text], 300, depth, tokenizer, seed=1)
        assert ids.shape == (pass_keys.NEEDLES, 300)
        for row in ids.tolist():
            said = tokenizer.decode(row)
            key = said.rsplit(" ", 1)[1]
            assert len(key) == 5 and said.count(key) == 2 and answer >= 5
            assert said.index("\nThe pass key") == pytest.approx(depth * 300, abs=100)

    class Oracle(torch.nn.Module):
        """Knows what comes next, but for texts whose key begins with an odd digit."""

        def forward(self, input_ids, use_cache, logits_to_keep):
            right = F.one_hot(input_ids.roll(-1, 1), 257)[:, -logits_to_keep:].float()
            return type("Out", (), {"logits": right * (1 if input_ids[0, -5] % 2 == 0 else -1)})

    even = sum(row[-5] % 2 == 0 for row in asked([text], 300, 0.5, tokenizer, seed=300)[0].tolist())
    found = needles(Oracle(), [text], [300], tokenizer)["300"]
    assert 0 < even < pass_keys.NEEDLES and found == [even / pass_keys.NEEDLES] * len(DEPTHS)


def test_neighbours_are_joined_in_their_order():
    assert neighbours(["ab", "c", "defg", "h", "rest"], 4) == ["ab\nc\ndefg", "h\nrest"]


def test_an_unknown_form_is_named(made_up):
    with pytest.raises(ValueError, match="variant='other' is unknown: use one of"):
        decoder(settings_of("other"), made_up)
    assert decoder_of("toy-decoder", made_up).config.max_position_embeddings == 128
