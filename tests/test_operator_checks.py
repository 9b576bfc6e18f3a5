import pytest
import torch
from problems import DEVICE

from pi_attention import PiPattern, pi_attention, segments_from_cu_seqlens, segments_from_mask

PATTERN = PiPattern(4, 4, 2)


def tensors(**shapes):
    made = {"query": (2, 4, 8, 16), "key": (2, 2, 8, 16), "value": (2, 2, 8, 16)} | shapes
    return {name: torch.randn(shape) for name, shape in made.items()}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (tensors(query=(2, 8, 16)), ValueError, r"query must be \[B, H, T, D\]"),
        (tensors() | {"query": [1.0]}, TypeError, "query"),
        (tensors() | {"key": torch.randn(2, 2, 8, 16).half()}, TypeError, "cast"),
        (tensors() | {"query": torch.ones(2, 4, 8, 16, dtype=torch.int64)}, TypeError, "query has dtype"),
        (tensors(value=(2, 2, 9, 16)), ValueError, "value"),
        (tensors(value=(2, 2, 8, 24)), ValueError, "must have one shape"),
        (tensors(key=(1, 2, 8, 16), value=(1, 2, 8, 16)), ValueError, "batch"),
        (tensors(key=(2, 3, 8, 16), value=(2, 3, 8, 16)), ValueError, "divide the query heads"),
        (tensors(key=(2, 2, 7, 16), value=(2, 2, 7, 16)), ValueError, "at least as many keys"),
        (tensors(query=(2, 4, 0, 16)), ValueError, "empty"),
        (tensors() | {"pattern": "local"}, TypeError, "PiPattern"),
        (tensors() | {"pattern": PiPattern(4, (4, 4, 4), 2)}, ValueError, "3 entries"),
        (tensors() | {"pattern": PiPattern(4, 3, 2, causal=False, ring=True)}, ValueError, "divide the length"),
        (tensors() | {"fusion": "add"}, ValueError, "fusion"),
        (tensors() | {"gate": torch.randn(2, 4, 9)}, ValueError, "gate must be"),
        (tensors() | {"gate": torch.ones(2, 4, 8, dtype=torch.int64)}, TypeError, "floating"),
        (tensors() | {"segment_ids": torch.zeros(2, 9, dtype=torch.int32)}, ValueError, "segment_ids must be"),
        (tensors() | {"segment_ids": torch.zeros(2, 8)}, TypeError, "int32"),
        (tensors() | {"impl": "cuda"}, ValueError, "impl"),
        (tensors() | {"sink_logit": torch.zeros(2)}, ValueError, r"sink_logit must be \[H\] = \(4,\), got \(2,\)"),
        (tensors() | {"sink_logit": torch.zeros(4, dtype=torch.int64)}, TypeError, "sink_logit must be a floating"),
        (tensors() | {"sink_logit": 0.5}, TypeError, "sink_logit must be a floating"),
        (tensors() | {"sink_logit": torch.zeros(4, device="meta")}, ValueError, "sink_logit is on meta"),
        (tensors() | {"softcap": 0.0}, ValueError, "softcap must be finite and above 0, got 0.0"),
        (tensors() | {"softcap": -3.0}, ValueError, "softcap must be finite and above 0"),
        (tensors() | {"softcap": float("inf")}, ValueError, "None leaves scores as they are"),
        (tensors() | {"softcap": torch.tensor(3.0)}, TypeError, "softcap must be a float or None, got Tensor"),
        (tensors() | {"softcap": [5.0]}, TypeError, r"softcap must be a float or None, got \[5.0\]: pass one number"),
        (tensors() | {"softcap": 3 + 0j}, TypeError, r"softcap must be a float or None, got \(3\+0j\)"),
        (tensors() | {"softcap": 1e39}, ValueError, r"softcap must be finite and above 0, got 1e\+39 \(of fp32\)"),
        (tensors() | {"softcap": 1e-46}, ValueError, "softcap must be finite and above 0, got 1e-46"),
        (tensors() | {"scale": [5.0]}, TypeError, r"scale must be a float, got \[5.0\]: pass one number"),
        (tensors() | {"sink_logit": 0.5}, TypeError, r"got 0.5: one number serves all heads as torch.full"),
        (tensors() | {"sink_logit": torch.zeros(4).int()}, TypeError, "got torch.int32: cast it to float32"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        pi_attention(**({"pattern": PATTERN} | arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (tensors() | {"dtype": torch.float64}, "float64"),
        (tensors(query=(1, 1, 8, 300), key=(1, 1, 8, 300), value=(1, 1, 8, 300)), "head dim 300"),
    ],
)
def test_an_explicit_implementation_never_falls_back(arguments, words):
    dtype = arguments.pop("dtype", torch.float32)
    with pytest.raises(NotImplementedError, match=words):
        pi_attention(**{name: x.to(DEVICE, dtype) for name, x in arguments.items()}, pattern=PATTERN, impl="triton")


def test_without_a_gpu_the_kernels_say_so(monkeypatch):
    monkeypatch.setattr("pi_attention.ops.fused.attention.INTERPRETED", False)
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        pi_attention(**tensors(), pattern=PATTERN, impl="triton")


def test_the_kernels_refuse_double_backward():
    inputs = [x.to(DEVICE).requires_grad_() for x in tensors().values()]
    out = pi_attention(*inputs, PATTERN, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


def test_segment_helpers_refuse_other_shapes():
    with pytest.raises(ValueError, match="attention_mask"):
        segments_from_mask(torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="cu_seqlens"):
        segments_from_cu_seqlens(torch.tensor([0]), 4)
