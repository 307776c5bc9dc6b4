# Everything a fresh machine needs is installed here: Python >= 3.10 with venv, and PyPI, are enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/smollm2-135m-instruct
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: quickstart test test-slow test-browser test-loggers lint format bench gpu-check clean

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

$(VENV)/bench.done: $(VENV)/dev.done
	@$(PIP) -c requirements/pins.txt -e '.[bench]'
	@touch $@

$(MODEL)/config.json: configs/quickstart/fetch_model.py | $(VENV)/run.done
	@$(BIN)/python configs/quickstart/fetch_model.py $(MODEL)

clean:
	rm -rf $(VENV) .cache runs build *.egg-info
