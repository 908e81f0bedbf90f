# The one front door: `make` lists every target. PROFILE=cpu|4090x2 overrides detection; ARGS="--flag value" reaches the script.
SHELL := /bin/bash
PY := .venv/bin/python
export PROFILE STORE
export MAKE_COMMAND = $(MAKECMDGOALS) $(MAKEOVERRIDES)
.DEFAULT_GOAL := help

.PHONY: help
help: ## list every target
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

# ------------------------------------------------------------------------------
# Everything

.PHONY: setup doctor snapshot quickstart report progress plan download test test-long stop
setup: ## create the environment and fill it with the lock (LOCK=cpu|gpu, ENV=venv|conda, YES=1)
	@LOCK="$(LOCK)" ENV="$(ENV)" YES="$(YES)" scripts/setup.sh

doctor: env ## prove that this machine is fit for the stages: every check does the thing (ARGS="--only ports hub", --json, --strict)
	@$(PY) scripts/doctor.py $(ARGS)

snapshot: env ## write what the doctor finds into .CLAUDE.md, for an AI assistant
	@$(PY) scripts/doctor.py --snapshot $(ARGS)

quickstart: setup ## set up, run one headline script of each stage, write a report; an interrupted run goes on (FRESH=1 starts anew)
	@$(PY) scripts/quickstart.py $(if $(FRESH),--fresh) $(ARGS)

report: env ## write runs/report.html, one page with plots, from what has been run
	@$(PY) scripts/report.py $(ARGS)

progress: env ## which stages and which tasks of the PLAN.md files are done
	@$(PY) scripts/progress.py $(ARGS)

plan: env ## what fits which cards, by arithmetic (ARGS="serve --model ID --gpus 2", train, image-edit; alone: this repository)
	@$(PY) scripts/plan.py $(ARGS)

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

.PHONY: smoke roofline memory gauges plan-examples
smoke: env ## 01: versions, matrix products against float64, memory bandwidth, first tokens
	@$(PY) modules/01_single_gpu_smoke/01_smoke.py $(ARGS)

roofline: env ## 01: how fast this machine multiplies and reads, and which of the two bounds decoding, prefill and training
	@$(PY) modules/01_single_gpu_smoke/03_roofline.py $(ARGS)

memory: env ## 01: where memory goes, step by step, on a living model: context, weights, cache, activations, optimizer, holes
	@$(PY) modules/01_single_gpu_smoke/04_where_memory_goes.py $(ARGS)

gauges: env ## 01: what utilization, memory, power and clocks say, each provoked by a small load
	@$(PY) modules/01_single_gpu_smoke/05_gauges.py $(ARGS)

plan-examples: env ## 01: five questions about two 24 GB cards, answered by arithmetic, beside other estimators
	@$(PY) modules/01_single_gpu_smoke/02_plan_examples.py $(ARGS)

# ------------------------------------------------------------------------------
# 02 image editing

.PHONY: image-edit image-fits
image-edit: env ## 02: edit a picture by words (ARGS='--image my.png --prompt "make it night" --recipe nf4')
	@$(PY) modules/02_qwen_image_edit/01_edit.py $(ARGS)

image-fits: env ## 02: what each recipe needs on each card and on the host, by arithmetic, and whether it fits here
	@$(PY) modules/02_qwen_image_edit/02_what_fits.py $(ARGS)

# ------------------------------------------------------------------------------
# 03 vLLM

.PHONY: vllm-serve vllm-chat vllm-structured vllm-throughput watch monitor vllm-load vllm-bench mini-vllm mini-tp paging prefix-caching batch-one speculative vllm-tp two-nodes
vllm-serve: env ## 03: start the OpenAI-compatible server in the background (FG=1 in front, MODEL=, RECIPE=, PORT=)
	@$(PY) modules/03_vllm/01_serve.py $(if $(MODEL),--model "$(MODEL)") $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(PORT),--port $(PORT)) $(if $(FG),--foreground) $(ARGS)

vllm-chat: env ## 03: ask the running server, the answer streamed
	@$(PY) modules/03_vllm/02_chat.py $(ARGS)

