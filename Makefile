# The four stages, glued by their files: a target is made again when a file that it is made from has changed.
#
#   make all                          the demo: everything from nothing to the result table
#   make all PRESET=paper             the paper's run, for a GPU; GPUS=8 shares it by eight
#   make all PRESET=modern            … with a small decoder of today, Qwen3-0.6B
#   make all PRESET=scratch           all 30 tasks without pretrained weights, by larger models where there is a GPU
#   make all TASKS=1-1,1-2 MODEL=small RUN=runs/mine
#   make all V=1                      shows the commands, too
#
# Every setting is a variable, set below per preset, and on the command line by whoever likes other values.

PRESET ?= demo
RUN    ?= runs/$(PRESET)
PYTHON ?= python3

# ---- Presets ---------------------------------------------------------------------------------------------------------
# TASKS           what is learned and played: names, ids, topics, all
# TRAIN_SETS      what is trained on: TASKS or TASKS:N for N variations of each, spread over all; several with blanks between
# DEV_VARIATIONS  dev variations of each task that students are tested on
# ANNOTATOR       rules, examples, llm, or propagated: an LLM is asked for one trajectory of each task, which the others
#                 follow. LLM is its name, ANNOTATE_FLAGS are more flags, such as --base-url URL or --max-cost 5
# MODEL           nano, tiny, small, medium (from scratch), or a model of the hub or a folder
# SUBGOAL_FLAGS   flags of train_subgoal.py (any of Hugging Face's too), ACTION_FLAGS those of train_action.py, with
#                 and without --flat
# SEED            of the training
# JOBS            how many students train at the same time (default: one a core, at most all three)
# GPUS            how many GPUs share a training, whose updates stay the same
# TEST_VARIATIONS the first N test variations of each task that are played; PLAY_FLAGS are more flags of evaluate.py
# Of the experiments: SEEDS; SIZES models for `make sizes`; HELDOUT tasks that `make heldout` trains without (-4-3,-7-2); TEACHERS
# annotators to compare; OWN train variations of each task that `make selftrain` plays

THINNED := 1,2,3-1,3-2,3-4,4,5,6,7,8 9,10:50 3-3:100  # all 30 tasks, as the paper thins them

ifeq ($(PRESET),demo)
  TASKS          ?= 2-1,4,7
  ANNOTATOR      ?= rules
  MODEL          ?= tiny
  SIZES          ?= nano
  HELDOUT        ?= -4-3,-7-2
else ifeq ($(PRESET),paper)
  TRAIN_SETS     ?= $(THINNED)
  MODEL          ?= google/flan-t5-large
  # For a card of 24 GB. 783 M parameters in fp32 with their gradients and AdamW's two moments are 16 bytes each: 12.5 GB.
  # What bf16 autocast keeps of 8 inputs of 1,024 tokens for the backward pass is about 60 GB; checkpointing keeps only
  # the 24 layers' inputs and one layer's 2.5 GB: some 18 GB in all. With 80 GB, leave it out (SUBGOAL_FLAGS= ACTION_FLAGS=).
  SUBGOAL_FLAGS  ?= --activation_checkpointing
  ACTION_FLAGS   ?= --activation_checkpointing
  JOBS           ?= 1
  SIZES          ?= google/flan-t5-small google/flan-t5-base
else ifeq ($(PRESET),modern)
  TRAIN_SETS     ?= $(THINNED)
  MODEL          ?= Qwen/Qwen3-0.6B
  # 0.6 G parameters at 16 bytes are 9.6 GB; logits are computed for the answers' tokens alone, and cost little.
  SUBGOAL_FLAGS  ?= --activation_checkpointing --learning_rate 2e-5 --num_train_epochs 3 --warmup_steps 100 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8
  ACTION_FLAGS   ?= $(SUBGOAL_FLAGS)
  JOBS           ?= 1
  SIZES          ?= HuggingFaceTB/SmolLM2-135M HuggingFaceTB/SmolLM2-360M
else ifeq ($(PRESET),scratch)
  TRAIN_SETS     ?= $(THINNED)
  DEV_VARIATIONS ?= 3
  ANNOTATOR      ?= rules
  MODEL          ?= $(if $(shell command -v nvidia-smi),medium,tiny)
  SUBGOAL_FLAGS  ?= --per_task 1500 --num_train_epochs 4
  ACTION_FLAGS   ?= $(SUBGOAL_FLAGS)
  SIZES          ?= small
