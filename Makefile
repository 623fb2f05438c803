# Needs python3 (3.11 or later) with its venv module, and make. Everything else goes into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: run test survey check soak fuzz audit sbom bench lock clean

run: $(VENV)/.runtime            ## the gateway with its built-in demo upstream: no account, no configuration
	@$(BIN)/python -m gwproxy demo

test: $(VENV)/.dev               ## the whole test suite, on all cores
	@$(BIN)/python -m pytest -q -n auto --dist worksteal

survey: $(VENV)/.dev             ## every planted defect of the simulator, until it is noticed: up to an hour
	@$(BIN)/python -m pytest -q -m survey

check: $(VENV)/.dev              ## style, types, tests: what a change must pass
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

soak: $(VENV)/.dev               ## mixed traffic for SOAK_S seconds (an hour): memory, files, tasks flat, the books right
	SOAK_S=$(or $(SOAK_S),3600) $(BIN)/python -m pytest -q -s -m slow tests/test_soak.py

SECONDS_EACH ?= 60

fuzz: $(VENV)/.dev               ## every fuzz target for SECONDS_EACH (60): what must hold, whatever comes in
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-fuzz.txt
	$(BIN)/python -m fuzz --seconds $(SECONDS_EACH)

AUDIT := .venv-audit

audit: $(AUDIT)/.done            ## known vulnerabilities of what is pinned; ends with 3 where nobody could be asked
	@$(AUDIT)/bin/python .ci/audit.py $(AUDIT)/bin/pip-audit || { code=$$?; echo "exit code $$code"; exit $$code; }

sbom: $(AUDIT)/.done             ## sbom.json: what the package is made of, from the lock
	@$(AUDIT)/bin/python -W ignore -m cyclonedx_py requirements requirements.txt --pyproject pyproject.toml \
	    --output-reproducible --of JSON -o sbom.json
	@echo written: sbom.json

bench: $(VENV)/.dev              ## CPU, time and memory against nginx and other gateways, in one run
	$(BIN)/python -m bench

lock: $(VENV)/.runtime           ## refresh both hash-pinned requirement files from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate \
	    --custom-compile-command "make lock" --upgrade -o requirements.txt pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate \
	    --custom-compile-command "make lock" --upgrade -c requirements.txt --extra dev -o requirements-dev.txt pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate \
	    --custom-compile-command "make lock" --upgrade --group fuzz -o requirements-fuzz.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate \
	    --custom-compile-command "make lock" --upgrade --group audit -o requirements-audit.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

$(AUDIT)/.done: requirements-audit.txt
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-audit.txt
	@touch $@

clean:                           ## remove the environment and caches
	rm -rf $(VENV) $(AUDIT) sbom.json .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis
