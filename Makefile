# make demo   the whole mission on a CPU with tiny models        make test       the quick tests
# make demo-slurm   the same by sbatch, on a SLURM that it starts itself where none is (as root, Debian)
# make lint   ruff, mypy and shellcheck                          make test-slow  the tests that take longer
#                                                                make test-slurm those on a local SLURM
#
# Each target installs what it needs into $(VENV) first; torch comes from $(TORCH). A CUDA user names the build that fits
# the driver, with its index if that is not the default one:  make demo TORCH="torch==2.13.0 --index-url URL"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TEST_JOBS ?= 2

BIN := $(VENV)/bin
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
INSTALLED := $(VENV)/.installed-$(subst /,_,$(subst $(SPACE),_,$(TORCH)))
SHELL_SCRIPTS = .ci/run $(shell git ls-files '*.sh')

.PHONY: install demo demo-slurm test test-slow test-slurm lint format clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v < (3, 14) and f"Python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python alignment/demo/run.py

demo-slurm: $(INSTALLED)
	PYTHON=$(abspath $(BIN))/python bash slurm/demo_slurm.sh

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_JOBS) -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile -m "slow and not slurm"

test-slurm: $(INSTALLED)
	bash slurm/local_cluster.sh start
	$(BIN)/python -m pytest -m slurm -p no:xdist; code=$$?; bash slurm/local_cluster.sh stop; exit $$code

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf alignment/outputs/demo* .pytest_cache .ruff_cache .mypy_cache
