# The one front door: `make` lists every target, grouped, the first steps first.
# PROFILE=cpu|4090x1|4090x2 overrides detection; ARGS="--flag value" reaches the script;
# RUNS=folder is where runs write (default: runs).
SHELL := /bin/bash
PY := .venv/bin/python
# The environment's programs (ninja, deepspeed ...) come first; only set-up wants the machine's.
SYSTEM_PATH := $(subst $(CURDIR)/.venv/bin:,,$(PATH))
export PATH := $(CURDIR)/.venv/bin:$(SYSTEM_PATH)
export SYSTEM_PATH
SETUP := PATH="$$SYSTEM_PATH" scripts/setup.sh
export PROFILE STORE RUNS
export MAKE_COMMAND = $(MAKECMDGOALS) $(MAKEOVERRIDES)
.DEFAULT_GOAL := help

.PHONY: help
help: ## list every target
	@echo 'usage: make TARGET [ARGS="--flag value"] [PROFILE=cpu|4090x1|4090x2] [RUNS=folder]'
	@awk -F ':.*## ' '/^# [A-Z0-9]/ && banner {printf "\n%s\n", substr($$0, 3)} \
	  {banner = /^# ---/} \
	  /^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

# ------------------------------------------------------------------------------
# First steps

.PHONY: setup quickstart progress doctor smoke plan speeds download stop test
setup: ## the environment, filled from the lock (LOCK=cpu|gpu, ENV=venv|conda, YES=1)
	@LOCK="$(LOCK)" ENV="$(ENV)" YES="$(YES)" $(SETUP)

quickstart: setup ## set up, one script of each stage, a report; resumable (FRESH=1: all again)
	@$(PY) scripts/quickstart.py $(if $(FRESH),--fresh) $(ARGS)

progress: env ## what is done, and the one next step (ARGS="03_vllm": all tasks of a stage)
	@$(PY) scripts/progress.py $(ARGS)

doctor: env ## is this machine fit? Every check does the thing (ARGS="--only ports")
	@$(PY) scripts/doctor.py $(ARGS)

smoke: env ## 01: matrix products against float64, memory bandwidth, first tokens
	@$(PY) modules/01_single_gpu_smoke/01_smoke.py $(ARGS)

plan: env ## what fits your cards, before any download (ARGS="serve --model ID")
	@$(PY) scripts/plan.py $(ARGS)

speeds: env ## how fast each command should run on your cards (or two 4090s), with a range
	@$(PY) scripts/speeds.py $(ARGS)

download: env ## fetch this profile's models beforehand, resumably (ARGS=--list: only list)
	@$(PY) scripts/download.py $(ARGS)

stop: env ## end every server and job that this repository started, and nothing else
	@$(PY) scripts/stop.py

test: setup ## everything a change must pass (ARGS="-m smoke": the installation, a minute)
	@$(PY) -m pytest -n auto -m "not long" $(ARGS)

# ------------------------------------------------------------------------------
# 01 One GPU (or none): is the machine sound?

.PHONY: roofline memory gauges plan-examples
roofline: env ## how fast this machine multiplies and reads, and which of them bounds what
	@$(PY) modules/01_single_gpu_smoke/03_roofline.py $(ARGS)

memory: env ## where memory goes, step by step, on a living model
	@$(PY) modules/01_single_gpu_smoke/04_where_memory_goes.py $(ARGS)

gauges: env ## what utilization, memory, power and clocks say, each provoked by a load
	@$(PY) modules/01_single_gpu_smoke/05_gauges.py $(ARGS)

plan-examples: env ## five questions about two 24 GB cards, answered by arithmetic
	@$(PY) modules/01_single_gpu_smoke/02_plan_examples.py $(ARGS)

# ------------------------------------------------------------------------------
# 02 Image editing

.PHONY: image-edit image-fits
image-edit: env ## edit a picture by words (ARGS='--image my.png --prompt "make it night"')
	@$(PY) modules/02_qwen_image_edit/01_edit.py $(ARGS)

image-fits: env ## what each recipe needs on each card and on the host, and whether it fits
	@$(PY) modules/02_qwen_image_edit/02_what_fits.py $(ARGS)

# ------------------------------------------------------------------------------
# 03 vLLM, in the order of the road

.PHONY: vllm-serve vllm-chat vllm-structured watch vllm-throughput paging prefix-caching
.PHONY: batch-one speculative vllm-tp monitor vllm-load vllm-bench two-nodes mini-vllm mini-tp
.PHONY: vllm-embed vllm-picture
vllm-serve: env ## start the OpenAI-compatible server (FG=1 in front, MODEL=, RECIPE=, PORT=)
	@$(PY) modules/03_vllm/01_serve.py $(if $(MODEL),--model "$(MODEL)") $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(PORT),--port $(PORT)) $(if $(FG),--foreground) $(ARGS)

