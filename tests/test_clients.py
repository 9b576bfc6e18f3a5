"""The libraries that users bring along, on small models: pipelines, PEFT, TRL, lm-eval, torchao, torch.export."""

import json
import os
import subprocess
import sys

import pytest
import torch
from test_models import make, prompt
from transformers import TextIteratorStreamer, pipeline

from pi_attention.data.tokenizers import byte_tokenizer
from pi_attention.models import PiConfig, PiForCausalLM


def speaking(**more):
    """A model of bytes in single precision."""
    return make("pi", vocab_size=257, **more).float()


def test_text_generation_pipeline_streams():
    model, tokenizer = speaking(), byte_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    text = generate("To be, or not", streamer=streamer, **options)[0]["generated_text"]
    assert "".join(streamer).startswith(text) and len(text) > 0
    together = generate(["To be", "or not to be, that is"], batch_size=2, **options)
    assert together[0][0]["generated_text"] == generate("To be", **options)[0]["generated_text"]


def test_assisted_generation_equals_greedy():
    model, assistant = make("mixed"), make("mixed", num_hidden_layers=1)
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = prompt(1, 30)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **options), model.generate(ids, **options))


def test_lora_with_the_gate_trained_beside_it(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = speaking(), prompt(2, 60)
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.5)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        losses.append(adapted(ids, labels=ids).loss)
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    want = adapted(ids).logits
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(speaking(), tmp_path)
    assert torch.equal(loaded(ids).logits, want)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, want, rtol=1e-3, atol=1e-4)


def test_exported_model_takes_any_length():
    model, length = speaking(), torch.export.Dim("length")
    shapes = {"input_ids": {1: length}, "use_cache": None}
    given = {"input_ids": prompt(2, 60), "use_cache": False}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()
    for tokens in (1, 5, 33, 200):
        ids = prompt(2, tokens)
        torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.parametrize("installed", [True, False])
def test_a_saved_folder_loads_by_trust_remote_code_or_says_what_to_install(tmp_path, installed):
    model, ids = speaking(), prompt(1, 40)
    PiConfig.register_for_auto_class()
    PiForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        model.save_pretrained(tmp_path)
    finally:
        del PiConfig._auto_class, PiForCausalLM._auto_class
    code = "" if installed else "import sys; sys.modules['pi_attention'] = None\n"
    code += (
        "import torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)\n"
        f"print(float(model(torch.tensor({ids.tolist()})).logits.double().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    if installed:
        assert done.returncode == 0, done.stderr[-1000:]
        assert float(done.stdout) == pytest.approx(float(model(ids).logits.double().sum()), rel=1e-3)
    else:
        assert "pi_attention" in done.stderr.splitlines()[-1]


def test_int8_weights_by_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model, ids = speaking(), prompt(1, 60)
    want = model(ids).logits
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert 0 < float((model(ids).logits - want).norm() / want.norm()) < 0.1
    assert model.generate(ids, max_new_tokens=5, pad_token_id=0).shape == (1, 65)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_by_bitsandbytes(tmp_path, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model, ids = speaking(hidden_size=64), prompt(1, 60)
    model.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    settings.bnb_4bit_compute_dtype = torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    if bits == 4:  # four bits change a small random model much: compare with the weights that they stand for
        for name, module in loaded.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                model.get_submodule(name).weight.data = weight.float()
    want = model(ids).logits
    assert float((loaded(ids).logits - want).norm() / want.norm()) < (0.1 if bits == 8 else 1e-3)
    assert loaded.generate(ids, max_new_tokens=5, pad_token_id=0).shape == (1, 65)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_without(tmp_path, stage):
    pytest.importorskip("deepspeed")
    code = """
import json, sys, torch
from transformers import Trainer, TrainingArguments
from pi_attention.models import PiConfig, PiForCausalLM
folder, stage = sys.argv[1:]
adam = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}
sizes = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
zero = {"zero_optimization": {"stage": int(stage)}, "optimizer": adam, "zero_force_ds_cpu_optimizer": False} | sizes
arguments = TrainingArguments(
    folder, deepspeed=zero if stage != "0" else None, max_steps=5, per_device_train_batch_size=2, report_to=[],
    use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-2,
)
torch.manual_seed(0)
sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
config = PiConfig(**sizes, window=8, period=8, skips=4, gate=True)
tokens = torch.randint(100, (12, 40))
rows = [{"input_ids": row, "labels": row} for row in tokens]
trainer = Trainer(PiForCausalLM(config), arguments, train_dataset=rows)
trainer.train()
print(json.dumps([line["loss"] for line in trainer.state.log_history if "loss" in line]))
"""
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    losses = []
    for number, chosen in enumerate((0, stage)):
        environment = os.environ | ({**single, "MASTER_PORT": str(29610 + stage + 10 * number)} if chosen else {})
        command = [sys.executable, "-c", code, str(tmp_path), str(chosen)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append(json.loads(done.stdout.splitlines()[-1]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][-1] < losses[0][0]


def test_trl_fine_tunes(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = byte_tokenizer()
    lines = datasets.Dataset.from_dict({"text": ["the cat sat on the mat. " * 3] * 16})
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to="none", use_cpu=True, bf16=False, max_length=64, save_strategy="no",
    )  # fmt: skip
    trainer = trl.SFTTrainer(model=speaking(), args=settings, train_dataset=lines, processing_class=tokenizer)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]


def test_lm_eval_scores_a_local_task(tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"{a} and {b} make", "answers": ["one", "two"], "label": 1} for a in "ab" for b in "cd"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "answers",
        "doc_to_target": "label",
    }
    model, tokenizer = speaking(), byte_tokenizer()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    result = lm_eval.evaluate(lm=harness, task_dict=TaskManager().load([task])["tasks"], bootstrap_iters=0)
    scored = []
    for row in rows:
        start = tokenizer(row["question"], return_tensors="pt").input_ids
        for answer in row["answers"]:
            end = tokenizer(" " + answer, return_tensors="pt").input_ids
            logits = model(torch.cat([start, end], dim=1)).logits.log_softmax(-1)[0, start.shape[1] - 1 : -1]
            scored.append(float(logits.gather(1, end[0][:, None]).sum()))
    right = sum(two > one for one, two in zip(scored[::2], scored[1::2], strict=True))
    assert result["results"]["sums"]["acc,none"] == right / len(rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # 200,000 steps of 2 ms, more on a busy machine
def test_memory_stays_over_200_000_generated_positions():
    model, sizes = speaking(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1), set()
    with torch.no_grad():
        cache = model(prompt(1, 9), use_cache=True).past_key_values
        token = torch.zeros(1, 1, dtype=torch.long)
        for position in range(200_000):
            logits = model(token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            if position % 1000 == 999:
                sizes.add(cache.nbytes)
    assert cache.get_seq_length() == 200_009 and logits.isfinite().all()
    assert max(sizes) == min(sizes)
