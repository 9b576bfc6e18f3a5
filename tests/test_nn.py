import itertools
import math

import pytest
import torch
from problems import DEVICE, need_triton
from torch.utils._python_dispatch import TorchDispatchMode

from pi_attention import PiPattern, coordinated_heads, pi_attention
from pi_attention.cache import LayerCache
from pi_attention.nn import FusionGate, PiAttention, SwiGLU, apply_rotary, record_aux, rotary_angles
from pi_attention.nn.attention import GateOptions
from pi_attention.nn.gate import neutral_bias

PATTERN = PiPattern(4, 5, 3, sinks=1)
SCORES = {"sink_logit": True, "softcap": 1.5}
ROTARY_ROUNDING = {"rtol": 1e-4, "atol": 1e-4}  # rotary embedding is relative, but its angles are fp32


def layer(**options):
    torch.manual_seed(0)
    made = PiAttention(32, 4, PATTERN, num_kv_heads=2, **options).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"rope_theta": None}, {"gate": GateOptions("mass")}, SCORES]
)
def test_cached_chunks_equal_the_whole(options):
    attention, x = layer(**options), torch.randn(2, 50, 32, dtype=torch.float64)
    cache = LayerCache(PATTERN)
    parts = [attention(part, cache=cache) for part in x.split([7, 1, 1, 30, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), attention(x))


def test_left_padded_rows_decode_as_if_alone():
    attention, x = layer(), torch.randn(2, 50, 32, dtype=torch.float64)
    ids = torch.zeros(2, 50, dtype=torch.int32)
    ids[1, :13] = -1
    cache = LayerCache(PATTERN)
    first = attention(x[:, :20], segment_ids=ids[:, :20], cache=cache)
    rest = [attention(x[:, t : t + 1], segment_ids=ids[:, : t + 1], cache=cache) for t in range(20, 50)]
    out = torch.cat([first, *rest], dim=1)
    torch.testing.assert_close(out[0], attention(x[:1])[0])
    torch.testing.assert_close(out[1, 13:], attention(x[1:, 13:])[0], **ROTARY_ROUNDING)


def test_rotary_embedding_depends_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def score(i, j):
        angles = [[x.double() for x in rotary_angles(torch.tensor([[p]]), 16)] for p in (i, j)]
        return (apply_rotary(q, *angles[0]) * apply_rotary(k, *angles[1])).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-4)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-2


def test_a_fresh_gate_weighs_bands_by_their_keys():
    """Zero scores: the fresh "gate" layer is the mean over all keys of both bands, as one softmax would be."""
    alike, phases = PiPattern(4, 5, 3), coordinated_heads(4, 3, heads=4)
    assert alike.keys(39, 40) == ([36, 37, 38, 39], [24, 29, 34])
    for pattern, fusion in itertools.product((alike, phases), ("gate", "mass")):
        attention = PiAttention(32, 4, pattern, gate=GateOptions(fusion))
        torch.nn.init.zeros_(attention.q_proj.weight)
        x = torch.randn(1, 40, 32)
        values = attention.v_proj(x)[0].unflatten(-1, (4, 8))  # [T, H, D]
        seen = [[*itertools.chain(*pattern.keys(39, 40, head=head))] for head in range(4)]
        mean = torch.cat([values[keys, head].mean(dim=0) for head, keys in enumerate(seen)])
        torch.testing.assert_close(attention(x)[0, -1], attention.o_proj(mean))
        assert neutral_bias(pattern, "gate") == math.log(4 / 3)
    assert neutral_bias(phases, "mass") == neutral_bias(PiPattern(4, 5, None), "gate") == 0.0