else ifeq ($(PRESET),smoke)
  TASKS          ?= 4-2,7-1
  TRAIN_SETS     ?= $(TASKS):3
  DEV_VARIATIONS ?= 1
  MODEL          ?= tiny
  SUBGOAL_FLAGS  ?= --max_steps 20
  ACTION_FLAGS   ?= --max_steps 20
  TEST_VARIATIONS ?= 1
  SIZES          ?= nano
  HELDOUT        ?= -7-1
else
  $(error there is no preset $(PRESET); the presets are demo, paper, modern, scratch and smoke)
endif
CORES           := $(shell getconf _NPROCESSORS_ONLN)
TASKS           ?= all
TRAIN_SETS      ?= $(TASKS)
DEV_VARIATIONS  ?= 10
TEST_VARIATIONS ?= 10
ANNOTATOR       ?= examples
SEED            ?= 42
GPUS            ?= 1
JOBS            ?= $(if $(filter 1 2,$(CORES)),$(CORES),3)
SEEDS           ?= 42 43 44
TEACHERS        ?= rules examples
OWN             ?= 20
HELDOUT         ?= -1-2,-2-2,-3-4,-4-3,-5-2,-6-3,-7-2,-8-2,-9-3,-10-2
LLM             ?= gpt-4o-mini

# What the names stand for. An experiment's variants are given some of them, of the run that they vary.
DATA      = $(RUN)/train.jsonl $(RUN)/dev.jsonl
PLANNER   = $(RUN)/subgoal
EXECUTOR  = $(RUN)/action
PLAYED    = hierarchical flat random
EPISODES  = $(PLAYED:%=$(RUN)/%.jsonl)
STUDENTS  = $(PLANNER) $(EXECUTOR) $(if $(filter flat,$(PLAYED)),$(RUN)/flat)
REPORT    = $(RUN)/report

Q    := $(if $(V),,@)
SAY   = @printf '\n== %s\n'
BIN  := .venv/bin/python
comma := ,
SUB  := $(MAKE) --no-print-directory

# ---- Everything ------------------------------------------------------------------------------------------------------

EXPERIMENTS := ablations seeds teachers sizes heldout selftrain
.PHONY: .venv all annotate students agents evaluate report $(EXPERIMENTS) test bench bench-train lint clean help
.DELETE_ON_ERROR:

all: evaluate             ## the whole method, from nothing to the result table

annotate: $(DATA)         ## stage 1: expert trajectories with sub-goals
students: annotate        ## stages 2 and 3: planner, executor and the flat baseline, JOBS of them side by side
	@+$(SUB) -j$(JOBS) $(STUDENTS:%=%/student.json)
agents: students          ## stage 4: the agents PLAYED, on test
	@+$(SUB) $(EPISODES)
evaluate: agents          ## … and their tables
	@+$(SUB) report
report: .venv/ready       ## the tables of EPISODES again, nothing played: REPORT.md and REPORT.html
	$Q$(BIN) evaluate.py --report-only $(EPISODES) --report $(REPORT)

# ---- The stages ------------------------------------------------------------------------------------------------------
# A stage writes beside its target, and the target appears when it is whole: after a kill, the same command goes on.

SETS.train = $(TRAIN_SETS)
SETS.dev   = $(TASKS):$(DEV_VARIATIONS)
SETS.test  = $(TASKS):$(TEST_VARIATIONS)
BY_LLM     = $(filter llm propagated,$(ANNOTATOR))
TEACHER    = $(if $(BY_LLM),llm --llm $(LLM) $(if $(filter propagated,$(ANNOTATOR)),--propagate) $(ANNOTATE_FLAGS),$(ANNOTATOR))
ON_GPUS    = $(if $(filter 1,$(GPUS)),$(BIN),.venv/bin/torchrun --standalone --nproc-per-node $(GPUS))
THREADS    = OMP_NUM_THREADS=$$(( $(CORES) > $(JOBS) * $(GPUS) ? $(CORES) / ($(JOBS) * $(GPUS)) : 1 ))

