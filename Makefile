# Each target makes its own virtual environment (.venv) with what it needs. On Windows, see the README for the same without make.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: demo test lint nbs bench clean help

help:   ## show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo:   ## draw a picture: server, worker and job in one command
	@$(PYTHON) tools/setup_env.py images
	@$(RUN) -m colab_gpu demo "a red circle on a blue background"

test:   ## notebooks, sync checks, ruff, mypy, and all tests
	@$(PYTHON) tools/setup_env.py images dev
	@$(RUN) -m pytest

lint:   ## ruff and mypy alone
	@$(PYTHON) tools/setup_env.py images dev
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

nbs:    ## export the notebooks, run them keeping their outputs, clean them, write the README
	@$(PYTHON) tools/setup_env.py images dev
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh -c 'nbdev-export && nbdev-test --save --n-workers 0 && nbdev-clean'
	@$(RUN) tools/make_readme.py

bench:  ## measure (needs wrk)
	@$(PYTHON) tools/setup_env.py images dev
	@$(RUN) benchmarks/bench_server.py

clean:  ## remove the environment and what tools leave behind
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
