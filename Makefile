# Everything a checkout needs. The first run builds .venv; later ones start at once and need no network.
#
#   make demo [KEEP=1]    the whole system on this machine, shown at work; KEEP=1 leaves it running
#   make test [JOBS=2]    lint, then all tests, those of so many files at a time
#   make test-debian      tests against the distribution's PostgreSQL server
#   make test-sql-compat  suites of others, directly and through the DB node (SUITES="asyncpg pgbench" for some of them)
#   make chaos            kills meta servers and PostgreSQL in every step of a write (MINUTES=10, SEED=7)
#   make bench            quick benchmarks
#   make vllm-venv        vLLM in an environment of its own, ~/.cache/stratakv/vllm
#   make test-vllm        tests of vLLM's connector to the pool, with that vLLM
#   make test-sglang      tests of SGLang's storage backend on the pool, in an environment of its own, ~/.cache/stratakv/sglang
#   make protocol         generates the messages of the KVCM API from its .proto files
#   make mooncake         installs what `stratakv bench dmp` compares with
#
# TORCH_INDEX names an extra package index that has a CPU build of torch: without a GPU,
# the default build brings gigabytes that are of no use.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
VLLM_VENV ?= $(HOME)/.cache/stratakv/vllm
VLLM_PY := $(VLLM_VENV)/bin/python
SGLANG_VENV ?= $(HOME)/.cache/stratakv/sglang
SGLANG_PY := $(SGLANG_VENV)/bin/python
# What SGLang's storage interface and host memory pools import; torchvision and SGLang themselves come without requirements.
SGLANG_NEEDS := apache-tvm-ffi compressed-tensors dill ipython orjson pillow pybase64 requests sentencepiece triton
BENCHMARKS ?= chat_warm sql zero_hit
JOBS ?= 2
# The order of the files is kept: what takes longest comes first.
PYTEST := $(PY) -m pytest --numprocesses $(JOBS) --no-loadscope-reorder

.PHONY: install demo test lint format test-debian test-sql-compat test-vllm vllm-venv test-sglang chaos bench mooncake protocol clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard stratakv/_native/*.cpp stratakv/_native/*.h workers/engine/kernels/*.cpp workers/engine/kernels/*.h)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(PY) examples/demo.py $(if $(KEEP),--keep)

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test: lint
	$(PY) -m stratakv.cli model pull smollm2-135m
	$(PYTEST) $(PYTEST_ARGS)

test-debian: install
	@ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || \
		{ echo "make test-debian needs a PostgreSQL server: apt-get install postgresql" >&2; exit 2; }
	$(PY) -m stratakv.cli model pull smollm2-135m
	$(PYTEST) -m debian $(PYTEST_ARGS)

test-sql-compat: install
	$(PY) -m tests.compat $(SUITES)

# The list is complete, so that nothing is resolved anew; our own package is taken from this checkout when it is run from here.
vllm-venv: $(VLLM_VENV)/.installed

$(VLLM_VENV)/.installed: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PY) -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --no-deps -r constraints-vllm.txt
	$(VLLM_PY) -m pip install --quiet --disable-pip-version-check --no-deps .
	touch $@

test-vllm: install vllm-venv
	$(PY) -m stratakv.cli model pull smollm2-135m
	VLLM_VENV=$(VLLM_VENV) $(PY) -m pytest -m vllm $(PYTEST_ARGS) tests/vllm

test-sglang: $(SGLANG_VENV)/.installed
	$(SGLANG_PY) setup.py --quiet build_ext --inplace
	$(SGLANG_PY) -m pytest tests/sglang $(PYTEST_ARGS)

$(SGLANG_VENV)/.installed: pyproject.toml constraints.txt constraints-sglang.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_PY) -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -c constraints-sglang.txt \
		-e '.[dev]' $(SGLANG_NEEDS)
	$(SGLANG_PY) -m pip install --quiet --disable-pip-version-check --no-deps \
		-c constraints.txt -c constraints-sglang.txt sglang torchvision
	touch $@

chaos: install
	$(PY) -m tests.chaos --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

bench: install
	@for name in $(BENCHMARKS); do $(PY) -m stratakv.cli bench $$name --quick --json || exit 1; done

mooncake: install
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mooncake]'
	@ldconfig -p | grep -q libibverbs.so.1 && ldconfig -p | grep -q librdmacm.so.1 || \
		{ echo "Mooncake needs two libraries of the distribution: apt-get install libibverbs1 librdmacm1" >&2; exit 2; }

# Generated code works with a protobuf that is newer than its generator, never with an older one; 1.74 makes it for 6.31.
protocol:
	$(PYTHON) -m venv build/protocol
	build/protocol/bin/python -m pip install --quiet --disable-pip-version-check grpcio-tools==1.74.0
	build/protocol/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. meta_server/kvcm/protocol/*.proto

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
