"""What `impl="auto"` takes on devices that this machine has not, and where the kernels do not compile."""

import logging
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pi_attention import PiPattern, pi_attention
from pi_attention.accelerator import best_device, has_bf16
from pi_attention.ops import api
from pi_attention.ops.fused import attention, fallback, operators, tiling
from pi_attention.training.train import in_bf16

PATTERN = PiPattern(8, 8, 2)


def tensors_on(device, dtype=torch.float16, dim=64):
    """What the choice asks of a query, on a device that need not be there."""
    device = torch.device(device)
    return SimpleNamespace(device=device, dtype=dtype, shape=(1, 2, 40, dim), is_cuda=device.type == "cuda")


@pytest.fixture(autouse=True)
def a_gpu_machine(monkeypatch):
    """Triton compiles, so that only the device decides; failures are forgotten afterwards."""
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    monkeypatch.setattr(attention, "INTERPRETED", False)
    monkeypatch.setattr(fallback, "FAILED", {})
    monkeypatch.setattr(fallback, "FAILED_BACKWARD", {})


@pytest.mark.parametrize(
    ("device", "hip", "word"),
    [("cuda:0", None, None), ("cuda:0", "7.1", "ROCm"), ("xpu:0", None, "XPU"), ("mps:0", None, "MPS"),
     ("cpu", None, "CPU"), ("hpu:0", None, "untried")],
)  # fmt: skip
def test_auto_takes_the_kernels_on_nvidia_alone_and_logs_why(monkeypatch, caplog, device, hip, word):
    monkeypatch.setattr(torch.version, "hip", hip)
    with caplog.at_level(logging.DEBUG, "pi_attention"):
        chosen = api._implementation("auto", tensors_on(device))
    if word is None:
        assert chosen is api._fused_or_blocked and not caplog.records
    else:
        assert chosen is api.blocked_attention and word in caplog.text


def test_asked_for_by_name_the_kernels_are_tried_on_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert api._implementation("triton", tensors_on("cuda:0")) is api.fused_attention


@pytest.mark.parametrize(("hip", "there"), [(None, True), ("7.1", False)])
def test_tensor_descriptors_are_nvidias(monkeypatch, hip, there):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))  # of an MI300, and above Hopper's
    assert tiling._has_descriptors.__wrapped__(torch.device("cuda:0")) is there


def failing(kind, words):
    def attend(*args, **kwargs):
        raise kind(words)

    return attend


def errors():
    triton = pytest.importorskip("triton")
    return {
        "out of shared memory": lambda: triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory"),
        "no C compiler": lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        "no Python.h": lambda: subprocess.CalledProcessError(1, ["gcc"]),
        "LLVM": lambda: RuntimeError("PassManager::run failed"),
    }


