# `make demo` and `make test` do all the set-up themselves, into .venv.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
RUN ?= runs/demo
WORKERS ?= 8

.PHONY: demo test test-oldest test-newest test-all test-gpu test-vllm experiments-smoke lint docs build test-wheel clean

demo: $(VENV)/installed
	$(BIN)/pi-attention train --out $(RUN) $(if $(wildcard $(RUN)/train.yaml),--resume,--tokenizer bpe:2048)
	$(BIN)/pi-attention eval $(RUN)
	$(BIN)/pi-attention generate $(RUN)
	$(BIN)/pi-attention inspect $(RUN)
	@echo
	@echo "Look at $(RUN)/: loss.png, pattern.png, gate.png, loss_by_position.png and sample.txt; metrics.jsonl holds the figures."
	@echo "Next: $(BIN)/pi-attention train --help, or train on your own text with --data PATH."

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu"

test-oldest: $(VENV)/oldest  # models, caches and conversion with the oldest transformers that the package accepts
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n auto -m "not slow and not gpu" \
		tests/test_models.py tests/test_static_cache.py tests/test_convert.py tests/test_extension.py

test-newest: $(VENV)/newest  # the same with the newest
	PYTHONPATH=$(VENV)/newest $(BIN)/python -m pytest -n auto -m "not slow and not gpu" \
		tests/test_models.py tests/test_static_cache.py tests/test_convert.py tests/test_extension.py

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n auto -m "not gpu" --cov=pi_attention --cov-report=term

test-gpu:  # on a machine with a GPU, in an environment of its own: the semantics of the kernels, and the rest
	$(PYTHON) -m pytest -n $(WORKERS) --dist worksteal tests/test_semantics.py tests/test_compile.py \
		tests/test_operator_checks.py tests/test_paged.py tests/test_gpu.py tests/test_hopper.py

test-vllm: $(VLLM_VENV)/installed  # the plugin for vLLM, in an environment of its own, on a CPU (about 1 GB, minutes)
	cd integrations/vllm && $(abspath $(VLLM_VENV))/bin/python -m pytest

experiments-smoke: $(VENV)/installed  # each experiment at toy size, with data made up where the real is not there
	$(BIN)/python -m pytest -n auto tests/test_experiments.py --smoke

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m report
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

build: $(VENV)/installed  # dist/: wheel and source distribution, built twice, the same to the byte, fit for a package index
	PYTHON=$(BIN)/python .ci/build

test-wheel: build  # the wheel in fresh environments: PyTorch alone, and each extra, on each Python that is here (minutes)
	.ci/test-wheel dist/*.whl

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

$(VENV)/oldest: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --target $@ transformers==5.17.0

$(VENV)/newest: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --target $@ transformers==5.24.0

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VLLM_VENV)/installed: pyproject.toml integrations/vllm/pyproject.toml integrations/vllm/constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint integrations/vllm/constraints.txt torch
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint integrations/vllm/constraints.txt \
		--editable . --editable "integrations/vllm[dev]"
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # CUDA builds, which fail
	touch $@
