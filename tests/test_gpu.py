"""What only a GPU can show: long sequences, large offsets, CUDA graphs, the default implementation there."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pi_attention import PiPattern, coordinated_heads, pi_attention
from pi_attention.nn import PiAttention
from pi_attention.ops.paged import Pages, paged_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def relative_error(got, want):
    return float((got.double() - want.double()).detach().norm() / want.detach().double().norm())


def qkv(*shape, dtype=torch.bfloat16, grad=True):
    return [torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=grad) for _ in range(3)]


PATTERNS = [
    PiPattern(256, 256, 16),
    PiPattern(1024, 1024, 32),
    PiPattern(64, 64, 8, sinks=4),
    PiPattern(256, 256, 1),
    PiPattern(100, (60, 70, 80, 90), 12),
    PiPattern(128, 128, 8, causal=False),
    PiPattern(16, 4, 64, phase=(0, 1, 2, 3)),
    PiPattern(128, (4, 4, 9, 64), 70, phase=(3, 1, 5, 40)),
    PiPattern(20, 16, None, phase=(0, 5, 10, 15)),
    PiPattern(30, 16, 5, causal=False, phase=(0, 5, 10, 15)),
]


@pytest.mark.parametrize("dim", [64, 128, 80, 256])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("groups", [4, 1])
def test_long_sequences_agree_with_the_blocked_implementation(pattern, dim, groups):
    query, key, value = qkv(1, 4, 3333, dim)
    inputs = query, *(x.detach()[:, :groups].requires_grad_() for x in (key, value))
    gate = torch.randn(1, 4, 3333, device="cuda", requires_grad=True)
    grad = torch.randn(1, 4, 3333, dim, device="cuda", dtype=torch.bfloat16)
    results = []
    for impl in ("triton", "blocked"):
        out = pi_attention(*inputs, pattern, gate=gate, impl=impl)
        results.append([out, *torch.autograd.grad(out, (*inputs, gate), grad)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-2


@pytest.mark.parametrize("dim", [200, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "pattern", [PiPattern(512, 1, 0), PiPattern(300, 1, 0, sinks=4), coordinated_heads(100, 400, 4, sinks=4)], ids=str
)
def test_large_heads_agree_where_keys_are_loaded_by_descriptors(pattern, dtype, dim):
    """From 2²⁴ elements of the query on; on Hopper with tiles of its own."""
    query, key, value = qkv(1, 4, 1 << 15, dim, dtype=dtype, grad=False)
    inputs = [x.requires_grad_() for x in (query, key[:, :1].clone(), value[:, :1].clone())]
    grad = torch.randn_like(query)
    results = []
    for impl in ("triton", "blocked"):
        out = pi_attention(*inputs, pattern, fusion="mass", impl=impl)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-2


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("fusion", ["gate", "mass"])
@pytest.mark.parametrize(
    "pattern", [PiPattern(128, 1, 0), PiPattern(256, 256, 16), PiPattern(64, 64, 8, sinks=4), PATTERNS[6]], ids=str
)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("length", [3333, 1 << 16])  # the longer one's keys are loaded by descriptors, or on Hopper
def test_sink_logits_and_soft_caps_agree_with_the_blocked_implementation(length, softcap, pattern, fusion, dim):
    inputs = qkv(1, 4, length, dim)
    gate = torch.randn(1, 4, length, device="cuda", requires_grad=True)
    sink_logit = torch.randn(4, device="cuda", requires_grad=True)
    noise = torch.randn(1, 4, length, dim, device="cuda", dtype=torch.bfloat16)
    grad = noise + inputs[2].detach()  # by which the sink logit's gradient is no sum of terms that cancel
    wanted = (*inputs, gate, sink_logit) if pattern.skips else (*inputs, sink_logit)
    options = {"gate": gate, "fusion": fusion, "sink_logit": sink_logit, "softcap": softcap}
    results = []
    for impl in ("triton", "blocked"):
        out = pi_attention(*inputs, pattern, impl=impl, **options)
        results.append([out, *torch.autograd.grad(out, wanted, grad)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 1e-2
    step = [x[:, :, -1:].detach() for x in (inputs[0], gate)]
    out = results[0][0][:, :, -1:]
    with torch.no_grad():  # the decoding kernel
        last = pi_attention(step[0], *inputs[1:], pattern, **options | {"gate": step[1]})
    assert relative_error(last, out) < 1e-2


def test_gpu_default_is_the_kernels_and_bitwise_repeatable():
    inputs = qkv(2, 8, 2048, 64)
    pattern = PiPattern(64, 64, 8)
    runs = []
    for impl in ("auto", "triton"):
        out = pi_attention(*inputs, pattern, impl=impl)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_more_than_two_billion_elements():
    query = torch.randn(1, 128, (1 << 31) // (128 * 128) + 512, 128, device="cuda", dtype=torch.bfloat16)
    assert query.numel() > 1 << 31
    pattern = PiPattern(32, 64, 2)
    out = pi_attention(query, query, query, pattern, impl="triton")
    last = pi_attention(query[:, :, -1:], query, query, pattern, impl="triton")  # the decoding kernel
    assert torch.equal(last.isfinite().all(), torch.tensor(True, device="cuda"))
    assert relative_error(last[:, -1], out[:, -1, -1:]) < 1e-2
    tail = query[:, -1:, -400:]
    want = pi_attention(tail, tail, tail, pattern, impl="blocked")
    assert relative_error(out[:, -1:, -200:], want[:, :, -200:]) < 1e-2


def test_cuda_graph_capture():
    pattern, inputs = PiPattern(64, 64, 8), qkv(1, 4, 1000, 64, grad=False)
    want = pi_attention(*inputs, pattern)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pi_attention(*inputs, pattern)
    inputs[0].copy_(torch.randn_like(inputs[0]))
    graph.replay()
    assert not torch.equal(out, want)
    assert torch.equal(out, pi_attention(*inputs, pattern))


def captured(step):
    """A CUDA graph of a step with gradients, which ran once before, and the tensors that it writes."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    return graph, results


