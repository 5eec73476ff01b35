# The commands of nanods; `make` alone lists them. Each target sets up the environment it needs.
SCALE  ?= tiny
ARGS   ?=
DATA    =
PROCS  ?= 1
GPUS   ?= $(PROCS)
EXTRAS ?=
PYTHON ?= python3
PY     := .venv/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: help setup
.PHONY: train-v0 train-v1 train-v2 train-v3 upcycle-v2 finetune-v0 finetune-v1 finetune-v2
.PHONY: sample-v0 sample-v1 sample-v2 sample-v3 serve-v0 serve-v1 serve-v2 serve-v3
.PHONY: distill-v1 distill-v3
.PHONY: plan-v0 plan-v1 plan-v2 plan-v3 quantize-v0 quantize-v1 quantize-v2 quantize-v3
.PHONY: bench bench-v1 bench-v2 bench-v3 bench-scale bench-recall bench-long-text
.PHONY: bench-arithmetic bench-balance bench-experts bench-labels bench-emoji bench-compress bench-adapt
.PHONY: bench-ablations bench-serve speedrun results docs
.PHONY: lessons notebook progress
.PHONY: check-00 check-01 check-02 check-03 check-04 check-05 check-06 check-07 check-08
.PHONY: test test-slow lint format clean

help:
	@echo 'The commands of nanods, with their times on 2 CPU cores (training: with bf16 units; two to'
	@echo 'three times as long without). The first command also sets up the environment (2 minutes,'
	@echo 'once). SCALE=tiny|small|base|full chooses the size of the model, and ARGS="--lr 1e-2" passes'
	@echo 'flags on. PROCS=2 trains with 2 processes, GPUS=8 with 8 GPUs. DATA=my_file or'
	@echo 'DATA=my_folder trains on your own data: docs/DATA.md.'
	@echo
	@echo 'Train, plan and use a model'
	@echo '  make train-v0          a GPT with dense attention: train, plot, sample            3 min'
	@echo '  make train-v1          the same with sparse attention                             3 min'
	@echo '  make train-v2          V1 with 16 experts per layer                               4 min'
	@echo '  make train-v3          text, image and sound in one space, with pictures          4 min'
	@echo '  make train-v1 DATA=my.txt   the same on your text; also v0 and v2'
	@echo '  make train-v3 DATA=photos   the same on your folder of captioned images or sounds'
	@echo '  make train-v3 DATA=emoji    drawings, their names, and their names spoken         8 min'
	@echo '  make upcycle-v2        start V2 from a trained V1 (after train-v1)                2 min'
	@echo '  make finetune-v1       learn to answer, from a base run on pydocs-train (trained first);'
	@echo '                         DATA=my_answers.jsonl: your own; also v0 and v2             5 min'
	@echo '  make sample-v2         generate text (ARGS="--prompt def"); also v0 and v1      seconds'
	@echo '  make sample-v3         search by text, image or sound (ARGS="--query ...")      seconds'
	@echo '  make serve-v2          answer over HTTP and gRPC (ARGS="--port 9000"); also others'
	@echo '  make distill-v1        V1 with V2 as its teacher (trained first if missing)       7 min'
	@echo '  make distill-v3        a small V3 taught by one with 16 experts (likewise)        8 min'
	@echo '  make quantize-v2       store a trained run as INT8 (ARGS="--to fp8"); also others  1 min'
	@echo '  make plan-v2           memory and time that a run needs; also v0 to v3          seconds'
	@echo '                         (SCALE=full ARGS="--gpus 512 --gpu a100-80gb")'
	@echo
	@echo 'Learn'
	@echo '  make notebook          open the lessons in Jupyter'
	@echo '  make check-00          grade your answers in lessons/exercises; also 01 to 08   seconds'
	@echo '  make progress          which exercises pass, and what is next                     30 s'
	@echo '  make lessons           execute every lesson and compare what it prints           10 min'
	@echo
	@echo 'Measure (writes results/; a stopped bench keeps its finished runs: start it again to continue)'
	@echo '  make bench             loss over time; the cache; a GPT grown from a bigram table 15 min'
	@echo '  make bench-ablations   what each idea of the trunk is worth, left out alone      10 min'
	@echo '  make speedrun          tinyshakespeare to a given loss on 3 seeds: join in      15 min'
	@echo '  make bench-v1          sparse against dense attention: time, memory, recall      12 min'
	@echo '  make bench-v2          the MoE layer against one MLP and other packages          15 min'
	@echo '  make bench-v3          what V3 retrieves, and which part contributes how much    75 min'
	@echo '  make bench-scale       two processes against one                                  4 min'
	@echo '  make bench-recall      associative recall by each selection method               20 min'
	@echo '  make bench-long-text   V1 against dense attention at 4,096 tokens                50 min'
	@echo '  make bench-arithmetic  V2 against V1 on sums and products                        75 min'
	@echo '  make bench-experts     experts: balance, quality, upcycling, stability          2.5 hours'
	@echo '  make bench-balance     what evens the load of experts, each at its best          25 min'
	@echo '  make bench-labels      ten classes of images, V3 beside scikit-learn             10 min'
	@echo '  make bench-emoji       V3 on drawings and spoken names, known and unseen         60 min'
	@echo '  make bench-compress    INT8, FP8, rounding in training (ARGS="--only speed") 2.5 hours'
	@echo '  make bench-adapt       learn new tasks without forgetting: EWC, L2, replay     2 hours'
	@echo '  make bench-serve       speed of a server, beside LitServe; false alarms         10 min'
	@echo '  make results           train the tiny presets of V0 to V2 on 3 seeds             60 min'
	@echo '  make docs              write docs/RESULTS.md, the README table and pictures    seconds'
	@echo
	@echo 'Develop'
	@echo '  make setup             the environment alone (EXTRAS=datasets,serve adds packages)'
	@echo '  make test              the tests                                                  8 min'
	@echo '  make test-slow         the slow tests: killed processes, measured memory          8 min'
	@echo '  make lint              check the code with ruff                                 seconds'
	@echo '  make format            format the code with ruff, and fix what it can fix       seconds'
	@echo '  make clean             delete the environment, but no runs and no data'

