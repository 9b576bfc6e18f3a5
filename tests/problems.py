"""Inputs that all operator tests share: one case, its random tensors, and the strategy that draws cases."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from pi_attention import PiPattern, pi_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def need_triton() -> None:
    pytest.importorskip("triton")


def attend(*arguments, impl: str, **options):
    """`pi_attention`; for the kernels, which compute in fp32, on the GPU if there is one, and cast there and back."""
    if impl != "triton":
        return pi_attention(*arguments, impl=impl, **options)
    dtype = arguments[0].dtype

    def there(x):
        if not isinstance(x, Tensor):
            return x
        return x.to(DEVICE, torch.float32 if x.dtype == torch.float64 else x.dtype)

    def back(x):
        return x.to("cpu", dtype if dtype == torch.float64 else x.dtype)

    result = pi_attention(*map(there, arguments), impl=impl, **{name: there(x) for name, x in options.items()})
    if isinstance(result, Tensor):
        return back(result)
    return back(result[0]), type(result[1])(*map(back, result[1]))


def assert_close(got: Tensor, want: Tensor, impl: str = "", **options) -> None:
    """`torch.testing.assert_close` at the precision of the implementation."""
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if impl == "triton" else {}
    torch.testing.assert_close(got, want, **tolerance | options)


@dataclass(frozen=True)
class Case:
    pattern: PiPattern
    T: int = 37
    S: int = 37
    B: int = 2
    H: int = 4
    G: int = 2
    D: int = 8
    fusion: str = "gate"
    gated: bool = True
    segments: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)
    sink_logit: bool = False
    softcap: float | None = None

    def __str__(self) -> str:
        p = self.pattern
        flags = "" if p.causal else "-ring" if p.ring else "-both"
        sinks = f"-s{p.sinks}" if p.sinks else ""
        packed = "-packed" if self.segments else ""
        heads = f"B{self.B}-H{self.H}-G{self.G}-T{self.T}-S{self.S}-D{self.D}"
        phase = f"-f{p.phase}" if p.phase else ""
        scores = ("-z" if self.sink_logit else "") + (f"-cap{self.softcap}" if self.softcap else "")
        name = f"{heads}-w{p.window}-p{p.period}{phase}-m{p.skips}{flags}{sinks}{packed}-{self.fusion}{scores}"
        return name.replace(" ", "")

    def tensors(self, dtype: torch.dtype = torch.float64, grad: bool = True, seed: int = 0) -> tuple[Tensor, ...]:
        """query, key, value and gate logits, and a sink logit; drawn in `dtype`, so that only arithmetic differs."""
        random = torch.Generator().manual_seed(seed)
        shapes = [(self.B, self.H, self.T, self.D), *[(self.B, self.G, self.S, self.D)] * 2, (self.B, self.H, self.T)]
        shapes += [(self.H,)] * self.sink_logit
        drawn = [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]
        return tuple(x.requires_grad_(grad) for x in drawn)

    def segment_ids(self) -> Tensor | None:
        return None if self.segments is None else torch.tensor(self.segments, dtype=torch.int32)

    def run(self, impl: str, inputs: tuple[Tensor, ...], **more):
        query, key, value, gate, *sink_logit = inputs
        options = {"fusion": self.fusion, "segment_ids": self.segment_ids(), "impl": impl, "softcap": self.softcap}
        options |= {"sink_logit": sink_logit[0] if sink_logit else None} | more
        return attend(query, key, value, self.pattern, gate=gate if self.gated else None, **options)


def outputs_and_gradients(case: Case, impl: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """out, finite log-sum-exps and gate weights, then the gradients of the inputs through all of them."""
    inputs = case.tensors(dtype, seed=seed)
    out, aux = case.run(impl, inputs, return_aux=True)
    finite = [out, *(torch.where(x == -torch.inf, 0.0, x) for x in aux)]
    random = torch.Generator().manual_seed(seed + 1)
    weights = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in finite]
    loss = sum((x.double() * w).sum() for x, w in zip(finite, weights, strict=True))
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
    return [*(x.detach() for x in finite), *grads]


@st.composite
def patterns(draw: st.DrawFn, heads: int, length: int) -> PiPattern:
    periods = st.integers(1, 40)
    causal = draw(st.booleans())
    ring = not causal and draw(st.booleans())
    if ring:
        periods = st.sampled_from([p for p in range(1, length + 1) if length % p == 0])
    period = draw(periods | st.lists(periods, min_size=heads, max_size=heads).map(tuple))
    smallest = min(period) if isinstance(period, tuple) else period
    phase = draw(st.just(0) | st.integers(0, smallest - 1) | st.none())
    if phase is None:  # one a head
        of_heads = period if isinstance(period, tuple) else (period,) * heads
        phase = tuple(draw(st.integers(0, p - 1)) for p in of_heads)
    return PiPattern(
        window=draw(st.integers(1, 48)),
        period=period,
        phase=phase,
        skips=draw(st.none() | st.integers(0, 9)),
        causal=causal,
        ring=ring,
        sinks=draw(st.integers(0, 3)) if causal else 0,
    )


@st.composite
def segment_rows(draw: st.DrawFn, batch: int, length: int) -> tuple[tuple[int, ...], ...]:
    """Runs of ids, some of them padding, some ids used twice."""
    rows = []
    for _ in range(batch):
        row: list[int] = []
        while len(row) < length:
            row += [draw(st.integers(-1, 3))] * draw(st.integers(1, length))
        rows.append(tuple(row[:length]))
    return tuple(rows)


@st.composite
def cases(draw: st.DrawFn, dims: tuple[int, ...] = (1, 3, 8)) -> Case:
    S = draw(st.integers(1, 70))
    G = draw(st.integers(1, 2))
    H = G * draw(st.integers(1, 3))
    B = draw(st.integers(1, 2))
    return Case(
        pattern=draw(patterns(H, S)),
        T=draw(st.just(S) | st.integers(1, S)),
        S=S,
        B=B,
        H=H,
        G=G,
        D=draw(st.sampled_from(dims)),
        fusion=draw(st.sampled_from(["gate", "mass"])),
        gated=draw(st.booleans()),
        segments=draw(st.none() | segment_rows(B, S)),
        sink_logit=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 0.7, 30.0])),
    )


CASES = [
    Case(PiPattern(8, 8, 3)),
    Case(PiPattern(8, 3, 5), fusion="mass"),
    Case(PiPattern(5, 7, 4, sinks=2), T=63, S=63, fusion="mass"),
    Case(PiPattern(4, (3, 5, 8, 64), 3), T=111, S=111, D=24),
    Case(PiPattern(6, 9, 2, causal=False), T=63, S=63),
    Case(PiPattern(6, (5, 10, 12, 20), 4, causal=False, ring=True), T=60, S=60, fusion="mass"),
    Case(PiPattern(16, 16, 4), T=7, S=111, D=40),
    Case(PiPattern(16, 16, 4), T=1, S=1),
    Case(PiPattern(64, 64, 2), T=37, S=37),
    Case(PiPattern(8, 4, None), T=50, S=63),
    Case(PiPattern(8, 4, 0), T=63, S=63, H=2, G=2),
    Case(PiPattern(8, 4, 0, phase=(0, 1, 2, 3)), T=31, S=31, G=1),
    Case(PiPattern(8, 8, 3, sinks=1), segments=((-1,) * 9 + (0,) * 28, (0,) * 20 + (1,) * 12 + (-1,) * 5)),
    Case(PiPattern(6, 4, 9, phase=(0, 1, 2, 3)), T=63, S=63, fusion="mass"),
    Case(PiPattern(3, 16, 2, phase=11), T=5, S=50, G=1),
    Case(PiPattern(5, (4, 8, 4, 7), 3, sinks=2, phase=(3, 5, 0, 6)), T=31, S=57, G=1),
    Case(PiPattern(4, (5, 10, 12, 20), 4, causal=False, ring=True, phase=(0, 7, 11, 3)), T=60, S=60),
    Case(PiPattern(2, 9, 3, causal=False, phase=(4, 0, 8, 4)), T=40, S=63, fusion="mass"),
    Case(PiPattern(4, 4, None, phase=(0, 3, 1, 2)), segments=((-1,) * 9 + (0,) * 28, (0,) * 20 + (1,) * 17)),
]
"""The corners, by hand: sizes that divide nothing, below the window, below the period, T < S, padding, packing."""

SCORES = [
    Case(PiPattern(8, 8, 3), sink_logit=True),
    Case(PiPattern(8, 3, 5), fusion="mass", sink_logit=True),
    Case(PiPattern(5, 7, 4, sinks=2), T=63, S=63, fusion="mass", softcap=1.5),
    Case(PiPattern(6, (5, 10, 12, 20), 4, causal=False, ring=True), T=60, S=60, softcap=1.5, sink_logit=True),
    Case(PiPattern(8, 4, 0), T=63, S=63, H=2, G=2, sink_logit=True, softcap=4.0),
    Case(PiPattern(8, 3, 5), fusion="mass", gated=False, sink_logit=True, G=4, softcap=1.5),
    Case(
        PiPattern(8, 8, 3, sinks=1),
        segments=((-1,) * 9 + (0,) * 28, (0,) * 20 + (1,) * 12 + (-1,) * 5),
        fusion="mass",
        sink_logit=True,
        softcap=1.5,
    ),
    Case(PiPattern(64, 64, 2), sink_logit=True, softcap=4.0),
]
"""Cases with a sink logit, with soft-capped scores, and with both."""
