# Two commands do everything on a fresh machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the tests: what starts Ray clusters runs in one of them.
WORKERS ?= 2

.PHONY: setup demo test faults soak check format bench bench-cells bench-choose bench-data bench-recovery gpu jobs constraints clean

setup: $(STAMP)

$(STAMP): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "treadle needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e ".[dev,jobs]"
	@touch $@

demo: setup
	$(BIN)/treadle demo

test: setup
	$(BIN)/python -m pytest -n $(WORKERS)

# Every fault of the matrix in full, and its table; half an hour. FAULTS=fast: what `make test` runs of it.
FAULTS ?= full
faults: setup
	$(BIN)/python -m pytest tests/faults --faults=$(FAULTS) --matrix -p no:randomly

# A run of two ranks under a random fault every 20 s, beside one that is left alone; half an hour.
soak: setup
	$(BIN)/python tests/faults/soak.py

check: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/basedpyright

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Slow suites: run by hand, their tables are recorded under tests/bench/results/.
jobs: setup
	$(BIN)/python tests/bench/jobs.py

bench: setup
	$(BIN)/python tests/bench/startup.py
	$(BIN)/python tests/bench/batching.py
	$(BIN)/python tests/bench/data_loading.py
	$(BIN)/python tests/bench/data_build.py
	$(BIN)/python tests/bench/data_memory.py
	$(BIN)/python tests/bench/data_augment.py
	$(BIN)/python tests/bench/tracking.py
	$(BIN)/python tests/bench/scan.py
	$(BIN)/python tests/bench/transducer.py
	$(BIN)/python tests/bench/long_rows.py
	$(BIN)/python tests/bench/compress.py

# The recurrent layers beside torch's own and the published minGRU's; half an hour.
bench-cells: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e ".[bench]"
	$(BIN)/python tests/bench/cells.py

# What each cell learns and costs, on tasks with known answers; a quarter of an hour.
bench-choose: setup
	$(BIN)/python tests/bench/choose.py

# The data engine beside transformers, lhotse, torch's DataLoader, Hugging Face datasets and Ray Data; ten minutes.
bench-data: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e ".[bench]"
	$(BIN)/python tests/bench/data_planning.py
	$(BIN)/python tests/bench/data_loading_peers.py
	$(BIN)/python tests/bench/data_training.py

# Lost processes beside plain Ray Train and torchft, what a checkpoint costs a step, and what one rank and two do; half an hour.
bench-recovery: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/torchft torchft==0.2.0
	$(BIN)/python tests/bench/recovery.py --torchft build/torchft
	$(BIN)/python tests/bench/checkpoints.py
	$(BIN)/python tests/bench/overhead.py
	$(BIN)/python tests/bench/ranks.py
	$(BIN)/python tests/bench/updater.py
	$(BIN)/python tests/bench/sweep.py

# On a machine with a CUDA device.
gpu: setup
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python tests/bench/gpu_cells.py

constraints: setup
	{ sed -n '/^#/p' infra/constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' | grep -v -E '^(treadle|triton=)'; } > infra/constraints.new
	mv infra/constraints.new infra/constraints.txt

clean:
	rm -rf $(VENV) dist build .ruff_cache .pytest_cache .hypothesis .import_linter_cache
