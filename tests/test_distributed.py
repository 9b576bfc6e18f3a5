"""A sequence over several processes equals one process: outputs, gradients, training."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from distributed_worker import work
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from pi_attention import PiPattern
from pi_attention.distributed import HaloContext, attach, detach, halo_plan
from pi_attention.distributed.tensor_parallel import split_heads
from pi_attention.models import PiConfig, PiForCausalLM


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_sharded_equals_whole(ranks, tmp_path):
    seeds = range(12 * ranks, 12 * ranks + 12)
    try:
        multiprocessing.spawn(work, args=(ranks, str(tmp_path), seeds), nprocs=ranks)
    except Exception:
        errors = sorted(Path(tmp_path).glob("error-*"))
        pytest.fail("\n".join(f"{file.name}: {file.read_text()}" for file in errors) or "a process died")


def test_tensor_parallelism_refuses_a_sink_logit():
    config = PiConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, sink_logit=True)
    assert config.base_model_tp_plan is None
    mesh = SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 0)
    with pytest.raises(NotImplementedError, match=r"does not split the sink logit of model.layers.0.self_attn"):
        split_heads(PiForCausalLM(config), mesh)


def losses(ranks, cp):
    """What examples/context_parallel.py prints under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    example = Path(__file__).parents[1] / "examples" / "context_parallel.py"
    options = ["--cp", str(cp), "--context", "256", "--steps", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(3):
        done = subprocess.run([*launch, str(example), *options], capture_output=True, text=True, env=environment)
        if "terminate called without an active exception" not in done.stderr:  # gloo's, rarely, as a process ends
            break
    assert done.returncode == 0, done.stderr
    return re.findall(r"loss (\S+)", done.stdout)


def test_the_example_trains_the_same_however_it_is_sharded():
    """FSDP2 and context parallelism together, as written in the README."""
    alone = losses(1, 1)
    assert len(alone) == 3 and alone[0] > alone[2]
    for ranks in (2, 4):
        assert [float(x) for x in losses(ranks, ranks)] == pytest.approx([float(x) for x in alone], abs=2e-6)
    assert len(losses(4, 2)) == 3


@st.composite
def shardings(draw):
    lengths = draw(st.lists(st.integers(0, 15), min_size=1, max_size=6).filter(sum))
    starts = draw(st.sets(st.integers(1, max(1, sum(lengths) - 1)), max_size=3))
    documents = [0, *sorted(s for s in starts if s < sum(lengths))]
    causal = draw(st.booleans())
    periods = draw(st.lists(st.integers(1, 15), min_size=1, max_size=2))
    ring = not causal and draw(st.booleans())
    if ring:
        documents = [0]
        lengths[0] += -sum(lengths) % math.lcm(*periods)
    pattern = PiPattern(
        draw(st.integers(1, 9)),
        tuple(periods) if len(periods) > 1 else periods[0],
        draw(st.sampled_from([0, 1, 3, None])),
        causal=causal,
        sinks=draw(st.integers(0, 3)) if causal else 0,
        ring=ring,
        phase=tuple(draw(st.integers(0, period - 1)) for period in periods) if len(periods) > 1 else 0,
    )
    return pattern, lengths, documents


@settings(max_examples=300, deadline=None)
@given(shardings())
def test_a_rank_needs_exactly_the_keys_that_its_queries_see(case):
    pattern, lengths, documents = case
    plan = halo_plan(pattern, lengths, documents)
    ends = [*documents[1:], sum(lengths)]
    for halo in plan.halos:
        seen = set()
        for query in range(*halo.own):
            start, end = next((a, b) for a, b in zip(documents, ends, strict=True) if a <= query < b)
            for head in range(len(pattern.periods)):
                local, skip = pattern.keys(query - start, end - start, head=head)
                seen |= {start + key for key in local + skip}
        needed = {position for a, b in halo.needed for position in range(a, b)}
        assert needed == seen - set(range(*halo.own))
        places = [halo.place(position) for position in sorted(needed | set(range(*halo.own)))]
        assert len(places) == len(set(places)) and all(0 <= place < halo.length for place in places)
        assert pattern.ring or places == sorted(places)


def test_the_halo_is_bounded_by_the_reach_and_smaller_for_short_shards():
    pattern = PiPattern(1024, 4096, 4)
    wide = halo_plan(pattern, [65536] * 16).halos[8]
    assert wide.rows == pattern.reach == 16384
    short = halo_plan(pattern, [1024] * 1024).halos[512]
    assert short.rows == 4 * 1024 + 1023
    assert halo_plan(pattern, [1024] * 1024).rows(512, 511) == 1023


def test_contiguous_shards_are_balanced():
    pattern, ranks, total = PiPattern(1024, 4096, 4), 64, 1 << 20
    lags = [lag for band in (pattern.local_band, pattern.skip_band()) for lag in band.lags()]
    work_of = []
    for rank in range(ranks):
        start = rank * total // ranks
        visits = 0
        for lag in lags:
            visits += max(0, min(total // ranks, start + total // ranks - lag))
        work_of.append(visits)
    assert max(work_of) / (sum(work_of) / ranks) <= 1.01


def test_wrong_plans_are_named():
    ring = PiPattern(2, 2, 1, causal=False, ring=True)
    with pytest.raises(ValueError, match=r"documents=\[0, 4\] cannot share a ring"):
        halo_plan(ring, [4, 4], [0, 4])
    with pytest.raises(ValueError, match="every period to divide the length"):
        halo_plan(ring, [4, 5])
    with pytest.raises(ValueError, match=r"documents=\[0, 9\]"):
        halo_plan(PiPattern(2, 2, 1), [4, 4], [0, 9])
    with pytest.raises(ValueError, match="must not be negative"):
        halo_plan(PiPattern(2, 2, 1), [4, -4])


def test_a_document_that_begins_with_a_shard_must_be_named(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    one, several = (HaloContext(None, [12, 12], PiPattern(4, 4, 2), documents) for documents in (None, [0, 12]))
    positions = torch.arange(12)[None]
    several.check_batch(None, positions)
    one.check_batch(None, positions + 12)
    one.check_batch(torch.ones(1, 12), None)
    with pytest.raises(
        ValueError, match=r"begin with \[0\] in the shard of rank 1, which begins at 12: give positions"
    ):
        one.check_batch(None, positions)


def test_what_a_sharded_model_cannot_know_is_refused():
    model = PiForCausalLM(PiConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    ids = torch.randint(50, (1, 20))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="Linear has no PiAttention layer"):
            attach(torch.nn.Linear(2, 2), dist.group.WORLD, [20])
        with pytest.raises(ValueError, match="2 entries for 1 ranks"):
            attach(model, dist.group.WORLD, [10, 10])
        want = model(ids).logits
        attach(model, dist.group.WORLD, [20])
        with pytest.raises(ValueError, match="pass use_cache=False"):
            model(ids)
        with pytest.raises(ValueError, match="padding or packed documents"):
            model(ids, position_ids=torch.arange(20)[None] % 7, use_cache=False)
        torch.testing.assert_close(model(ids, use_cache=False).logits, want)
        mask, marks = (torch.arange(20) > 3).int()[None], (torch.arange(20) > 9).int()[None]
        for told in ({}, {"documents": [0, 10]}, {"segment_ids": marks}):
            attach(model, dist.group.WORLD, [20], **told)
            with pytest.raises(ValueError, match="attention_mask has padding, which a sharded sequence does not know"):
                model(ids, attention_mask=mask, use_cache=False)
        attach(model, dist.group.WORLD, [20])
        detach(model)
        torch.testing.assert_close(model(ids).logits, want)
        of_layer, ids_of = model.model.layers[0].self_attn, torch.zeros(1, 20, dtype=torch.int32)
        attach(model, dist.group.WORLD, [20], segment_ids=ids_of)
        kept = of_layer.source
        attach(model, dist.group.WORLD, [20], segment_ids=ids_of)
        assert of_layer.source is kept
        of_layer.pattern = PiPattern(2, 2, 1)
        attach(model, dist.group.WORLD, [20], segment_ids=ids_of)
        assert of_layer.source.pattern == of_layer.pattern
        of_layer.pattern = kept.pattern
        detach(model)
        cut = ids.clone()
        refused = pytest.raises(RuntimeError, match=r"context_parallel .* is active")
        with context_parallel(init_device_mesh("cpu", (1,)), buffers=[cut], buffer_seq_dims=[1]), refused:
            model(cut)
        torch.testing.assert_close(model(ids).logits, want)
    finally:
        dist.destroy_process_group()
