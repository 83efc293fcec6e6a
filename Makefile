# The four stages, glued by their files: a target is made again when a file that it is made from has changed.
#
#   make all                          the demo: everything from nothing to the result table
#   make all PRESET=paper             the paper's run, for a GPU
#   make all PRESET=paper GPUS=8      the same run, shared by eight
#   make all TASKS=1-1,1-2 MODEL=small RUN=runs/mine
#
# Every setting is a variable, set below per preset, and on the command line by whoever likes other values.

PRESET ?= demo
RUN ?= runs/$(PRESET)
PYTHON ?= python3

# ---- Presets ---------------------------------------------------------------------------------------------------------
# TASKS           what is learned and played: names, ids, topics, all
# TRAIN_SETS      what is trained on: TASKS or TASKS:N for the first N variations of each, several with blanks between
# DEV_VARIATIONS  dev variations of each task that choose the best checkpoint
# MODEL           tiny, small, medium (from scratch), or a model of the hub or a folder
# SUBGOAL_FLAGS   flags of train_subgoal.py (any of Hugging Face's too), ACTION_FLAGS those of train_action.py
# FLAT_FLAGS      those of the baseline (default: ACTION_FLAGS)
# ANNOTATOR       rules, examples or llm; with llm: LLM its name, ANNOTATE_FLAGS more flags, such as --max-cost 5
# JOBS            how many students train at the same time
# GPUS            how many GPUs a training is shared by; its updates stay the same
# TEST_VARIATIONS the first N test variations of each task that are played; BEAMS their beam search

ifeq ($(PRESET),demo)
  TASKS           ?= 2-1,4,7
  DEV_VARIATIONS  ?= 10
  ANNOTATOR       ?= rules
  MODEL           ?= tiny
  JOBS            ?= 3
  TEST_VARIATIONS ?= 10
else ifeq ($(PRESET),paper)
  TASKS           ?= all
  TRAIN_SETS      ?= 1,2,3-1,3-2,3-4,4,5,6,7,8 9,10:50 3-3:100
  DEV_VARIATIONS  ?= 10
  MODEL           ?= google/flan-t5-large
  # For a card of 24 GB. 783 M parameters in fp32 with their gradients and AdamW's two moments are 16 bytes each: 12.5 GB.
  # What bf16 autocast keeps of 8 inputs of 1,024 tokens for the backward pass is about 60 GB, most of it attention with
  # its position bias; checkpointing keeps only the 24 layers' inputs, 0.8 GB, and has one layer's 2.5 GB and its
  # gradients at a time: some 18 GB in all, with GPUS > 1 also 3 GB of gradients on their way. It costs a third more
  # computing: with 80 GB, leave it out (SUBGOAL_FLAGS= ACTION_FLAGS=).
  SUBGOAL_FLAGS   ?= --activation_checkpointing
  ACTION_FLAGS    ?= --activation_checkpointing
  JOBS            ?= 1
  TEST_VARIATIONS ?= 10
else ifeq ($(PRESET),smoke)
  TASKS           ?= 4-2,7-1
  TRAIN_SETS      ?= $(TASKS):3
  DEV_VARIATIONS  ?= 1
  MODEL           ?= tiny
  SUBGOAL_FLAGS   ?= --max_steps 20
  ACTION_FLAGS    ?= --max_steps 20
  JOBS            ?= 1
  TEST_VARIATIONS ?= 1
else
  $(error there is no preset $(PRESET); the presets are demo, paper and smoke)
endif
TRAIN_SETS ?= $(TASKS)
ANNOTATOR  ?= examples
ifeq ($(ANNOTATOR),llm)
  LLM      ?= gpt-4o-mini
  override ANNOTATE_FLAGS += --llm $(LLM)
endif
BEAMS      ?= 5
GPUS       ?= 1
FLAT_FLAGS ?= $(ACTION_FLAGS)
CORES      := $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
WORKERS    ?= $(CORES)

# ---- Everything ------------------------------------------------------------------------------------------------------

.PHONY: .venv all annotate subgoal action flat students evaluate test bench-train lint clean help
.DELETE_ON_ERROR:

all: .venv/ready              ## the whole method, from nothing to the result table
	@$(MAKE) --no-print-directory annotate
	@$(MAKE) --no-print-directory -j$(JOBS) students
	@$(MAKE) --no-print-directory evaluate

annotate: $(RUN)/train.jsonl $(RUN)/dev.jsonl   ## stage 1: expert trajectories with sub-goals
subgoal:  $(RUN)/subgoal/student.json           ## stage 2: the sub-goal generator
action:   $(RUN)/action/student.json            ## stage 3: the action generator
flat:     $(RUN)/flat/student.json              ## stage 3: the baseline without sub-goals
students: subgoal action flat
evaluate: $(RUN)/report.md                      ## stage 4: all three agents on test, and the table
	@cat $(RUN)/report.md