vllm-structured: env ## 03: JSON by a schema, and a tool call, from the running server
	@$(PY) modules/03_vllm/03_structured.py $(ARGS)

vllm-throughput: env ## 03: requests of mixed length, transformers against vLLM
	@$(PY) modules/03_vllm/05_throughput.py $(ARGS)

watch: env ## 03: GPUs and engine of the running server, a line a second, under load
	@$(PY) modules/03_vllm/04_watch.py $(ARGS)

mini-vllm: env ## 03: a small vLLM from scratch, its scheduler at work, its speed beside vLLM's (ARGS="--only mini --blocks 64")
	@$(PY) modules/03_vllm/15_mini_vllm.py $(ARGS)

mini-tp: env ## 03: tensor parallelism from scratch on two processes: the logits of one (PROCESSES=2)
	@$(PY) -m lab.launch mini-tp .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) modules/03_vllm/16_tensor_parallel.py $(ARGS)

monitor: env ## 03: Prometheus beside the running server, with its alerts, in the background (again: their state now)
	@$(PY) modules/03_vllm/11_monitor.py $(ARGS)

vllm-load: env ## 03: the running server under a load of mixed lengths and of clients that hang up: nothing may fail or stay
	@$(PY) modules/03_vllm/12_load.py $(ARGS)

vllm-bench: env ## 03: latency against throughput of the running server by `vllm bench serve`, closed and open loop, with its goodput knee
	@$(PY) modules/03_vllm/13_bench.py $(ARGS)

paging: env ## 03: what a paged KV cache buys over contiguous pieces of the longest length, in the same memory
	@$(PY) modules/03_vllm/06_paging.py $(ARGS)

prefix-caching: env ## 03: what is saved where prompts begin alike
	@$(PY) modules/03_vllm/07_prefix_caching.py $(ARGS)

batch-one: env ## 03: how near decoding comes to the memory's bandwidth, one request alone and many
	@$(PY) modules/03_vllm/08_batch_one.py $(ARGS)

speculative: env ## 03: what guessing the next tokens from the text so far buys, where it repeats itself and where not
	@$(PY) modules/03_vllm/09_speculative.py $(ARGS)

vllm-tp: env ## 03: vLLM with one device and with two: what gets faster, what only gets room
	@$(PY) modules/03_vllm/10_tensor_parallel_speed.py $(ARGS)

two-nodes: env ## 03: one model on two machines (network namespaces), without Ray, the cable's bytes counted (ARGS="--parallel tp")
	@$(PY) modules/03_vllm/14_two_nodes.py $(ARGS)

# ------------------------------------------------------------------------------
# 04 Accelerate

.PHONY: train-one train-ddp train-accelerate train-mixed
train-one: env ## 04: the yardstick: one process, as many tokens a step as two processes
	@$(PY) modules/04_Accelerate/01_train_ddp.py --accumulate 2 $(ARGS)

train-ddp: env ## 04: data parallel training by native DDP, launched by torchrun (PROCESSES=2)
	@$(PY) -m lab.launch train-ddp .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) modules/04_Accelerate/01_train_ddp.py --min-world 2 $(ARGS)

train-accelerate: env ## 04: the same training by Accelerate (CONFIG=ddp|fsdp|deepspeed_zero2, PROCESSES=2)
	@test -f modules/04_Accelerate/configs/$(or $(CONFIG),ddp).yaml || { echo "error: there is no CONFIG=$(CONFIG): choose ddp, fsdp or deepspeed_zero2" >&2; exit 2; }
	@$(PY) -m lab.launch train-accelerate .venv/bin/accelerate launch --config_file modules/04_Accelerate/configs/$(or $(CONFIG),ddp).yaml --num_processes $(or $(PROCESSES),2) modules/04_Accelerate/02_train_accelerate.py --min-world 2 $(ARGS)

train-mixed: env ## 04: the same steps in fp32 and in bf16: types, losses, seconds
	@$(PY) modules/04_Accelerate/03_mixed_precision.py $(ARGS)

# ------------------------------------------------------------------------------
# 05 DeepSpeed

