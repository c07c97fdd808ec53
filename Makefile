# Offline distillation in two stages. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# Output folder, number of processes, configuration. All can be given on the command line:
#   make train-student NPROC=2 ARGS="--temperature 1"
RUN     ?= runs/default
LONG_RUN ?= runs/long
NPROC   ?= 1
CONFIG  ?=
GPUS    ?=
ARGS    ?=
PYTHON  ?= python3

# With OVERLAY the same targets go to a cluster (k8s/README.md): RUN, NODES, CONFIG, ARGS, IMAGE, QUEUE,
# PRIORITY, NAMESPACE, TIMEOUT (seconds), IDENTITY (of the cache), INSTANCE, OPERATOR, DRY_RUN=1;
# prepare-corpus has WORKERS and NODE_SELECTOR instead of NODES.
OVERLAY ?=
DEVICE  ?= gpu
TAG     ?= $(if $(filter cpu,$(DEVICE)),cpu,$(shell git describe --always --dirty --abbrev=12 2>/dev/null || echo dev))
SWEEP   ?= stages/configs/sweeps/temperature.yaml
SECRET  ?= hub-token

# What people or CI give is text, never make's or the shell's to read: taken raw, and handed to recipes
# in the environment, where they quote it. ARGS alone is a piece of a command line, quotes and all.
GIVEN = RUN LONG_RUN NPROC GPUS ARCHITECTURES CONFIG OVERLAY DEVICE TAG SWEEP SECRET NAMESPACE \
  NODES IMAGE QUEUE PRIORITY \
  TIMEOUT IDENTITY WORKERS NODE_SELECTOR INSTANCE OPERATOR STAGE REGION ACCOUNT FSX_ID FSX_MOUNT SUBNET \
  SECURITY_GROUP STORAGE THROUGHPUT EFA TOPOLOGY DRY_RUN DATA YES
define take_raw
ifneq ($(filter command environment,$(firstword $(origin $(1)))),)
override $(1) := $$(value $(1))
endif
export GIVEN_$(1) := $$($(1))
endef
$(foreach name,$(GIVEN),$(eval $(call take_raw,$(name))))
# $(call flag,--nodes,NODES): the flag with its value, nothing where none is given.
flag = $(if $($(2)),$(1) "$$GIVEN_$(2)")

SETUP   := @$(PYTHON) stages/setup_env.py
TEACHER := $(shell $(PYTHON) stages/setup_env.py --print-python teacher)
STUDENT := $(shell $(PYTHON) stages/setup_env.py --print-python student)

TRAIN = $(STUDENT) -m stages train-student --nproc "$$GIVEN_NPROC" $(call flag,--config,CONFIG) $(ARGS)
ROUNDS = $(STUDENT) -m stages.rounds $(call flag,--config,CONFIG) --nproc "$$GIVEN_NPROC" \
    --teacher_python $(TEACHER) $(ARGS)
RUN_SWEEP = $(STUDENT) -m stages.sweep --sweep "$$GIVEN_SWEEP" --teacher_python $(TEACHER) $(ARGS)
PREPARE_CORPUS = $(TEACHER) -m stages.prepare_corpus $(call flag,--config,CONFIG) $(ARGS)
PREVIEW = $(TEACHER) -m stages.preview $(call flag,--config,CONFIG) $(ARGS)
# More than one worker: NPROC= of them, or as many as the GPUs allow (GPUS=all, GPUS=0,1).
WORKERS_OF = $(if $(filter-out 1,$(NPROC)),--nproc "$$GIVEN_NPROC") $(call flag,--gpus,GPUS)
RUN_TEACHER = $(TEACHER) -m $(if $(strip $(WORKERS_OF)),stages.workers $(WORKERS_OF),stages.cache_teacher) \
    $(call flag,--config,CONFIG) $(ARGS)

CLUSTER = $(STUDENT) -m k8s
PLACE   = --overlay "$$GIVEN_OVERLAY" $(call flag,--namespace,NAMESPACE) $(call flag,--instance,INSTANCE) \
    $(if $(filter 1,$(DRY_RUN)),--dry-run)
NAMED   = --run "$${GIVEN_RUN\#\#*/}"
JOB     = $(call flag,--image,IMAGE) $(call flag,--queue,QUEUE) $(call flag,--priority,PRIORITY) \
    $(call flag,--operator,OPERATOR) $(call flag,--topology,TOPOLOGY) $(call flag,--timeout_s,TIMEOUT)
