"""How a compiled kernel is launched again: straight to its launcher, or by Triton's own launch. Needs no GPU."""

from types import SimpleNamespace

import pytest
import torch
from problems import need_triton

need_triton()

from pi_attention import PiPattern, coordinated_heads  # noqa: E402
from pi_attention.ops.fused import compiled  # noqa: E402
from pi_attention.ops.fused.compiled import Constants, Kernel, Step  # noqa: E402
from pi_attention.ops.fused.decoding import decode_plan, table_length  # noqa: E402
from pi_attention.ops.fused.tiling import problem_of  # noqa: E402


class FakeKernel:
    """Stands for a Triton kernel and for its compiled form; writes down who was launched with what."""

    def __init__(self):
        self.calls = []
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.calls.append(("triton" if constants else "compiled", grid[0], arguments))
            return self

        return launch

    def run(self, *arguments):
        self.calls.append(("direct", arguments[0], arguments[3:]))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(compiled, "_stream_finder", lambda: lambda device: "stream")
    return FakeKernel()


def step_of(kernel, programs=3, numbers=(7, 0.5)):
    return Step(Kernel(kernel), programs, (16, 1), numbers, Constants({"num_warps": 4}, D=16))


def test_addresses_go_straight_to_the_launcher_of_a_known_version(kernel, monkeypatch):
    monkeypatch.setattr(compiled, "DIRECT", True)
    step, x = step_of(kernel), torch.zeros(64)
    step((x, x))
    step((x, x))
    assert [call[0] for call in kernel.calls] == ["triton", "direct"]
    address = x.data_ptr()
    want = ("stream", "function", "metadata", None, None, None, address, address, 16, 1, 7, 0.5, 16)
    assert kernel.calls[1][1:] == (3, want)


@pytest.mark.parametrize("scratch", [0, 64])
def test_triton_s_launcher_is_passed_by_where_a_kernel_wants_no_scratch_memory(kernel, monkeypatch, scratch):
    monkeypatch.setattr(compiled, "DIRECT", True)
    direct = []

    class CudaLauncher:
        global_scratch_size, profile_scratch_size = scratch, 0
        launch_cooperative_grid, launch_pdl = "cooperative", "pdl"
        __call__ = launch = staticmethod(lambda *arguments: direct.append(arguments))

    kernel.run = CudaLauncher()
    step, x = step_of(kernel), torch.zeros(64)
    step((x,))
    step((x,))
    options = () if scratch else ("cooperative", "pdl", None, None)
    hooks = (None, None, None)
    ours = (x.data_ptr(), 16, 1, 7, 0.5, 16)
    assert direct == [(3, 1, 1, "stream", "function", *options, "metadata", *hooks, *ours)]


def test_tensors_that_are_compiled_out_are_none(kernel, monkeypatch):
    monkeypatch.setattr(compiled, "DIRECT", True)
    step, x = Step(Kernel(kernel), 3, (16,), (7,), Constants({"num_warps": 4}, D=16), absent=2), torch.zeros(64)
    step((x,))
    step((x,))
    assert kernel.calls[0][2] == (x, None, None, 16, 7)
    assert kernel.calls[1][2][6:] == (x.data_ptr(), None, None, 16, 7, 16)


def test_a_tensor_descriptor_stays_one(kernel, monkeypatch):
    monkeypatch.setattr(compiled, "DIRECT", True)
    step, x = step_of(kernel), torch.zeros(64)
    described = SimpleNamespace(base=x)
    for tensors in ((x, described), (x, described), (x[1:], described)):
        step(tensors)
    assert [call[0] for call in kernel.calls] == ["triton", "direct", "triton"]
    assert kernel.calls[1][2][6:8] == (x.data_ptr(), described)


def test_another_version_launches_the_compiled_kernel(kernel, monkeypatch):
    monkeypatch.setattr(compiled, "DIRECT", False)
    step, x = step_of(kernel), torch.zeros(64)
    step((x, x))
    step((x, x))
    assert [call[0] for call in kernel.calls] == ["triton", "compiled"]
    assert kernel.calls[1][2][2:] == (16, 1, 7, 0.5, 16)