.PHONY: zero-theory train-z0 train-z1 train-z2 train-z3 train-z2-offload train-compare
DEEPSPEED = @PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m lab.launch $@ deepspeed --num_gpus $(or $(PROCESSES),2) modules/05_DeepSpeed/train.py --deepspeed modules/05_DeepSpeed/

zero-theory: env ## 05: what ZeRO's stages cost a card, by formula: no engine runs (ARGS="--processes 64")
	@$(PY) modules/05_DeepSpeed/01_state_bytes.py $(ARGS)

train-z0: env ## 05: full fine-tuning by DeepSpeed with nothing divided over the processes (PROCESSES=2)
	$(DEEPSPEED)configs/z0.json $(ARGS)

train-z1: env ## 05: the same, optimizer states divided over the processes
	$(DEEPSPEED)configs/z1.json $(ARGS)

train-z2: env ## 05: the same, gradients divided too
	$(DEEPSPEED)configs/z2.json $(ARGS)

train-z3: env ## 05: the same, parameters divided too
	$(DEEPSPEED)configs/z3.json $(ARGS)

train-z2-offload: env ## 05: ds_config.json: stage 2, the optimizer and its states in host memory
	$(DEEPSPEED)ds_config.json $(ARGS)

train-compare: env ## 04, 05: the losses of your last trainings side by side, every engine against one process
	@$(PY) modules/05_DeepSpeed/02_compare.py $(ARGS)

# ------------------------------------------------------------------------------
# 06 LLaMA-Factory

.PHONY: lf-train lf-train-z2 lf-score lf-merge lf-chat lf-api lf-webui
lf-train: env ## 06: LoRA fine-tuning in one process (ARGS="learning_rate=1e-3": any setting of LLaMA-Factory)
	@$(PY) modules/06_LLaMA-Factory/01_train.py $(ARGS)

lf-train-z2: env ## 06: the same with DeepSpeed ZeRO-2 in several processes
	@$(PY) modules/06_LLaMA-Factory/01_train.py --zero2 $(ARGS)

lf-score: env ## 06: held-out requests before and after, exact match (ARGS=--train trains first)
	@$(PY) modules/06_LLaMA-Factory/02_score.py $(ARGS)

lf-merge: env ## 06: merge the adapter into a plain model folder
	@$(PY) modules/06_LLaMA-Factory/03_merge.py $(ARGS)

lf-chat: env ## 06: talk to the tuned model (piped input works too)
	@$(PY) modules/06_LLaMA-Factory/04_chat.py $(ARGS)

lf-api: env ## 06: OpenAI-style API of the tuned model, in the background
	@$(PY) modules/06_LLaMA-Factory/05_serve.py api $(ARGS)

lf-webui: env ## 06: LLaMA-Factory's web UI, in the background
	@$(PY) modules/06_LLaMA-Factory/05_serve.py webui $(ARGS)

# ------------------------------------------------------------------------------
# Upkeep

.PHONY: lock data evidence calibrate tables lint clean env
lock: env ## regenerate locks/*.txt from the .in and .overrides files (UPGRADE=1 takes the newest)
	@UPGRADE="$(UPGRADE)" scripts/lock.sh

data: env ## write the data set of the training stages anew (fixed seed)
	@$(PY) scripts/make_data.py $(ARGS)

evidence: env ## measure and store this machine's records under results/, then the tables
	@$(PY) scripts/evidence.py $(ARGS)

calibrate: env ## measure what the planner predicts, on this machine, without a download (ARGS="--only serve-7b")
	@$(PY) scripts/calibrate.py $(ARGS)

tables: env ## write the tables in the readmes from the records
	@$(PY) scripts/tables.py $(ARGS)

lint: env ## ruff over all Python files
	@$(PY) -m ruff check .

clean: ## remove what runs wrote (runs/, caches), not the environment
	@if [ -x $(PY) ] && [ -d runs/jobs ]; then $(PY) scripts/stop.py; fi
	@rm -rf runs .pytest_cache .ruff_cache; find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

env:
	@scripts/setup.sh --check
