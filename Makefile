# The README's commands. Each needs only Python 3.11+ with pip, make and git; the rest is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-fast chaos long fuzz rehearsal rehearse-hmdb51 fresh-model screenshots check audit format install lock \
	clean help

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(INSTALLED)  ## render videos (or VIDEOS=DIR), pack, train, register, predict, report
	@$(BIN)/tavlad demo $(if $(VIDEOS),--videos "$(VIDEOS)")

test: $(INSTALLED)  ## the whole suite but chaos and the long rehearsals
	@$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not chaos and not long"

test-fast: $(INSTALLED)  ## the suite without the slow tests
	@$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow"

chaos: $(INSTALLED)  ## kill and damage things in mid-work, and see that nothing is lost
	@$(BIN)/python -m pytest -m chaos

long: $(INSTALLED)  ## whole trainings: by a plain Ray job, from features, a reproduction, the guide
	@$(BIN)/python -m pytest -m "long and not chaos"

fuzz: $(INSTALLED)  ## 2,000 malformed inputs of each kind
	@TAVLAD_FUZZ_CASES=2000 $(BIN)/python -m pytest --timeout 1800 tests/test_fuzz.py tests/test_fuzz_serve.py

rehearsal: $(INSTALLED)  ## a site of four hosts on this machine, one of which dies in mid-training; as root
	@$(BIN)/python -m tests.rehearsal

rehearse-hmdb51: $(INSTALLED)  ## HMDB51's whole protocol on 6,766 stand-in videos with the official split files
	@$(BIN)/python -m tests.rehearse_hmdb51

fresh-model: $(INSTALLED)  ## a registered model in a new environment with nothing of ours predicts as evaluated
	@$(BIN)/python -m pytest tests/ray_jobs/test_fresh_model.py

screenshots: $(INSTALLED)  ## the README's pictures of MLflow's pages, of what the local site holds (after make demo)
	@$(BIN)/python -m tests.screenshots docs/pictures

check: $(INSTALLED)  ## lint, format, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

audit: $(INSTALLED)  ## known vulnerabilities of all that is pinned; says so where the advisories cannot be reached
	@test -x $(VENV)/audit/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(VENV)/audit
	@$(BIN)/uv pip sync --quiet --require-hashes --python $(VENV)/audit/bin/python requirements-audit.lock
	@$(BIN)/python -m tests.audit $(VENV)/audit/bin/pip-audit requirements.lock requirements-bootstrap.lock requirements-audit.lock

format: $(INSTALLED)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)  ## create .venv with everything pinned

$(INSTALLED): requirements.lock requirements-bootstrap.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else "tavlad needs Python 3.11 or 3.12, this is %d.%d: name one with make PYTHON=python3.12 ..." % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements-bootstrap.lock
	$(BIN)/uv pip sync --quiet --require-hashes --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

lock:  ## pin every dependency again, newest first, with hashes and without hosts
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --group dev \
		--generate-hashes --no-emit-index-url --no-header --quiet --upgrade --output-file requirements.lock
	$(BIN)/uv pip compile --group pyproject.toml:audit --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --quiet --upgrade --output-file requirements-audit.lock

clean:  ## remove .venv; data under .tavlad stays
	rm -rf $(VENV)