SUBMIT  = $(CLUSTER) $@ $(PLACE) $(NAMED) $(call flag,--config,CONFIG) $(call flag,--nodes,NODES) $(JOB) \
    $(call flag,--cache_identity,IDENTITY) -- $(ARGS)
SUBMIT_PREPARE = $(CLUSTER) $@ $(PLACE) $(NAMED) $(call flag,--config,CONFIG) $(call flag,--image,IMAGE) \
    $(call flag,--queue,QUEUE) $(call flag,--priority,PRIORITY) $(call flag,--timeout_s,TIMEOUT) \
    $(call flag,--workers,WORKERS) $(call flag,--node_selector,NODE_SELECTOR) -- $(ARGS)
SUBMIT_SWEEP = $(CLUSTER) $@ $(PLACE) --sweep "$$GIVEN_SWEEP" $(call flag,--nodes,NODES) $(JOB)

define build_image
command -v docker >/dev/null || { echo "error: docker: no such program; install it." >&2; exit 1; }; \
docker build --platform linux/amd64 --file docker/$(1).Dockerfile --build-arg DEVICE="$$GIVEN_DEVICE" \
  --tag distill-$(1):"$$GIVEN_TAG" .
endef

.PHONY: help
help: ## List all targets
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z][a-z-]*:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ Run
.PHONY: distill
distill: setup ## Run both stages, a control student and the report on the embedded default (ARGS=, NPROC=)
	@$(STUDENT) -m stages.distill --run_dir "$$GIVEN_RUN" --nproc "$$GIVEN_NPROC" --teacher_python $(TEACHER) $(ARGS)

.PHONY: distill-long
distill-long: setup ## The same for most of an hour: three times the rows, a student of dense targets beside it (LONG_RUN=, ARGS=)
	@$(STUDENT) -m stages.distill --run_dir "$$GIVEN_LONG_RUN" --nproc "$$GIVEN_NPROC" --teacher_python $(TEACHER) \
	  --teacher_config stages/configs/long-teacher.yaml --student_config stages/configs/long-student.yaml \
	  --dense true $(ARGS)

.PHONY: preview
preview: setup-teacher ## Show the first rows as the teacher will read them: template, loss mask, cuts (CONFIG=, ARGS=)
	@$(PREVIEW)

.PHONY: prepare-corpus
prepare-corpus: $(if $(OVERLAY),setup-dev,setup-teacher) ## Tokenise the corpus of stage one apart, on CPUs (CONFIG=, ARGS=; on a cluster OVERLAY=, WORKERS= pods)
	@$(if $(OVERLAY),$(SUBMIT_PREPARE),$(PREPARE_CORPUS))

.PHONY: cache-teacher
cache-teacher: $(if $(OVERLAY),setup-dev,setup-teacher) ## Stage one: run the teacher once, write its sparse logits (CONFIG=, ARGS=, NPROC= workers or GPUS=all; on a cluster OVERLAY=)
	@$(if $(OVERLAY),$(SUBMIT),$(RUN_TEACHER))

.PHONY: train-student
train-student: $(if $(OVERLAY),setup-dev,setup-student) ## Stage two: train a student from a cache (CONFIG=, ARGS=, NPROC= processes; on a cluster OVERLAY=)
	@$(if $(OVERLAY),$(SUBMIT),$(TRAIN))

.PHONY: sweep
sweep: $(if $(OVERLAY),setup-dev,setup) ## Train many students from one cache, with a report (SWEEP=file, ARGS=--dry-run; on a cluster OVERLAY=)
	@$(if $(OVERLAY),$(SUBMIT_SWEEP),$(RUN_SWEEP))

.PHONY: rounds
rounds: setup ## The student writes, the teacher scores it, the student learns from that, in rounds (CONFIG=, NPROC=, ARGS=--dry-run)
	@$(ROUNDS)

.PHONY: score-student
score-student: setup-student ## Score a student on the held-out rows of caches (ARGS="--student_model DIR --caches DIR,DIR")
	@$(STUDENT) -m stages.score_student $(ARGS)

.PHONY: eval-student
eval-student: setup-student ## Evaluate a finished student with lm-evaluation-harness (ARGS="--output_dir DIR --tasks NAME,FILE")
	@$(STUDENT) -m stages.eval_student $(ARGS)

.PHONY: push-student
push-student: setup-student ## Push a finished student to the hub (ARGS="--output_dir DIR --hub_location NAME")
	@$(STUDENT) -m stages.push_student $(ARGS)

