"""What one process of tests/test_distributed.py does; `torch.multiprocessing` wants it importable."""

import math
import os
import random
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from pi_attention import PiPattern, pi_attention
from pi_attention.distributed import HaloContext, Layout, attach, prefill
from pi_attention.distributed.exchange import Extend, route
from pi_attention.models import PiConfig, PiForCausalLM
from pi_attention.training.step import Parallel

LAYOUTS = {
    2: [Layout(cp=2)],
    4: [Layout(tp=2, cp=2), Layout(dp=2, tp=2), Layout(dp=2, cp=2)],
    8: [Layout(dp=2, tp=2, cp=2)],
}


def draw(seed, ranks):
    """A pattern, shards (uneven, empty, shorter than the reach), documents, heads."""
    random.seed(seed)
    lengths = [random.choice([0, 1, 3, 9, 16, 25]) for _ in range(ranks)]
    lengths[random.randrange(ranks)] += 5
    near = seed % 3 == 0  # shards longer than the reach: most queries see no other shard's keys
    if near:
        lengths = [length + 40 for length in lengths]
    total = sum(lengths)
    documents = [0, *sorted(random.sample(range(1, total), min(total - 1, random.choice([0, 0, 2, 4]))))]
    causal = random.random() < 0.7
    heads = random.choice([2, 4])
    periods = tuple(random.randint(1, 20) for _ in range(heads)) if random.random() < 0.4 else random.randint(1, 20)
    pattern = PiPattern(
        random.randint(1, 12), periods, random.choice([0, 1, 3, None]), causal=causal,
        sinks=random.choice([0, 0, 2]) if causal else 0,
    )  # fmt: skip
    if seed % 2:
        pattern = replace(pattern, phase=tuple(random.randrange(pattern.period_of(head)) for head in range(heads)))
    if near:
        pattern = replace(pattern, causal=True, skips=random.choice([0, 1]), sinks=0)
    groups = random.choice([g for g in (1, 2, 4) if heads % g == 0])
    if seed % 4 == 1 and not near:  # a ring of whole periods
        whole = math.lcm(*(periods if isinstance(periods, tuple) else (periods,)))
        if whole <= 60:
            lengths[seed % ranks] += -sum(lengths) % whole
            documents, pattern = [0], replace(pattern, causal=False, ring=True, sinks=0)
    return pattern, lengths, documents, heads, groups, random.choice(["gate", "mass", None])


def whole_tensors(seed, total, heads, groups, fusion):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, total, 8), (2, groups, total, 8), (2, groups, total, 8), (2, heads, total)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return tensors[: 3 if fusion is None else 4], torch.randn(shapes[0], generator=generator, dtype=torch.float64)


def check_operator(group, seed):
    """Outputs and all gradients of the shards are those of the whole; returns whether the exchange overlapped."""
    pattern, lengths, documents, heads, groups, fusion = draw(seed, dist.get_world_size(group))
    tensors, grad = whole_tensors(seed, sum(lengths), heads, groups, fusion)
    whole = [x.clone().requires_grad_() for x in tensors]
    ids = torch.bucketize(torch.arange(sum(lengths)), torch.tensor(documents), right=True).int()[None].expand(2, -1)
    gate = whole[3] if fusion else None
    out = pi_attention(*whole[:3], pattern, gate=gate, fusion=fusion or "mass", segment_ids=ids, impl="reference")
    out.backward(grad)
    halo = HaloContext(group, lengths, pattern, documents)
    mine = [halo.shard(x, 2).clone().requires_grad_() for x in tensors]
    got = halo.attention(*mine[:3], gate=mine[3] if fusion else None, fusion=fusion or "mass")
    got.backward(halo.shard(grad, 2))
    torch.testing.assert_close(got, halo.shard(out, 2), rtol=1e-12, atol=1e-12)
    for x, y in zip(mine, whole, strict=True):
        given = torch.zeros_like(x) if x.grad is None else x.grad
        torch.testing.assert_close(given, halo.shard(y.grad, 2), rtol=1e-12, atol=1e-12)
    return halo._first_at_home is not None and halo._first_at_home < len(range(*halo.halo.own))


