"""The predicted receptive field is that of real networks."""

import pytest
import torch

from pi_attention.models import PiConfig, PiForCausalLM, PiForMaskedLM
from pi_attention.tasks.influence import influence

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
PATTERNS = {
    "holes": {"window": 3, "period": 11, "skips": 2},
    "full": {"window": 8, "period": 8, "skips": 3},
    "ring-local": {"window": 5, "period": 5, "skips": 0},
    "coprime heads": {"window": 2, "period": [7, 9, 11, 13], "skips": 1},
    "sinks": {"window": 3, "period": 9, "skips": 1, "sinks": 2},
    "layers": {"window": 3, "period": 10, "skips": 1, "layer_patterns": ["pi", "local", {"period": 4}]},
    "every multiple": {"window": 2, "period": 9, "skips": None},
}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("gate", [True, False])
def test_the_jacobian_is_non_zero_on_exactly_the_predicted_positions(options, gate):
    model = PiForCausalLM(PiConfig(**SIZES | options, gate=gate))
    found = influence(model, torch.randint(0, 50, (1, 120)))
    assert found.agrees, f"{found.wrong} positions"
    assert 0 < found.field.covered() <= 120
    assert next(model.parameters()).dtype == torch.float32


def test_bidirectional_and_other_queries():
    model = PiForMaskedLM(PiConfig(**SIZES, window=3, period=11, skips=2, causal=False))
    for query in (None, 0, 17, 119):
        assert influence(model, torch.randint(0, 50, (1, 120)), query).agrees
    causal = PiForCausalLM(PiConfig(**SIZES, window=3, period=11, skips=2))
    assert influence(causal, torch.randint(0, 50, (1, 120)), 60).agrees


def test_trained_weights_agree_and_a_wrong_prediction_would_show():
    torch.manual_seed(0)
    model = PiForCausalLM(PiConfig(**SIZES | PATTERNS["holes"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 50, (4, 60))
    for _ in range(20):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    found = influence(model, torch.randint(0, 50, (1, 120)))
    assert found.agrees
    assert [hops for hops, _, _ in found.by_hops()] == [0, 1, 2, 3]
    model.config.period = 12
    assert influence(model, torch.randint(0, 50, (1, 120))).wrong > 0
