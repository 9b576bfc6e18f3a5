"""What π-Attention is, asked of every implementation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CASES, DEVICE, SCORES, Case, assert_close, attend, cases, need_triton, outputs_and_gradients

from pi_attention import PiPattern, coordinated_heads, pi_attention, segments_from_mask
from pi_attention.masks import dense_mask

FAST = ["blocked", "triton"]


def assert_equal_results(got, want, impl):
    names = ["out", "lse_local", "lse_skip", "g", "dquery", "dkey", "dvalue", "dgate", "dsink_logit"]
    for name, a, b in zip(names[: len(want)], got, want, strict=True):
        assert_close(a, b, impl, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES + SCORES, ids=str)
def test_equals_the_reference(case, fast, poisoned_memory):
    assert_equal_results(outputs_and_gradients(case, fast), outputs_and_gradients(case, "reference"), fast)


@pytest.fixture(params=FAST)
def fast(request):
    if request.param == "triton":
        need_triton()
    return request.param


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_equals_the_reference_on_any_pattern_and_shape(case):
    assert_equal_results(outputs_and_gradients(case, "blocked"), outputs_and_gradients(case, "reference"), "blocked")


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(case=cases(dims=(1, 3, 8, 24)))
def test_equals_the_reference_on_many_patterns_and_shapes(case):
    assert_equal_results(outputs_and_gradients(case, "blocked"), outputs_and_gradients(case, "reference"), "blocked")


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(8))  # workers compile side by side
@settings(max_examples=30 if torch.cuda.is_available() else 5, deadline=None)
@given(case=cases(dims=(16, 24)))
def test_kernels_equal_the_reference_on_many_patterns_and_shapes(shard, case):
    need_triton()
    assert_equal_results(outputs_and_gradients(case, "triton"), outputs_and_gradients(case, "reference"), "triton")


def assert_decodes(case):
    """The kernels without gradients, which for few queries are those of decoding."""
    need_triton()
    inputs = case.tensors(grad=False)
    out, aux = case.run("triton", inputs, return_aux=True)
    want, want_aux = case.run("reference", inputs, return_aux=True)
    for got, expected in zip((out, *aux), (want, *want_aux), strict=True):
        assert_close(got, expected, "triton")


@pytest.mark.parametrize("queries", [1, 5, 16])
@pytest.mark.parametrize("case", [c for c in CASES + SCORES if c.pattern.causal], ids=str)
def test_decoding_equals_the_reference(case, queries, poisoned_memory):
    assert_decodes(replace(case, T=min(queries, case.S)))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(case=cases(dims=(8, 24)), queries=st.integers(1, 16))
def test_decoding_equals_the_reference_on_many_patterns_and_shapes(case, queries):
    assert_decodes(replace(case, T=min(queries, case.S)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES + SCORES, ids=str)
def test_error_is_within_the_budget_of_eager_low_precision(case, dtype, fast, monkeypatch):
    """At most twice (output) and three times (gradients) the error of eager attention in that precision."""
    if fast == "triton" and not torch.cuda.is_available() and dtype != torch.float16:
        pytest.skip("the interpreter has no bf16 products, and takes long; the GPU runs them all")
    got = outputs_and_gradients(case, fast, dtype)
    with monkeypatch.context() as patch:
        patch.setattr("pi_attention.ops.reference.band_reference", eager_band)
        eager = outputs_and_gradients(case, "reference", dtype)
    inputs = case.tensors(dtype)
    exact_case_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = _results_of(case, exact_case_inputs)
    for index, (a, b, gold) in enumerate(zip(got, eager, exact, strict=True)):
        budget = 2 if index < 4 else 3
        rounding = torch.finfo(a.dtype).eps * max(8.0, gold.abs().max())  # what cancels to 0 has an error, too
        error, eager_error = (a.double() - gold).abs().max(), (b.double() - gold).abs().max()
        assert error <= budget * eager_error + rounding, f"result {index}: {error:.2e} against {eager_error:.2e}"


def eager_band(query, key, value, visible, scale, softcap):
    """A band as eager attention computes it: products in the precision of the inputs, the softmax in fp32."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    empty = ~visible.any(dim=-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(empty, 0.0), dim=-1, keepdim=True)
    weights = torch.exp(scores - lse).masked_fill(~visible, 0.0)
    return weights.to(value.dtype) @ value, lse.masked_fill(empty, -torch.inf).squeeze(-1)


