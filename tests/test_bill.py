"""The GPU bill: its bytes are those of real exchanges, its memory near what was measured, its claims what they are."""

import json
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.multigpu.rows import FILE, read
from benchmarks.multigpu.step import predicted
from pi_attention import PiPattern
from pi_attention.accounting import Sizes
from pi_attention.bill import MODELS, WAYS, bill, fewest_ranks, parameters
from pi_attention.distributed import Layout, halo_plan
from pi_attention.distributed.exchange import route
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.models.modeling_pi import PiDecoderLayer
from pi_attention.ops.fused.attention import INTERPRETED
from pi_attention.stack import DENSE

PATTERN = PiPattern(256, 256, 16)
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def test_parameters_are_those_of_a_model():
    with torch.device("meta"):
        config = PiConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=16,
                          vocab_size=32000, tie_word_embeddings=False, gate=True)  # fmt: skip
        model = PiForCausalLM(config)
    assert parameters(MODELS["1b"]) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_halo_s_bytes_are_those_that_the_exchange_receives(ranks):
    sizes = MODELS["1b"]
    context = 16384
    plan = halo_plan(PATTERN, [context // ranks] * ranks)
    received = [sum(route(plan, rank).received) for rank in range(ranks)]
    row = 2 * sizes.num_key_value_heads * sizes.head_dim * 2
    assert bill(sizes, PATTERN, context, ranks).received == 2 * max(received) * row


def test_memory_is_what_gpus_measured():
    measured = [row for row in read(FILE) if row["piece"] == "step" and row.get("peak GiB")]
    for row in measured:
        assert predicted(row) / 2**30 == pytest.approx(row["peak GiB"], rel=0.05), row
    assert len(measured) >= 64 and {row["way"] for row in measured} == {*WAYS}


@pytest.mark.parametrize(("kind", "loss_slice"), [("tracked bytes", None), ("tracked bytes, loss by slices", 4096)])
def test_memory_is_what_was_tracked_on_the_cpu_whose_norm_keeps_copies_in_fp32(kind, loss_slice):
    """Each norm keeps its input and the normed one in fp32 there, and no bf16 input: a GPU's is fused."""
    result = json.loads((RESULTS / "memory.json").read_text())
    for row in (row for row in [*result["rows"], *result["long"]] if kind in row):
        layout, sizes, context = Layout.parse(row["layout"]), MODELS[row["model"]], row.get("S", result["S"])
        made = bill(sizes, PATTERN, context, layout.cp, loss_slice=loss_slice,
                    dp=layout.dp, tp=layout.tp, zero=row.get("zero", 3))  # fmt: skip
        copies = 2 * 4 * context // layout.cp * sizes.hidden_size  # of one norm
        norms = {"the loss": 1, "a layer's feed-forward": 2, "a layer's attention": 1}
        peak = max(size + norms.get(part, 0) * copies for part, size in made.peaks.items())
        assert peak == pytest.approx(row[kind], rel=0.05), (row, peak)
        if layout.tp < 8 and context == result["S"]:
            assert made.bytes == pytest.approx(row[kind], rel=0.1), row


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on the CPU in Triton's interpreter alone")
def test_a_layer_keeps_what_the_bill_counts():
    sizes, tokens = Sizes(128, 384, 1, 8, 4, 16, 64, 128, 32), 128
    config = PiConfig(hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_attention_heads=8,
                      num_key_value_heads=4, window=16, period=16, skips=4, gate=True)  # fmt: skip
    layer = PiDecoderLayer(config, config.patterns()[0], 0).half()
    layer.self_attn.impl = "triton"
    x = torch.randn(1, tokens, 128, dtype=torch.half, requires_grad=True)
    angles = (torch.randn(1, tokens, 16, dtype=torch.half),) * 2
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        layer(x, angles)
    known = {t.untyped_storage()._cdata for t in (x, *angles, *layer.parameters())}
    halves = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in known and t.dtype == torch.half)
    hidden, inner = 2 * tokens * 128, 2 * tokens * 384
    counted = bill(sizes, config.patterns()[0], tokens, 1).layer
    # beside what is kept the bill counts gradients; the sum after the attention is kept in fp32 here, by the norm
    assert halves + hidden == pytest.approx(counted - hidden - 2 * inner, rel=0.05)  # the gate's few features


def test_what_layouts_divide():
    sizes, context = MODELS["1b"], 32768
    alone, dp, cp, tp = (bill(sizes, PATTERN, context, ranks, dp=dp, tp=tp)
                         for ranks, dp, tp in ((1, 1, 1), (1, 4, 1), (4, 1, 1), (1, 1, 4)))  # fmt: skip
    assert dp.state == cp.state == alone.state // 4 and dp.activations == alone.activations == 4 * cp.activations
    assert dp.flops == alone.flops == 4 * cp.flops == 4 * tp.flops  # each group of dp has a sequence of its own
    ends = 2 * sizes.vocab_size * sizes.hidden_size  # whole on each rank of tp
    assert tp.state == pytest.approx(12 * ((parameters(sizes) - ends) / 4 + ends))
    assert tp.activations == alone.activations and tp.logits == alone.logits and tp.layer < alone.layer
    assert bill(sizes, PATTERN, context, 2, tp=2).received * 2 == bill(sizes, PATTERN, context, 2).received
    stages = [bill(sizes, PATTERN, context, 1, dp=4, zero=zero).bytes for zero in (3, 2, 1)]
    assert stages == sorted(stages) and stages[2] - stages[1] == 4 * parameters(sizes)


def test_what_half_the_gpus_means():
    """Against dense Ring Attention memory needs as many GPUs; what is saved is time."""
    sizes, context = MODELS["8b"], 1 << 20
    fewest = {way: fewest_ranks(sizes, PATTERN, context, 80 << 30, way) for way in WAYS}
    assert fewest["halo"] == fewest["dense ring"] <= fewest["all-gather"]
    ours, ring = (bill(sizes, PATTERN, context, 64, way) for way in ("halo", "dense ring"))
    assert ring.flops > 10 * ours.flops and ring.received > 50 * ours.received


def test_a_loss_by_slices_halves_the_gpus_of_a_model_whose_logits_fill_them():
    sizes, context = MODELS["8b"], 1 << 20
    whole, sliced = (bill(sizes, PATTERN, context, 64, loss_slice=size) for size in (None, 4096))
    assert sliced.logits * 4 == whole.logits and sliced.bytes < whole.bytes / 2  # a rank has 16,384 tokens
    assert bill(sizes, PATTERN, 4096, 4, loss_slice=4096).logits == bill(sizes, PATTERN, 4096, 4).logits
    fewest = [fewest_ranks(sizes, PATTERN, context, 80 << 30, "halo", size) for size in (None, 4096)]
    assert fewest == [32, 8]


def test_layers_of_several_patterns_are_billed_each():
    sizes, context = MODELS["1b"], 1 << 18
    window = PiPattern(256, 1, 0)
    stack = [window] * 9 + [DENSE] + [window] * 10
    mixed, windows, dense = (bill(sizes, pattern, context, 8, loss_slice=4096) for pattern in (stack, window, DENSE))
    assert (mixed.keys, mixed.received) == (dense.keys, dense.received) > (windows.keys, windows.received)
    assert windows.bytes < mixed.bytes <= dense.bytes  # one layer's keys exist at a time
    share = (mixed.flops - windows.flops) / (dense.flops - windows.flops)
    assert share == pytest.approx(1 / 20, rel=1e-3)
    assert bill(sizes, [PATTERN] * 20, context, 8) == bill(sizes, PATTERN, context, 8)
    with pytest.raises(ValueError, match="pattern has 3 entries: give one for each of 20 layers"):
        bill(sizes, [PATTERN] * 3, context, 8)


def test_a_dense_ring_attends_on_both_sides_where_the_pattern_does():
    both = PiPattern(64, 64, 4, causal=False)
    everything = PiPattern(65536, 1, 0, causal=False)
    ring, halo = (bill(MODELS["1b"], *asked) for asked in ((both, 65536, 4, "dense ring"), (everything, 65536, 4)))
    assert ring.flops == halo.flops > bill(MODELS["1b"], PATTERN, 65536, 4, "dense ring").flops


def test_one_rank_receives_nothing_and_wrong_arguments_are_named():
    for way in WAYS:
        assert bill(MODELS["1b"], PATTERN, 4096, 1, way).received == 0
    with pytest.raises(ValueError, match="ranks=0"):
        bill(MODELS["1b"], PATTERN, 4096, 0)
    with pytest.raises(ValueError, match="way='other'"):
        bill(MODELS["1b"], PATTERN, 4096, 2, "other")
    for name, wrong in (("tp", 3), ("zero", 4), ("zero", True)):
        with pytest.raises(ValueError, match=f"{name}={wrong}"):
            bill(MODELS["1b"], PATTERN, 4096, 2, **{name: wrong})
    for name, wrong in (("dp", 0), ("tp", -1), ("loss_slice", 0)):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {wrong}"):
            bill(MODELS["1b"], PATTERN, 4096, 2, **{name: wrong})
    for name, wrong in (("dp", 1.5), ("loss_slice", 2.0)):
        with pytest.raises(TypeError, match=f"{name} must be an int, got {wrong}"):
            bill(MODELS["1b"], PATTERN, 4096, 2, **{name: wrong})
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        fewest_ranks(MODELS["1b"], PATTERN, 0, 80 << 30, "halo")
    for pattern in (None, 5, [3] * 20, (PATTERN for _ in range(20))):
        with pytest.raises(TypeError, match="must be a PiPattern"):
            bill(MODELS["1b"], pattern, 4096, 2)
    with pytest.raises(ValueError, match="3 entries but there are 16 query heads"):
        bill(MODELS["1b"], PiPattern(64, (64, 65, 66), 4), 4096, 2)
