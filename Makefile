# `make demo` and `make test` set up what they need: a virtual environment in .venv and a real
# ComfyUI in .comfyui (COMFYUI_PATH=... uses yours) and a Chromium.  Needs Python 3.10 or newer with pip.

PYTHON3 ?= python3
PYTHON := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.PHONY: setup comfyui browser demo test gpu lint format clean

setup: comfyui browser

comfyui: .venv/.ready
	@$(PYTHON) -m dev.get_comfyui

browser: .venv/.ready
	@$(PYTHON) -m dev.get_browser

.venv/.ready: requirements-dev.txt pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "This needs Python 3.10 or newer: make PYTHON3=/path/to/python3"; exit 1; }
	@$(PYTHON3) -c 'import venv, ensurepip' \
		|| { echo "Python's venv module is missing (Debian, Ubuntu: install python3-venv)."; exit 1; }
	@echo "Setting up .venv: PyTorch and the test tools, a few minutes the first time."
	@$(PYTHON3) -m venv .venv
	@$(PYTHON) -m pip install --quiet -r requirements-dev.txt
	@$(PYTHON) -m pip install --quiet --editable .
	@touch $@

demo: setup
	@$(PYTHON) -m demo.run

# Two files at a time, with one thread each: much of the time goes by in servers and in the browser. In the order of
# their names, since pytest would leave those with few tests to the end, and some of these take minutes.
test: setup
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

gpu: comfyui
	@$(PYTHON) -m benchmarks.gpu

lint: comfyui
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m pyright

format: .venv/.ready
	@$(PYTHON) -m ruff check --fix
	@$(PYTHON) -m ruff format

clean:
	rm -rf .venv .comfyui .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
