"""What vLLM generates: token for token what `generate` gives, with prefixes from the cache, in bounded memory."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, engine, managers, served, wanted
from models import MODELS, model_of
from small_models import prompts_of

MORE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, settings, prompts = json.loads(sys.argv[1])
    llm = LLM(folder, **settings)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    print(json.dumps([list(out.outputs[0].token_ids) for out in outs]))
"""


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_generate(name, saved):
    model = model_of(name)
    prompts = prompts_of([5, 130, 40, 1, 17, 90])
    want = wanted(model, prompts, 24)
    assert len({tuple(text) for text in want}) == len(prompts)
    longer = [prompts[1] + prompts[2], prompts[5][:50] + prompts[0], prompts[2] + want[2] + prompts[4]]
    with engine(saved(model)) as llm:
        assert served(llm, prompts, 24) == (want, [0] * 6)
        again, cached = served(llm, prompts, 24)
        assert again == want and cached[1] >= 112
        texts, cached = served(llm, longer, 24)
        assert texts == wanted(model, longer, 24) and cached[0] > 0 and cached[2] > 0


@pytest.mark.parametrize(("name", "blocks"), [("pi: periods and phases of heads, sinks", 14), ("llama: sinks", 11)])
@pytest.mark.parametrize("caching", [True, False])
def test_texts_with_few_blocks(name, blocks, caching, saved):
    """Requests are put off, and blocks of cached prefixes are taken for others."""
    model, prompts = model_of(name), prompts_of([9, 12, 20, 5, 30, 150, 8, 75])
    want = wanted(model, prompts, 40)
    with engine(saved(model), num_gpu_blocks_override=blocks, enable_prefix_caching=caching) as llm:
        put_off = watch(llm, "_preempt_request")
        for _ in range(2):
            assert served(llm, prompts, 40)[0] == want
        assert put_off


def watch(llm, method):
    """A list that grows with each call of a method of the scheduler."""
    scheduler, calls = llm.llm_engine.engine_core.engine_core.scheduler, []
    usual = getattr(scheduler, method)

    def counted(*args, **kwargs):
        calls.append(method)
        return usual(*args, **kwargs)

    setattr(scheduler, method, counted)
    return calls


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("pi: periods and phases of heads, sinks", [1 + 10]),  # sinks, and a reach of 67 with a chunk of 64 tokens
        ("pi: layers of many kinds, tied", [1 + 7, 1 + 7, 25]),  # a reach of 25, and the dense layer keeps all
    ],
)
def test_a_request_keeps_its_sinks_and_what_is_in_reach(name, most, saved):
    model, prompt = model_of(name), prompts_of([340])
    with engine(saved(model)) as llm:
        held = [[] for _ in managers(llm)]
        schedule = llm.llm_engine.engine_core.engine_core.scheduler.schedule

        def counted(*args, **kwargs):
            out = schedule(*args, **kwargs)
            for counts, manager in zip(held, managers(llm), strict=True):
                counts += [sum(not b.is_null for b in blocks) for blocks in manager.req_to_blocks.values()]
            return out

        llm.llm_engine.engine_core.engine_core.scheduler.schedule = counted
        assert served(llm, prompt, 50)[0] == wanted(model, prompt, 50)
    assert all(max(counts) <= bound for counts, bound in zip(sorted(held, key=max), most, strict=True))


def test_texts_from_an_engine_in_processes_of_its_own(saved):
    """As vLLM runs by default: scheduler and worker apart, each with the plugin."""
    model, prompts = model_of("llama: sinks"), prompts_of([5, 130, 40])
    script = saved(model) / "generate.py"
    script.write_text(MORE)
    arguments = json.dumps([str(script.parent), SMALL, prompts])
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [sys.executable, str(script), arguments], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == wanted(model, prompts, 12)


def test_in_bf16_each_token_is_among_the_likeliest(saved):
    """Rounding may choose another token than `generate`; the one that it chose is as likely, to what bf16 resolves."""
    model, prompts = model_of("llama: sinks").bfloat16(), prompts_of([130, 40, 90])
    with engine(saved(model), dtype="bfloat16") as llm:
        texts, _ = served(llm, prompts, 24)
    for prompt, text in zip(prompts, texts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + text]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        short = logits.amax(dim=1) - logits.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert short.max() <= 0.05 * logits.std()
