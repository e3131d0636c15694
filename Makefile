# `make demo` and `make test` need nothing but python3 (3.11 or newer), make and gcc.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := build/demo
# Debian packages venv apart from Python; in a fresh container there is a root to install it.
GET_VENV := { test "$$(id -u)" = 0 && apt-get update -q && apt-get install -q -y python3-venv; }

.PHONY: demo test test-all test-external test-deployment test-skypilot test-engines external-environments validators lint types check examples clean

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

# Tests of the runtime leave Numba out of their processes: those of its kernels run in others. Neighbours share
# fixtures, so each process begins with a half in order; one that has none left takes half of the other's.
KERNELS := -n 2 --dist worksteal tests/kernels tests/kernels_amx
OTHERS  := -n 2 --dist worksteal --ignore=tests/kernels --ignore=tests/kernels_amx

test: $(VENV)/.done
	$(BIN)/pytest $(KERNELS)
	$(BIN)/pytest $(OTHERS)

test-all: $(VENV)/.done
	$(BIN)/pytest -m 'not external' --hypothesis-profile=others $(KERNELS)
	$(BIN)/pytest -m 'not external' --hypothesis-profile=others $(OTHERS)

# The real consumers of generated files, in an environment of their own, from package registries only.
VALIDATORS := build/validators
$(VALIDATORS)/.done: tests/external/requirements.txt tests/external/wheels.txt
	$(PYTHON) -m venv $(VALIDATORS)
	$(VALIDATORS)/bin/pip install -q --disable-pip-version-check --only-binary :all: -r tests/external/requirements.txt
	$(VALIDATORS)/bin/pip download -q --disable-pip-version-check --no-deps --only-binary :all: \
	  -d $(VALIDATORS)/wheels -r tests/external/wheels.txt
	cd $(VALIDATORS) && apt-get download -q cloud-init && dpkg -x cloud-init_*.deb cloud-init || \
	  echo 'no cloud-init: its schema comes from a Debian package' >&2
	touch $@

validators: $(VALIDATORS)/.done

test-deployment: $(VENV)/.done $(VALIDATORS)/.done
	$(BIN)/pytest -m external tests/external/test_terraform.py tests/external/test_terraform_apply.py \
	  tests/external/test_containers.py

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
	@for spec in examples/*/spec.yaml; do $(BIN)/moeplan check --strict $$spec || exit 1; done

examples: $(VENV)/.done
	@for spec in examples/*/spec.yaml; do $(BIN)/moeplan compile $$spec || exit 1; done

# SkyPilot pins packages that other validators have newer: an environment of its own.
SKYPILOT := build/skypilot
$(SKYPILOT)/.done:
	$(PYTHON) -m venv $(SKYPILOT)
	$(SKYPILOT)/bin/pip install -q --disable-pip-version-check --only-binary :all: skypilot==0.14.1
	touch $@

test-skypilot: $(VENV)/.done $(SKYPILOT)/.done
	$(BIN)/pytest -m external tests/external/test_sky_accepts.py

# Packages of engines, only read: the flags in tests/codegen/flags come from them.
ENGINES := build/engines
$(ENGINES)/.done: tests/codegen/flags/vllm.json tests/codegen/flags/llama_cpp.json | $(VENV)/.done
	$(BIN)/pip download -q --disable-pip-version-check --no-deps --only-binary :all: -d $(ENGINES) vllm==0.33.0
	$(BIN)/pip download -q --disable-pip-version-check --no-deps --no-binary :all: -d $(ENGINES) llama-cpp-python==0.3.36
	touch $@

test-engines: $(VENV)/.done $(ENGINES)/.done
	$(BIN)/pytest -m external tests/external/test_flags.py

external-environments: $(SKYPILOT)/.done $(ENGINES)/.done $(VALIDATORS)/.done

# What reads generated files for real; with CI=true a missing program is a failure.
test-external: $(VENV)/.done external-environments
	$(BIN)/pytest -m external tests/external

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache planner/programs/__pycache__ planner/simulate/__pycache__ planner/placing/__pycache__
