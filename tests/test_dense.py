"""Where the window covers everything, "auto" takes PyTorch's own kernels, but for long masks."""

import pytest
import torch
from problems import Case, assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from pi_attention import PiPattern, pi_attention
from pi_attention.ops import api, dense
from pi_attention.ops.blocked.attention import blocked_attention

PACKED = ((-1,) * 5 + (0,) * 30 + (1,) * 28, (0,) * 63)
DENSE = PiPattern(1 << 40, 1, 0)


@pytest.mark.parametrize("most", [1, 1000, 1 << 20])
@pytest.mark.parametrize("length", [1, 5, 63])
@pytest.mark.parametrize("segments", [None, PACKED])
def test_parts_of_the_mask_give_the_same_output_and_gradients(length, segments, most, monkeypatch):
    monkeypatch.setattr(dense, "MASKED", most)
    case = Case(PiPattern(63, 7, 5), H=4, G=2, T=length, S=63, segments=segments)
    inputs = case.tensors()
    got, want = (case.run(impl, inputs) for impl in ("auto", "reference"))
    assert_close(got, want)
    weights = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((out * weights).sum(), inputs[:3]) for out in (got, want)), strict=True):
        assert_close(a, b)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)]
        self.found = max([self.found, *(x.numel() for x in tensors)])
        return out


def test_the_mask_of_a_chunk_of_a_long_prompt_never_exists_whole(monkeypatch):
    query, key = torch.randn(1, 1, 256, 8), torch.randn(1, 1, 1 << 15, 8)
    monkeypatch.setattr(dense, "MASKED", 1 << 18)
    with Largest() as largest:
        pi_attention(query, key, key, DENSE)
    assert largest.found <= 1 << 18


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
