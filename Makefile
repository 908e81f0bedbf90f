# The one front door: `make` lists every target. PROFILE=cpu|4090x2 overrides detection; ARGS="--flag value" reaches the script.
SHELL := /bin/bash
PY := .venv/bin/python
export PROFILE STORE
.DEFAULT_GOAL := help

.PHONY: help
help: ## list every target
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

# ------------------------------------------------------------------------------
# Everything

.PHONY: setup quickstart download test test-long stop
setup: ## create the environment and fill it with the lock (LOCK=cpu|gpu, ENV=venv|conda, YES=1)
	@LOCK="$(LOCK)" ENV="$(ENV)" YES="$(YES)" scripts/setup.sh

quickstart: setup ## set up, then run one headline script of each stage; an interrupted run goes on (FRESH=1 starts anew)
	@$(PY) scripts/quickstart.py $(if $(FRESH),--fresh) $(ARGS)

download: env ## fetch the models of this profile beforehand, resumably (ARGS=--list only lists them)
	@$(PY) scripts/download.py $(ARGS)

test: setup ## everything a change must pass
	@$(PY) -m pytest -m "not long" $(ARGS)

test-long: setup ## the slow proofs
	@$(PY) -m pytest -m long $(ARGS)

stop: env ## end every server and job this repository started, and nothing else
	@$(PY) scripts/stop.py

# ------------------------------------------------------------------------------
# 01 single GPU smoke test

.PHONY: smoke
smoke: env ## 01: versions, matrix products against float64, memory bandwidth, first tokens
	@$(PY) modules/01_single_gpu_smoke/01_smoke.py $(ARGS)

# ------------------------------------------------------------------------------
# 03 vLLM

.PHONY: vllm-serve vllm-chat vllm-throughput vllm-watch
vllm-serve: env ## 03: start the OpenAI-compatible server in the background (FG=1 in front, MODEL=, PORT=)
	@$(PY) modules/03_vllm/01_serve.py $(if $(MODEL),--model "$(MODEL)") $(if $(PORT),--port $(PORT)) $(if $(FG),--foreground) $(ARGS)

vllm-chat: env ## 03: ask the running server, the answer streamed
	@$(PY) modules/03_vllm/02_chat.py $(ARGS)

vllm-throughput: env ## 03: requests of mixed length, transformers against vLLM
	@$(PY) modules/03_vllm/03_throughput.py $(ARGS)

vllm-watch: env ## 03: GPUs and engine of the running server, a line a second, under load
	@$(PY) modules/03_vllm/04_watch.py $(ARGS)

# ------------------------------------------------------------------------------
# Upkeep

.PHONY: lock data evidence tables lint clean env
lock: env ## regenerate locks/*.txt from the .in and .overrides files (UPGRADE=1 takes the newest)
	@UPGRADE="$(UPGRADE)" scripts/lock.sh

data: env ## write the data set of the training stages anew (fixed seed)
	@$(PY) scripts/make_data.py $(ARGS)

evidence: env ## measure and store this machine's records under results/, then the tables
	@$(PY) scripts/evidence.py $(ARGS)

tables: env ## write the tables in the readmes from the records
	@$(PY) scripts/tables.py $(ARGS)

lint: env ## ruff over all Python files
	@$(PY) -m ruff check .

clean: ## remove what runs wrote (runs/, caches), not the environment
	@if [ -x $(PY) ] && [ -d runs/jobs ]; then $(PY) scripts/stop.py; fi
	@rm -rf runs .pytest_cache .ruff_cache; find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

env:
	@scripts/setup.sh --check
