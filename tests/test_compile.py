import pytest
import torch
import torch._dynamo.testing
from problems import DEVICE, Case, need_triton

from pi_attention import PiPattern, pi_attention
from pi_attention.nn import PiAttention
from pi_attention.ops.blocked.operator import band, band_backward
from pi_attention.ops.fused.operators import decode, fused, fused_backward
from pi_attention.segments import segment_starts
from pi_attention.stack import DENSE


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("scores", [{}, {"sink_logit": True, "softcap": 1.5}], ids=["plain", "capped"])
def test_compiled_operator_agrees_and_does_not_recompile_for_each_length(impl, scores):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pi_attention, fullgraph=True, backend=counter)
    for length in (40, 41, 57, 64, 90):
        case = Case(PiPattern(4, (5, 6, 7, 9), 3, sinks=1), T=length, S=length, fusion="mass", **scores)
        query, key, value, gate, *sink_logit = inputs = case.tensors()
        more = {"softcap": case.softcap, "sink_logit": sink_logit[0] if sink_logit else None}
        out = compiled(query, key, value, case.pattern, gate=gate, fusion="mass", impl=impl, **more)
        want = case.run("reference", inputs)
        torch.testing.assert_close(out, want)
        for got, expected in zip(
            torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True
        ):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2  # the first length, then any length


def test_a_compiled_layer_of_the_kernels_takes_any_length():
    """Its queries lie token by token, and so do its output and gradients, whatever the number of tokens."""
    need_triton()
    torch._dynamo.reset()
    layer = PiAttention(32, num_heads=4, pattern=PiPattern(4, 5, 3)).to(DEVICE)
    layer.impl = "triton"
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (20, 33, 24):
        x = torch.randn(2, length, 32, device=DEVICE)
        found = []
        for run in (layer, compiled):
            out = run(x)
            found.append([out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("way", ["blocked", "triton", "triton: decoding"])
def test_a_compiled_graph_refuses_a_soft_cap_that_is_none(way):
    """After a cap that is one: the graph of any cap knows none of their values."""
    torch._dynamo.reset()
    if way != "blocked":
        need_triton()
    case = Case(PiPattern(4, 5, 3), T=1 if way.endswith("decoding") else 20, S=20, B=1)
    inputs = [x.to(DEVICE) for x in case.tensors(torch.float32, grad="decoding" not in way)]
    impl = way.partition(":")[0]

    def capped(softcap):
        return pi_attention(*inputs[:3], case.pattern, gate=inputs[3], softcap=softcap, impl=impl)

    compiled = torch.compile(capped, fullgraph=True, backend="aot_eager")
    for softcap in (1.5, 2.5):
        torch.testing.assert_close(compiled(softcap), capped(softcap))
    for softcap in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="softcap must be finite and above 0"):
            compiled(softcap)


@pytest.mark.parametrize("impl", ["blocked", "triton"])
@pytest.mark.parametrize("shared", ["keys and values", "all"])
def test_a_compiled_call_may_be_given_one_tensor_twice(impl, shared):
    torch._dynamo.reset()
    if impl == "triton":
        need_triton()

    def attend(query, key):
        return pi_attention(key if shared == "all" else query, key, key, PiPattern(4, 5, 3), impl=impl)

    inputs = [torch.randn(1, 2, 20, 8, device=DEVICE, requires_grad=True) for _ in range(2)]
    calls = attend, torch.compile(attend, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(call(*inputs).square().sum(), inputs[1])[0] for call in calls)
    torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    case = Case(PiPattern(4, 5, 3), segments=((0,) * 20 + (1,) * 17,) * 2)
    inputs = case.tensors(torch.float32)
    compiled = torch.compile(pi_attention, fullgraph=True)
    out = compiled(*inputs[:3], case.pattern, gate=inputs[3], segment_ids=case.segment_ids())
    torch.testing.assert_close(out, case.run("reference", inputs))
    grads = torch.autograd.grad(out.sum(), inputs)
    want = torch.autograd.grad(case.run("reference", inputs).sum(), inputs)
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_registered_operators_pass_opcheck(packed, softcap):
    case = Case(PiPattern(4, 5, 3), T=17, S=19)
    query, key, value, _ = case.tensors()
    starts = segment_starts(torch.zeros(case.B, case.S, dtype=torch.int32)) if packed else None
    for skip in (False, True):
        arguments = (query, key, value, starts, case.pattern.to_ints(), skip, 0.5, softcap)
        torch.library.opcheck(band, arguments)
        with torch.no_grad():
            out, lse = band(*arguments)
        tensors = [torch.randn_like(out), torch.randn_like(lse), *(x.detach() for x in (query, key, value)), out]
        torch.library.opcheck(band_backward, (*tensors, *arguments[3:]))


@pytest.mark.parametrize("sink_logit", [False, True])
def test_export_gives_the_same_result(sink_logit):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, gate, sink_logit=None):
            more = {} if sink_logit is None else {"sink_logit": sink_logit, "softcap": 1.5}
            return pi_attention(query, key, value, PiPattern(4, 5, 3), gate=gate, **more)

    inputs = Case(PiPattern(4, 5, 3), sink_logit=sink_logit).tensors(torch.float32, grad=False)
    tokens = torch.export.Dim("tokens")
    shapes = [{2: tokens}] * 4 + [None] * sink_logit
    program = torch.export.export(Attend(), inputs, dynamic_shapes=shapes)
    longer = Case(PiPattern(4, 5, 3), T=77, S=77, sink_logit=sink_logit).tensors(torch.float32, grad=False)
    torch.testing.assert_close(program.module()(*longer), Attend()(*longer))