.PHONY: report
report: setup-student ## Write the report of a run, a sweep or one student again (RUN=runs/default)
	@$(STUDENT) -m stages.report --run_dir "$$GIVEN_RUN"

##@ Set up
.PHONY: setup
setup: ## Install both stages (one environment on a CPU machine, two on a GPU machine)
	$(SETUP) teacher student

.PHONY: setup-teacher
setup-teacher: ## Install the environment of stage one
	$(SETUP) teacher

.PHONY: setup-student
setup-student: ## Install the environment of stage two
	$(SETUP) student

.PHONY: setup-dev
setup-dev: ## Install the environment of the tests and checks
	$(SETUP) dev

.PHONY: setup-flash
setup-flash: setup ## Install flash-attn on a GPU machine (compiles it; needs nvcc)
	@for python in $(TEACHER) $(STUDENT); do \
	  $$(dirname $$python)/uv pip install --python $$python --no-build-isolation flash-attn; done

.PHONY: lock
lock: setup-dev ## Resolve stages/locks/*.lock from stages/locks/*.in
	@$(STUDENT) stages/locks/resolve.py

##@ Check
.PHONY: check
check: lint types arch ## Run lint, types and arch

.PHONY: lint
lint: setup-dev ## Check formatting and lint with ruff
	@$(STUDENT) -m ruff format --check pipeline stages k8s docker tests
	@$(STUDENT) -m ruff check pipeline stages k8s docker tests

.PHONY: types
types: setup-dev ## Check types with mypy --strict
	@$(STUDENT) -m mypy

.PHONY: arch
arch: setup-dev ## Check the direction of imports with import-linter
	@$(dir $(STUDENT))lint-imports --no-logo

.PHONY: options
options: setup-dev ## Write stages/README.md, all commands and options, from the settings
	@$(STUDENT) -m stages.options

.PHONY: recipes
recipes: setup-dev ## Write the cost table of stages/configs/recipes from the settings and published configs
	@$(STUDENT) -m tests.recipes

.PHONY: format
format: setup-dev ## Format the sources with ruff
	@$(STUDENT) -m ruff format pipeline stages k8s docker tests
	@$(STUDENT) -m ruff check --fix pipeline stages k8s docker tests

# Beside the environment, not in it: its pins are those of AWS's command-line tools.
HYPERPOD_FOLDER = .hyperpod-models
.PHONY: hyperpod-models
hyperpod-models: setup-dev ## Fetch the models of HyperPod's own operator for the checks (260 KB once)
	@test -d $(HYPERPOD_FOLDER)/sagemaker || $(dir $(STUDENT))uv pip install --quiet --python $(STUDENT) --no-deps \
	  --target $(HYPERPOD_FOLDER) sagemaker-hyperpod==3.12.0

.PHONY: test
test: setup-dev hyperpod-models ## Run all tests except the slow ones (under 10 minutes on 2 cores; ARGS= for pytest)
	@$(STUDENT) -m pytest -n 2 --dist loadfile -m "not slow and not browser and not triton" --durations 15 $(ARGS)

.PHONY: test-all
test-all: setup-dev ## Run the slow tests: real engines, killed processes, two processes, the browser
	@$(STUDENT) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow or browser" --durations 15 $(ARGS)

# Beside the environment, not in it: the version that torch pins, 690 MB for one test file.
TRITON_FOLDER = .triton
.PHONY: test-triton
test-triton: setup-dev ## Run the Triton kernels of loss and capture in Triton's interpreter (downloads 690 MB once)
	@test -d $(TRITON_FOLDER)/triton || $(dir $(STUDENT))uv pip install --quiet --python $(STUDENT) --no-deps \
	  --target $(TRITON_FOLDER) $$(grep '^triton==' stages/locks/student-gpu.lock)
	@TRITON_INTERPRET=1 PYTHONPATH=$(TRITON_FOLDER) $(STUDENT) -m pytest -m triton $(ARGS)

.PHONY: test-mutations
test-mutations: setup-dev ## Break lines of the sources one by one, in copies: named tests must notice (15 idle minutes; ARGS="--only loss", --list)
	@$(STUDENT) -m tests.mutations $(ARGS)

.PHONY: check-gpu
check-gpu: setup setup-dev ## Ask this machine's GPU what only a GPU can tell: one table, gpu-check.json (ARGS="--only NAME")
	@$(STUDENT) -m tests.gpu --teacher_python $(TEACHER) $(ARGS)

