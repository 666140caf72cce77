# One thin line a target. make install builds .venv; every other target first brings it up to date.
PYTHON ?= $(shell command -v python3.11 || command -v python3)

export PATH := $(CURDIR)/.venv/bin:$(PATH)

# One process a core and one thread a process: OpenMP threads that spin while they wait cost more than
# half the speed when they outnumber the cores. Training sets its own share.
TESTS := test test-cuda test-distributed test-matrix test-pages first-contact wheels
$(TESTS) test-stale test-full lint: export OMP_NUM_THREADS = 1
# Tests start many processes. Compiled modules are kept, so that each process does not compile them.
$(TESTS) test-stale test-full: export PYTHONDONTWRITEBYTECODE =

CHECKS := .venv/bin/python -m scripts.checks

.PHONY: install demo docs $(TESTS) test-stale test-full te-contract gpu lint bench clean

install:
	@$(PYTHON) scripts/install.py

demo: install
	.venv/bin/m3i-fast demo $(ARGS)

# The site, strictly: a warning, a link or an anchor that leads nowhere is an error.
docs: install
	.venv/bin/python -m scripts.docs $(ARGS)

# The gate. Each other group of tests has a target; scripts/checks.py says what is in it.
test: install lint
	@$(CHECKS) gate $(ARGS)

$(filter-out test,$(TESTS)): install
	@$(CHECKS) $(@:test-%=%) $(ARGS)

# The groups whose inputs changed after they last passed.
test-stale: install
	@$(CHECKS) stale

test-full: install lint
	@$(CHECKS) full

# Transformer Engine in an environment of its own, build/cuda: CUDA's torch without a GPU.
te-contract:
	@$(PYTHON) -m scripts.te_contract $(ARGS)

# No install: the python of .venv or of the machine, or that named by PYTHON, with its own torch.
gpu:
	@$(if $(filter file,$(origin PYTHON)),python3,$(PYTHON)) -m scripts.gpu $(ARGS)

lint: install
	.venv/bin/pre-commit run --all-files

bench: install
	.venv/bin/m3i-fast bench $(ARGS)

# What make made. runs/ and data/ are the user's.
clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
