"""Which tests stand behind each line of the support table in docs/huggingface.md.

python -m pytest tests --support benchmarks/results/support-transformers-5.24.0.json
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import torch
import transformers

SUPPORT = {
    "save and load, tied weights": ["test_models.py::test_saved_and_loaded"],
    "`AutoModelFor…` classes of every head": ["test_models.py::test_heads_are_found_by_the_auto_classes_and_reload"],
    "`trust_remote_code` after `register_for_auto_class`": [
        "test_clients.py::test_a_saved_folder_loads_by_trust_remote_code_or_says_what_to_install"
    ],
    "eager, blocked and fused attention agree": [
        "test_models.py::test_eager_is_the_reference",
        "test_semantics.py::test_equals_the_reference",
    ],
    "attention maps, hidden states": [
        "test_models.py::test_attention_maps_are_those_of_the_output",
        "test_models.py::test_hidden_states_are_recorded",
    ],
    "padding on either side": ["test_models.py::test_padding_changes_no_logit"],
    "packed documents, with and without a cache": [
        "test_models.py::test_packed_documents_do_not_leak_by_default",
        "test_models.py::test_the_last_packed_document_can_be_continued",
    ],
    "greedy, sampling, beams; continuation": [
        "test_models.py::test_generation_with_the_cache_equals_without",
        "test_models.py::test_cached_equals_uncached",
    ],
    "left-padded batches": ["test_models.py::test_left_padded_generation_equals_separate"],
    "prompt lookup, assisted decoding": [
        "test_models.py::test_speculative_generation_equals_greedy",
        "test_clients.py::test_assisted_generation_equals_greedy",
    ],
    '`cache_implementation="static"`, compiled in one graph': ["test_static_cache.py"],
    "transformers' own dynamic cache (without sinks)": [
        "test_models.py::test_the_library_s_own_cache_is_exact_too",
        "test_models.py::test_the_library_s_own_cache_is_refused_with_sinks",
    ],
    "bounded memory over 200,000 tokens": [
        "test_clients.py::test_memory_stays_over_200_000_generated_positions",
        "test_models.py::test_cache_memory_is_bounded_in_generation",
    ],
    "gradient checkpointing": ["test_models.py::test_gradients_with_and_without_checkpointing"],
    "Trainer: resume, gradient accumulation": [
        "test_trainer.py",
        "test_silent_settings.py::test_accumulated_batches_are_the_batch",
    ],
    "`torch.compile(fullgraph=True)`": ["test_models.py::test_compiled_model_agrees"],
    "`torch.export`": ["test_clients.py::test_exported_model_takes_any_length"],
    "PEFT LoRA: save, load, merge": [
        "test_clients.py::test_lora_with_the_gate_trained_beside_it",
        "test_convert.py::test_lora_on_projections_with_the_gate_trained",
    ],
    "int8 weights by torchao": ["test_clients.py::test_int8_weights_by_torchao"],
    "4 and 8 bit weights by bitsandbytes": ["test_clients.py::test_weights_by_bitsandbytes"],
    "DeepSpeed ZeRO 2 and 3 by the Trainer": ["test_clients.py::test_deepspeed_trains_as_without"],
    "TRL's SFTTrainer": ["test_clients.py::test_trl_fine_tunes"],
    "lm-eval": ["test_clients.py::test_lm_eval_scores_a_local_task"],
    "text-generation pipeline with streaming": ["test_clients.py::test_text_generation_pipeline_streams"],
    "converted Llama, Qwen 2, Qwen 3, Mistral, Gemma 3": ["test_convert.py"],
    "continuous batching (transformers 5.23)": ["test_serving.py"],
    "4-D masks: refused": ["test_models.py::test_masks_of_four_dimensions_are_refused"],
    "transformers' common test suite": ["test_transformers_suite.py"],
}


class SupportTable:
    """A pytest plugin: counts outcomes by feature and writes them as JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: dict[str, dict[str, int]] = {feature: {} for feature in SUPPORT}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and not (report.when == "setup" and report.skipped):
            return
        test = report.nodeid.removeprefix("tests/").partition("[")[0]
        for feature, tests in SUPPORT.items():
            if any(test == name or test.partition("::")[0] == name for name in tests):
                self.counts[feature][report.outcome] = self.counts[feature].get(report.outcome, 0) + 1

    def pytest_sessionfinish(self) -> None:
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        found = versions | {"date": date.today().isoformat(), "features": self.counts}
        self.path.write_text(json.dumps(found, indent=1) + "\n")
