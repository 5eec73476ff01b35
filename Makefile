# nanods: each target makes what it needs, the environment included. `make` alone prints this page.
SCALE  ?= tiny
ARGS   ?=
PROCS  ?= 1
GPUS   ?= $(PROCS)
EXTRAS ?=
PYTHON ?= python3
PY     := .venv/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: help setup train-v0 train-v1 train-v2 train-v3 plan-v0 plan-v1 plan-v2 plan-v3 upcycle-v2 sample-v0 sample-v1 sample-v2 sample-v3 bench bench-v1 bench-v2 bench-v3 bench-scale bench-recall bench-long-text bench-experts bench-arithmetic results lessons notebook check-01 check-02 check-03 check-04 test test-slow lint format clean

help:
	@echo 'nanods, on 2 CPU cores (SCALE=tiny|small|base and ARGS="--lr 1e-2" are passed on):'
	@echo
	@echo '  make train-v3    text, image and sound in one space, with pictures   5 min, once 2 min more to set up'
	@echo '  make train-v2    train, plot and sample the GPT with 16 experts      6 min'
	@echo '  make train-v1    the same with one MLP: sparse attention alone       5 min'
	@echo '  make train-v0    the same with dense attention                       5 min'
	@echo '  ... PROCS=2      by two processes that share the batch; GPUS=8: by eight, a GPU each'
	@echo '  make plan-v2     what a run needs (SCALE=full ARGS="--gpus 512 --gpu a100-80gb")  seconds; also plan-v0 to plan-v3'
	@echo '  make upcycle-v2  experts that start as the MLPs of a trained V1      2 min after train-v1'
	@echo '  make sample-v2   let the trained model write (ARGS="--prompt def")   seconds; also sample-v0, sample-v1'
	@echo '  make sample-v3   find by text, image or sound (ARGS="--query ...")   seconds'
	@echo '  make notebook    open the lessons in Jupyter'
	@echo '  make check-01    grade your answers in lessons/exercises             seconds; also check-02 to check-04'
	@echo '  make lessons     execute every lesson, top to bottom                 4 min'
	@echo '  make test        the tests                                           4 min'
	@echo '  make test-slow   kill tests, and what a step weighs                  8 min'
	@echo '  make lint        ruff; make format mends what it can                 seconds'
	@echo '  make bench       time to loss, generation with and without a cache   10 min'
	@echo '  make bench-v1    sparse attention against dense: time, memory, recall 12 min'
	@echo '  make bench-v2    experts against one MLP: time, memory, skew, rivals 15 min'
	@echo '  make bench-v3    what V3 finds, and what it owes it to               50 min'
	@echo '  make bench-scale what a second process brings: copies, experts       4 min'
	@echo '  make bench-recall     does it matter which blocks are read?          20 min'
	@echo '  make bench-long-text  dense against V1 at 4,096 tokens               10 min'
	@echo '  make bench-arithmetic are experts better at sums? V2 against V1      12 min'
	@echo '  make bench-experts    balance, quality, upcycling, stability       3 hours'
	@echo '  make results     train each tiny rung on 3 seeds, write results/     50 min'
	@echo '  make setup       the environment alone (EXTRAS=bpe,datasets adds to it)'
	@echo '  make clean       delete the environment (never runs or data)'

# One process, or as many as GPUS or (without any GPU) PROCS asks for. One that dies ends all: go on with ARGS=--resume.
TRAIN = $(if $(filter 1,$(GPUS)),$(PY),$(PY) -m nanods.distributed.launch --standalone --nproc-per-node $(GPUS)) train.py

# The environment is made once, and again when the pins change: the stamp files are younger than constraints.txt.
.venv/base: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'nanods needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 2; }
	@echo 'setting up .venv (once, about 2 minutes) ...'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PIP) -e .
	@touch $@

.venv/dev: .venv/base
	@echo 'adding what tests and lessons need (once, about 1 minute) ...'
	@$(PIP) -e '.[dev]'
	@touch $@

setup: .venv/base
	@$(if $(EXTRAS),$(PIP) -e '.[$(EXTRAS)]',:)

train-v0 train-v1 train-v2 train-v3: train-%: .venv/base
	$(TRAIN) $*-$(SCALE) $(ARGS)

plan-v0 plan-v1 plan-v2 plan-v3: plan-%: .venv/base
	$(PY) train.py $*-$(SCALE) --plan $(ARGS)

# 400 more steps from a trained V1, which is trained first where there is none; at the full rate it would unlearn (LOG.md).
upcycle-v2: .venv/base
	@test -f runs/v1-$(SCALE)/loss.png || $(PY) train.py v1-$(SCALE)
	$(PY) train.py v2-$(SCALE) --init-from runs/v1-$(SCALE) --steps 400 --lr 0.005 --expert-lr 0.005 --out-dir runs/v2-$(SCALE)-upcycled $(ARGS)

sample-v0 sample-v1 sample-v2 sample-v3: sample-%: .venv/base
	$(PY) sample.py $*-$(SCALE) $(ARGS)

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

bench-recall: .venv/base
	$(PY) -m nanods.bench.recall $(ARGS)

bench-long-text: .venv/base
	$(PY) -m nanods.bench.long_text $(ARGS)

bench-arithmetic: .venv/base
	$(PY) -m nanods.bench.arithmetic $(ARGS)

bench-experts: .venv/base
	$(PY) -m nanods.bench.experts $(ARGS)

results: .venv/base
	$(PY) -m nanods.bench.ladder $(ARGS)

# JUPYTER=--inplace keeps the outputs in the notebooks.
lessons: .venv/dev
	.venv/bin/jupyter execute $(JUPYTER) --timeout=300 lessons/*.ipynb

notebook: .venv/dev
	.venv/bin/jupyter lab lessons

# ARGS=my_answers.py grades another file than the stubs themselves.
check-01 check-02 check-03 check-04: check-%: .venv/base
	$(PY) lessons/exercises/check_$*.py $(ARGS)

test: .venv/dev
	$(PY) -m pytest -m 'not slow' $(ARGS)

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