def test_another_length_compiles_nothing(kernel, monkeypatch):
    monkeypatch.setattr(compiled, "DIRECT", True)
    shared, x = Kernel(kernel), torch.zeros(64)
    for length in (100, 200):
        Step(shared, length, (16, 1), (length, 0.5), Constants({"num_warps": 4}, D=16))((x, x))
    assert [call[0] for call in kernel.calls] == ["triton", "compiled"]


@pytest.mark.parametrize("direct", [True, False])
def test_unaligned_tensors_wide_numbers_and_hooks_take_triton_s_launch(kernel, monkeypatch, direct):
    monkeypatch.setattr(compiled, "DIRECT", direct)
    x = torch.zeros(64)
    step = step_of(kernel)
    for _ in range(2):
        step((x[1:], x))
    wide = step_of(kernel, numbers=(2**31, 0.5))
    for _ in range(2):
        wide((x, x))
    assert [call[0] for call in kernel.calls] == ["triton"] * 4
    step((x, x))
    monkeypatch.setattr(compiled, "knobs", SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=Hook())))
    step((x, x))
    assert [call[0] for call in kernel.calls[4:]] == ["triton", "compiled"]


class Hook:
    calls = ("a profiler",)


@pytest.mark.parametrize(
    "pattern", [coordinated_heads(128, 128, 16, period=4), PiPattern(256, 256, 16, sinks=4)], ids=str
)
@pytest.mark.parametrize("hopper", [False, True])
def test_constants_are_the_last_arguments_in_the_order_of_the_kernel(pattern, hopper, monkeypatch):
    """A compiled kernel takes its arguments by place."""
    from pi_attention.ops.fused import launch
    from pi_attention.ops.fused.hopper import launch as of_hopper
    from pi_attention.ops.fused.hopper import serves
    from pi_attention.ops.fused.tiling import Problem

    monkeypatch.setattr(serves, "INTERPRETED", False)
    monkeypatch.setattr(serves, "MEASURED", hopper)
    monkeypatch.setattr(serves, "is_hopper", lambda device: True)
    monkeypatch.setattr(of_hopper, "multiprocessors", lambda device: 132)
    x = torch.empty(1, 16, 32768, 128, dtype=torch.bfloat16, device="meta")
    sizes = (x.shape, x.shape, x.stride() * 3, None, False, x.dtype, x.device, "tf32", True)
    problem = Problem(pattern, True, 0.1, *sizes)
    forward = launch.forward_plan.__wrapped__(problem)
    backward = launch.backward_plan.__wrapped__(problem, x.stride(), True, True)
    launches = forward.skip, forward.local, backward.query, backward.one_pass, backward.key
    for step in (*launches, *(backward.skip or ()), *(backward.sinks or ())):
        step = getattr(step, "step", step)
        if step is not None:
            constants = list(step.constants.values)
            assert step.kernel.kernel.arg_names[-len(constants) :] == constants
    assert isinstance(forward.local, of_hopper.Forward) == hopper


@pytest.mark.parametrize(
    ("pattern", "splits"),
    [
        (PiPattern(32, 64, 8), 1),
        (PiPattern(300, 64, 8), 4),
        (PiPattern(4, 4, None), 4),
        (PiPattern(4, 4, 60, sinks=4), 2),
        (PiPattern(4, 64, 0, sinks=100), 4),
        (coordinated_heads(4, None, 2, period=2), 4),
    ],
    ids=str,
)
def test_every_list_of_keys_of_a_decoding_step_is_split(pattern, splits):
    query, key = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 500, 16)
    problem = problem_of(query, key, key, None, None, pattern, True, 1.0)
    assert decode_plan(problem).splits == splits  # of eight programs on the four multiprocessors of the interpreter


@pytest.mark.parametrize("skips", [9, None])
def test_a_text_that_grows_by_a_token_needs_no_new_table(skips):
    pattern = coordinated_heads(4, skips, 2, period=2)
    lengths = range(1, 2000)
    tables = {table_length(pattern, length) for length in lengths}
    assert len(tables) == (1 if pattern.reach else 24)
    assert all(table_length(pattern, n) >= (n if pattern.reach is None else pattern.reach + 1) for n in lengths)
    both = PiPattern(4, (2, 3), 5, causal=False)
    assert [table_length(both, n) for n in (7, 8)] == [7, 8]
