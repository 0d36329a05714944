# Two commands on a machine that has Python 3.11 (or 3.10) and make: `make demo`, `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
LOCK ?= requirements/stable.txt
BIN := $(VENV)/bin
# The first Python that spu 0.9.5 has a wheel for.
PYTHON ?= $(shell for p in python3.11 python3.10 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2>/dev/null && echo $$p && break; done)

# No file but those that the lock file has the hashes of, and no code of theirs: wheels alone.
LOCKED := --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes

# Two processes: most tests of parties wait, most others compute.
TOGETHER := --numprocesses 2 --dist loadfile --durations 15

.PHONY: help setup demo docs test test-slow test-next wheel-test release lint lock audit bench bench-layer bench-peers

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.ready-$(notdir $(LOCK)) ## the environment, from the lock file

# Without dependencies: the lock file is complete, and leaves out torch, which a package of weights asks for.
$(VENV)/.ready-$(notdir $(LOCK)): $(LOCK) pyproject.toml
ifeq ($(PYTHON),)
	@echo "flaxmpc needs Python 3.11 or 3.10: SPU, which runs the secret computation, has no wheels for others." >&2; exit 1
endif
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(LOCKED) -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## a real sentence, classified by a BERT that nobody sees
	$(BIN)/flaxmpc infer "A gripping, beautifully acted film." "A tedious, lifeless mess."

lint: setup ## ruff and pyright
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

test: setup lint ## lint and tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow" $(TOGETHER)

test-slow: setup ## accuracy over whole test sets: minutes
	$(BIN)/python -m pytest -m slow

test-next: ## the same tests on the SPU pre-release
	$(MAKE) setup VENV=.venv-next LOCK=requirements/spu-next.txt
	.venv-next/bin/python -m pytest -m "not slow" $(TOGETHER)

# Outside of the repository, and with what pip itself chooses: in a minute, and on a busy machine within the limit.
wheel-test: setup ## builds the wheel, installs it afresh with pip, and asks its model: needs the package index
	rm -rf dist && $(BIN)/hatchling build
	$(PYTHON) -m venv dist/venv
	time timeout 300 dist/venv/bin/pip install --quiet --disable-pip-version-check --dry-run dist/*.whl
	time dist/venv/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	dist/venv/bin/pip check
	cd / && time $(CURDIR)/dist/venv/bin/flaxmpc infer "A gripping film."

bench-layer: setup ## one BERT-Base layer, unmodified against folded
	$(BIN)/python benchmarks/layer_cost.py

# CrypTen's environment, apart from ours. See requirements/peers.txt for why CrypTen comes without dependencies.
PEERS := .venv-peers
$(PEERS)/.ready: requirements/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps crypten==0.4.1
	@touch $@

bench-peers: setup $(PEERS)/.ready ## parts of CrypTen, MPCFormer and SHAFT beside ours: needs the package index
	$(BIN)/python benchmarks/peers.py $(if $(QUICK),--quick)

# Script and expected minutes on 2 idle cores.
BENCHES := layer_cost:2 families:4 parts:3 steps:1 attention:10 embedding:4 scaling:4 network:4 pareto:1 public_layers:1 outliers:10 for_cost:18 msb_error:2 kernel:1 bert_base:40
bench: setup ## all benchmarks of costs, an hour and a half on 2 cores; QUICK=1 for 5 minutes that save nothing
	@for entry in $(BENCHES); do \
		echo "$${entry%:*}.py$(if $(QUICK),, (about $${entry#*:} minutes))"; \
		$(BIN)/python benchmarks/$${entry%:*}.py $(if $(QUICK),--quick) || exit 1; done

COMPILE := uv pip compile --universal --generate-hashes --no-header --no-annotate
lock: ## pins what pyproject.toml asks for, with hashes: needs uv; what is pinned stays if it can
	$(COMPILE) --python-version 3.10 --extra dev --override requirements/overrides.txt \
		--output-file requirements/stable.txt pyproject.toml
	$(COMPILE) --python-version 3.11 --extra dev --override requirements/overrides.txt \
		--override requirements/spu-next.in --output-file requirements/spu-next.txt pyproject.toml
	$(COMPILE) --python-version 3.10 \
		--output-file requirements/tools.txt requirements/tools.in
	$(COMPILE) --python-version 3.11 --extra docs --override requirements/overrides.txt \
		--constraint requirements/stable.txt --output-file requirements/docs.txt pyproject.toml

# With an environment of its own: what these need is none of flaxmpc's business.
TOOLS := .venv-tools
$(TOOLS)/.ready: requirements/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install $(LOCKED) -r requirements/tools.txt
	@touch $@

audit: $(TOOLS)/.ready ## asks for known vulnerabilities in what is locked: needs the network
	for lock in stable spu-next docs tools; do \
		$(TOOLS)/bin/pip-audit --require-hashes --disable-pip -r requirements/$$lock.txt || exit 1; done

release: wheel-test $(TOOLS)/.ready ## builds and checks what would be uploaded, in dist/, and tries the wheel; uploads nothing
	$(TOOLS)/bin/twine check --strict dist/*.whl dist/*.tar.gz

$(VENV)/.docs: requirements/docs.txt $(VENV)/.ready-$(notdir $(LOCK))
	$(BIN)/python -m pip install $(LOCKED) -r requirements/docs.txt
	@touch $@

docs: setup $(VENV)/.docs ## the documentation site, with its notebooks executed, in docs/_build/html: Python 3.11
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html
	$(BIN)/python -m pytest docs --numprocesses 2 --quiet  # with a browser where there is one: Debian's chromium
