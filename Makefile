# Two commands do all: `make demo` and `make test`. Needs Python >= 3.11, git and make; uv is fetched when missing.

VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
SOURCES := pyproject.toml README.md $(shell git ls-files --cached --others --exclude-standard namm_transfer adapters eval configs 2>/dev/null)

.PHONY: demo test lint types unit suites wheel clean

demo: $(VENV)/.installed
	$(BIN)/namm-transfer transfer $(ARGS)

test: lint types unit

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml -p namm_transfer  # the installed package, not the checkout

unit: $(VENV)/.tested
	$(BIN)/pytest

# What needs lm-evaluation-harness, with it; `make test` leaves it out where it is not installed.
suites: $(VENV)/.tested
	$(UV) pip install --quiet --python $(VENV) ".[lm-eval]"
	$(BIN)/pytest tests/eval/test_harness.py tests/eval/test_japanese.py

wheel: $(UV)
	$(UV) build --wheel

clean:
	rm -rf $(VENV) .tools build dist *.egg-info

# The package is installed, not linked: what is checked and tested is what users get.
$(VENV)/.installed: $(SOURCES) | $(UV) $(VENV)/bin/python
	$(UV) pip install --quiet --python $(VENV) --reinstall-package namm-transfer .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(UV) pip install --quiet --python $(VENV) ".[dev,language,ray,train,d4rl,minari]"
	touch $@

$(VENV)/bin/python: | $(UV)
	$(UV) venv --quiet --allow-existing $(VENV)

.tools/bin/uv:
	python3 -m venv .tools && .tools/bin/python -m pip install --quiet uv || \
	  { echo "uv is missing and could not be fetched: install it (https://docs.astral.sh/uv/) and run make again"; exit 1; }

$(filter-out .tools/bin/uv,$(UV)):
