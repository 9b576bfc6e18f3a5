"""transformers.Trainer, for those who bring it, trains, saves and resumes our models."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from pi_attention.data.packing import PackedBlocks
from pi_attention.data.tokenizers import load_tokenizer
from pi_attention.models import PiConfig, PiForCausalLM


@pytest.fixture(scope="module")
def blocks():
    return PackedBlocks(["".join(f"{i} and {i * i}. " for i in range(300))], load_tokenizer("bytes"), 64)


def trainer(blocks, folder, **settings):
    torch.manual_seed(0)
    config = PiConfig(
        vocab_size=260,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        window=4,
        period=4,
        skips=2,
        gate=True,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=2,
        learning_rate=3e-3,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        **settings,
    )
    return Trainer(model=PiForCausalLM(config), args=arguments, train_dataset=blocks)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_trainer_ends_at_the_same_weights(accumulation, blocks, tmp_path):
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    whole = trainer(blocks, tmp_path, **sizes)
    whole.train()
    again = trainer(blocks, tmp_path, **sizes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 6 and len(whole.state.log_history) == 1
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    loaded = PiForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert torch.equal(loaded.lm_head.weight, whole.model.lm_head.weight)


def test_a_trainer_takes_the_loss_by_slices(blocks, tmp_path):
    histories = []
    for size in (None, 10):
        one = trainer(blocks, tmp_path / str(size), per_device_train_batch_size=2, logging_steps=1, save_strategy="no")
        one.model.config.loss_slice = size
        one.train()
        histories.append([line["loss"] for line in one.state.log_history if "loss" in line])
    assert len(histories[0]) == 6 and histories[0][-1] < histories[0][0]
    assert histories[1] == pytest.approx(histories[0], abs=1e-4)
