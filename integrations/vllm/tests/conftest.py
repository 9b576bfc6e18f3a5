"""vLLM in this process, on a CPU, with small blocks and little memory."""

import gc
import os
from contextlib import contextmanager

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the tests look into the engine
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: threads would only wait for one another
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

SMALL = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "block_size": 16,
    "max_num_batched_tokens": 64,  # prompts in chunks, beside requests that decode
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 2**23,
}


@contextmanager
def engine(folder, **settings):
    """An engine that serves a saved model."""
    llm = LLM(str(folder), **SMALL | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def wanted(model, prompts, tokens):
    """What `generate` continues each prompt with, alone."""
    texts = []
    for prompt in map(torch.tensor, prompts):
        seen = torch.ones(1, len(prompt), dtype=torch.long)  # or a token like the padding's would not be
        out = model.generate(prompt[None], attention_mask=seen, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


def served(llm, prompts, tokens):
    """What the engine continues the prompts with, and how many tokens of each came from the cache of prefixes."""
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs], [out.num_cached_tokens for out in outs]


def managers(llm):
    """What keeps the blocks of the requests, by group of layers."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.coordinator.single_type_managers


@pytest.fixture
def saved(tmp_path):
    """Save a model and return its folder."""

    def save(model):
        model.save_pretrained(tmp_path)
        return tmp_path

    return save