@pytest.mark.parametrize("gate", [GateOptions(), GateOptions("mass"), GateOptions(learned=False)], ids=str)
def test_a_layer_passes_its_sink_logit_and_its_cap_on(gate):
    attention, x = layer(gate=gate, rope_theta=None, **SCORES), torch.randn(2, 50, 32, dtype=torch.float64)
    query, key, value = (
        projection(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    logits = None if attention.gate is None else attention.gate(x)
    scores = {"sink_logit": attention.sink_logit.weight, "softcap": 1.5}
    out = pi_attention(query, key, value, PATTERN, gate=logits, fusion=gate.fusion, impl="reference", **scores)
    torch.testing.assert_close(attention(x), attention.o_proj(out.transpose(1, 2).flatten(2)))


def test_a_layer_without_a_sink_logit_has_the_weights_it_had():
    assert {name.partition(".")[0] for name in layer().state_dict()} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate"}
    with pytest.raises(ValueError, match="softcap must be finite and above 0, got -1"):
        layer(softcap=-1.0)


def test_gate_reads_the_first_features_only():
    gate = FusionGate(32, 4, gate_features=8)
    torch.nn.init.normal_(gate.fc_out.weight)
    x = torch.randn(2, 5, 32)
    changed = x.clone()
    changed[..., 8:] += 1
    assert gate(x).shape == (2, 4, 5)
    assert torch.equal(gate(x), gate(changed))
    changed[..., 0] += 1
    assert not torch.equal(gate(x), gate(changed))


def test_no_gate_without_skips_or_when_not_wanted():
    assert PiAttention(32, 4, PiPattern(4, 5, 0)).gate is None
    assert PiAttention(32, 4, PATTERN, gate=GateOptions(learned=False)).gate is None


def test_every_parameter_learns():
    attention = layer(qk_norm=True, **SCORES)
    attention(torch.randn(2, 50, 32, dtype=torch.float64)).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.parameters())


def test_recorded_gates():
    attention = torch.nn.Sequential(layer(), SwiGLU(32, 64).double())
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    with record_aux(attention) as aux:
        out = attention(x)
    assert torch.equal(attention(x), out)
    gate = aux["0"][0].gate
    assert gate.shape == (2, 4, 50)
    assert (gate[..., :5] == 1).all() and ((gate[..., 6:] > 0) & (gate[..., 6:] < 1)).all()


def test_a_recording_within_a_recording_leaves_it_on():
    attention, x = layer(), torch.randn(1, 20, 32, dtype=torch.float64)
    with record_aux(attention) as outer:
        with record_aux(attention) as inner:
            attention(x)
        attention(x)
    attention(x)
    assert len(inner[""]) == len(outer[""]) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"head_dim": 7}, "even head_dim"),
        ({"rope_theta": 0.0}, "positive base"),
        ({"num_heads": 5}, "head_dim"),
        ({"num_kv_heads": 3}, "must divide"),
        ({"pattern": PiPattern(4, (5, 6), 3)}, "2 entries"),
        ({"gate": GateOptions("sum")}, "fusion"),
        ({"gate": GateOptions(features=33)}, "gate_features"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        PiAttention(**({"hidden_size": 32, "num_heads": 4, "pattern": PATTERN} | options))


def test_arguments_of_a_wrong_kind_are_named():
    for options, words in (
        ({"pattern": None}, "PiPattern"),
        ({"gate": "mass"}, "GateOptions"),
        ({"head_dim": 8.0}, "int"),
    ):
        with pytest.raises(TypeError, match=words):
            PiAttention(**({"hidden_size": 32, "num_heads": 4, "pattern": PATTERN} | options))
    for shape in ((50, 32), (1, 50, 30)):
        with pytest.raises(ValueError, match=r"\[B, T, hidden_size = 32\]"):
            layer()(torch.randn(shape))


def test_compiles_and_runs_under_autocast():
    torch._dynamo.reset()
    attention, x = layer().float(), torch.randn(2, 50, 32)
    torch.testing.assert_close(torch.compile(attention, fullgraph=True, backend="aot_eager")(x), attention(x))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(x), rtol=0.1, atol=0.5)


@pytest.mark.parametrize("pattern", [PiPattern(4, 4, 3), PiPattern(4, 4, 3, sinks=2), PiPattern(99, 1, 0)], ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference", "blocked"])
def test_autocast_casts_as_sdpa_does_whatever_the_dtypes(pattern, impl):
    query, key, value = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    want = pi_attention(*(x.bfloat16() for x in (query, key, value)), pattern, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        out = pi_attention(query, key, value.bfloat16(), pattern, impl=impl)
        assert torch.nn.functional.scaled_dot_product_attention(query, key, value).dtype == out.dtype
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    out.float().sum().backward()
    assert query.grad.dtype == torch.float32


def test_autocast_leaves_wrong_arguments_and_fp64_alone():
    x = torch.randn(1, 2, 10, 16)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError):
            pi_attention(x, None, x, PATTERN)
        with pytest.raises(TypeError, match="int64"):
            pi_attention(*[x.long()] * 3, PATTERN)
        assert pi_attention(*[x.double()] * 3, PATTERN).dtype == torch.float64


@pytest.mark.parametrize("pattern", [PATTERN, PiPattern(4, 5, 0)], ids=["skips", "window"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"rope_theta": None}])
def test_a_layer_copies_no_output_and_for_a_window_no_gradient(options, pattern):
    """The kernels write them token by token, as projections read them; the gradients of skips are three copies."""
    need_triton()
    attention = PiAttention(32, 4, pattern, num_kv_heads=2, **options).to(DEVICE)
    attention.impl = "triton"
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default) and result.dim() == 4:
                copied.append(tuple(result.shape))
            return result

    with Copies():
        attention(torch.randn(2, 20, 32, device=DEVICE)).square().sum().backward()
    assert len(copied) == (3 if pattern.skips else 0)