def _results_of(case, inputs):
    """As `outputs_and_gradients` by the fp64 reference, for inputs that were drawn in another precision."""
    patched = replace(case)
    object.__setattr__(patched, "tensors", lambda *_, **__: inputs)
    return outputs_and_gradients(patched, "reference")


def sdpa(case, query, key, value, mask):
    share = case.H // case.G
    return F.scaled_dot_product_attention(
        query, key.repeat_interleave(share, 1), value.repeat_interleave(share, 1), attn_mask=mask
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.segments is None], ids=str)
def test_mass_without_a_gate_is_one_softmax_over_both_bands(case, impl):
    query, key, value, _ = case.tensors(grad=False)
    want = sdpa(case, query, key, value, dense_mask(case.pattern, case.T, case.S))
    assert_close(attend(query, key, value, case.pattern, impl=impl), want, impl=impl)
    zeros = query.new_zeros(query.shape[:3])
    got = attend(query, key, value, case.pattern, gate=zeros, fusion="mass", impl=impl)
    assert_close(got, want, impl=impl)


@pytest.mark.parametrize("window", [1, 5])
def test_period_one_with_enough_skips_is_dense(window, impl):
    case = Case(PiPattern(window, 1, 100))
    query, key, value, _ = case.tensors(grad=False)
    want = sdpa(case, query, key, value, torch.ones(case.T, case.S, dtype=torch.bool).tril())
    assert_close(attend(query, key, value, case.pattern, impl=impl), want, impl=impl)


def test_a_window_over_everything_is_dense(impl):
    case = Case(PiPattern(200, 7, 5))
    query, key, value, gate = case.tensors(grad=False)
    want = sdpa(case, query, key, value, torch.ones(case.T, case.S, dtype=torch.bool).tril())
    assert_close(case.run(impl, (query, key, value, gate)), want, impl=impl)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 5, 63])
@pytest.mark.parametrize("packed", [False, True])
def test_auto_takes_dense_attention_where_the_window_covers_everything(length, causal, packed):
    segments = ((-1,) * 5 + (0,) * 30 + (1,) * 28,) * 2 if packed else None
    case = Case(PiPattern(63, 7, 5, causal=causal), T=length, S=63, segments=segments)
    inputs = case.tensors(grad=False)
    assert_close(case.run("auto", inputs), case.run("reference", inputs))


def test_no_skips_is_a_sliding_window_whatever_the_gate(impl):
    case = Case(PiPattern(6, 4, 0))
    query, key, value, gate = case.tensors(grad=False)
    lag = torch.arange(case.T)[:, None] - torch.arange(case.S)
    want = sdpa(case, query, key, value, (lag >= 0) & (lag < 6))
    assert_close(case.run(impl, (query, key, value, gate)), want, impl=impl)


@pytest.mark.parametrize("fusion", ["gate", "mass"])
def test_an_infinite_gate_is_one_branch(fusion, impl):
    case = Case(PiPattern(6, 9, 3), fusion=fusion)
    query, key, value, gate = case.tensors(grad=False)
    local = attend(query, key, value, PiPattern(6, 9, 0), impl=impl)
    far = torch.full_like(gate, torch.inf)
    assert_close(case.run(impl, (query, key, value, far)), local, rtol=0, atol=0, impl=impl)
    out = case.run(impl, (query, key, value, -far))
    assert_close(out[:, :, :9], local[:, :, :9], impl=impl)  # no skip key yet: the local branch
    lag = torch.arange(case.T)[:, None] - torch.arange(case.S)
    skip = (lag == 9) | (lag == 18) | (lag == 27)
    assert_close(out[:, :, 9:], sdpa(case, query[:, :, 9:], key, value, skip[9:]), impl=impl)


@pytest.mark.parametrize("case", [c for c in CASES if c.pattern.causal], ids=str)
def test_future_keys_change_nothing(case, impl):
    """A NaN future key and a changed future value leave the past as it was, bit for bit."""
    query, key, value, gate = case.tensors(grad=False)
    cut = case.S - case.T // 2
    changed_key, changed_value = key.clone(), value.clone()
    changed_key[:, :, cut:] = torch.nan
    changed_value[:, :, cut:] = -3 * value[:, :, cut:]
    past = case.T - (case.S - cut)
    before = case.run(impl, (query, key, value, gate))[:, :, :past]
    after = case.run(impl, (query, changed_key, changed_value, gate))[:, :, :past]
    assert torch.equal(before, after)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_chunks_appended_to_cached_keys_equal_the_whole(chunk, impl):
    case = Case(PiPattern(5, (6, 7, 11, 64), 3, sinks=1, phase=(0, 4, 10, 1)), T=63, S=63)
    query, key, value, gate = case.tensors(grad=False)
    whole = case.run(impl, (query, key, value, gate))
    for first in range(0, 63, chunk):
        end = min(first + chunk, 63)
        part = case.run(impl, (query[:, :, first:end], key[:, :, :end], value[:, :, :end], gate[:, :, first:end]))
        assert_close(part, whole[:, :, first:end], impl=impl)


