# Two commands for a fresh machine: `make demo` and `make test`. Each sets up all it needs, in .venv.
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
BIN := .venv/bin
# The CPU build of torch, exactly: any looser request would pull gigabytes of CUDA. Set TORCH= for a GPU machine.
TORCH ?= torch==2.13.0

.PHONY: demo test lint docs architectures clean

demo: .venv/.run
	$(BIN)/luthier demo

test: .venv/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/test.sh

lint: .venv/.dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

docs: .venv/.dev
	$(BIN)/python scripts/docs.py

# The table of docs/reference/architectures.md; ONLY=llama,phi makes those rows anew.
architectures: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python scripts/architectures.py --only '$(ONLY)'

clean:
	rm -rf .venv

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "luthier needs Python 3.11 or newer; install it, or say PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv || { echo "python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }

.venv/.run: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
