# `make demo` and `make test` need nothing but python3 (3.11 or newer), make and gcc.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := build/demo
# Debian packages venv apart from Python; in a fresh container there is a root to install it.
GET_VENV := { test "$$(id -u)" = 0 && apt-get update -q && apt-get install -q -y python3-venv; }

.PHONY: demo test test-all lint types check examples clean

$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'moeplan needs Python 3.11 or newer' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(GET_VENV) || \
	  { echo "Python's venv module is missing: sudo apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[runtime,dev]'
	touch $@

# Measure this machine once, compile the example for it, run the plan on real prompts.
demo: $(VENV)/.done
	@mkdir -p $(DEMO)
	@test -f $(DEMO)/machine.yaml || $(BIN)/moeplan calibrate -o $(DEMO)/machine.yaml
	$(BIN)/moeplan compile examples/tinymoe/spec.yaml --machine $(DEMO)/machine.yaml -o $(DEMO)/tinymoe.plan
	$(BIN)/moeplan run $(DEMO)/tinymoe.plan --checkpoint examples/tinymoe/checkpoint \
	  --input examples/tinymoe/prompts.jsonl --output $(DEMO)/answers.jsonl --show 4

test: $(VENV)/.done
	$(BIN)/pytest

test-all: $(VENV)/.done
	$(BIN)/pytest -m ''

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers cannot follow setuptools' editable finder, so give mypy the installed layout.
types: $(VENV)/.done
	@mkdir -p build/types/moeplan
	@for d in planner codegen templates runtime_min; do ln -sfn ../../../$$d build/types/moeplan/$$d; done
	MYPYPATH=build/types $(BIN)/mypy -p moeplan

# Every example's checked-in plan must be what its spec compiles to.
check: $(VENV)/.done
	@for spec in examples/*/spec.yaml; do $(BIN)/moeplan check $$spec || exit 1; done

examples: $(VENV)/.done
	@for spec in examples/*/spec.yaml; do $(BIN)/moeplan compile $$spec || exit 1; done

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache planner/programs/__pycache__ planner/simulate/__pycache__ planner/placing/__pycache__
