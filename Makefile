# Each target makes its own virtual environment (.venv) with what it needs. On Windows, see the README for the same without make.
SHELL  := /bin/sh
VENV   := .venv
RUN    := $(VENV)/bin/python
SETUP   = $(PYTHON) tools/setup_env.py --venv $(VENV)
# The first Python that is new enough: `python3` is an old one on many machines. Yours with: make PYTHON=/path/to/python test
PYTHON ?= $(shell for p in python3 python python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; exit; }; done; echo python3)

.NOTPARALLEL:
.PHONY: help demo test lint nbs bench soak clean

help:   ## show this
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo:   ## draw a picture: server, worker and job in one command
	@$(SETUP) images
	@$(RUN) -m colab_gpu demo "a house by the sea at sunset"

test:   ## everything: notebooks, agreement, ruff, mypy, unit, process and end-to-end tests
	@$(SETUP) images chat dev
	@$(RUN) -m pytest

lint:   ## ruff and mypy alone
	@$(SETUP) images chat dev
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

nbs:    ## export the notebooks, run them keeping their outputs, clean them, write the README; one: make nbs NB=nbs/02_jobs.ipynb
	@$(SETUP) images chat dev
	@$(RUN) tools/build_notebooks.py $(NB)

bench:  ## measure (needs wrk)
	@$(SETUP) images chat dev
	@$(RUN) benchmarks/bench_server.py
	@$(RUN) benchmarks/bench_worker.py
	@$(RUN) benchmarks/bench_idle.py
	@$(RUN) benchmarks/bench_notebook.py
	@$(RUN) benchmarks/bench_panel.py

soak:   ## ten minutes of killed workers, killed servers and broken connections, then a count of what was lost
	@$(SETUP) images chat dev
	@$(RUN) -m tests.chaos.soak

clean:  ## remove the environment and what tools leave behind
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find colab_gpu tests tools benchmarks nbs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