.PHONY: check-families
check-families: setup-dev ## Compare packed sequences with the same alone in tiny models of 45 families (ARGS="--families Llama,LFM2")
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.families $(ARGS)

.PHONY: check-architectures
check-architectures: setup-dev ## Compare what vLLM captures of 47 tiny teachers with transformers (ARCHITECTURES=llama,qwen3)
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.architectures $(call flag,--architectures,ARCHITECTURES) $(ARGS)

.PHONY: conformance
conformance: setup-dev ## Try every chat x template x container and print the figures (ARGS=--long)
	@$(STUDENT) -m tests.conformance $(ARGS)

##@ Cluster
.PHONY: image-teacher
image-teacher: ## Build the image of stage one (DEVICE=gpu or cpu, TAG=)
	@$(call build_image,teacher)

.PHONY: image-student
image-student: ## Build the image of stage two (DEVICE=gpu or cpu, TAG=)
	@$(call build_image,student)

.PHONY: push-images
push-images: ## Push both images to Amazon ECR and record their digests (TAG=, REGION=, ACCOUNT=)
	@REGION="$$GIVEN_REGION" ACCOUNT="$$GIVEN_ACCOUNT" docker/push.sh "$$GIVEN_TAG" runs/k8s/images.json

.PHONY: fsx-volume
fsx-volume: setup-dev ## Create the volume and claim of an FSx file system (OVERLAY=; FSX_ID=, FSX_MOUNT=, REGION= or SUBNET=, SECURITY_GROUP=, STORAGE=, THROUGHPUT=, EFA=1)
	@$(CLUSTER) $@ $(PLACE) $(call flag,--file_system,FSX_ID) $(call flag,--mount_name,FSX_MOUNT) \
	  $(call flag,--region,REGION) $(call flag,--subnet,SUBNET) $(call flag,--storage,STORAGE) \
	  $(call flag,--security_group,SECURITY_GROUP) $(call flag,--throughput,THROUGHPUT) \
	  $(if $(filter 1,$(EFA)),--efa true)

.PHONY: fsx-init
fsx-init: setup-dev ## Create the project's folder on the volume, once (OVERLAY=)
	@$(CLUSTER) $@ $(PLACE) $(call flag,--image,IMAGE)

.PHONY: prefetch
prefetch: setup-dev ## Download models and data set to the volume (OVERLAY=, SECRET=hub-token or none, ARGS="--teacher_model NAME ...")
	@$(CLUSTER) $@ $(PLACE) $(NAMED) --secret "$$GIVEN_SECRET" $(call flag,--image,IMAGE) $(ARGS)

.PHONY: jobs
jobs: setup-dev ## List the jobs of this project (OVERLAY=)
	@$(CLUSTER) $@ $(PLACE)

.PHONY: logs
logs: setup-dev ## Follow the logs of a run (OVERLAY=, RUN=, STAGE=)
	@$(CLUSTER) $@ $(PLACE) $(NAMED) $(call flag,--stage,STAGE)

.PHONY: teardown
teardown: setup-dev ## Delete all of this project in the namespace, asking first (OVERLAY=, YES=1; DATA=fs-... with its data)
	@$(CLUSTER) $@ $(PLACE) --secret "$$GIVEN_SECRET" $(call flag,--data,DATA) $(if $(filter 1,$(YES)),--yes true)

.PHONY: manifests
manifests: setup-dev hyperpod-models ## Render and check every manifest; lint Dockerfiles, shell and YAML (needs no cluster)
	@$(CLUSTER) manifests

# Its name of before, which is in people's hands.
.PHONY: rehearse
rehearse: simulate-cluster ## The same as simulate-cluster

.PHONY: simulate-cluster
simulate-cluster: setup-dev ## Simulate the cluster locally: run the pods of overlay local-kind as processes, kill one per stage
	@$(STUDENT) -m pytest -s tests/cluster/test_simulated_cluster.py $(ARGS)

# A kube-apiserver of Debian 12's sources and an etcd, in a folder beside the environment.
CONTROL_PLANE_FOLDER = .control-plane
.PHONY: test-control-plane
test-control-plane: setup-dev hyperpod-models ## Apply, follow and scale on a real API server (builds it once: ten minutes of a core, 2 GB)
	@nice tests/cluster/build_control_plane.sh $(CONTROL_PLANE_FOLDER) $(dir $(STUDENT))uv
	@$(STUDENT) -m pytest tests/cluster/check_control_plane.py $(ARGS)

##@ Measure
.PHONY: bench-capture
bench-capture: setup-dev ## Measure the CPU time of the capture over prefill and head (ARGS="--shape 7b": proportions of a 7B model)
	@$(STUDENT) -m tests.bench.capture $(ARGS)

.PHONY: bench-writer
bench-writer: setup-dev ## Measure the rate of encoding and writing over the teacher's own
	@$(STUDENT) -m tests.bench.writer $(ARGS)

.PHONY: bench-memory
bench-memory: setup-dev ## Measure the peak memory of stage one at 10 and 1,000 shards
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.memory $(ARGS)

.PHONY: bench-leases
bench-leases: setup-dev ## Measure the cost of leases: 64 workers on 5,000 empty shards, and two workers with a teacher
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.leases $(ARGS)

.PHONY: bench-loss
bench-loss: setup-dev ## Measure the loss with the head over the head's matmuls, beside other projects' losses
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.loss $(ARGS)

.PHONY: bench-head-gpu
bench-head-gpu: setup-dev ## Estimate what the head with the loss costs on a GPU (ARGS=--measure: on this machine, too)
	@$(STUDENT) -m tests.bench.head_gpu $(ARGS)

.PHONY: bench-codec
bench-codec: setup-dev ## Measure layouts of sparse targets on the same teacher outputs: bytes, encode, decode
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.codec $(ARGS)

.PHONY: bench-control
bench-control: setup-dev ## Measure the squared error of the gradient by the share of the control variate
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.control $(ARGS)

.PHONY: bench-variance
bench-variance: setup-dev ## Compare ways to draw entries along a sequence by the gradient's error (ARGS=--rules: inclusion rules)
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.variance $(ARGS)

.PHONY: bench-mixture
bench-mixture: setup-dev ## Measure the bias of the mean of two sampled teachers against dense averaging
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.mixture $(ARGS)

.PHONY: bench-fidelity
bench-fidelity: setup-dev ## Measure the gradient's error over bytes per token, with table and plot (ARGS=--quick; --peer NAME=PATH: other projects' code)
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.fidelity --plot pipeline/cache/fidelity.svg $(ARGS)

.PHONY: bench-heldout
bench-heldout: setup-dev ## Measure the KL of a cache's held-out rows against the dense one, and whose likeliest token it knows
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.heldout $(ARGS)

.PHONY: bench-quality
bench-quality: setup-dev ## Measure students from the cache against students of dense logits and of other projects' caches
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.quality $(ARGS)

.PHONY: bench-yardsticks
bench-yardsticks: setup-dev ## Measure what papers report, in miniature: sparse targets, selected positions, width or depth, divergences, copying
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(STUDENT) -m tests.bench.yardsticks $(ARGS)

.PHONY: bench-stream
bench-stream: setup-dev ## Measure the training stream alone: rate over a plain DataLoader's, memory, time to resume
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.stream $(ARGS)

.PHONY: bench-step
bench-step: setup-dev ## Measure a training step from the cache over plain fine-tuning and over the teacher in the loop
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.step $(ARGS)

.PHONY: bench-zero-stages
bench-zero-stages: setup-dev ## Measure the first step of bfloat16 weights at each ZeRO stage over stage 2's, and sums of gradients
	@OMP_NUM_THREADS=1 $(STUDENT) -W ignore -m tests.bench.zero_stages $(ARGS)

.PHONY: bench-sequence-parallel
bench-sequence-parallel: setup-dev ## Measure losses and weights of two processes that share each pass, over one process
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.sequence_parallel $(ARGS)

.PHONY: bench-sweep
bench-sweep: setup-dev ## Measure a sweep from the cache over the same sweep with the teacher in the loop
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.sweep $(ARGS)

.PHONY: bench-rounds
bench-rounds: setup-dev ## Measure students of their own text against students of the corpus's and the teacher's text (ARGS="--seeds 1")
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.rounds $(ARGS)

.PHONY: bench-scale
bench-scale: setup-dev ## Measure what must hold at scale, each figure beside its limit (ARGS="--sections threads")
	@OMP_NUM_THREADS=1 $(STUDENT) -m tests.bench.scale $(ARGS)

.PHONY: bench-first-run
bench-first-run: setup-dev ## Measure first contact: README's own-data commands, a second make distill, three seeds of the default
	@$(STUDENT) -m tests.bench.first_run $(ARGS)