vllm-chat: env ## ask the running server, the answer streamed
	@$(PY) modules/03_vllm/02_chat.py $(ARGS)

vllm-structured: env ## JSON by a schema, and a tool call, from the running server
	@$(PY) modules/03_vllm/03_structured.py $(ARGS)

watch: env ## GPUs and engine of the running server, a line a second, under load
	@$(PY) modules/03_vllm/04_watch.py $(ARGS)

vllm-throughput: env ## requests of mixed length, transformers against vLLM
	@$(PY) modules/03_vllm/05_throughput.py $(ARGS)

paging: env ## what a paged KV cache buys over contiguous pieces, in the same memory
	@$(PY) modules/03_vllm/06_paging.py $(ARGS)

prefix-caching: env ## what is saved where prompts begin alike
	@$(PY) modules/03_vllm/07_prefix_caching.py $(ARGS)

batch-one: env ## how near decoding comes to the memory's bandwidth, alone and in a batch
	@$(PY) modules/03_vllm/08_batch_one.py $(ARGS)

speculative: env ## what guessing the next tokens from the text so far buys, and where
	@$(PY) modules/03_vllm/09_speculative.py $(ARGS)

vllm-tp: env ## vLLM with one device and with two: what gets faster, what only gets room
	@$(PY) modules/03_vllm/10_tensor_parallel_speed.py $(ARGS)

monitor: env ## Prometheus beside the running server, with its alerts (again: their state)
	@$(PY) modules/03_vllm/11_monitor.py $(ARGS)

vllm-load: env ## the running server under mixed lengths and clients that hang up
	@$(PY) modules/03_vllm/12_load.py $(ARGS)

vllm-bench: env ## latency against throughput of the running server, and its goodput knee
	@$(PY) modules/03_vllm/13_bench.py $(ARGS)

two-nodes: env ## one model on two machines (network namespaces) (ARGS="--parallel tp")
	@$(PY) modules/03_vllm/14_two_nodes.py $(ARGS)

mini-vllm: env ## a small vLLM from scratch, its speed beside vLLM's (ARGS="--only mini")
	@$(PY) modules/03_vllm/15_mini_vllm.py $(ARGS)

mini-tp: env ## tensor parallelism from scratch on two processes: the logits of one
	@$(PY) -m lab.launch mini-tp .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) modules/03_vllm/16_tensor_parallel.py $(ARGS)

vllm-embed: env ## texts to vectors, and to scores for a question, by a server that pools
	@$(PY) modules/03_vllm/17_embed.py $(ARGS)

vllm-picture: env ## send the running vision-language model a picture (ARGS="--image my.jpg")
	@$(PY) modules/03_vllm/18_picture.py $(ARGS)

# ------------------------------------------------------------------------------
# 04 Accelerate

.PHONY: train-one train-ddp train-accelerate train-mixed mini-accelerate real-loop train-trainer
.PHONY: loss-weights step-speed sixteen-bits accelerate-overhead train-faults
LAUNCH = @$(PY) -m lab.launch $@ .venv/bin/accelerate launch \
	--config_file modules/04_Accelerate/configs/ddp.yaml --num_processes $(or $(PROCESSES),2)

train-one: env ## the yardstick: one process, as many tokens a step as two processes
	@$(PY) modules/04_Accelerate/01_train_ddp.py --accumulate 2 $(ARGS)

train-ddp: env ## data parallel training by native DDP, by torchrun (PROCESSES=2, RESTARTS=n)
	@$(PY) -m lab.launch train-ddp .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) $(if $(RESTARTS),--max-restarts $(RESTARTS)) modules/04_Accelerate/01_train_ddp.py --min-world 2 $(ARGS)

train-accelerate: env ## the same by Accelerate (CONFIG=ddp|fsdp|deepspeed_zero2, PROCESSES=2)
	@test -f modules/04_Accelerate/configs/$(or $(CONFIG),ddp).yaml || { echo "error: there is no CONFIG=$(CONFIG): choose ddp, fsdp or deepspeed_zero2" >&2; exit 2; }
	@$(PY) -m lab.launch train-accelerate .venv/bin/accelerate launch --config_file modules/04_Accelerate/configs/$(or $(CONFIG),ddp).yaml --num_processes $(or $(PROCESSES),2) $(if $(RESTARTS),--max_restarts $(RESTARTS)) modules/04_Accelerate/02_train_accelerate.py --min-world 2 $(ARGS)