# Train with one process, with one per GPU (GPUS), or on CPUs with PROCS processes. If one of them
# fails, all stop; ARGS=--resume continues the run.
LAUNCH = -m nanods.distributed.launch --standalone --nproc-per-node $(GPUS)
START = $(if $(filter 1,$(GPUS)),$(PY),$(PY) $(LAUNCH))
TRAIN = $(START) train.py

# DATA may hold blanks and apostrophes. V3 has a preset of its own for the emoji.
PRESET = $*-$(SCALE)
DATA_FLAG = $(if $(DATA),--data '$(subst ','\'',$(DATA))')
ifeq ($(DATA),emoji)
train-v3 plan-v3 sample-v3 serve-v3 quantize-v3 distill-v3: PRESET = v3-emoji
train-v3 sample-v3 distill-v3: .venv/emoji
endif

# .venv/base and .venv/dev are empty files that record when the environment was set up. A newer
# constraints.txt or pyproject.toml makes it be set up again. It is built anew where its Python is
# gone or finds no torch, or finds nanods elsewhere: this folder was moved or copied.
IS_OURS := import importlib.util, os, sys; find = importlib.util.find_spec; \
  sys.exit(not (find("torch") and os.path.samefile(find("nanods").origin, "nanods/__init__.py")))
ifneq ($(wildcard .venv/base),)
  MUST_REBUILD := $(shell test -L .venv || $(PY) -I -c '$(IS_OURS)' 2>/dev/null || echo rebuild)
endif

.PHONY: rebuild
rebuild:
	@echo 'the environment in .venv is broken or belongs to another folder (was this one moved?); extras must be added again:'
	rm -rf .venv

.venv/base: constraints.txt pyproject.toml $(MUST_REBUILD)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'nanods needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 2; }
	@echo 'setting up .venv (once, about 2 minutes) ...'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PIP) -e .
	@touch $@

.venv/dev: .venv/base
	@echo 'adding the packages for tests and lessons (once, about 1 minute) ...'
	@$(PIP) -e '.[dev]'
	@touch $@

.venv/emoji: .venv/base
	@echo 'adding the drawings and the voices of the emoji (once, about 1 minute) ...'
	@$(PIP) -e '.[emoji]'
	@touch $@

.venv/serve: .venv/base
	@echo 'adding the packages of the server (once, about 1 minute) ...'
	@$(PIP) -e '.[serve]'
	@touch $@

setup: .venv/base
	@$(if $(EXTRAS),$(PIP) -e '.[$(EXTRAS)]',:)

train-v0 train-v1 train-v2 train-v3: train-%: .venv/base
	$(TRAIN) $(PRESET) $(DATA_FLAG) $(ARGS)

plan-v0 plan-v1 plan-v2 plan-v3: plan-%: .venv/base
	$(PY) train.py $(PRESET) --plan $(DATA_FLAG) $(ARGS)

# Train 400 steps as V2, starting from a trained V1. Trains V1 first if there is none. The learning
# rate is a quarter of the preset's: at the full rate the loss first gets worse (LOG.md).
upcycle-v2: .venv/base
	@test -f runs/v1-$(SCALE)/loss.png || $(PY) train.py v1-$(SCALE) $(DATA_FLAG)
	$(PY) train.py v2-$(SCALE) --init-from runs/v1-$(SCALE) $(DATA_FLAG) --steps 400 \
	  --lr 0.005 --expert-lr 0.005 --out-dir runs/v2-$(SCALE)-upcycled $(ARGS)

# Train a base run without the modules whose answers are held out, if there is none; then fine-tune.
BASE = runs/$(PRESET)-base
finetune-v0 finetune-v1 finetune-v2: finetune-%: .venv/base
	@test -f $(BASE)/loss.png || $(PY) train.py $(PRESET) --data pydocs-train --out-dir $(BASE)
	$(TRAIN) $(PRESET) --stage finetune --init-from $(BASE) $(DATA_FLAG) $(ARGS)

