"""The Hopper kernels: they compile without a GPU and fit the chip; on Hopper they agree with the blocked bands."""

import json
import os
import subprocess
import sys

import pytest
import torch
from problems import need_triton

from pi_attention import PiPattern, pi_attention

SHARED_MEMORY = 227 * 1024
SPILLS = 128
"""Bytes of a thread's stack: the gradients of keys and values at D = 128 fill all 240 registers and a little more."""

SCRIPT = """
import json, os, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from pi_attention.ops.fused.hopper import launch
from pi_attention.ops.fused.hopper.serves import HEAD_DIMS

TOOL = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
WIDE = {"q_desc", "skip_desc"}, {"q_desc", "grad_desc"}, {"k_desc", "v_desc"}
HALVES = {"Out", "SkipOut", "GradQ"}
LOCAL, SKIP = {"SKIP": False, "PER_HEAD": False}, {"SKIP": True, "PER_HEAD": True}


def resources(kernel, wide, constants):
    signature, values = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[index,] = "constexpr", constants[name]
        elif name in ("lse_desc", "terms_desc"):
            signature[name] = f"tensordesc<fp32[1, {launch.BN}],{launch.ROWS!r}>"
        elif name.endswith("_desc"):
            rows = 2 * launch.BM if name in wide else launch.BM
            signature[name] = f"tensordesc<bf16[1, 1, 1, {rows}, {constants['D']}],{launch.HEADS!r}>"
        elif name[0].isupper() and len(name) > 1:
            signature[name] = "*i32" if name in ("Starts", "Bands") else "*bf16" if name in HALVES else "*fp32"
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    pointers = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = GluonASTSource(kernel, signature, constexprs=values, attrs=pointers)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.OPTIONS)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        table = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(part.split(":")[:2] for part in table.split() if part.count(":") == 1 and part.split(":")[1].isdigit())
    return {"shared": compiled.metadata.shared, "registers": int(found["REG"]), "stack": int(found["STACK"])}


for dim in (64, 128):
    for segments in (False, True):
        shape = {"GROUP": 2, "D": dim, "BM": launch.BM, "BN": launch.BN, "SEGMENTS": segments}
        flags = {"MASS": True, "GATED": True}
        of_query = {**flags, "BOTH": True, "LSE": True, "SKIP_LSE": True, "BY_TOKEN": False}
        kernels = {
            "forward": (launch.forward_kernel, WIDE[0], {**flags, **LOCAL, "FUSE": True}),
            "query": (launch.query_kernel, WIDE[1], {**of_query, **LOCAL, "QUERIES": 1}),
            "query, one band": (launch.query_kernel, WIDE[1], {**of_query, **LOCAL, "BOTH": False, "QUERIES": 2}),
            "query, by token": (launch.query_kernel, WIDE[1], {**of_query, **LOCAL, "QUERIES": 1, "BY_TOKEN": True}),
            "query, one band, by token": (
                launch.query_kernel,
                WIDE[1],
                {**of_query, **LOCAL, "BOTH": False, "QUERIES": 2, "BY_TOKEN": True},
            ),
            "key": (launch.key_kernel, WIDE[2], {**LOCAL, "ADD": True}),
        }
        if not segments:
            kernels |= {
                "forward, skips": (launch.forward_kernel, WIDE[0], {**SKIP, **dict.fromkeys([*flags, "FUSE"], False)}),
                "query, skips": (launch.query_kernel, WIDE[1], {**of_query, **SKIP, "QUERIES": 2}),
                "key, skips": (launch.key_kernel, WIDE[2], {**SKIP, "ADD": False}),
            }
        for name, (kernel, wide, flags) in kernels.items():
            of, _, _ = name.partition(",")
            if dim not in HEAD_DIMS[of]:
                continue
            constants = {**shape, **flags, "STAGES": launch.stages(of, dim)}
            print(json.dumps({"kernel": f"{name} {dim} {segments}", **resources(kernel, wide, constants)}))
"""


def test_kernels_compile_for_hopper_and_fit_it():
    need_triton()
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 18
    for row in rows:
        assert row["shared"] <= SHARED_MEMORY, row
        assert row["registers"] <= 168, row  # three warpgroups of 168 fill the register file
        assert row["stack"] <= (SPILLS if row["kernel"].startswith("key") and " 128 " in row["kernel"] else 0), row


@pytest.mark.parametrize("pattern", [PiPattern(70, 1, 0, sinks=4), PiPattern(40, 2, 60, phase=(0, 1))], ids=str)
def test_tiles_of_large_heads_compute_the_same(pattern, monkeypatch):
    """In the interpreter, which takes smaller ones otherwise; the keys of the local band come by descriptors."""
    need_triton()
    from pi_attention.ops.fused import tiling, tuning

    if not tiling.INTERPRETED:
        pytest.skip("test_gpu.py has them on a GPU")
    taken = {}

    def of_hopper(kernel, few, head_dim, rows, **_):
        taken[kernel] = tuning.HOPPER[kernel][head_dim]
        return taken[kernel]

    monkeypatch.setattr(tiling, "choose_tiles", of_hopper)
    query, key, value = (torch.randn(1, heads, 200, 256).half().requires_grad_() for heads in (2, 1, 1))
    grad = torch.randn(1, 2, 200, 256).half()
    results = []
    for impl in ("triton", "reference"):
        out = pi_attention(query, key, value, pattern, fusion="mass", impl=impl)
        results.append([out, *torch.autograd.grad(out, (query, key, value), grad)])
    assert taken.keys() == tuning.HOPPER.keys()
    for got, want in zip(*results, strict=True):
        assert (got.double() - want.double()).norm() < 2e-3 * want.double().norm()


def is_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


