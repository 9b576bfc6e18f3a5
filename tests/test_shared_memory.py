"""Every kernel compiles within the shared memory of its GPUs: 99 KiB, or 227 of Hopper. Needs no GPU."""

import os
import subprocess
import sys

import pytest
from problems import need_triton

LIMITS = {89: 99 * 1024, 90: 227 * 1024}
"""By compute capability."""

SCRIPT = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pi_attention import PiPattern, coordinated_heads
from pi_attention.ops.fused import decoding, launch, tiling
from pi_attention.ops.fused.kernels import backward, decode, forward, sinks
from pi_attention.ops.fused.kernels import one_pass as one_pass_file
from pi_attention.ops.fused.tiling import Problem, plan_one_pass, plan_tiles

tiling.is_hopper = lambda device: CAPABILITY == 90
LONE = PiPattern(256, 256, 16, sinks=64)
GATE = {"MASS": True, "GATED": True, "SINK_LOGIT": False}
TERMS = {"MASS": True, "GATED": True, "LSE": True, "SKIP_LSE": True, "SINK_LOGIT": False}
KERNELS = {
    "forward": (forward.band_forward_kernel, {"FUSE": True, **GATE, "DESCRIBED": False}),
    "backward query": (backward.band_backward_query_kernel, {"ADD": True, "BOTH": True, **TERMS, "DESCRIBED": False}),
    "backward key": (backward.band_backward_key_kernel, {"ADD": True}),
}
TABLES = {"Starts", "Bands", "Members", "Owner"}
FP32 = {"SkipLse", "Lse", "Terms", "GradLse", "GradSkipLse", "GradGate", "Gate"}
FP32 |= {"PartOut", "PartLse", "ShareK", "ShareV", "SinkLogit", "GradSinkLogit"}



def shared_memory(kernel, given, element):
    signature, constants, attributes = {}, dict(given.values), {}
    for index, argument in enumerate(kernel.arg_names):
        stride = argument[0] == "s" and argument[2:3] == "_"
        if argument in ("SinkLogit", "GradSinkLogit") and not constants["SINK_LOGIT"]:
            constants[argument] = None
        if argument.endswith("_d"):
            constants[argument] = 1
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument[0].isupper() and len(argument) > 1 or argument in "QKV":
            kind = "i32" if argument in TABLES else "fp32" if argument in FP32 else element
            signature[argument] = "*" + kind
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
            if stride:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=given.options).metadata.shared


for dim, (dtype, element) in [(d, t) for d in DIMS for t in TYPES]:
    precision = "ieee" if element == "fp32" else "tf32"

    def problem(pattern, queries=32768, groups=4, scores=(False, 0.0)):
        query, key = (1, 16, queries, dim), (1, groups, 32768, dim)
        strides, gate = (0,) * 12, ((0, 0, 0), torch.float32)
        where = torch.device("meta"), precision, True
        return Problem(pattern, True, 1.0, query, key, strides, gate, True, dtype, *where, *scores)

    bands = {"local": (LONE, False), "skip": (LONE, True), "coordinated": (coordinated_heads(16, 64, 16), True)}
    for band, (name, (kernel, flags)) in [(b, k) for b in bands for k in KERNELS.items()]:
        plan = plan_tiles(name, problem(bands[band][0]), bands[band][1], **flags)
        shared = shared_memory(kernel, plan.constants, element)
        print(shared, dim, element, band, name, plan.tiles)
    one_pass = plan_one_pass(problem(LONE, groups=16)) if dim <= 128 and element != "fp32" else None
    if one_pass is not None:
        print(shared_memory(one_pass_file.skip_backward_kernel, one_pass.constants, element), dim, element, "one pass")
    for pattern, paged in [(p, t) for p in (LONE, coordinated_heads(16, 64, 16)) for t in (False, True)]:
        constants = decoding.decode_constants(problem(pattern, 16)._replace(segments=not paged, paged=paged))
        print(shared_memory(decode.decode_kernel, constants, element), dim, element, "decode", pattern, paged)
    capped = problem(LONE, scores=(True, 30.0))
    for name, (kernel, flags) in KERNELS.items():
        flags = flags | ({"SINK_LOGIT": True} if "SINK_LOGIT" in flags else {})
        plan = plan_tiles(name, capped, False, **flags)
        print(shared_memory(kernel, plan.constants, element), dim, element, "capped", name)
    constants = decoding.decode_constants(problem(LONE, 16, scores=(True, 30.0)))
    print(shared_memory(decode.decode_kernel, constants, element), dim, element, "capped decode")
    for flag in (False, True):
        given = {"D": dim, "BD": launch.padded(dim), "BS": 16, "MASS": flag, "GATED": flag, "SINK_LOGIT": flag}
        constants = launch.Constants({"num_warps": 4}, **given)
        print(shared_memory(decode.join_kernel, constants, element), dim, element, "join")
    kernels = (sinks.sink_backward_kernel, sinks.sink_sum_kernel)
    for step, kernel in zip(launch.sink_steps(problem(LONE), (0,) * 16)[0], kernels):
        print(shared_memory(kernel, step.constants, element), dim, element, "sinks")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dims"),
    [(89, (64, 128)), (89, (256,)), (90, (256,))],
    ids=["consumer", "consumer, 256", "Hopper, 256"],
)
def test_kernels_compile_within_the_shared_memory_of_their_gpus(capability, dims):
    need_triton()
    types = '((torch.bfloat16, "bf16"), (torch.float32, "fp32"))'
    script = SCRIPT.replace("DIMS", str(dims)).replace("TYPES", types).replace("CAPABILITY", str(capability))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(lines) == 42 * len(dims) + sum(dim <= 128 for dim in dims)
    for shared, what in lines:
        assert int(shared) <= LIMITS[capability], f"{what}: {shared} bytes"
