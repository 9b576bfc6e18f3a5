"""Where the window covers everything, "auto" takes PyTorch's own kernels, but for long masks."""

import pytest
import torch
from problems import Case, assert_close, need_triton
from torch.utils._python_dispatch import TorchDispatchMode

from pi_attention import PiPattern, pi_attention
from pi_attention.ops import api, dense
from pi_attention.ops.blocked.attention import blocked_attention

PACKED = ((-1,) * 5 + (0,) * 30 + (1,) * 28, (0,) * 63)
DENSE = PiPattern(1 << 40, 1, 0)


@pytest.mark.parametrize("most", [1, 1000, 1 << 20])
@pytest.mark.parametrize("length", [1, 5, 63])
@pytest.mark.parametrize("segments", [None, PACKED])
def test_parts_of_the_mask_give_the_same_output(length, segments, most, monkeypatch):
    monkeypatch.setattr(dense, "MASKED", most)
    case = Case(PiPattern(63, 7, 5), H=4, G=2, T=length, S=63, segments=segments)
    inputs = case.tensors(grad=False)
    assert_close(case.run("auto", inputs), case.run("reference", inputs))


@pytest.mark.parametrize("scale", [-1.0, 0.0])
@pytest.mark.parametrize("length", [1, 5, 63])
def test_any_scale(length, scale):
    case = Case(PiPattern(63, 7, 5), T=length, S=63)
    inputs = case.tensors(grad=False)
    assert_close(case.run("auto", inputs, scale=scale), case.run("reference", inputs, scale=scale))


@pytest.mark.parametrize("fewer", [0, 7])
@pytest.mark.parametrize("segments", [False, True])
def test_compiled_for_any_length(fewer, segments):
    """By a model's call: T = S, as in training, or fewer queries than keys."""
    attend = torch.compile(pi_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 41, 57):
        key = torch.randn(1, 2, length, 8)
        ids = torch.arange(length)[None].ge(9).int() if segments else None
        got, want = (call(key[:, :, fewer:], key, key, DENSE, segment_ids=ids) for call in (attend, pi_attention))
        assert_close(got, want)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)]
        self.found = max([self.found, *(x.numel() for x in tensors)])
        return out


def test_the_mask_of_a_chunk_of_a_long_prompt_never_exists_whole(monkeypatch):
    query, key = torch.randn(1, 1, 64, 8), torch.randn(1, 1, 1 << 13, 8)
    monkeypatch.setattr(dense, "MASKED", 1 << 16)
    with Largest() as largest:
        pi_attention(query, key, key, DENSE)
    assert largest.found <= 1 << 16


@pytest.mark.parametrize("length", [1, 5, 63])
@pytest.mark.parametrize("segments", [None, PACKED])
def test_kernels_of_a_gpu_serve_what_would_need_a_mask(length, segments, monkeypatch):
    served = []
    monkeypatch.setattr(api, "why_not_auto", lambda query: None)
    monkeypatch.setattr(api, "_fused_or_blocked", lambda *x, **y: served.append(1) or blocked_attention(*x, **y))
    case = Case(PiPattern(63, 7, 5), T=length, S=63, segments=segments)
    inputs = case.tensors(grad=False)
    assert_close(case.run("auto", inputs), case.run("reference", inputs))
    assert bool(served) == (segments is not None or length == 5)


def test_kernels_are_exported_for_any_length_without_gradients():
    need_triton()

    class Attend(torch.nn.Module):
        def forward(self, query, key, ids):
            return pi_attention(query, key, key, DENSE, segment_ids=ids, impl="triton")

    def inputs(length):
        return torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16), torch.arange(length)[None].ge(5).int()

    length = torch.export.Dim("length", min=8, max=512)
    with torch.no_grad():
        program = torch.export.export(Attend(), inputs(40), dynamic_shapes=({2: length}, {2: length}, {1: length}))
        for tokens in (9, 100):
            query, key, ids = inputs(tokens)
            want = pi_attention(query, key, key, DENSE, segment_ids=ids, impl="reference")
            assert_close(program.module()(query, key, ids), want, "triton")