CASES = {
    "plain": ({}, PiPattern(256, 256, 16)),
    "narrow": ({}, PiPattern(1, 16, 3)),
    "odd window": ({"length": 1900}, PiPattern(77, 64, 8)),
    "wide": ({}, PiPattern(1500, 256, 4)),
    "wider than the sequence": ({"length": 700}, PiPattern(4096, 8, 4)),
    "no skips": ({}, PiPattern(200, 8, 0)),
    "sinks": ({}, PiPattern(128, 64, 8, sinks=4)),
    "many sinks": ({}, PiPattern(100, 64, 8, sinks=150)),
    "grouped": ({"heads": 8, "groups": 2}, PiPattern(256, 64, 8)),
    "batch": ({"batch": 3}, PiPattern(192, 64, 8)),
    "fewer queries": ({"queries": 1800}, PiPattern(256, 64, 8)),
    "keys in no fours": ({"length": 2001, "queries": 1800}, PiPattern(256, 64, 8)),
    "strided": ({"strided": True}, PiPattern(256, 64, 8)),
    "fp16": ({"dtype": torch.float16}, PiPattern(256, 64, 8)),
    "packed": ({"packed": True}, PiPattern(256, 64, 8)),
    "packed with sinks": ({"packed": True}, PiPattern(128, 64, 8, sinks=4)),
    "coordinated": ({"length": 2048}, PiPattern(64, 4, 64, phase=(0, 1, 2, 3))),
    "coordinated, grouped": ({"length": 2048, "heads": 8, "groups": 2}, PiPattern(40, 4, 70, phase=(0, 1, 2, 3) * 2)),
    "coordinated, sinks": ({"length": 1600}, PiPattern(128, 8, 100, sinks=11, phase=(0, 5, 2, 3))),
    "coordinated, all skips": ({"length": 1600, "strided": True}, PiPattern(16, 4, None, phase=(3, 1, 2, 0))),
    "coordinated, one phase": ({"length": 2048, "groups": 1}, PiPattern(100, 16, 40)),
    "coordinated, all keys near": ({"length": 2048}, PiPattern(2, 4, 64, phase=(0, 1, 2, 3))),
    "coordinated, period 1": ({"length": 2048}, PiPattern(64, 1, 64)),
    "coordinated, fp16": ({"length": 2048, "dtype": torch.float16}, PiPattern(64, 4, 64, phase=(0, 1, 2, 3))),
    "periods that differ": ({"length": 2048}, PiPattern(64, (4, 8, 4, 8), 64)),
}
"""In those whose names begin with "coordinated" the skip band is served, too."""


def made(dim, batch=2, heads=4, groups=4, length=2000, queries=None, strided=False, dtype=torch.bfloat16, packed=False):
    def tensor(count, rows):
        shape = (batch, rows, count, dim) if strided else (batch, count, rows, dim)
        x = torch.randn(shape, device="cuda", dtype=dtype)
        return (x.transpose(1, 2) if strided else x).requires_grad_()

    queries = queries or length
    inputs = tensor(heads, queries), tensor(groups, length), tensor(groups, length)
    segments = None
    if packed:  # padding, documents, and a document of one token
        cuts = torch.tensor([0, 100, 101, 777, 1500], device="cuda")
        segments = torch.searchsorted(cuts, torch.arange(length, device="cuda"), right=True).expand(batch, -1) - 2
    gate = torch.randn(batch, heads, queries, device="cuda", requires_grad=True)
    return inputs, gate, segments


@pytest.mark.gpu
@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("fusion", ["gate", "mass"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_agree_with_the_blocked_bands(name, fusion, dim, monkeypatch):
    from pi_attention.ops.fused import launch
    from pi_attention.ops.fused.hopper import launch as hopper
    from pi_attention.ops.fused.hopper import serves

    served = set()
    for kind in (hopper.Forward, hopper.Query, hopper.Key):
        whole = kind.__call__
        monkeypatch.setattr(
            kind, "__call__", lambda self, x, whole=whole: (served.add((type(self), self.skip)), whole(self, x))
        )
    monkeypatch.setattr(serves, "LEAST", 0)
    monkeypatch.setattr(serves, "LEAST_OF_SKIPS", (33, 1))
    for plan in (launch.forward_plan, launch.backward_plan):
        plan.cache_clear()
    torch.manual_seed(0)
    keywords, pattern = CASES[name]
    inputs, gate, segments = made(dim, **keywords)
    grad, found = torch.randn_like(inputs[0]), []
    for impl in ("triton", "blocked"):
        out, aux = pi_attention(
            *inputs, pattern, gate=gate, fusion=fusion, segment_ids=segments, impl=impl, return_aux=True
        )
        lse, skip = aux.lse_local, aux.lse_skip
        loss = (out.float() * grad).sum() + lse.masked_fill(lse.isinf(), 0).square().sum() / 100
        if skip is not None:
            loss = loss + skip.masked_fill(skip.isinf(), 0).sin().sum()
        found.append([out, lse, *torch.autograd.grad(loss, (*inputs, gate), allow_unused=True)])
    for plan in (launch.forward_plan, launch.backward_plan):
        plan.cache_clear()
    alone = "packed with" in name or dim == 64
    kinds = {hopper.Key} if alone else {hopper.Forward, hopper.Query, hopper.Key}
    kinds -= {hopper.Key} if name == "keys in no fours" else set()
    of_skips = kinds if name.startswith("coordinated") else set()
    assert served == {(kind, False) for kind in kinds} | {(kind, True) for kind in of_skips}
    for got, want in zip(*found, strict=True):
        if want is None:
            assert got is None
            continue
        there = want.isfinite()
        assert torch.equal(got.isfinite(), there)
        got, want = got[there].double(), want[there].double()
        assert (got - want).norm() <= 1e-2 * want.norm()