# Train V1 with V2 as its teacher, and a small dense V3 whose teacher has 16 experts. The teacher is
# trained first if there is none. At tiny size V3's student has 186 thousand parameters (--plan), its
# teacher 6.7 million.
STUDENT = --moe.n-expert 1 $(if $(filter tiny,$(SCALE)),--n-layer 2 --n-embd 64)

distill-v1: .venv/base
	@test -f runs/v2-$(SCALE)/loss.png || $(PY) train.py v2-$(SCALE) $(DATA_FLAG)
	$(PY) train.py v1-$(SCALE) --teacher runs/v2-$(SCALE) $(DATA_FLAG) \
	  --out-dir runs/v1-$(SCALE)-distilled $(ARGS)

distill-v3: distill-%: .venv/base
	@test -f runs/$(PRESET)-teacher/loss.png || $(PY) train.py $(PRESET) --moe.n-expert 16 \
	  $(DATA_FLAG) --out-dir runs/$(PRESET)-teacher
	$(PY) train.py $(PRESET) $(STUDENT) --teacher runs/$(PRESET)-teacher $(DATA_FLAG) \
	  --out-dir runs/$(PRESET)-distilled $(ARGS)

sample-v0 sample-v1 sample-v2 sample-v3: sample-%: .venv/base
	$(START) sample.py $(PRESET) $(ARGS)

serve-v0 serve-v1 serve-v2 serve-v3: serve-%: .venv/serve
	$(PY) -m nanods.serving $(PRESET) $(ARGS)

quantize-v0 quantize-v1 quantize-v2 quantize-v3: quantize-%: .venv/base
	$(PY) -m nanods.training.quantize $(PRESET) $(ARGS)

bench-v1: .venv/base
	$(PY) -m nanods.bench.attention $(ARGS)

bench-v2: .venv/base
	$(PY) -m nanods.bench.moe $(ARGS)

bench-scale: .venv/base
	$(PY) -m nanods.bench.scale $(ARGS)

bench-v3: .venv/base
	$(PY) -m nanods.bench.multimodal $(ARGS)

bench: .venv/base
	$(PY) -m nanods.bench.time_to_loss
	$(PY) -m nanods.bench.generation
	$(PY) -m nanods.bench.from_bigram

bench-recall: .venv/base
	$(PY) -m nanods.bench.recall $(ARGS)

bench-long-text: .venv/base
	$(PY) -m nanods.bench.long_text $(ARGS)

bench-arithmetic: .venv/base
	$(PY) -m nanods.bench.arithmetic $(ARGS)

bench-ablations: .venv/base
	$(PY) -m nanods.bench.ablations $(ARGS)

speedrun: .venv/base
	$(PY) -m nanods.bench.speedrun $(ARGS)

bench-balance: .venv/base
	$(PY) -m nanods.bench.balance $(ARGS)

bench-experts: .venv/base
	$(PY) -m nanods.bench.experts $(ARGS)

# Needs the extra peers: make setup EXTRAS=peers
bench-labels: .venv/base
	$(PY) -m nanods.bench.labels $(ARGS)

bench-adapt: .venv/base
	$(PY) -m nanods.bench.adapt $(ARGS)

bench-emoji: .venv/emoji
	$(PY) -m nanods.bench.emoji $(ARGS)

# torchao, which it compares with, is in the extra peers: make setup EXTRAS=peers
bench-compress: .venv/base
	$(PY) -m nanods.bench.compress $(ARGS)

# Needs the extra peers for LitServe and river's detectors (make setup EXTRAS=peers): else their rows
# are missing.
bench-serve: .venv/serve
	$(PY) -m nanods.bench.serve_alarms
	$(PY) -m nanods.bench.serve $(ARGS)

results: .venv/base
	$(PY) -m nanods.bench.ladder $(ARGS)

# Write the pages and pictures that are generated from results/ and from runs/.
docs: .venv/base
	$(PY) -m nanods.bench.results_page
	$(PY) -m nanods.bench.lessons_page
	$(PY) -m nanods.bench.readme_pictures

# Fails if a lesson prints something else than what is committed. ARGS=--inplace writes the outputs.
lessons: .venv/dev
	$(PY) -m tests.lessons.execute $(ARGS)

notebook: .venv/dev
	.venv/bin/jupyter lab $(ARGS) lessons

# ARGS=my_answers.py grades that file instead of the exercise file. The grader exits with 3 where
# steps are open or wrong: it says which, and make adds no error of its own.
check-00 check-01 check-02 check-03 check-04 check-05 check-06 check-07 check-08: check-%: .venv/base
	@$(PY) lessons/exercises/check_$*.py $(ARGS) || test $$? = 3

progress: .venv/base
	@$(PY) lessons/exercises/progress.py $(ARGS) || test $$? = 3

# By up to four processes, each of which runs whole files. ARGS="-n 0" runs them all in one.
test: .venv/dev
	$(PY) -m pytest -m 'not slow' -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: .venv/dev
	$(PY) -m pytest -m slow $(ARGS)

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/dev
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv
