# Offline distillation in two stages. `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# Where things go, and how many processes train. All can be given on the command line:
#   make train-student NPROC=2 ARGS="--temperature 1"
RUN     ?= runs/default
NPROC   ?= 1
CONFIG  ?=
ARGS    ?=
PYTHON  ?= python3

SETUP   := @$(PYTHON) stages/setup_env.py
TEACHER := $(shell $(PYTHON) stages/setup_env.py --print-python teacher)
STUDENT := $(shell $(PYTHON) stages/setup_env.py --print-python student)

CONFIGURED_STUDENT = -m stages.train_student --config $(or $(CONFIG),stages/configs/student.yaml) $(ARGS)
ifeq ($(NPROC),1)
  TRAIN = $(STUDENT) $(CONFIGURED_STUDENT)
else
  # Checked by one process first: torchrun would show a mistake once a rank, and a trace of its own.
  TRAIN = $(STUDENT) $(CONFIGURED_STUDENT) --check && \
    $(STUDENT) -m torch.distributed.run --standalone --nproc-per-node $(NPROC) $(CONFIGURED_STUDENT)
endif

.PHONY: help
help: ## List all targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | awk -F'\t' '{printf "  %-18s %s\n", $$1, $$2}'

##@ Run
.PHONY: distill
distill: setup ## Teacher, cache, student, control, report: the whole path on the embedded default
	@$(STUDENT) -m stages.distill --run_dir $(RUN) --nproc $(NPROC) --teacher_python $(TEACHER) $(ARGS)

.PHONY: cache-teacher
cache-teacher: setup-teacher ## Stage one: run the teacher once, write its sparse logits (CONFIG=, ARGS=)
	@$(TEACHER) -m stages.cache_teacher --config $(or $(CONFIG),stages/configs/teacher.yaml) $(ARGS)

.PHONY: train-student
train-student: setup-student ## Stage two: train a student from a cache (CONFIG=, ARGS=, NPROC=2 for two processes)
	@$(TRAIN)

.PHONY: push-student
push-student: setup-student ## Push a finished student to the hub again (ARGS="--output_dir DIR --hub_location NAME")
	@$(STUDENT) -m stages.push_student $(ARGS)

.PHONY: report
report: setup-student ## Write the report of a finished `make distill` anew (RUN=runs/default)
	@$(STUDENT) -m stages.report --run_dir $(RUN)

##@ Set up
.PHONY: setup
setup: ## Install everything once (one environment on a CPU machine, two on a GPU machine)
	$(SETUP) teacher student

.PHONY: setup-teacher
setup-teacher: ## Install what stage one needs
	$(SETUP) teacher

.PHONY: setup-student
setup-student: ## Install what stage two needs
	$(SETUP) student

.PHONY: setup-dev
setup-dev: ## Install what the tests and checks need
	$(SETUP) dev

.PHONY: setup-flash
setup-flash: setup ## Add flash-attn on a GPU machine (compiles for a while; needs nvcc)
	@for python in $(TEACHER) $(STUDENT); do \
	  $$(dirname $$python)/uv pip install --python $$python --no-build-isolation flash-attn; done

.PHONY: lock
lock: setup-dev ## Resolve the pinned lock files anew from stages/locks/*.in
	@$(STUDENT) stages/locks/resolve.py

##@ Check
.PHONY: test
test: setup-dev ## All tests but the slow ones (under 10 minutes on 2 cores)
	@$(STUDENT) -m pytest -m "not slow and not browser" $(ARGS)

.PHONY: test-all
test-all: setup-dev ## The slow tests: real engines, kills in the middle, two processes, the browser, README's commands
	@$(STUDENT) -m pytest -m "slow or browser" $(ARGS)

.PHONY: check
check: lint types arch ## Formatting, lint, types and import direction

.PHONY: lint
lint: setup-dev ## ruff
	@$(STUDENT) -m ruff format --check pipeline stages tests
	@$(STUDENT) -m ruff check pipeline stages tests

.PHONY: types
types: setup-dev ## mypy --strict
	@$(STUDENT) -m mypy

.PHONY: arch
arch: setup-dev ## import-linter: data flows one way
	@$(dir $(STUDENT))lint-imports --no-logo

.PHONY: format
format: setup-dev ## Rewrite the sources as ruff wants them
	@$(STUDENT) -m ruff format pipeline stages tests
	@$(STUDENT) -m ruff check --fix pipeline stages tests