@pytest.mark.parametrize("example", [3, 5, 40], ids=["within the window", "beyond it", "long"])
@pytest.mark.parametrize(
    "pattern",
    [
        *[PiPattern(4, 5, 3), PiPattern(4, 1, 0), PiPattern(4, 5, None), PiPattern(4, 5, 3, causal=False), DENSE],
        PiPattern(4, (2, 3), 3, sinks=2),
    ],
    ids=str,
)
def test_an_exported_call_takes_lengths_on_both_sides_of_the_window(pattern, example):
    class Attend(torch.nn.Module):
        def forward(self, x):
            return pi_attention(x, x, x, pattern)

    tokens = torch.export.Dim("tokens", min=pattern.sinks + 1)
    program = torch.export.export(Attend(), (torch.randn(1, 2, example, 8),), dynamic_shapes=({2: tokens},)).module()
    for length in (pattern.sinks + 1, 4, 5, 6, 77):
        x = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(program(x), pi_attention(x, x, x, pattern, impl="reference"))


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("sink_logit", [False, True])
def test_registered_kernels_pass_opcheck(sink_logit, by_token):
    need_triton()
    # an odd number of rows a head, so that the two log-sum-exps do not share an allocation, which opcheck dislikes
    case = Case(PiPattern(4, 5, 3), T=17, S=19, B=1, H=2, G=2, sink_logit=sink_logit)
    drawn = [x.to(DEVICE) for x in case.tensors(torch.float32, grad=False)]
    if by_token:
        drawn[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in drawn[:3]]
    query, key, value, gate, *logit = drawn
    sink = logit[0] if logit else None
    starts = segment_starts(torch.zeros(case.B, case.S, dtype=torch.int32, device=DEVICE))
    rest = (case.pattern.to_ints(), True, 0.5)
    torch.library.opcheck(fused, (query, key, value, gate, starts, *rest, sink, 1.5))
    torch.library.opcheck(decode, (query[:, :, -1:], key, value, gate[:, :, -1:], starts, *rest, sink, 1.5))
    saved = fused(query, key, value, gate, starts, *rest, sink, 1.5)
    grads = torch.randn_like(query), None, None
    torch.library.opcheck(fused_backward, (*grads, query, key, value, gate, starts, *saved, *rest, sink, 1.5))


def test_compiled_code_takes_starts_that_were_written_to_for_ids():
    torch._dynamo.reset()
    pattern, inputs = PiPattern(4, 5, 3, sinks=2), [torch.randn(1, 2, 12, 4) for _ in range(3)]
    returns = torch.tensor([[0] * 5 + [1] * 4 + [0] * 3], dtype=torch.int32)

    def before(starts):
        return pi_attention(*inputs, pattern, segment_ids=starts)

    def inside(ids):
        return before(segment_starts(ids).copy_(returns))

    want = before(returns)
    ids = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    torch.testing.assert_close(torch.compile(inside, backend="eager", fullgraph=True)(ids), want)
    starts = segment_starts(ids).copy_(returns)
    torch.testing.assert_close(torch.compile(before, backend="eager", fullgraph=True)(starts), want)
