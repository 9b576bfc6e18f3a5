"""The kernels fit consumer GPUs: every one compiles within 99 KiB of shared memory. Needs no GPU."""

import os
import subprocess
import sys

import pytest
from problems import need_triton

LIMIT = 99 * 1024

SCRIPT = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pi_attention import PiPattern, coordinated_heads
from pi_attention.ops.fused import launch
from pi_attention.ops.fused.kernels import backward, decode, forward
from pi_attention.ops.fused.tiling import Shape, plan_tiles

LONE = PiPattern(256, 256, 16)
KERNELS = {
    "forward": (forward.band_forward_kernel, {"FUSE": True, "MASS": True, "GATED": True, "DESCRIBED": False}),
    "backward query": (backward.band_backward_query_kernel, {"ADD": True, "DESCRIBED": False}),
    "backward key": (backward.band_backward_key_kernel, {"ADD": True}),
}
FP32 = {"SkipLse", "Lse", "Weight", "Shift", "PartOut", "PartLse"}



def shared_memory(kernel, given, element):
    signature, constants, attributes = {}, dict(given.values), {}
    for index, argument in enumerate(kernel.arg_names):
        stride = argument[0] == "s" and argument[2:3] == "_"
        if argument.endswith("_d"):
            constants[argument] = 1
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument[0].isupper() and len(argument) > 1 or argument in "QKV":
            kind = "i32" if argument in ("Starts", "Bands", "Members") else "fp32" if argument in FP32 else element
            signature[argument] = "*" + kind
            attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
            if stride:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 89, 32), options=given.options).metadata.shared


for dim, (dtype, element) in [(d, t) for d in DIMS for t in TYPES]:
    precision = "ieee" if element == "fp32" else "tf32"
    shape = Shape(16, 4, 32768, 32768, dim, dtype, True, precision)
    bands = {"local": (LONE, False), "skip": (LONE, True), "coordinated": (coordinated_heads(16, 64, 16), True)}
    for band, (name, (kernel, flags)) in [(b, k) for b in bands for k in KERNELS.items()]:
        plan = plan_tiles(name, *bands[band], shape, tuple(flags.items()))
        shared = shared_memory(kernel, plan.constants, element)
        print(shared, dim, element, band, name, plan.tiles)
    for per_head in (False, True):
        constants = launch._decode_constants(4, dim, 16, True, per_head, precision, dim * dtype.itemsize)
        print(shared_memory(decode.decode_kernel, constants, element), dim, element, "decode", per_head)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(64, 128), (256,)], ids=str)
def test_kernels_compile_within_the_shared_memory_of_consumer_gpus(dims):
    need_triton()
    types = '((torch.bfloat16, "bf16"), (torch.float32, "fp32"))'
    script = SCRIPT.replace("DIMS", str(dims)).replace("TYPES", types)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert len(lines) == 22 * len(dims)
    for shared, what in lines:
        assert int(shared) <= LIMIT, f"{what}: {shared} bytes"
