# A newcomer needs `make demo` and `make test` alone. Both work in .venv, which they create on the first call.
#   PY=python3.12      the Python that .venv is made from
#   JOBS=0             run tests one after the other in one process, for --pdb and -s; by default two at once
#   ARGS="..."         further arguments for resnet-fast demo, pytest or resnet-fast bench
#   PIP_FLAGS="..."    further arguments for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu
#   SANITIZE=thread    what `make sanitize` looks for; by default address,undefined
#   NATIVE_FLAGS="..." arguments for csrc/native_build.py, such as --archs "80;90a" --sm90 ci --jobs 4
PY ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=
PIP_FLAGS ?=
NATIVE_FLAGS ?=
SANITIZE ?= address,undefined

BIN := $(VENV)/bin
# RESNET_FAST_BUILD=keep: `make native` builds the CUDA kernels; otherwise pip would, at each of these installations. The
# CPU engine pip builds, unless the one in the checkout is of its present sources.
PIP := RESNET_FAST_BUILD=keep $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
# Threads that wait do not spin, so that two processes, and others on this machine, hardly slow each other down.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --durations=10 -n $(JOBS) --dist worksteal
DESCRIBES_INSTALL := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/cpu/*)
NATIVE := build/native

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format bench gpu kernels launches wheel engine sanitize native clean
.DELETE_ON_ERROR:

help: ## list these targets
	@echo "make demo and make test need nothing but $(PY) (3.10 or newer); everything is installed in $(VENV)."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## classify two photographs with plain torch and fused, compare answers and speed; then a training
	@echo "==> resnet-fast demo"
	@$(BIN)/resnet-fast demo $(ARGS)

test: $(VENV)/.test ## run all tests but the slow ones (ARGS="-k stem -x" goes to pytest)
	@echo "==> pytest, without the tests marked slow"
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.test ## run all tests, the slow ones too
	@echo "==> pytest"
	@$(PYTEST) $(ARGS)

lint: $(VENV)/.dev ## check style and types: ruff, mypy, clang-format
	@echo "==> ruff check"
	@$(BIN)/ruff check -q .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format -q --check .
	@echo "==> mypy"
	@$(BIN)/mypy
	@echo "==> clang-format"
	@find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev ## rewrite the sources as ruff and clang-format want them
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format .
	@find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' | xargs $(BIN)/clang-format -i

bench: $(VENV)/.bench ## time ResNet-50 on this machine against torch and the installed peers
	@echo "==> resnet-fast bench"
	@$(BIN)/resnet-fast bench $(ARGS)

# Installs nothing: GPU machines may have no network access. The python3 that has torch runs what is in this folder.
gpu: ## on a machine with a GPU: check, time and tune in 8.5 minutes; ARGS=--second does the rest (docs/benchmarks.md)
	@$(PY) -m benchmarks.gpu $(ARGS)

kernels: $(VENV)/.test ## compile every Triton kernel without a GPU and check registers, shared memory, instructions
	@echo "==> compiling the kernels"
	@$(BIN)/python -m resnet_fast.tuning.compile --check $(ARGS)

launches: $(VENV)/.test ## run every launch of the networks through Triton's launcher on a driver without a GPU (after make kernels)
	@echo "==> launching every kernel"
	@$(BIN)/python -m tests.emulator.launches $(ARGS)

wheel: $(VENV)/.dev ## build the source archive, and from it the wheel, into dist/
	@echo "==> building dist/"
	@rm -rf dist
	@$(BIN)/python -m build -q
	@ls dist

engine: $(VENV)/.made ## compile csrc/cpu/ into this checkout again, only what has changed (the installation has done it once)
	@[ -e $(VENV)/.test ] || [ -e $(VENV)/.dev ] || $(MAKE) --no-print-directory $(VENV)/.dev
	@$(BIN)/python csrc/native_build.py --module _cpu --out resnet_fast --build-dir build/cpu

sanitize: $(VENV)/.test ## test the CPU engine built with sanitizers (SANITIZE=thread, ARGS="tests/ops/test_stem.py -k size")
	@$(BIN)/python -m tests.sanitize $(SANITIZE) $(or $(ARGS),tests/ops/cpu)

native: $(VENV)/.native ## build the CUDA kernels into this checkout (NATIVE_FLAGS='--archs "80;90a"'), and check their machine code
	@echo "==> csrc/native_build.py"
	@$(BIN)/python csrc/native_build.py --out resnet_fast --build-dir $(NATIVE) $(NATIVE_FLAGS)
	@echo "==> checking registers, shared memory, instructions"
	@$(BIN)/python -m resnet_fast.tuning.native resnet_fast --check

clean: ## delete what was built and cached; the environment stays (rm -r .venv for a new one)
	rm -rf resnet_fast/_C.*.so resnet_fast/_cpu.*.so resnet_fast/_build_record.json build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Each file $(VENV)/.<extra> records that the extra is installed as these files describe it, so a second call is quick.
$(VENV)/.made:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "needs Python 3.10 or newer: make PY=python3.12 ...")'
	@echo "==> making $(VENV) with $$($(PY) --version)"
	@$(PY) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(DESCRIBES_INSTALL) | $(VENV)/.made
	@echo "==> installing resnet_fast and what the demo needs in $(VENV) (torch takes a minute or so the first time)"
	@$(PIP) -e '.[demo]'
	@touch $@

# The tests compare with torchvision. Without --no-deps it would bring its own choice of torch.
$(VENV)/.test: $(DESCRIBES_INSTALL) | $(VENV)/.made
	@echo "==> installing resnet_fast and what the tests need in $(VENV) (torch takes a minute or so the first time)"
	@$(PIP) -e '.[test,demo]'
	@$(PIP) --no-deps torchvision timm
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(DESCRIBES_INSTALL) | $(VENV)/.made
	@echo "==> installing resnet_fast and the developers' tools in $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

# Only the headers of CUTLASS's package are needed, not the dependencies of its Python part.
$(VENV)/.native: $(DESCRIBES_INSTALL) | $(VENV)/.made
	@echo "==> installing resnet_fast and what the native build needs in $(VENV)"
	@$(PIP) -e '.[dev]'
	@$(PIP) --no-deps nvidia-cutlass
	@touch $@ $(VENV)/.dev $(VENV)/.demo

$(VENV)/.bench: $(DESCRIBES_INSTALL) | $(VENV)/.made
	@echo "==> installing resnet_fast and the peers it is compared with in $(VENV)"
	@$(PIP) -e '.[bench,plot]'
	@touch $@
