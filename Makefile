# One thin line a target. make install builds .venv; every other target first brings it up to date.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PYTEST := .venv/bin/python -m pytest

export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Tests: one process a core and one thread a process (OpenMP threads that spin while they wait cost
# more than half the speed when they outnumber the cores). Training sets its own share.
WORKERS ?= 2
test test-slow lint: export OMP_NUM_THREADS = 1
# They start many processes, which shall not compile the same modules each.
test test-slow first-contact: export PYTHONDONTWRITEBYTECODE =

.PHONY: install demo docs test test-slow te-contract first-contact wheels gpu lint bench clean

install:
	@$(PYTHON) scripts/install.py

demo: install
	.venv/bin/m3i-fast demo $(ARGS)

# The site, strictly: a warning, a link or an anchor that leads nowhere is an error. `make test` builds it too.
docs: install
	.venv/bin/python -m scripts.docs $(ARGS)

test: install lint
	@scripts/chromium.sh
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not nightly" $(ARGS)

test-slow: install
	@$(PYTHON) scripts/nsys.py
	@scripts/slurm.sh
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "slow and not nightly" $(ARGS)

# An environment of their own, build/cuda: CUDA's torch without a GPU, with Transformer Engine, or on
# the null CUDA runtime, whose runs read with the DALI of .venv.
te-contract:
	@$(PYTHON) -m scripts.te_contract $(ARGS)

first-contact: install
	@$(PYTHON) -m scripts.first_contact $(ARGS)

# The wheel by itself, in fresh environments of several Pythons and torches; stays in build/wheels/dist.
wheels: install
	@$(PYTHON) -m scripts.wheel_matrix $(ARGS)

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
