# make quickstart: from a clone to a trained model and its report, on a CPU.  make test: what CI runs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
RUN := runs/quickstart
# files of tests at a time: half of their time is waiting, for ranks and for SLURM
TEST_JOBS ?= 2

# ranks share the cores: more threads per rank only make them wait for each other
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup quickstart study test test-dist test-faults test-gpu bench-gpu golden tables lint clean
.DEFAULT_GOAL := test

setup: $(READY)

$(READY): setup.py pyproject.toml constraints.txt megatron_synth/data/shards/native.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[study,test]'
	touch $@

quickstart: setup
	$(BIN)/megatron-synth prepare configs/data/quickstart.yaml
	$(BIN)/python -m megatron_synth.cluster.agent --local --nproc-per-node 4 -m megatron_synth train configs/train/quickstart.yaml \
	    --run-dir $(RUN) parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=2
	$(BIN)/megatron-synth eval $(RUN)
	$(BIN)/megatron-synth report $(RUN)

# the study in small: prepares, plans, trains 72 runs (again to go on after a stop), fits, and writes one page
STUDY := configs/study/twin.yaml

study: setup
	$(BIN)/megatron-synth study prepare $(STUDY)
	$(BIN)/megatron-synth study plan $(STUDY)
	$(BIN)/megatron-synth study submit $(STUDY) --local --jobs $$(nproc)
	$(BIN)/megatron-synth study report $(STUDY)

test: lint
	tests/slurm/install.sh
	$(BIN)/python -m pytest -m 'not gpu' --numprocesses $(TEST_JOBS) --dist loadfile --durations 10

test-dist: setup
	$(BIN)/python -m pytest tests/dist

test-faults: setup
	PYTHONPATH=.:kernels $(BIN)/python -m tests.faults.campaign --kills 200 --table docs/faults.md

tables: setup
	PYTHONPATH=.:kernels $(BIN)/python docs/tables.py

golden: setup
	PYTHONPATH=.:kernels $(BIN)/python -m tests.golden.quickstart

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

bench-gpu: setup
	$(BIN)/megatron-synth bench gpu

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info runs/quickstart runs/study/twin data/quickstart data/study-twin
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	rm -f megatron_synth/data/shards/_native*.so
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