$(RUN)/train.jsonl $(RUN)/dev.jsonl $(RUN)/test.jsonl: $(RUN)/%.jsonl: annotate.py \
  $(if $(BY_LLM),$(wildcard prompts/annotate*.jinja)) $(if $(filter-out rules keep,$(ANNOTATOR)),prompts/examples.jsonl) \
  $(addsuffix /%.jsonl,$(TRAJECTORIES)) | .venv/ready
	$(SAY) "Stage 1: the expert's trajectories, split $*; sub-goals by $(if $(BY_LLM),$(LLM),$(ANNOTATOR))"
	$Qfor set in $(SETS.$*); do \
	  $(BIN) annotate.py --annotator $(TEACHER) --split $* --tasks $${set%%:*}$(WITHOUT:%=,%) --output $@.part \
	    $$(case $$set in *:*) echo --variations $${set#*:};; esac) $(TRAJECTORIES:%=--input %/$*.jsonl) || exit; \
	done
	$Qmv $@.part $@

TRAIN.subgoal = train_subgoal.py $(SUBGOAL_FLAGS)
TRAIN.action  = train_action.py $(ACTION_FLAGS)
TRAIN.flat    = train_action.py --flat $(ACTION_FLAGS)
$(RUN)/subgoal/student.json: $(wildcard prompts/subgoal*.jinja)
$(RUN)/action/student.json $(RUN)/flat/student.json: train_action.py $(wildcard prompts/action*.jinja)
$(RUN)/subgoal/student.json $(RUN)/action/student.json $(RUN)/flat/student.json: train_subgoal.py $(DATA)
	$(SAY) "Stage $(if $(findstring subgoal,$(@D)),2,3): $(@D), a student of $(MODEL)"
	$Q$(THREADS) $(ON_GPUS) $(TRAIN.$(notdir $(@D))) --data $(DATA) --model $(MODEL) --seed $(SEED) --output_dir $(@D).part
	$Qrm -rf $(@D) && mv $(@D).part $(@D)

PLAY.hierarchical = model --subgoal-model $(PLANNER) --action-model $(EXECUTOR)
PLAY.flat         = none --action-model $(RUN)/flat
PLAY.random       = random --action-model $(EXECUTOR) --data $(RUN)/train.jsonl
PLAY.semi-random  = semi-random --subgoal-model $(PLANNER) --action-model $(EXECUTOR) --data $(RUN)/train.jsonl
PLAY.oracle       = oracle --action-model $(EXECUTOR) --data $(RUN)/test.jsonl
$(RUN)/hierarchical.jsonl $(RUN)/semi-random.jsonl: $(PLANNER)/student.json
$(RUN)/hierarchical.jsonl $(RUN)/semi-random.jsonl $(RUN)/random.jsonl $(RUN)/oracle.jsonl: $(EXECUTOR)/student.json
$(RUN)/flat.jsonl: $(RUN)/flat/student.json
$(RUN)/random.jsonl $(RUN)/semi-random.jsonl: $(RUN)/train.jsonl
$(RUN)/oracle.jsonl: $(RUN)/test.jsonl
# The table of one agent alone is left out: the report has them all.
$(patsubst PLAY.%,$(RUN)/%.jsonl,$(filter PLAY.%,$(.VARIABLES))): evaluate.py
	$(SAY) "Stage 4: $(basename $@) plays"
	$Q$(BIN) evaluate.py --tasks $(TASKS) --split test --variations $(TEST_VARIATIONS) $(PLAY_FLAGS) --output $@.part \
	  $(if $(ROW),--name "$(basename $(@F))$(comma) $(ROW)") --subgoals $(PLAY.$(basename $(@F))) > /dev/null
	$Qmv $@.part $@

# ---- Experiments -----------------------------------------------------------------------------------------------------
# Each ends in a table, RUN/NAME/report.md and .html, of the run and its variants. A variant is a run in a folder of the
# run, with other settings. After a kill, the same command goes on.

VARIANT = $(SUB) agents RUN=$(RUN)/$@
COMPARE = $(SUB) report REPORT=$(RUN)/$@/report EPISODES="$$(find $(RUN)/hierarchical.jsonl $(RUN)/flat.jsonl $(RUN)/$@ \
  -name hierarchical.jsonl -o -name flat.jsonl | sort | tr '\n' ' ')"

ablations: students       ## sub-goals from the planner, none, random, semi-random, or the expert's (oracle)
	@+$(SUB) evaluate REPORT=$(RUN)/$@/report PLAYED="hierarchical flat random semi-random oracle"

seeds: agents             ## trainings that differ in their SEED: mean and interval
	@+for seed in $(filter-out $(SEED),$(SEEDS)); do \
	  $(VARIANT)/$$seed SEED=$$seed DATA="$(DATA)" PLAYED="hierarchical flat" || exit; done
	@+$(COMPARE)

teachers: agents          ## other annotators of the same trajectories; an LLM: TEACHERS=propagated LLM=NAME
	@+for teacher in $(filter-out $(ANNOTATOR),$(TEACHERS)); do \
	  $(VARIANT)/$$teacher ANNOTATOR=$$teacher TRAJECTORIES=$(RUN) PLAYED=hierarchical ROW="by $$teacher" || exit; done
	@+$(COMPARE)

sizes: agents             ## the planner's size varied with the executor fixed, and the reverse
	@+for size in $(filter-out $(MODEL),$(SIZES)); do \
	  $(VARIANT)/planner/$$size MODEL=$$size DATA="$(DATA)" EXECUTOR=$(EXECUTOR) PLAYED=hierarchical ROW="planner $$size" && \
	  $(VARIANT)/executor/$$size MODEL=$$size DATA="$(DATA)" PLANNER=$(PLANNER) PLAYED=hierarchical ROW="executor $$size" \
	  || exit; done
	@+$(COMPARE)

heldout: agents           ## trained without the tasks HELDOUT, played on all: seen and unseen tasks
	@+$(VARIANT) WITHOUT=$(HELDOUT) ANNOTATOR=keep TRAJECTORIES=$(RUN) PLAYED="hierarchical flat" ROW="without $(HELDOUT)"
	@+$(COMPARE)

selftrain: agents         ## a second round, with those of OWN train variations of each task that the agent has solved
	@+$(SUB) $(RUN)/$@/solved.jsonl
	@+$(VARIANT) DATA="$(DATA) $(RUN)/$@/solved.jsonl" PLAYED=hierarchical ROW="second round"
	@+$(COMPARE)

$(RUN)/selftrain/solved.jsonl: evaluate.py annotate.py $(PLANNER)/student.json $(EXECUTOR)/student.json
	$(SAY) "Train variations, played by the agent; those that it solves are kept"
	$Q$(BIN) evaluate.py --tasks $(TASKS) --split train --variations $(OWN) --subgoal-model $(PLANNER) \
	  --action-model $(EXECUTOR) --output $(@D)/played.jsonl
	$Q$(BIN) annotate.py --annotator keep --tasks $(TASKS) --input $(@D)/played.jsonl --output $@.part
	$Qmv $@.part $@

# ---- The house -------------------------------------------------------------------------------------------------------

.venv: .venv/ready        ## the packages, pinned
.venv/ready: requirements.txt
	$(SAY) "The packages, into .venv"
	$Q$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed: PYTHON=python3.12")'
	$Q$(PYTHON) -m venv .venv
	$Q.venv/bin/pip install --quiet --requirement requirements.txt
	@touch $@

test: .venv/ready         ## the tests: real simulator, tiny models
	$Q.venv/bin/python -m pytest --numprocesses $(CORES) --dist loadfile
bench: students           ## stage 4 against one episode at a time: speed, memory
	$Q$(BIN) tests/benchmark_evaluate.py --tasks $(TASKS) --subgoal-model $(PLANNER) --action-model $(EXECUTOR)
bench-train: .venv/ready  ## tokens a second of the training, and of 8 inputs padded to 1,024 tokens
	$Q$(BIN) tests/benchmark_train.py
lint: .venv/ready         ## ruff
	$Q.venv/bin/ruff check .
clean:                    ## remove what the runs made (runs/); the packages stay
	rm -rf runs
help:                     ## this list
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */|/' | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'
	@echo; sed -n '/^# ---- Presets/,/^$$/p' Makefile | sed -n 's/^# //p' | tail -n +2