# ---- The stages ------------------------------------------------------------------------------------------------------
# A stage writes beside its target, and the target appears when it is whole: after a kill, the same command goes on.

BIN := .venv/bin/python
TEACHER := $(if $(filter llm,$(ANNOTATOR)),$(wildcard prompts/annotate*.jinja)) $(if $(filter-out rules,$(ANNOTATOR)),prompts/examples.jsonl)
DATA := $(RUN)/train.jsonl $(RUN)/dev.jsonl
EPISODES := $(RUN)/hierarchical.jsonl $(RUN)/flat.jsonl $(RUN)/random.jsonl
ANNOTATE = $(BIN) annotate.py --annotator $(ANNOTATOR) $(ANNOTATE_FLAGS) --workers $(WORKERS) --output $@.part
TRAIN = OMP_NUM_THREADS=$(THREADS) $(if $(filter 1,$(GPUS)),$(BIN),.venv/bin/torchrun --standalone --nproc-per-node $(GPUS))
TRAIN_FLAGS = --data $(DATA) --model $(MODEL) --output_dir $(@D).part
THREADS := $(shell echo $$(( $(CORES) > $(JOBS) * $(GPUS) ? $(CORES) / ($(JOBS) * $(GPUS)) : 1 )))
PLAY = $(BIN) evaluate.py --tasks $(TASKS) --split test --variations $(TEST_VARIATIONS) --beams $(BEAMS) \
  --workers $(WORKERS) --output $@.part

$(RUN)/train.jsonl: annotate.py $(TEACHER) | .venv/ready
	for set in $(TRAIN_SETS); do \
	  case $$set in *:*) first="--variations $${set#*:}";; *) first=;; esac; \
	  $(ANNOTATE) --split train --tasks $${set%%:*} $$first || exit; \
	done
	mv $@.part $@

$(RUN)/dev.jsonl: annotate.py $(TEACHER) | .venv/ready
	$(ANNOTATE) --split dev --tasks $(TASKS) --variations $(DEV_VARIATIONS)
	mv $@.part $@

$(RUN)/subgoal/student.json: train_subgoal.py $(wildcard prompts/subgoal*.jinja) $(DATA)
	$(TRAIN) train_subgoal.py $(TRAIN_FLAGS) $(SUBGOAL_FLAGS)
	rm -rf $(@D) && mv $(@D).part $(@D)

$(RUN)/action/student.json: train_action.py train_subgoal.py $(wildcard prompts/action*.jinja) $(DATA)
	$(TRAIN) train_action.py $(TRAIN_FLAGS) $(ACTION_FLAGS)
	rm -rf $(@D) && mv $(@D).part $(@D)

$(RUN)/flat/student.json: train_action.py train_subgoal.py $(wildcard prompts/action*.jinja) $(DATA)
	$(TRAIN) train_action.py --flat $(TRAIN_FLAGS) $(FLAT_FLAGS)
	rm -rf $(@D) && mv $(@D).part $(@D)

$(RUN)/hierarchical.jsonl: evaluate.py $(RUN)/subgoal/student.json $(RUN)/action/student.json
	$(PLAY) --subgoals model --subgoal-model $(RUN)/subgoal --action-model $(RUN)/action
	mv $@.part $@

$(RUN)/flat.jsonl: evaluate.py $(RUN)/flat/student.json
	$(PLAY) --subgoals none --action-model $(RUN)/flat
	mv $@.part $@

$(RUN)/random.jsonl: evaluate.py $(RUN)/action/student.json $(RUN)/train.jsonl
	$(PLAY) --subgoals random --data $(RUN)/train.jsonl --action-model $(RUN)/action
	mv $@.part $@

$(RUN)/report.md: $(EPISODES)
	$(BIN) evaluate.py --report-only $(EPISODES) --report $@ > /dev/null

# ---- The house -------------------------------------------------------------------------------------------------------

.venv: .venv/ready          ## the packages, pinned
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	@touch $@

test: .venv/ready             ## the tests: real simulator, tiny models
	.venv/bin/python -m pytest

bench-train: .venv/ready      ## tokens a second of the training, and of 8 inputs padded to 1,024 tokens
	$(BIN) tests/benchmark_train.py $(BENCH_FLAGS)

lint: .venv/ready             ## ruff
	.venv/bin/ruff check .

clean:                      ## remove what the runs made (runs/); the packages stay
	rm -rf runs

help:                       ## this list
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */|/' | column -t -s '|'
	@echo; sed -n '/^# ---- Presets/,/^$$/p' Makefile | sed -n 's/^# //p' | tail -n +2
