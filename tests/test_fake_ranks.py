"""A model on more ranks than there are, each of a fake process group: what one of eight holds is what the bill says."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("transformers")

from benchmarks.sizes import config_of
from pi_attention import PiPattern
from pi_attention.bill import MODELS, bill
from pi_attention.distributed import Layout
from pi_attention.models import PiForCausalLM
from pi_attention.training.step import Parallel

PATTERN = PiPattern(256, 256, 16)
SLOW = ["dp=2,cp=4", "tp=2,cp=4"]


def in_a_process(function, *arguments):
    """A process group is made once in a process, and `benchmarks.memory` turns Triton's interpreter on."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def weights_held(layout):
    """Bytes of weights that a rank of the 8 B model holds, and the dtypes that they have."""
    from benchmarks.memory import with_data

    dist.init_process_group("fake", rank=layout.ranks // 2, world_size=layout.ranks, store=FakeStore())
    mesh = layout.mesh("cpu")
    config = config_of(MODELS["8b"], PATTERN, tie_word_embeddings=False)
    with FakeTensorMode(), patch.object(DeviceMesh, "__init__", with_data(DeviceMesh.__init__)):
        mesh["dp", "cp"]._flatten("dp_cp")
        parallel = Parallel(PiForCausalLM(config), mesh, bf16=True)
        local = [parameter.to_local() for parameter in parallel.model.parameters()]
        return sum(x.numel() * x.element_size() for x in local), {x.dtype for x in local}


def peak_of_step(sizes, context, loss_slice):
    """Bytes that are tracked for one of eight ranks that share a sequence."""
    from benchmarks.memory import peak

    return peak(sizes, Layout(cp=8), 3, loss_slice, context)


@pytest.mark.parametrize("layout", ["cp=8", *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW)])
def test_one_of_eight_ranks_holds_the_weights_that_the_bill_counts(layout):
    layout = Layout.parse(layout)
    held, dtypes = in_a_process(weights_held, layout)
    made = bill(MODELS["8b"], PATTERN, 1 << 20, layout.cp, dp=layout.dp, tp=layout.tp)
    assert dtypes == {torch.float32}
    assert held == pytest.approx(made.state / 3, rel=1e-3)  # beside both moments of AdamW


def test_a_step_of_one_of_eight_ranks_takes_what_the_bill_counts():
    sizes, context, loss_slice = replace(MODELS["8b"], num_hidden_layers=2), 131072, 4096
    tracked = in_a_process(peak_of_step, sizes, context, loss_slice)
    made = bill(sizes, PATTERN, context, 8, loss_slice=loss_slice)
    copies = 2 * 4 * context // 8 * sizes.hidden_size  # of a norm, in fp32 on a CPU
    norms = {"the loss": 1, "a layer's feed-forward": 2, "a layer's attention": 1}
    expected = max(size + norms.get(part, 0) * copies for part, size in made.peaks.items())
    assert tracked == pytest.approx(expected, rel=0.05)