@pytest.mark.parametrize(
    "pattern",
    [PiPattern(4, 5, 3, sinks=1), PiPattern(4, 5, 2, causal=False), PiPattern(4, 5, 3, sinks=1, phase=(0, 2, 3, 4))],
    ids=str,
)
def test_packed_documents_equal_separate_ones(pattern, impl):
    lengths = [1, 17, 4, 15]
    case = Case(pattern, B=1, segments=(tuple(i for i, n in enumerate(lengths) for _ in range(n)),))
    query, key, value, gate = case.tensors(grad=False)
    packed = case.run(impl, (query, key, value, gate))
    for part, *inputs in zip(*(x.split(lengths, dim=2) for x in (packed, query, key, value, gate)), strict=True):
        q, k, v, a = inputs
        assert_close(part, attend(q, k, v, pattern, gate=a, impl=impl), impl=impl)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_and_gives_zero(side, impl):
    pattern, length, pad = PiPattern(4, 5, 3, sinks=1), 24, 9
    case = Case(pattern, T=length, S=length)
    inputs = case.tensors(grad=False)
    want = case.run(impl, inputs)
    amounts = (pad, 0) if side == "left" else (0, pad)
    real = slice(pad, None) if side == "left" else slice(0, length)
    padded = [F.pad(x, (0, 0, *amounts), value=7.0) for x in inputs[:3]] + [F.pad(inputs[3], amounts, value=7.0)]
    mask = F.pad(torch.ones(case.B, length), amounts)
    q, k, v, a = (x.requires_grad_() for x in padded)
    out, aux = attend(q, k, v, pattern, gate=a, segment_ids=segments_from_mask(mask), return_aux=True, impl=impl)
    assert_close(out[:, :, real], want, impl=impl)
    padding = slice(0, pad) if side == "left" else slice(length, None)
    assert (out[:, :, padding] == 0).all()
    assert (aux.lse_local[:, :, padding] == -torch.inf).all() and (aux.lse_skip[:, :, padding] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + out.pow(2).sum(), (q, k, v, a))
    assert all((g[:, :, padding] == 0).all() for g in grads)
    assert all(g.isfinite().all() for g in grads)


def test_all_padding_is_zero_without_nan(impl):
    case = Case(PiPattern(4, 5, 3, sinks=1), segments=((-1,) * 37,) * 2)
    out, *rest = outputs_and_gradients(case, impl)
    assert (out == 0).all() and all((x == 0).all() for x in rest[3:])


def test_a_batch_row_does_not_depend_on_its_neighbours(impl):
    case = Case(PiPattern(4, (5, 6, 7, 9), 3), B=3)
    inputs = case.tensors(torch.float32, grad=False)
    whole = case.run(impl, inputs)
    alone = replace(case, B=1).run(impl, tuple(x[1:2] for x in inputs))
    assert_close(alone, whole[1:2], rtol=1e-6, atol=1e-6, impl=impl)


def test_permuted_heads_give_permuted_outputs(impl):
    order = [2, 0, 3, 1]
    periods, phases = (5, 6, 7, 9), (3, 0, 6, 2)
    case = Case(PiPattern(4, periods, 3, phase=phases), G=4)
    inputs = case.tensors(grad=False)
    permuted = attend(
        *(x[:, order] for x in inputs[:3]),
        PiPattern(4, tuple(periods[h] for h in order), 3, phase=tuple(phases[h] for h in order)),
        gate=inputs[3][:, order],
        impl=impl,
    )
    assert_close(permuted, case.run(impl, inputs)[:, order], impl=impl)


def test_equal_periods_per_head_are_one_period(impl):
    inputs = Case(PiPattern(4, 6, 3)).tensors(grad=False)
    one = Case(PiPattern(4, 6, 3)).run(impl, inputs)
    assert_close(Case(PiPattern(4, (6, 6, 6, 6), 3)).run(impl, inputs), one, impl=impl)