def test_cuda_graph_capture_of_a_step():
    """As large as the Hopper kernels want it, which serve both bands."""
    inputs = [*qkv(1, 16, 1 << 14, 128), torch.randn(1, 16, 1 << 14, device="cuda", requires_grad=True)]
    grad = torch.randn(1, 16, 1 << 14, 128, device="cuda", dtype=torch.bfloat16)
    pattern = coordinated_heads(64, 64, 16, period=4)

    def step():
        out = pi_attention(*inputs[:3], pattern, gate=inputs[3])
        return torch.autograd.grad(out, inputs, grad)

    graph, grads = captured(step)
    with torch.no_grad():
        inputs[0].normal_()
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(grads, step(), strict=True))


def test_cuda_graph_capture_of_a_converted_model_with_sinks():
    transformers = pytest.importorskip("transformers")
    from pi_attention.convert import convert

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, max_position_embeddings=512, **sizes)
    pattern = coordinated_heads(16, 32, 4, sinks=4)
    model = convert(transformers.LlamaForCausalLM(config), pattern).cuda().train()
    ids = torch.randint(99, (1, 512), device="cuda")

    def loss_and_gradients():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    graph, results = captured(loss_and_gradients)
    ids.random_(99)
    graph.replay()
    for got, want in zip(results, loss_and_gradients(), strict=True):
        torch.testing.assert_close(got, want)


def test_a_new_length_compiles_nothing():
    from pi_attention.ops.fused.kernels.forward import band_forward_kernel

    pattern = PiPattern(64, 64, 8)
    for length in (5000, 9000):  # below and above the size from which tensor descriptors pay
        pi_attention(*qkv(1, 4, length, 64, grad=False), pattern)
    compiled = sum(len(cache[0]) for cache in band_forward_kernel.device_caches.values())
    for length in (5001, 6000, 7777, 8192, 10001, 16000):
        pi_attention(*qkv(1, 4, length, 64, grad=False), pattern)
    assert sum(len(cache[0]) for cache in band_forward_kernel.device_caches.values()) == compiled


