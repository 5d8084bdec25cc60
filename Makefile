# Everything runs in its own virtual environment, made on first use from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

WRAPPER ?= ddp
OUT ?= demo
CHECKPOINT_DIR ?= $(OUT)/run-$(WRAPPER)-$(shell date +%Y%m%d-%H%M%S)

LOOPS ?= 200
MINUTES ?= 10

.PHONY: demo test soak lint types docs bench venv clean

# Train on real data with two ranks, sweep sigma_rel, write the best checkpoint and a picture.
demo: $(READY)
	mkdir -p $(OUT)
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_digits.py \
		--wrapper $(WRAPPER) --checkpoint-dir $(CHECKPOINT_DIR) --out $(OUT)/raw.safetensors
	$(BIN)/phema ls $(CHECKPOINT_DIR)
	$(BIN)/python examples/sweep_digits.py \
		--checkpoint-dir $(CHECKPOINT_DIR) --raw $(OUT)/raw.safetensors --out $(OUT)
	@echo "see $(OUT)/sweep.png, $(OUT)/sweep.md and $(OUT)/best.safetensors"

# All tests, the S3 server included: it comes with the environment and is started by the tests that need it.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Kill jobs at random, and break their storage at random, for long; LOOPS=20 MINUTES=2 for less.
soak: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --loops $(LOOPS) --minutes $(MINUTES)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# All documentation as a site, in site/; a warning is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/update.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 benchmarks/update.py --ddp
	$(BIN)/python benchmarks/blocking.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 benchmarks/blocking.py --wrapper ddp
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 benchmarks/blocking.py --wrapper fsdp2
	$(BIN)/python benchmarks/evaluation.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 benchmarks/evaluation.py
	$(BIN)/python benchmarks/construction.py
	$(BIN)/python benchmarks/synthesis.py
	$(BIN)/python benchmarks/opening.py
	$(BIN)/python benchmarks/opening.py --s3 --latency 0.05
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/upload.py
	$(BIN)/python benchmarks/retention.py
	$(BIN)/python benchmarks/planning.py
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/imported.py
	$(BIN)/python benchmarks/imports.py
	$(BIN)/python benchmarks/gpu.py --quick

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[s3,plot,lightning,transformers,demo,docs,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo site .pytest_cache .mypy_cache .ruff_cache .hypothesis