@pytest.mark.parametrize("phase", [2, 3])
def test_a_phase_is_a_shift_of_the_keys(phase, impl):
    """The skip branch of phase φ is that of phase 0 over keys and values that are moved on by φ tokens."""
    case = Case(PiPattern(4, 4, 5, phase=phase))
    query, key, value, gate = case.tensors(grad=False)
    far = torch.full_like(gate, -torch.inf)  # the skip branch alone
    got = attend(query, key, value, case.pattern, gate=far, impl=impl)
    moved = [F.pad(x, (0, 0, phase, 0))[:, :, : case.S] for x in (key, value)]
    want = attend(query, *moved, PiPattern(4, 4, 5), gate=far, impl=impl)
    start = 4 * 5 + phase  # from here on no key lies before the first
    assert_close(got[:, :, start:], want[:, :, start:], impl=impl)


def test_a_phase_of_zero_for_each_head_is_none(impl):
    inputs = Case(PiPattern(4, 6, 3)).tensors(grad=False)
    none = Case(PiPattern(4, 6, 3)).run(impl, inputs)
    assert torch.equal(Case(PiPattern(4, 6, 3, phase=0)).run(impl, inputs), none)
    assert torch.equal(Case(PiPattern(4, 6, 3, phase=(0, 0, 0, 0))).run(impl, inputs), none)


@pytest.mark.parametrize("causal", [True, False])
def test_heads_with_all_phases_together_are_a_window(causal):
    pattern = replace(coordinated_heads(6, 5, heads=4, period=4), causal=causal)
    together = dense_mask(pattern, 63, 63).any(dim=1)
    assert torch.equal(together, dense_mask(PiPattern(6 + 5 * 4, 1, 0, causal=causal), 63, 63)[:, 0])


@pytest.mark.parametrize("shift", [3, 17])
def test_a_ring_has_no_first_token(shift, impl):
    case = Case(PiPattern(4, (5, 6, 10, 15), 3, causal=False, ring=True, phase=(1, 0, 7, 3)), T=60, S=60)
    inputs = case.tensors(grad=False)
    turned = case.run(impl, tuple(x.roll(shift, dims=2) for x in inputs))
    assert_close(turned, case.run(impl, inputs).roll(shift, dims=2), impl=impl)


def test_any_strides(impl):
    """[B, T, H, D] seen as [B, H, T, D], and a slice of a wider tensor."""
    case = Case(PiPattern(4, 5, 3))
    query, key, value, gate = case.tensors(grad=False)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    wide = torch.cat([value, value], dim=-1)[..., : case.D]
    out = case.run(impl, (*strided, wide, gate.transpose(0, 2).contiguous().transpose(0, 2)))
    assert_close(out, case.run(impl, (query, key, value, gate)), impl=impl)


LAYOUTS = [
    Case(PiPattern(4, 5, 3, sinks=2), G=4),
    Case(PiPattern(4, (5, 6, 7, 9), 3, sinks=1), T=20, segments=((0,) * 20 + (1,) * 17,) * 2),
    Case(PiPattern(4, 4, 3, sinks=2, phase=(0, 1, 2, 3)), T=30, fusion="mass", sink_logit=True),
    Case(PiPattern(5, 5, 0), D=3),
    Case(PiPattern(5, 5, 0, sinks=3), T=30, segments=((0,) * 20 + (1,) * 17,) * 2),
    Case(PiPattern(5, (5, 6, 7, 9), 2, causal=False), G=4),
]