def check_exchange(group, seed):
    """On integers, bit for bit: every needed row arrives, every gradient is the number of its uses."""
    pattern, lengths, documents, *_ = draw(seed, dist.get_world_size(group))
    halo = HaloContext(group, lengths, pattern, documents)
    start, end = halo.halo.own
    key = (torch.arange(start, end, dtype=torch.float64)[:, None].repeat(2, 3, 1, 5) + 1).requires_grad_()
    value = (-key.detach()).requires_grad_()
    extended = Extend.apply(key, value, route(halo.plan, halo.rank), group)
    want = torch.zeros(2, 3, halo.halo.length, 5, dtype=torch.float64)
    for a, b in (*halo.halo.needed, halo.halo.own):
        for position in range(a, b):
            want[:, :, halo.halo.place(position)] = position + 1
    assert torch.equal(extended[0], want) and torch.equal(extended[1], -want)
    (extended[0] + 2 * extended[1]).sum().backward()
    uses = torch.ones(end - start, 1, dtype=torch.float64)
    for other in halo.plan.halos:
        for a, b in other.needed:
            uses[max(a, start) - start : max(min(b, end) - start, 0)] += 1 if max(a, start) < min(b, end) else 0
    assert torch.equal(key.grad, uses.expand_as(key)) and torch.equal(value.grad, 2 * key.grad)


