# make demo: compile two real models for this CPU, run them, time them beside onnxruntime.
# make test: the tests; what a missing tool leaves out is said at the end. make tools: installs those tools (Debian, as root).
# Both make their own environment in $(VENV) from this checkout; PYTHON names the interpreter (3.11+).
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test env lint tools clean

demo: $(VENV)/.luthier-demo
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/.luthier-dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

env: $(VENV)/.luthier-dev

# Only packages whose command or file is missing are asked for: a machine may have its own node or gcc.
tools: env
	@wanted=$$(sed '/^\#/d' tests/system-packages.txt | while read -r p; do \
	  case $$p in nodejs) command -v node >/dev/null && continue;; npm) command -v npm >/dev/null && continue;; esac; \
	  dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$wanted" ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$wanted >/dev/null; fi
	$(PIP) 'torch==2.13.0' 'transformers==5.24.0' 'xgboost>=3.2'

lint: $(VENV)/.luthier-dev
	$(VENV)/bin/ruff check .

$(VENV)/.luthier-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; \
	else echo "neither python3-venv nor python3-pip is installed: apt-get install python3-venv"; exit 1; fi
	touch $@

$(VENV)/.luthier-dev: $(VENV)/.luthier-venv pyproject.toml setup.py
	$(PIP) -e '.[dev]'
	-$(VENV)/bin/python benchmarks/setup_web.py --tests  # for the tests that ask a browser, a bundler, Deno or Dawn, 370 MB; without npm or Chromium they are skipped
	touch $@

# rapidocr-onnxruntime is wanted for its model files alone: its own dependencies (OpenCV) and Python limit do not matter.
$(VENV)/.luthier-demo: $(VENV)/.luthier-venv pyproject.toml setup.py
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps --ignore-requires-python 'rapidocr-onnxruntime==1.4.4'
	touch $@

clean:
	rm -rf build/lib build/bdist.* dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