@pytest.mark.parametrize("turned", [(True,) * 3, (True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_results_of_the_kernels_lie_as_their_inputs(case, turned, poisoned_memory):
    """[B, T, H, D] seen as [B, H, T, D] has an output that lies so, and without skips gradients; with the same bits."""
    need_triton()

    def results(layout):
        drawn = [x.to(DEVICE, torch.float32) for x in case.tensors(grad=False)]
        inputs = [
            (x.transpose(1, 2).contiguous().transpose(1, 2) if by_token else x).requires_grad_()
            for x, by_token in zip(drawn, (*layout, *[False] * (len(drawn) - 3)), strict=True)
        ]
        query, key, value, gate, *logit = inputs
        ids = case.segment_ids()
        options = {"gate": gate, "fusion": case.fusion, "segment_ids": None if ids is None else ids.to(DEVICE)}
        options |= {"sink_logit": logit[0]} if logit else {}
        out = pi_attention(query, key, value, case.pattern, impl="triton", **options)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(2))
        assert out.stride() == query.stride()
        for x, grad in zip(inputs[:3], grads[:3], strict=True):
            assert grad.is_contiguous() if case.pattern.skips else grad.stride() == x.stride()
        return out, *grads

    for got, want in zip(results(turned), results((False,) * 3), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("skips", [0, 2])
def test_saved_outputs_that_were_moved_are_laid_out_again(skips):
    """Hooks such as those of activation offloading may give back another layout than autograd saved."""
    need_triton()
    query, key, value = (torch.randn(2, 9, 4, 8, device=DEVICE).transpose(1, 2).requires_grad_() for _ in range(3))

    def grads(give_back):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, give_back):
            out = pi_attention(query, key, value, PiPattern(3, 2, skips), impl="triton")
            return torch.autograd.grad(out.sum(), (query, key, value))

    for got, want in zip(grads(lambda x: x.contiguous()), grads(lambda x: x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("queries", [40, 3])
def test_segment_ids_have_any_strides(queries, impl):
    """Ids that were made [S, B], as sequence-first models have them, are the same documents."""
    ids = torch.zeros(2, 40, dtype=torch.int32)
    ids[0, 13:], ids[1, :4], ids[1, 25:] = 1, -1, 1
    query, key, value = torch.randn(3, 2, 2, 40, 16, dtype=torch.float64)
    call = query[:, :, 40 - queries :], key, value, PiPattern(4, 5, 3, sinks=2)
    want = attend(*call, segment_ids=ids, impl=impl)
    assert torch.equal(attend(*call, segment_ids=ids.T.contiguous().T, impl=impl), want)


def test_results_are_bitwise_repeatable(impl):
    case = Case(PiPattern(4, (5, 6, 7, 9), 3, sinks=1), segments=((0,) * 20 + (1,) * 17,) * 2)
    first, second = (outputs_and_gradients(case, impl, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_scale_is_applied(impl):
    case = Case(PiPattern(4, 5, 3))
    query, key, value, gate = case.tensors(grad=False)
    scaled = case.run(impl, (query * 3, key, value, gate), scale=0.1)
    assert_close(case.run(impl, (query, key, value, gate), scale=0.3), scaled, impl=impl)


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scale_may_be_zero_or_negative(scale, impl):
    case = Case(PiPattern(4, 5, 3))
    query, key, value, gate = case.tensors(grad=False)
    want = case.run("reference", (query * scale, key, value, gate), scale=1.0)
    assert_close(case.run(impl, (query, key, value, gate), scale=scale), want, impl=impl)


def test_output_dtype_follows_the_query_and_log_sum_exps_stay_exact(impl):
    case = Case(PiPattern(4, 5, 3))
    dtype = torch.float16 if impl == "triton" and not torch.cuda.is_available() else torch.bfloat16
    query, key, value, gate = case.tensors(dtype, grad=False)
    out, aux = case.run(impl, (query, key, value, gate.float()), return_aux=True)
    assert out.dtype == dtype and out.shape == query.shape
    assert {x.dtype for x in aux} == {torch.float32} and {x.shape for x in aux} == {gate.shape}


def one_softmax(case, query, key, value, sink_logit):
    """The softmax of capped scores over both bands and the sink logit, as transformers' eager attention spells it."""
    share = case.H // case.G
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = query @ key.transpose(-1, -2) * case.D**-0.5
    scores = scores if case.softcap is None else case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~dense_mask(case.pattern, case.T, case.S), -torch.inf)
    column = sink_logit[None, :, None, None].expand(case.B, -1, case.T, 1)
    return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1] @ value


@pytest.mark.parametrize("pattern", [PiPattern(5, 7, 4, sinks=2), PiPattern(6, 9, 2, causal=False)], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_sink_logit_is_one_more_term_of_the_softmax(pattern, softcap, impl):
    case = Case(pattern, gated=False, sink_logit=True, softcap=softcap)
    inputs = case.tensors()
    query, key, value, _, sink_logit = inputs
    out, want = case.run(impl, inputs), one_softmax(case, query, key, value, sink_logit)
    assert_close(out, want, impl=impl)
    wanted = (query, key, value, sink_logit)
    weight = torch.randn_like(want)
    grads = (torch.autograd.grad((x * weight).sum(), wanted) for x in (out, want))
    for got, expected in zip(*grads, strict=True):
        assert_close(got, expected, impl=impl)


@pytest.mark.parametrize("fusion", ["gate", "mass"])
def test_a_sink_logit_of_minus_infinity_is_none(fusion, impl):
    case = Case(PiPattern(5, 7, 4, sinks=1), fusion=fusion, segments=((-1,) * 9 + (0,) * 28,) * 2)
    inputs = case.tensors()
    sink_logit = torch.full((case.H,), -torch.inf, dtype=torch.float64, requires_grad=True)
    none, out = case.run(impl, inputs), case.run(impl, (*inputs, sink_logit))
    assert_close(out, none, impl=impl)
    (grad,) = torch.autograd.grad(out.sum(), sink_logit)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("queries", [20, 1])
def test_a_sink_logit_has_any_strides_and_dtype(queries, fast, monkeypatch):
    """One after the other, of one shape: what was compiled or planned for the first must not serve the second."""
    case = Case(PiPattern(5, 7, 4, sinks=1), T=queries, S=20, B=1)
    inputs, base = case.tensors(grad=False), torch.tensor([[3.0, 9.0], [-2.0, 9.0], [0.5, 9.0], [8.0, 9.0]])
    read = dtypes_read(monkeypatch) if fast == "triton" else {}
    for logit in (base[:, 0].contiguous(), base[:, 0], torch.tensor(2.0).expand(4), base[:, 0].bfloat16()):
        for grad in (False, True):
            given = logit.detach().requires_grad_(grad)
            out, want = case.run(fast, (*inputs, given)), case.run("reference", (*inputs, given))
            assert_close(out, want, fast)
            if grad:
                grads = [torch.autograd.grad(x.sum(), given)[0] for x in (out, want)]
                assert grads[0].dtype == logit.dtype
                assert_close(*grads, fast, **{"rtol": 1e-2, "atol": 1e-2} if logit.itemsize == 2 else {})
    assert all(len(forms) == 1 for forms in read.values())


def dtypes_read(monkeypatch):
    """The dtypes of the tensors that each planned launch takes."""
    from pi_attention.ops.fused.compiled import Step

    read, launch = {}, Step.__call__

    def noting(self, tensors):
        dtypes = tuple(x.dtype if isinstance(x, torch.Tensor) else None for x in tensors)
        read.setdefault(self, set()).add(dtypes)
        return launch(self, tensors)

    monkeypatch.setattr(Step, "__call__", noting)
    return read


@pytest.mark.parametrize("logit", [0.0, -torch.inf])
@pytest.mark.parametrize("fusion", ["gate", "mass"])
def test_no_gradient_is_nan_where_a_gate_beside_a_sink_logit_is_infinite(fusion, logit, impl):
    segments = ((-1,) * 4 + (0,) * 16, (-1,) * 2 + (0,) * 18)
    case = Case(PiPattern(3, 4, 2), T=20, S=20, fusion=fusion, segments=segments, sink_logit=True)
    for infinite in (torch.inf, -torch.inf):
        query, key, value, gate, _ = case.tensors()
        gate = torch.full_like(gate, infinite, requires_grad=True)
        inputs = query, key, value, gate, torch.full((case.H,), logit, dtype=query.dtype, requires_grad=True)
        grads = torch.autograd.grad(case.run(impl, inputs).square().sum(), inputs)
        assert all(grad.isfinite().all() for grad in grads)


def test_a_large_soft_cap_is_none_and_a_small_one_makes_scores_equal(impl):
    case = Case(PiPattern(5, 7, 4))
    query, key, value, gate = case.tensors(grad=False)
    inputs = query, key, value, gate
    assert_close(case.run(impl, inputs, softcap=1e6), case.run(impl, inputs), impl=impl, rtol=1e-4, atol=1e-4)
    equal = case.run(impl, (torch.zeros_like(query), key, value, gate))
    assert_close(case.run(impl, inputs, softcap=1e-6), equal, impl=impl, rtol=1e-4, atol=1e-4)


def test_auto_takes_no_other_attention_where_scores_are_capped_or_there_is_a_sink_logit():
    for more in ({"softcap": 1.5}, {"sink_logit": True}):
        case = Case(PiPattern(64, 64, 2), **more)
        inputs = case.tensors(grad=False)
        out = case.run("auto", inputs)
        assert_close(out, case.run("reference", inputs))
        assert not torch.allclose(out, replace(case, softcap=None).run("auto", inputs[:4]))
