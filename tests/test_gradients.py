import pytest
import torch
from problems import DEVICE, Case, need_triton

from pi_attention import PiPattern, pi_attention

SMALL = [
    Case(PiPattern(3, 4, 2), T=11, S=11, B=1, H=2, G=1, D=2),
    Case(
        PiPattern(2, (3, 4), 2, sinks=1),
        T=9,
        S=11,
        B=2,
        H=2,
        G=2,
        D=2,
        fusion="mass",
        segments=((-1,) * 2 + (0,) * 9, (0,) * 6 + (1,) * 5),
    ),
    Case(PiPattern(2, 3, 2, causal=False, phase=(2, 0)), T=9, S=9, B=1, H=2, G=1, D=2, fusion="mass"),
    Case(PiPattern(2, 3, 2, causal=False, ring=True), T=9, S=9, B=1, H=2, G=1, D=2),
    Case(PiPattern(3, 4, 2), T=11, S=11, B=1, H=2, G=1, D=2, sink_logit=True, softcap=1.5),
    Case(PiPattern(2, (3, 4), 2, sinks=1), T=9, S=11, B=1, H=2, D=2, fusion="mass", sink_logit=True, softcap=1.5),
]


def finite_results(case, impl):
    def run(*inputs):
        out, aux = case.run(impl, inputs, return_aux=True)
        return out, *(torch.where(x == -torch.inf, 0.0, x) for x in aux)

    return run


@pytest.fixture(params=["reference", "blocked"])
def impl(request):
    return request.param


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_match_finite_differences(case, impl):
    assert torch.autograd.gradcheck(finite_results(case, impl), case.tensors())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_second_derivatives_match_finite_differences(case, impl):
    assert torch.autograd.gradgradcheck(finite_results(case, impl), case.tensors())


def test_gate_of_a_query_without_skip_keys_gets_no_gradient(impl):
    case = Case(PiPattern(3, 6, 2), T=20, S=20)
    inputs = case.tensors()
    (grad,) = torch.autograd.grad(case.run(impl, inputs).pow(2).sum(), inputs[3])
    assert (grad[:, :, :6] == 0).all()
    assert (grad[:, :, 6:] != 0).all()


def test_gradient_of_a_log_sum_exp_alone(impl):
    case = Case(PiPattern(3, 6, 2), T=20, S=20)
    query, key, value, gate = case.tensors()
    _, aux = case.run(impl, (query, key, value, gate), return_aux=True)
    grad_query, grad_value = torch.autograd.grad(aux.lse_local.sum(), (query, value), allow_unused=True)
    assert grad_query.abs().sum() > 0
    assert grad_value is None or (grad_value == 0).all()


def test_an_infinite_gate_has_finite_gradients(impl):
    case = Case(PiPattern(3, 6, 2), T=20, S=20)
    query, key, value, gate = case.tensors()
    gate = torch.full_like(gate, -torch.inf).requires_grad_()
    grads = torch.autograd.grad(case.run(impl, (query, key, value, gate)).sum(), (query, key, value, gate))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("impl", ["auto", "reference", "blocked"])
@pytest.mark.parametrize("length", [1, 5, 8, 9, 16])
def test_a_gate_that_fuses_nothing_has_a_zero_gradient(impl, length):
    """No gradient at all would make ranks of sharded training disagree on what they reduce."""
    query, gate = torch.randn(1, 2, length, 4, requires_grad=True), torch.randn(1, 2, length, requires_grad=True)
    pi_attention(query, query, query, PiPattern(8, 8, 2), gate=gate, impl=impl).sum().backward()
    assert torch.equal(gate.grad[..., :8], torch.zeros(1, 2, min(8, length)))


@pytest.mark.parametrize("impl", ["auto", "reference", "blocked", "triton"])
def test_a_gate_without_skips_has_a_zero_gradient(impl):
    if impl == "triton":
        need_triton()
    query, gate = (torch.randn(1, 2, 16, *dim, device=DEVICE, requires_grad=True) for dim in ([4], []))
    out = pi_attention(query, query, query, PiPattern(8, 8, 0), gate=gate, impl=impl)
    out.sum().backward()
    assert torch.equal(gate.grad, torch.zeros_like(gate))
    if impl == "triton":
        assert out.grad_fn.name() == "FusedBackward"  # what the kernels wrote: another operation would read all of it


@pytest.mark.parametrize("pattern", [PiPattern(2, 2, 2), PiPattern(2, 3, 2, sinks=1, phase=1)], ids=str)
def test_third_derivatives_are_those_of_the_reference(pattern):
    """Hessian-vector products by double backward, and a derivative of second derivatives."""
    case = Case(pattern, T=6, S=6, B=1, H=2, G=2)
    found = []
    for impl in ("reference", "blocked"):
        query, key, value, gate = case.tensors()

        def loss(query, key=key, value=value, gate=gate, impl=impl):
            return pi_attention(query, key, value, pattern, gate=gate, impl=impl).pow(3).sum()

        product = torch.autograd.functional.hvp(loss, query.detach(), torch.ones_like(query))[1]
        first = torch.autograd.grad(loss(query), query, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), query, create_graph=True)[0]
        found.append([product, *torch.autograd.grad(second.pow(2).sum(), (query, key, value, gate))])
    for got, want in zip(found[1], found[0], strict=True):
        assert want.norm() > 0
        torch.testing.assert_close(got, want)