def test_layer_under_autocast_and_compile():
    layer = PiAttention(256, 4, PiPattern(64, 64, 8)).cuda()
    x = torch.randn(2, 1000, 256, device="cuda")
    want = layer(x)
    with torch.autocast("cuda", torch.bfloat16):
        assert relative_error(layer(x), want) < 3e-2
    compiled = torch.compile(layer, fullgraph=True)
    assert relative_error(compiled(x), want) < 1e-4
    compiled(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(compiled, reentrant):
    if compiled and reentrant:
        pytest.skip("torch.compile takes the non-reentrant kind")
    pattern, inputs = PiPattern(64, 64, 8), qkv(1, 4, 1000, 64)

    def attend(*x):
        return pi_attention(*x, pattern, impl="triton").float().square().sum()

    def checkpointed(*x):
        return checkpoint(attend, *x, use_reentrant=reentrant)

    run = torch.compile(checkpointed) if compiled else checkpointed
    want = torch.autograd.grad(attend(*inputs), inputs)
    for x in inputs:
        x.grad = None
    run(*inputs).backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(inputs, want, strict=True))


def paged_requests(lengths, slots, heads, groups, dim, dtype=torch.bfloat16):
    """Queries, gates, keys and values that lie anywhere among the slots, and where."""
    query = torch.randn(len(lengths), heads, 1, dim, device="cuda", dtype=dtype)
    gate = torch.randn(len(lengths), heads, 1, device="cuda", dtype=dtype)
    key, value = (torch.empty(slots, groups, dim, device="cuda", dtype=dtype).normal_() for _ in range(2))
    return query, gate, key, value, Pages.of(lengths, torch.randperm(slots, device="cuda")[: sum(lengths)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 80, 256])
@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern.causal], ids=str)
def test_pages_are_read_where_they_lie(pattern, dim, dtype):
    lengths = [1, 4000, 77, 1500, 4001, 16, 300, 2]
    for groups in (4, 1):
        query, gate, key, value, pages = paged_requests(lengths, 12000, 4, groups, dim, dtype)
        got, want = (
            paged_attention(query, key, value, pages, pattern, gate=gate, impl=impl) for impl in ("triton", "blocked")
        )
        assert relative_error(got, want) < (1e-2 if dtype != torch.float32 else 1e-4)


def test_pages_lie_beyond_2_to_the_31_elements():
    query, gate, key, value, pages = paged_requests([900, 1200], 2**21 + 5000, 8, 8, 128)
    assert key.numel() > 2**31
    got, want = (
        paged_attention(query, key, value, pages, PiPattern(256, 256, 4, sinks=4), gate=gate, impl=impl)
        for impl in ("auto", "blocked")
    )
    assert relative_error(got, want) < 1e-2


def test_a_batch_that_decodes_compiles_nothing_for_other_lengths():
    from pi_attention.ops.fused.kernels.decode import decode_kernel

    compiled = []
    for lengths in ([500, 600], [501, 601], [37, 2000], [5, 6]):
        query, gate, key, value, pages = paged_requests(lengths, 4000, 4, 2, 64)
        paged_attention(query, key, value, pages, PiPattern(64, 64, 8, sinks=4), gate=gate, impl="triton")
        compiled.append(sum(len(cache[0]) for cache in decode_kernel.device_caches.values()))
    assert compiled[0] > 0 and len(set(compiled)) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("converted", [False, True])
def test_a_model_over_two_gpus_generates_what_it_does_on_one(converted):
    transformers = pytest.importorskip("transformers")
    from accelerate import dispatch_model

    from pi_attention.convert import convert
    from pi_attention.models import PiConfig, PiForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    if converted:
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=512))
        model = convert(llama, PiPattern(30, 7, 5, sinks=3), layers=[0, 2, 3])
    else:
        model = PiForCausalLM(PiConfig(**sizes, window=30, skips=40, sinks=3))
    model = model.to("cuda", torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    ids, mask = torch.randint(3, 300, (2, 200), device="cuda"), torch.ones(2, 200, dtype=torch.long, device="cuda")
    mask[0, :50] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **asked)
    base = "model.model" if converted else "model"
    places = {f"{base}.{name}": 0 for name in ("embed_tokens", "rotary_emb", "layers.0", "layers.1")}
    places |= {f"{base}.{name}": 1 for name in ("layers.2", "layers.3", "norm")}
    places[f"{base.removesuffix('model')}lm_head"] = 1
    model = dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)
    assert model.device.index == 0 and model.get_output_embeddings().weight.device.index == 1
    assert torch.equal(model.generate(ids, **asked), want)