train-mixed: env ## the same steps in fp32 and in bf16: types, losses, seconds
	@$(PY) modules/04_Accelerate/03_mixed_precision.py $(ARGS)

mini-accelerate: env ## Accelerate from scratch: losses, save and load, validation (PROCESSES=2)
	@$(PY) -m lab.launch mini-accelerate .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) modules/04_Accelerate/04_mini_accelerate.py --min-world 2 $(ARGS)

step-speed: env ## what makes a step of full fine-tuning fast, one measure after another
	@$(PY) modules/04_Accelerate/07_step_speed.py $(ARGS)

sixteen-bits: env ## what fp16 and bf16 lose, and the cures: loss scaling, rounding by chance
	@$(PY) modules/04_Accelerate/09_sixteen_bits.py $(ARGS)

real-loop: env ## a whole training loop: schedule, clipping, validation, packing, profile
	$(LAUNCH) modules/04_Accelerate/05_real_loop.py --min-world 2 $(ARGS)

train-trainer: env ## the training of train-ddp by transformers' Trainer (PROCESSES=2)
	$(LAUNCH) modules/04_Accelerate/06_trainer.py --min-world 2 $(ARGS)

loss-weights: env ## unequal rows: the mean of means against the mean over tokens (PROCESSES=2)
	$(LAUNCH) modules/04_Accelerate/08_loss_weights.py --min-world 2 $(ARGS)

accelerate-overhead: env ## what Accelerate and DeepSpeed-0 cost over native DDP, in one run
	@$(PY) -m lab.launch accelerate-overhead .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) modules/04_Accelerate/10_accelerate_overhead.py --min-world 2 $(ARGS)

train-faults: env ## one training through every fault: killed, full disk ..., what is lost
	@$(PY) modules/04_Accelerate/11_faults.py $(ARGS)

# ------------------------------------------------------------------------------
# 05 DeepSpeed

.PHONY: zero-theory train-z0 train-z1 train-z2 train-z3 train-z2-offload train-compare mini-zero
.PHONY: mini-parallel train-z3-offload train-z3-nvme zero-buckets which-way
.PHONY: train-costs train-compressed train-two-machines
DEEPSPEED = @$(PY) -m lab.launch $@ deepspeed --num_gpus $(or $(PROCESSES),2) \
	modules/05_DeepSpeed/train.py --deepspeed modules/05_DeepSpeed/

zero-theory: env ## what ZeRO's stages cost a card, by formula (ARGS="--processes 64")
	@$(PY) modules/05_DeepSpeed/01_state_bytes.py $(ARGS)

train-z0: env ## full fine-tuning by DeepSpeed with nothing divided (PROCESSES=2)
	$(DEEPSPEED)configs/z0.json $(ARGS)

train-z1: env ## the same, optimizer states divided over the processes
	$(DEEPSPEED)configs/z1.json $(ARGS)

train-z2: env ## the same, gradients divided too
	$(DEEPSPEED)configs/z2.json $(ARGS)

train-z3: env ## the same, parameters divided too
	$(DEEPSPEED)configs/z3.json $(ARGS)

train-z2-offload: env ## ds_config.json: stage 2, the optimizer and its states in host memory
	$(DEEPSPEED)ds_config.json $(ARGS)

train-z3-offload: env ## stage 3 with host memory, a full 7B (CONFIG=z3-offload-64gb: a 3B)
	@test -f modules/05_DeepSpeed/configs/$(or $(CONFIG),z3-offload).json || { echo "error: there is no CONFIG=$(CONFIG): choose z3-offload or z3-offload-64gb" >&2; exit 2; }
	$(DEEPSPEED)configs/$(or $(CONFIG),z3-offload).json --checkpointing $(ARGS)

train-z3-nvme: env ## the same, in files instead of host memory (ARGS="--nvme FOLDER")
	$(DEEPSPEED)configs/z3-nvme.json --checkpointing $(ARGS)

zero-buckets: env ## what bucket sizes, stage3_* keys, checkpointing cost (PROCESSES=2)
	@$(PY) modules/05_DeepSpeed/06_buckets.py --processes $(or $(PROCESSES),2) $(ARGS)

which-way: env ## one card, DDP, ZeRO, offload, LoRA: the first that fits (ARGS="--model ID")
	@$(PY) modules/05_DeepSpeed/07_which_way.py $(ARGS)

