"""Forward mode and the transforms of torch.func: exact in reference and blocked, refused by name in triton, never 0."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from problems import CASES, SCORES, Case, attend, cases, need_triton
from small_models import own
from test_gradients import SMALL, finite_results
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from pi_attention import PiPattern, nn, pi_attention

IMPLS = ["reference", "blocked", "auto"]
SQUARE = PiPattern(4, 4, 2)


def tensors(*shape, count=3):
    return tuple(torch.randn(shape, dtype=torch.float64) for _ in range(count))


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def results_of(case, impl):
    """All outputs, as a function of the inputs; of "auto" the first alone, so that it may take plain attention."""
    if impl != "auto":
        return finite_results(case, impl)
    return lambda *inputs: (case.run(impl, inputs),)


def check_jvp(case, impl):
    inputs = case.tensors(grad=False)
    tangents = case.tensors(grad=False, seed=1)
    got, want = jvp(results_of(case, impl), inputs, tangents), jvp(results_of(case, "reference"), inputs, tangents)
    for a, b in zip(got, want, strict=True):  # outputs, tangents
        for x, y in zip(a, b[: len(a)], strict=True):
            torch.testing.assert_close(x, y)
    if case.S > 1:
        assert got[1][0].abs().max() > 0


@pytest.mark.parametrize("case", CASES + SCORES, ids=str)
def test_tangents_are_the_reference_s(case, impl):
    check_jvp(case, impl)


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_tangents_are_the_reference_s_on_drawn_cases(case):
    inputs, tangents = case.tensors(grad=False), case.tensors(grad=False, seed=1)
    got, want = (jvp(results_of(case, impl), inputs, tangents) for impl in ("blocked", "reference"))
    for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_tangents_match_finite_differences(case, impl):
    options = {"check_forward_ad": True, "check_batched_forward_grad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(finite_results(case, impl), case.tensors(), **options)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dual_numbers_carry_a_tangent(impl, requires_grad):
    query, key, value = tensors(1, 2, 16, 8)
    tangent = torch.randn_like(query)
    _, want = jvp(lambda q: pi_attention(q, key, value, SQUARE, impl="reference"), (query,), (tangent,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query.clone().requires_grad_(requires_grad), tangent)
        got = forward_ad.unpack_dual(pi_attention(dual, key, value, SQUARE, impl=impl)).tangent
    torch.testing.assert_close(got.detach(), want)


@pytest.mark.parametrize("pattern", [SQUARE, PiPattern(3, 4, 2, sinks=2), PiPattern(20, 4, 2)], ids=str)
def test_jacobians_and_hessians_agree(pattern, impl):
    query, key, value = tensors(1, 1, 7, 2)

    def total(q, impl=impl):
        return pi_attention(q, key * q.cos(), value, pattern, impl=impl).square().sum(dim=(0, 1, 3))

    rows = torch.autograd.functional.jacobian(total, query)
    for found in (
        jacfwd(total)(query),
        jacrev(total)(query),
        torch.autograd.functional.jacobian(total, query, vectorize=True),
        torch.autograd.functional.jacobian(total, query, vectorize=True, strategy="forward-mode"),
    ):
        torch.testing.assert_close(found, rows)
    want = torch.autograd.functional.hessian(lambda q: total(q, "reference").sum(), query)
    torch.testing.assert_close(hessian(lambda q: total(q).sum())(query), want)
    assert want.abs().max() > 0


def test_reverse_transforms_are_the_plain_gradient(impl):
    query, key, value = tensors(2, 2, 16, 8)
    leaf = query.clone().requires_grad_()
    (want,) = torch.autograd.grad(pi_attention(leaf, key, value, SQUARE, impl=impl).sum(), leaf)
    torch.testing.assert_close(grad(lambda q: pi_attention(q, key, value, SQUARE, impl=impl).sum())(query), want)
    out, back = vjp(lambda q: pi_attention(q, key, value, SQUARE, impl=impl), query)
    torch.testing.assert_close(back(torch.ones_like(out))[0], want)


@pytest.mark.parametrize("segmented", [False, True])
def test_rows_by_vmap_are_the_batch(impl, segmented):
    query, key, value = tensors(3, 2, 16, 8)
    ids = torch.tensor([[0] * 9 + [1] * 7, [-1] * 4 + [0] * 12, [2] * 16], dtype=torch.int32) if segmented else None
    pattern = PiPattern(3, 4, 2, sinks=1)
    want = pi_attention(query, key, value, pattern, segment_ids=ids, impl=impl)

    def one(q, k, v, *ids):
        more = {"segment_ids": ids[0][None]} if ids else {}
        return pi_attention(q[None], k[None], v[None], pattern, impl=impl, **more)[0]

    got = vmap(one)(query, key, value, *([ids] if segmented else []))
    torch.testing.assert_close(got, want)


def test_gradients_of_each_sample_of_a_layer():
    torch.manual_seed(0)
    layer = nn.PiAttention(16, num_heads=2, pattern=PiPattern(3, 4, 2, sinks=1)).double()
    x = torch.randn(3, 12, 16, dtype=torch.float64)
    weights = dict(layer.named_parameters())

    def loss(weights, row):
        return functional_call(layer, weights, (row[None],)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for number, row in enumerate(x):
        alone = torch.autograd.grad(layer(row[None]).square().sum(), list(weights.values()))
        for name, want in zip(weights, alone, strict=True):
            torch.testing.assert_close(together[name][number], want)
    _, tangent = jvp(layer, (x,), (torch.ones_like(x),))
    step = 1e-6
    torch.testing.assert_close(tangent, (layer(x + step) - layer(x - step)) / (2 * step), rtol=1e-4, atol=1e-6)


def test_gates_and_log_sum_exps_have_tangents(impl):
    case = Case(PiPattern(3, 4, 2, sinks=1), fusion="mass", T=20, S=20)
    query, key, value, gate = case.tensors(grad=False)

    def all_of(gate):
        out, aux = pi_attention(query, key, value, case.pattern, gate=gate, fusion="mass", return_aux=True, impl=impl)
        return out, aux.gate

    def by_query(query):
        return pi_attention(query, key, value, case.pattern, return_aux=True, impl=impl)[1].lse_local

    for function, at in ((all_of, gate), (by_query, query)):
        _, tangent = jvp(function, (at,), (torch.ones_like(at),))
        step = 1e-6
        above, below = function(at + step), function(at - step)
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (tangent, above, below)), strict=True)
        for found, more, less in pairs:
            torch.testing.assert_close(found, (more - less) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_second_derivatives_where_a_band_is_empty(impl):
    inputs = tuple(x.requires_grad_() for x in tensors(1, 1, 5, 2))
    pattern = PiPattern(7, 9, 2)  # no skip key in 5 tokens
    assert torch.autograd.gradgradcheck(lambda *x: pi_attention(*x, pattern, impl=impl), inputs)


def test_batched_output_gradients_are_rows_of_the_jacobian():
    query, key, value = (x.requires_grad_() for x in tensors(1, 2, 9, 4))
    out = pi_attention(query, key, value, PiPattern(3, 4, 2), impl="blocked")
    directions = torch.randn(5, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, (query, key, value), directions, is_grads_batched=True, retain_graph=True)
    for number, direction in enumerate(directions):
        alone = torch.autograd.grad(out, (query, key, value), direction, retain_graph=True)
        for a, b in zip(batched, alone, strict=True):
            torch.testing.assert_close(a[number], b)


def test_memory_of_a_tangent_is_linear_in_the_length():
    query, key, value = (torch.randn(1, 1, 20_000, 4) for _ in range(3))  # dense scores would take 1.6 GB each
    _, tangent = jvp(lambda q: pi_attention(q, key, value, PiPattern(4, 64, 3), impl="blocked"), (query,), (query,))
    assert tangent.abs().max() > 0


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "dual"])
def test_the_kernels_refuse_by_name(transform):
    need_triton()
    query, key, value = (torch.randn(2, 1, 33, 16) for _ in range(3))

    def f(q):
        return attend(q, key, value, SQUARE, impl="triton")

    def dual():
        with forward_ad.dual_level():
            f(forward_ad.make_dual(query, query))

    calls = {
        "jvp": lambda: jvp(f, (query,), (query,)),
        "grad": lambda: grad(lambda q: f(q).sum())(query),
        "vmap": lambda: vmap(lambda q: f(q[None].expand(2, -1, -1, -1)))(query),
        "dual": dual,
    }
    with pytest.raises(NotImplementedError, match="forward mode and the transforms"):
        calls[transform]()


def test_the_interpreter_refuses_what_it_computes_wrongly():
    need_triton()
    if torch.cuda.is_available():
        pytest.skip("there the kernels are compiled")
    query = torch.randn(1, 1, 33, 16).bfloat16()
    with pytest.raises(NotImplementedError, match="interpreter computes products of bfloat16 wrongly"):
        pi_attention(query, query, query, PiPattern(4, 4, 3), impl="triton")
    assert pi_attention(query, query, query, PiPattern(4, 4, 3)).abs().max() < 10


def test_a_compiled_tangent_is_the_same():
    query, key, value = tensors(1, 2, 16, 8)

    def tangent(q):
        return jvp(lambda q: pi_attention(q, key, value, SQUARE), (q,), (q,))[1]

    compiled = torch.compile(tangent, backend="aot_eager")
    torch.testing.assert_close(compiled(query), tangent(query))


def test_a_case_in_single_precision_has_its_tangent(impl):
    case = replace(CASES[2])
    inputs = case.tensors(torch.float32, grad=False)
    _, tangent = jvp(results_of(case, impl), inputs, inputs)
    exact = [x.double() for x in inputs]
    _, want = jvp(results_of(case, "reference"), tuple(exact), tuple(exact))
    torch.testing.assert_close(tangent[0].double(), want[0], rtol=1e-4, atol=1e-4)


COVERING = {
    "causal": PiPattern(16, 4, 2),
    "bidirectional": PiPattern(16, 4, 2, causal=False),
    "appended": PiPattern(16, 4, 2, sinks=2),
}


@pytest.mark.parametrize("kind", COVERING)
@pytest.mark.parametrize("segmented", [False, True])
def test_higher_derivatives_where_attention_is_pytorch_s_own(kind, segmented):
    """The kernels of scaled_dot_product_attention have a first derivative alone."""
    query, key, value = (x.requires_grad_() for x in tensors(1, 2, 8, 4))
    query = query[:, :, 3:] if kind == "appended" else query
    ids = torch.tensor([[-1, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32) if segmented else None

    def third(impl):
        out = pi_attention(query, 2 * key, value, COVERING[kind], segment_ids=ids, impl=impl)
        found = []
        for power in (3, 2, 1):
            grads = torch.autograd.grad(out.pow(power).sum(), (key, value), create_graph=True)
            out = torch.cat(grads)
            found.append(out)
        return found

    torch.testing.assert_close(third("auto"), third("reference"))


@pytest.mark.parametrize("pattern", [SQUARE, replace(SQUARE, sinks=2), PiPattern(32, 4, 2)], ids=str)
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacrev", "jacfwd", "hessian", "vmap of grad"])
def test_compiled_transforms_are_those_that_are_not(pattern, transform):
    query, key, value = tensors(1, 2, 12, 4)

    def f(q):
        return pi_attention(q, key, value, pattern)

    def loss(q):
        return f(q).pow(2).sum()

    whole = {
        "grad": grad(loss),
        "jvp": lambda q: jvp(f, (q,), (q,))[1],
        "vmap": lambda q: vmap(f)(torch.stack([q, 2 * q])),
        "jacrev": jacrev(f),
        "jacfwd": jacfwd(f),
        "hessian": hessian(loss),
        "vmap of grad": lambda q: vmap(grad(loss))(torch.stack([q, 2 * q])),
    }[transform]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(whole, backend="aot_eager", fullgraph=True)(query), whole(query))


def test_second_derivatives_of_compiled_code_raise():
    query = torch.randn(1, 2, 12, 4, requires_grad=True)
    for pattern in (SQUARE, PiPattern(32, 4, 2)):
        compiled = torch.compile(lambda q, p=pattern: pi_attention(q, q, q, p), backend="aot_eager")
        (first,) = torch.autograd.grad(compiled(query).pow(2).sum(), query, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            first.sum().backward()


def test_gradients_of_each_sample_of_a_model_with_its_default_cache():
    torch.manual_seed(0)
    model = own()().double().eval()
    ids = torch.randint(1, 99, (3, 12))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, row):
        return functional_call(model, weights, (row[None],), {"labels": row[None]}).loss

    together = vmap(grad(loss), in_dims=(None, 0))(weights, ids)
    for number, row in enumerate(ids):
        alone = grad(loss)(weights, row)
        for name, want in alone.items():
            torch.testing.assert_close(together[name][number], want)
