# make install | demo | test | test-clusters | soak | soak-training | lint | bench | docs | dist. Everything goes to .venv; DEVICE=gpu takes the CUDA builds.
DEVICE ?= cpu
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(DEVICE)
# pip compiles 24,000 files one after the other; compileall takes all cores for them.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

TORCH := 2.13.0
TORCHREC := 1.8.0
FBGEMM := $(if $(filter gpu,$(DEVICE)),fbgemm-gpu,fbgemm-gpu-cpu)==1.8.0
# On Linux, plain `torch` from PyPI is the CUDA build. The CPU build has an index of its own; where pip is set up to
# find a CPU build elsewhere (a local index, a wheel folder), set TORCH_INDEX to nothing.
TORCH_INDEX ?= $(if $(filter gpu,$(DEVICE)),,$(shell $(PYTHON) -m pip config list 2>/dev/null | grep -q find-links || echo --extra-index-url https://download.pytorch.org/whl/cpu))

# Tests share two processes, file by file; each has one Ray. Three on two cores only wait for one another. 0 runs them
# in one.
TEST_PROCESSES ?= 2

# Faults, and seconds between them on average; 200 take most of an hour on two cores. Needs ZooKeeper and Redis.
SOAK ?= --faults 200 --mean-s 5
# SIGKILLs of one training; each costs half a second.
KILLS ?= 400

.PHONY: help install demo test test-clusters soak soak-training lint bench docs dist clean

help:
	@sed -n 1p Makefile

install: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH) ($(DEVICE)), torchrec $(TORCHREC), Ray and the rest into $(VENV) ..."
	@$(PIP) $(TORCH_INDEX) torch==$(TORCH) 2>&1 | grep -v "^WARNING: Location" || true
	@$(BIN)/python -c "import torch; assert torch.__version__.split('+')[0] == '$(TORCH)', torch.__version__"
	@$(PIP) -e '.[dev]' $(FBGEMM) 2>&1 | grep -v "^WARNING: Location" || true
	@$(PIP) --no-deps torchrec==$(TORCHREC) 2>&1 | grep -v "^WARNING: Location" || true
	@$(BIN)/python -m compileall -qq -j 0 $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") || true
	@$(BIN)/python -c "import ray, torch, fbgemm_gpu, rayfm, importlib.metadata as m; assert m.version('torchrec') == '$(TORCHREC)'"
	@touch $(STAMP)

demo: install
	@$(BIN)/rayfm run examples/demo.yaml --overwrite

test: install
	@$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations 25

test-clusters: install
	@RAYFM_CLUSTERS=1 $(BIN)/python -m pytest -q tests/clusters

soak-training: install
	@RAYFM_KILLS=$(KILLS) $(BIN)/python -m pytest -q tests/training/test_exactly_once.py -k kills --timeout 36000

soak: install
	@$(BIN)/python tests/soak/soak_main.py $(SOAK) --result docs/soak

lint: install
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: install
	@$(BIN)/python -m benchmarks.run

docs: install
	@$(BIN)/python docs/check.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

dist: install
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	@ls dist

clean:
	rm -rf $(VENV) runs build dist site *.egg-info