train-compare: env ## 04, 05: the losses of your last trainings side by side
	@$(PY) modules/05_DeepSpeed/02_compare.py $(ARGS)

mini-zero: env ## ZeRO's stages from scratch: losses, bytes, traffic in one run (PROCESSES=2)
	@$(PY) -m lab.launch mini-zero .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) modules/05_DeepSpeed/03_mini_zero.py --min-world 2 $(ARGS)

mini-parallel: env ## pipeline, tensor, ring, experts from scratch: losses, traffic (PROCESSES=2)
	@$(PY) -m lab.launch mini-parallel .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) modules/05_DeepSpeed/04_mini_parallel.py --min-world 2 $(ARGS)

train-costs: env ## collectives measured, alpha-beta fitted, a step's messages to 1,024
	@$(PY) -m lab.launch train-costs .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) modules/05_DeepSpeed/05_costs.py $(ARGS)

train-compressed: env ## gradients sent in bf16: bytes, time and losses beside plain DDP
	@$(PY) -m lab.launch train-compressed .venv/bin/torchrun --standalone --nproc-per-node $(or $(PROCESSES),2) modules/05_DeepSpeed/08_compression.py --min-world 2 $(ARGS)

train-two-machines: env ## 04 to 06 on two machines (network namespaces) (ARGS="--cut 2")
	@$(PY) modules/05_DeepSpeed/09_two_machines.py $(ARGS)

# ------------------------------------------------------------------------------
# 06 LLaMA-Factory

# RESUME=1: from the last whole checkpoint (auto: from the start where there is none);
# FRESH=1: an unfinished training is removed first
RESUMED = $(if $(RESUME),--resume$(if $(filter auto,$(RESUME)),-or-begin))
BEGIN = $(RESUMED) $(if $(FRESH),--fresh)
# METHOD="qlora fsdp": files of configs/methods/; MODEL=: another model than the profile's
TRAINED = $(if $(METHOD),--method "$(METHOD)") $(if $(MODEL),--model "$(MODEL)")

.PHONY: lf-check-data lf-new-data lf-train lf-train-z2 mini-lora mini-dpo lf-half mini-grpo lf-grpo lf-score lf-methods lf-sweep lf-merge lf-chat lf-api lf-webui lf-loop lf-weekly lf-distill lf-export lf-evaluate lf-quantise
lf-check-data: env ## data as the model will see it, and what is wrong (FILE=, INFO=)
	@$(PY) modules/06_LLaMA-Factory/00_check_data.py $(if $(FILE),"$(FILE)") $(if $(INFO),--info "$(INFO)") $(ARGS)

lf-new-data: env ## write the entry of FILE into the dataset_info.json beside it
	@$(PY) modules/06_LLaMA-Factory/00_check_data.py $(if $(FILE),"$(FILE)") --write $(ARGS)

lf-train: env ## LoRA, or METHOD=dora ..., in one process (ARGS="lora_rank=8"; RESUME=1)
	@$(PY) modules/06_LLaMA-Factory/01_train.py $(TRAINED) $(BEGIN) $(ARGS)

lf-train-z2: env ## the same in several processes: ZeRO-2, or METHOD=ddp, zero3, fsdp
	@$(PY) modules/06_LLaMA-Factory/01_train.py --zero2 $(TRAINED) $(BEGIN) $(ARGS)

mini-lora: env ## LoRA, rsLoRA, DoRA and PiSSA from scratch beside PEFT's
	@$(PY) modules/06_LLaMA-Factory/06_mini_lora.py $(ARGS)

mini-dpo: env ## DPO from scratch: pairs of answers, and a reference that needs no memory
	@$(PY) modules/06_LLaMA-Factory/10_mini_dpo.py $(ARGS)

# What it trains and merges is no evidence of lf-train and lf-merge
HALF = $(or $(RUNS),runs)/06_LLaMA-Factory/half
lf-half: env ## a half-trained, merged model: where METHOD=dpo, mini-grpo and lf-grpo begin
	@STORE= $(PY) modules/06_LLaMA-Factory/01_train.py max_samples=128 "output_dir=$(HALF)" $(ARGS)
	@STORE= $(PY) modules/06_LLaMA-Factory/03_merge.py --adapter "$(HALF)" --output "$(HALF)-merged"

mini-grpo: env ## GRPO from scratch: answers sampled, marked by rules (REWARDS=long BETA=0)
	@$(PY) modules/06_LLaMA-Factory/11_mini_grpo.py $(if $(REWARDS),--rewards $(REWARDS)) $(if $(BETA),--beta $(BETA)) $(ARGS)

