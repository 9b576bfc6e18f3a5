import pytest
import torch
import torch._dynamo.testing
from problems import Case

from pi_attention import PiPattern, pi_attention
from pi_attention.ops.blocked.operator import band, band_backward
from pi_attention.segments import segment_starts


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_compiled_operator_agrees_and_does_not_recompile_for_each_length(impl):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(pi_attention, fullgraph=True, backend=counter)
    for length in (40, 41, 57, 64, 90):
        case = Case(PiPattern(4, (5, 6, 7, 9), 3, sinks=1), T=length, S=length, fusion="mass")
        query, key, value, gate = case.tensors()
        out = compiled(query, key, value, case.pattern, gate=gate, fusion="mass", impl=impl)
        want = case.run("reference", (query, key, value, gate))
        torch.testing.assert_close(out, want)
        for got, expected in zip(
            torch.autograd.grad(out.sum(), (query, key, value, gate)),
            torch.autograd.grad(want.sum(), (query, key, value, gate)),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2  # the first length, then any length


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
def test_registered_operators_pass_opcheck(packed):
    case = Case(PiPattern(4, 5, 3), T=17, S=19)
    query, key, value, _ = case.tensors()
    starts = segment_starts(torch.zeros(case.B, case.S, dtype=torch.int32)) if packed else None
    for skip in (False, True):
        arguments = (query, key, value, starts, case.pattern.to_ints(), skip, 0.5)
        torch.library.opcheck(band, arguments)
        with torch.no_grad():
            out, lse = band(*arguments)
        tensors = [torch.randn_like(out), torch.randn_like(lse), *(x.detach() for x in (query, key, value)), out]
        torch.library.opcheck(band_backward, (*tensors, *arguments[3:]))


def test_export_gives_the_same_result():
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, gate):
            return pi_attention(query, key, value, PiPattern(4, 5, 3), gate=gate)

    inputs = Case(PiPattern(4, 5, 3)).tensors(torch.float32, grad=False)
    tokens = torch.export.Dim("tokens", min=8, max=4096)
    program = torch.export.export(Attend(), inputs, dynamic_shapes=[{2: tokens}] * 4)
    longer = Case(PiPattern(4, 5, 3), T=77, S=77).tensors(torch.float32, grad=False)
    torch.testing.assert_close(program.module()(*longer), Attend()(*longer))