@pytest.mark.parametrize("which", ["out of shared memory", "no C compiler", "no Python.h", "LLVM"])
def test_kernels_that_do_not_compile_are_warned_of_once_and_replaced(monkeypatch, which):
    error, calls = errors()[which], []

    def attend(*args, **kwargs):
        calls.append(1)
        raise error()

    monkeypatch.setattr(api, "fused_attention", attend)
    monkeypatch.setattr(api, "why_not_auto", fallback.why_not)
    query, key, value = torch.randn(3, 1, 2, 40, 16).unbind()
    with pytest.warns(UserWarning, match="plain PyTorch.*failed to compile") as told:
        first = pi_attention(query, key, value, PATTERN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = pi_attention(query, key, value, PATTERN)
    want = pi_attention(query, key, value, PATTERN, impl="blocked")
    assert len(calls) == 1 and told[0].filename == __file__
    assert torch.equal(first, want) and torch.equal(second, want)


def forward_alone(*args, **kwargs):
    """What the kernels of a forward pass would leave behind, where those of the backward pass do not compile."""
    query, key, value, gate, starts, pattern, mass, scale, sink_logit, softcap = args
    fusion = "mass" if mass or gate is None else "gate"
    of_scores = {"scale": scale, "sink_logit": sink_logit, "softcap": softcap}
    out, lse, skip_lse = api.blocked_attention(
        query, key, value, PiPattern.from_ints(pattern), gate=gate, fusion=fusion, starts=starts, **of_scores
    )
    return out, lse, out.clone(), skip_lse


@pytest.mark.parametrize("fusion", ["gate", "mass", None])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "sink logit, cap, documents, aux"])
@pytest.mark.parametrize("pattern", [PATTERN, PiPattern(8, 8, 0, sinks=2)], ids=["skips", "no skips"])
def test_gradients_whose_kernels_do_not_compile_are_those_of_plain_pytorch(monkeypatch, fusion, extras, pattern):
    pytest.importorskip("triton")
    calls = []

    def gradients(*args):
        calls.append(1)
        raise errors()["out of shared memory"]()

    monkeypatch.setattr(operators, "run_fused", lambda *args: forward_alone(*args))
    monkeypatch.setattr(operators, "run_fused_backward", gradients)
    monkeypatch.setattr(api, "why_not_auto", fallback.why_not)
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 2, 40, 16).unbind()]
    options: dict = {} if fusion is None else {"gate": torch.randn(1, 2, 40, requires_grad=True), "fusion": fusion}
    if extras:
        ids = (torch.arange(40) // 25)[None].int()
        options |= {"sink_logit": torch.randn(2, requires_grad=True), "softcap": 5.0, "segment_ids": ids}
    given = [*inputs, *(x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad)]

    def differentiate(impl):
        out = pi_attention(*inputs, pattern, **options, return_aux=extras, impl=impl)
        loss = out.sin().sum() if not extras else (out[0].sin() * out[1].lse_local.detach().exp()[..., None]).sum()
        if extras:
            loss = loss + out[1].lse_local.cos().sum()
        return torch.autograd.grad(loss, given, materialize_grads=True)

    want = differentiate("blocked")
    with pytest.warns(UserWarning, match="plain PyTorch.*failed to compile"):
        found = differentiate("auto")
    again = differentiate("auto")  # by plain PyTorch from the start
    assert len(calls) == 1
    for x, y, z in zip(want, found, again, strict=True):
        torch.testing.assert_close(x, y)
        assert torch.equal(x, z)


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_are_recomputed_as_they_were_where_kernels_of_gradients_do_not_compile(monkeypatch, reentrant):
    """The last layer's gradients fail first; others are recomputed afterwards. Autocast changes no gradient."""
    monkeypatch.setattr(operators, "run_fused", lambda *args: forward_alone(*args))
    monkeypatch.setattr(operators, "run_fused_backward", failing(RuntimeError, "PassManager::run failed"))
    monkeypatch.setattr(api, "why_not_auto", fallback.why_not)
    query = torch.randn(1, 2, 40, 16, requires_grad=True)

    def layer(x, impl="auto"):
        return pi_attention(x, 1.1 * x, 0.9 * x, PATTERN, impl=impl)

    out = layer(layer(query, "blocked"), "blocked")
    (want,) = torch.autograd.grad(out.sum(), query)
    with pytest.warns(UserWarning, match="Gradients of π-Attention run as plain PyTorch"):
        checkpoint(layer, checkpoint(layer, query, use_reentrant=reentrant), use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(query.grad, want)
    loss = layer(layer(query)).sum()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(loss, query)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_errors_of_gradients_are_not_hidden(monkeypatch, impl):
    """Those of running, and every one where the kernels were asked for by name."""
    error = errors()["LLVM"] if impl == "triton" else lambda: RuntimeError("an illegal memory access")
    monkeypatch.setattr(operators, "run_fused", lambda *args: forward_alone(*args))
    monkeypatch.setattr(operators, "run_fused_backward", lambda *args: failing(type(error()), str(error()))())
    monkeypatch.setattr(api, "why_not_auto", lambda query: None)
    monkeypatch.setattr(api, "why_not_triton", lambda query: None)
    out = pi_attention(*torch.randn(3, 1, 2, 40, 16, requires_grad=True), PATTERN, impl=impl)
    with pytest.raises(RuntimeError, match="PassManager" if impl == "triton" else "illegal memory access"):
        out.sum().backward()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, ValueError])
def test_errors_of_running_are_not_hidden(monkeypatch, kind):
    monkeypatch.setattr(api, "fused_attention", failing(kind, "CUDA error: an illegal memory access"))
    monkeypatch.setattr(api, "why_not_auto", lambda query: None)
    with pytest.raises(kind, match="illegal memory access"):
        pi_attention(*torch.randn(3, 1, 2, 40, 16), PATTERN)


def test_an_explicit_choice_shows_the_error_of_the_compiler(monkeypatch):
    monkeypatch.setattr(api, "fused_attention", failing(RuntimeError, "PassManager::run failed"))
    monkeypatch.setattr(api, "why_not_triton", lambda query: None)
    with pytest.raises(RuntimeError, match="PassManager"):
        pi_attention(*torch.randn(3, 1, 2, 40, 16), PATTERN, impl="triton")


def test_the_device_is_the_accelerator_that_torch_finds(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    assert best_device() == torch.device("xpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert best_device() == torch.device("cpu") and not has_bf16(best_device())


@pytest.mark.parametrize(("major", "native"), [(7, False), (9, True)])
def test_a_gpu_that_emulates_bfloat16_computes_in_fp32(monkeypatch, major, native):
    """PyTorch calls bfloat16 supported on a Turing GPU, which has no such products."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    assert has_bf16(torch.device("cuda", 0)) is native
    assert in_bf16("auto", torch.device("cuda", 0)) is native
    assert in_bf16("bf16", torch.device("cuda", 0)) and not in_bf16("auto", torch.device("cpu"))


@pytest.mark.parametrize("arguments", [["--version"], ["env"]])
def test_version_and_environment_need_torch_alone(arguments):
    hidden = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'rich', 'transformers', 'yaml', 'numpy']));"
    code = f"{hidden} sys.argv[1:] = {arguments}; from pi_attention.cli.__main__ import command; command()"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    lines = dict(line.split(maxsplit=1) for line in told.splitlines())
    import pi_attention

    assert lines["pi-attention"] == pi_attention.__version__
    if arguments == ["env"]:
        assert lines["torch"].startswith(torch.__version__) and "takes" in lines['impl="auto"']