def check_two_parts(group, seed):
    """`start` and `finish` are `extend`, forward and backward."""
    pattern, lengths, documents, heads, *_ = draw(seed, dist.get_world_size(group))
    halo = HaloContext(group, lengths, pattern, documents)
    tensors, _ = whole_tensors(seed, sum(lengths), heads, heads, None)
    found = []
    for extend in (halo.extend, lambda key, value: halo.finish(halo.start(key, value))):
        key, value = (halo.shard(x, 2).clone().requires_grad_() for x in tensors[1:])
        extended = extend(key, value)[:2]
        sum((x * torch.linspace(1, 2, x.numel()).view(x.shape)).sum() for x in extended).backward()
        found.append([*(x.detach() for x in extended), key.grad, value.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def check_model(group, lengths, options, *, marked=False):
    """Loss and gradients of a sharded model, summed over the ranks, are those of one process."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "gate": True}
    model = PiForCausalLM(PiConfig(**sizes | {"window": 6, "period": 5, "skips": 3} | options)).double()
    total, documents = sum(lengths), [0, 17, 40]
    ids = torch.randint(50, (2, total))
    positions = torch.cat([torch.arange(b - a) for a, b in zip(documents, [*documents[1:], total], strict=True)])[None]
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)  # shifted before sharding

    def loss_of(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    histories = []
    initial = {name: x.clone() for name, x in model.state_dict().items()}
    for sharded in (False, True):
        model.load_state_dict(initial)
        if sharded:
            ids_of = torch.bucketize(torch.arange(total), torch.tensor(documents), right=True).int()[None]
            attach(model, group, lengths, **({"segment_ids": ids_of} if marked else {"documents": documents}))
        cut = HaloContext(group, lengths, PiPattern(1, 1, 0)).shard if sharded else lambda x, dim=1: x
        history = []
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(cut(ids), position_ids=cut(positions), use_cache=False).logits
            loss = loss_of(logits, cut(labels)) / labels.numel()
            loss.backward()
            loss = loss.detach()
            if sharded:
                for x in (loss, *(p.grad for p in model.parameters())):
                    dist.all_reduce(x, group=group)
            history.append(float(loss))
            optimizer.step()
        histories.append(history)
    assert max(abs(a - b) for a, b in zip(*histories, strict=True)) < 1e-10, histories


def check_repeatable(group):
    """Twice the same gradients, bit for bit."""
    found = []
    for _ in range(2):
        tensors, grad = whole_tensors(0, 16 * dist.get_world_size(group), 2, 2, "gate")
        halo = HaloContext(group, [16] * dist.get_world_size(group), PiPattern(4, 5, 6, phase=(2, 4)))
        mine = [halo.shard(x.float(), 2).clone().requires_grad_() for x in tensors]
        halo.attention(*mine[:3], gate=mine[3]).backward(halo.shard(grad.float(), 2))
        found.append([x.grad for x in mine])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def refused(kind, words, call):
    try:
        call()
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError(f"nothing was refused: {words}")


def check_refused(group):
    """What would be silently wrong, or leave other ranks waiting, is refused on every rank before any message."""
    halo = HaloContext(group, [43, 49], PiPattern(4, 5, 3))
    tensors, _ = whole_tensors(0, 92, 2, 2, "gate")
    whole, mine = tensors[:3], [halo.shard(x, 2).clone().requires_grad_() for x in tensors]
    for call in (halo.attention, lambda query, key, value: halo.extend(key, value)):
        refused(ValueError, "key has shape (2, 2, 92, 8), but the shard of rank", lambda call=call: call(*whole))
    refused(ValueError, "query has shape", lambda: halo.attention(whole[0], *mine[1:3]))
    for value in (mine[2].repeat(1, 1, 1, 3), mine[2].half()):
        refused(ValueError, "must have one shape", lambda value=value: halo.start(mine[1], value))
    for shape in ((92,), (1, 43), (1, 120)):
        refused(ValueError, "whole sequence", lambda shape=shape: halo.set_segments(torch.zeros(shape).int()))
    for output in (halo.attention(*mine[:3], gate=mine[3]), halo.extend(*mine[1:3])[0]):
        grad = torch.autograd.grad
        refused(NotImplementedError, "second derivatives",
                lambda output=output: grad(output.sum(), mine[1], create_graph=True))  # fmt: skip


def check_half_used(group):
    """Ranks of which nothing uses the halo of `finish` take part in the way back; under autocast they agree."""
    for lengths in ([43, 49], [0, 49]):
        halo = HaloContext(group, lengths, PiPattern(4, 5, 3))
        tensors, _ = whole_tensors(0, sum(lengths), 2, 2, "gate")
        query, key, value = (halo.shard(x, 2).float().requires_grad_() for x in tensors[:3])
        with torch.autocast("cpu", torch.bfloat16):
            out = halo.attention(query, key, value)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        key.grad = None
        started = halo.start(key, value)
        extended = halo.finish(started)[0]
        used = 2 * started.key.sum() + (extended[:, :, : halo.halo.place(halo.halo.own[0])].sum() if halo.rank else 0)
        used.backward()
        needed = sum(b - a for a, b in halo.plan.received(1, 0)) if halo.rank == 0 else 0
        assert key.grad.sum() == key.shape[0] * key.shape[1] * key.shape[3] * (2 * key.shape[2] + needed)
        empty = halo.extend(key[:0], value[:0])[0]
        assert empty.shape == (0, 2, halo.halo.length, 8)


def check_prefill_leaves_the_shards(group):
    """A prompt read while training goes on sharded afterwards; positions are those of the whole by themselves."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "gate": True}
    model = PiForCausalLM(PiConfig(**sizes, window=6, period=5, skips=3)).double().train()
    ids = torch.randint(50, (1, 40))
    want = model(ids, use_cache=False).logits
    attach(model, group, [17, 23])
    prefill(model, ids, group)
    cut = HaloContext(group, [17, 23], PiPattern(1, 1, 0)).shard
    torch.testing.assert_close(model(cut(ids), use_cache=False).logits, cut(want), rtol=1e-10, atol=1e-10)
    model.gradient_checkpointing_enable()
    refused(ValueError, "fills no cache", lambda: prefill(model, ids, group))


def check_compiled(group):
    """One graph over the exchange, with the outputs and gradients of the eager call."""
    ranks = dist.get_world_size(group)
    halo = HaloContext(group, [16] * ranks, PiPattern(4, 5, 6))
    tensors, grad = whole_tensors(0, 16 * ranks, 2, 2, "gate")

    def attend(query, key, value, gate):
        return halo.attention(query, key, value, gate=gate)

    found = []
    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        mine = [halo.shard(x, 2).clone().requires_grad_() for x in tensors]
        out = run(*mine)
        out.backward(halo.shard(grad, 2))
        found.append([out, *(x.grad for x in mine)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    key = halo.shard(tensors[1], 2)
    same = torch.compile(halo.extend, fullgraph=True, backend="aot_eager")(key, key)
    assert torch.equal(same[0], halo.extend(key, key)[0]) and torch.equal(same[1], same[0])


def check_documents_compile_once(group):
    """Other documents change segment ids alone: nothing is compiled anew."""
    total = 32 * dist.get_world_size(group)
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "gate": True}
    model, alone = (PiForCausalLM(PiConfig(**sizes, window=6, period=5, skips=3)).double() for _ in range(2))
    alone.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids, positions = torch.randint(50, (1, total)), torch.arange(total)[None]
    for number, start in enumerate((40, 17, 3)):
        segments = (positions >= start).int()
        attach(model, group, [32] * dist.get_world_size(group), segment_ids=segments)
        cut = model.model.layers[0].self_attn.source.shard
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            got = compiled(cut(ids), position_ids=cut(positions), segment_ids=cut(segments), use_cache=False).logits
        want = alone(ids, position_ids=positions, segment_ids=segments, use_cache=False).logits
        torch.testing.assert_close(got, cut(want), rtol=1e-10, atol=1e-10)


def check_prefill(group, options):
    """A prompt prefilled by all ranks goes on as one that a single process reads."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "gate": True}
    model = PiForCausalLM(PiConfig(**sizes | {"window": 6, "period": 5, "skips": 3} | options)).double().eval()
    ids = torch.randint(50, (2, 61))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **options)
    cache = prefill(model, ids, group)
    assert cache.get_seq_length() == 60
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1]
        last = model(ids[:, -1:], past_key_values=prefill(model, ids, group)).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-10, atol=1e-10)


def check_layout(layout, options, zero=3):
    """The loss curves of a layout and of one process are those of a loop written by hand."""
    steps, blocks, tokens = 3, 4 * layout.dp, 48
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "qk_norm": True, "gate": True}
    config = PiConfig(**sizes | {"window": 6, "period": 5, "skips": 3} | options)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (blocks, tokens), generator=generator)
    starts = torch.randint(2, tokens, (blocks, 1), generator=generator)
    segments = (torch.arange(tokens) >= starts).int()
    labels = torch.where(torch.arange(tokens) == starts, -100, ids)  # the first token of a document is not predicted
    count = int((labels[:, 1:] != -100).sum())

    def by_hand(model):
        positions = torch.arange(tokens) - torch.where(segments > 0, starts, 0)
        logits = model(ids, position_ids=positions, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        return loss

    def by_batches(parallel):
        (rank, groups), rows = parallel.place("dp"), 1 if parallel.one_row else 2
        mine, total = torch.arange(blocks).chunk(groups)[rank].split(rows), torch.zeros(())
        for place, numbers in enumerate(mine, 1):
            batch = {"input_ids": ids[numbers], "segment_ids": segments[numbers], "labels": labels[numbers]}
            loss = parallel.loss(batch, count)
            parallel.backward(loss, last=place == len(mine))
            total = total + loss.detach()
        return parallel.mean(total)

    histories = []
    for how in ("by hand", None, layout.mesh("cpu")):
        torch.manual_seed(0)
        model = PiForCausalLM(config).double().train()
        parallel = None if how == "by hand" else Parallel(model, how, zero=zero)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
        history = []
        for _ in range(steps):
            history.append(float(by_hand(model) if parallel is None else by_batches(parallel)))
            optimizer.step()
            optimizer.zero_grad()
        histories.append(history)
    assert histories[0][-1] < histories[0][0]
    for history in histories[1:]:
        assert max(abs(a - b) for a, b in zip(histories[0], history, strict=True)) < 1e-10, (layout, histories)


def work(rank, ranks, folder, seeds):
    """All checks of one process."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    try:
        group = dist.group.WORLD
        overlapped = torch.zeros(())
        for seed in seeds:
            overlapped += check_operator(group, seed)
            check_exchange(group, seed)
            check_two_parts(group, seed)
        dist.all_reduce(overlapped)
        assert overlapped >= 3
        check_repeatable(group)
        if ranks == 2:
            check_refused(group)
            check_half_used(group)
            check_prefill_leaves_the_shards(group)
            check_compiled(group)
            check_documents_compile_once(group)
        shards = [60 // ranks] * (ranks - 1)
        phases = {"period": 4, "phase": [0, 1, 2, 3], "fusion": "mass"}
        for options in ({}, {"period": [3, 5, 7, 9], "sinks": 2, "num_key_value_heads": 2}, phases):
            check_model(group, [*shards, 60 - sum(shards)], options)
            if ranks == 2 or "sinks" in options:
                check_prefill(group, options)
        check_model(group, [*shards, 60 - sum(shards)], {}, marked=True)
        few = [60 // (ranks - 1)] * (ranks - 2)
        scores = {"sink_logit": True, "softcap": 1.5}
        check_model(group, [*few, 60 - sum(few), 0], scores)  # a rank without tokens takes part
        for layout in LAYOUTS.get(ranks, []):
            check_layout(layout, {"period": [3, 5, 7, 9], "num_key_value_heads": 2, "loss_slice": 5})
            if ranks < 8:
                check_layout(layout, {"sinks": 2, "period": 4, "phase": [0, 2, 3, 1], "fusion": "mass"}, zero=1)
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