lf-grpo: env ## GRPO with trl, for models of any size (ARGS=--resume goes on)
	@$(PY) modules/06_LLaMA-Factory/12_grpo.py $(if $(MODEL),--model "$(MODEL)") $(ARGS)

lf-score: env ## held-out requests before and after training (ARGS=--train trains first)
	@$(PY) modules/06_LLaMA-Factory/02_score.py $(ARGS)

lf-evaluate: env ## beyond the task: another form, texts, choices, which differences are noise
	@$(PY) modules/06_LLaMA-Factory/13_evaluate.py $(ARGS)

lf-methods: env ## the same task by LoRA, DoRA, QLoRA, full ... (ARGS="--methods lora dora")
	@$(PY) modules/06_LLaMA-Factory/08_methods.py $(ARGS)

lf-sweep: env ## rank, learning rate and epochs, each against the score
	@$(PY) modules/06_LLaMA-Factory/09_sweep.py $(ARGS)

lf-merge: env ## merge the adapter into a plain model folder
	@$(PY) modules/06_LLaMA-Factory/03_merge.py $(ARGS)

lf-export: env ## GGUF files, Ollama's Modelfile, a folder for a hub (SCORE=1: score each)
	@$(PY) modules/06_LLaMA-Factory/15_export.py $(if $(SCORE),--score) $(ARGS)

# Packages newer than the lock quantise, so that part of it is no evidence; what they make is scored in the environment
lf-quantise: env ## the merged model in FP8 and in 4 bits, by own rows (SCORE=1: score it)
	@scripts/quantise_packages.sh
	@STORE= PYTHONPATH="$$PWD/.venv/quantise$${PYTHONPATH:+:$$PYTHONPATH}" $(PY) modules/06_LLaMA-Factory/14_quantise.py $(ARGS)
	@$(if $(SCORE),$(PY) modules/06_LLaMA-Factory/18_quantised.py)

lf-chat: env ## talk to the tuned model (piped input works too)
	@$(PY) modules/06_LLaMA-Factory/04_chat.py $(ARGS)

lf-api: env ## OpenAI-style API of the tuned model, in the background
	@$(PY) modules/06_LLaMA-Factory/05_serve.py api $(ARGS)

lf-webui: env ## LLaMA-Factory's web UI, in the background
	@$(PY) modules/06_LLaMA-Factory/05_serve.py webui $(ARGS)

lf-loop: env ## the whole road: check, train, score, merge, serve, score what is served
	@$(PY) modules/06_LLaMA-Factory/07_loop.py $(ARGS)

lf-weekly: env ## from a week's logs to a better model; only says it (GO=1; ARGS=--roll-back)
	@$(PY) modules/06_LLaMA-Factory/16_weekly.py $(if $(GO),--go) $(ARGS)

lf-distill: env ## answers of the served model as training data, those that keep the rules
	@$(PY) modules/06_LLaMA-Factory/17_distill.py $(ARGS)

# ------------------------------------------------------------------------------
# Upkeep

.PHONY: report test-long lint snapshot data evidence calibrate tables lock clean
report: env ## write runs/report.html, one page with plots, from what has been run
	@$(PY) scripts/report.py $(ARGS)

test-long: setup ## the slow proofs
	@$(PY) -m pytest -n auto -m long $(ARGS)

lint: env ## ruff, its format, and the measures of scripts/lint.py
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) scripts/lint.py

snapshot: env ## write what the doctor finds into .CLAUDE.md, for an AI assistant
	@$(PY) scripts/doctor.py --snapshot $(ARGS)

data: env ## write the data set of the training stages anew (fixed seed)
	@$(PY) scripts/make_data.py $(ARGS)

evidence: env ## measure and store this machine's records under results/, then the tables
	@$(PY) scripts/evidence.py $(ARGS)

calibrate: env ## measure what the planner predicts, on this machine, without a download
	@$(PY) scripts/calibrate.py $(ARGS)

tables: env ## write the tables in the readmes from the records
	@$(PY) scripts/tables.py $(ARGS)

lock: env ## regenerate locks/*.txt from the .in files (UPGRADE=1: newest)
	@UPGRADE="$(UPGRADE)" scripts/lock.sh

clean: ## remove runs/ and caches, not the environment, nor a folder that RUNS names
	@if [ -x $(PY) ] && [ -d runs/jobs ]; then RUNS= $(PY) scripts/stop.py; fi
	@rm -rf runs .pytest_cache .ruff_cache; find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: env
env:
	@$(SETUP) --check
