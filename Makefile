# make demo: compile two real models for this CPU, run them, time them beside onnxruntime.
# make test: the tests. Both make their own environment in $(VENV) from this checkout; PYTHON names the interpreter (3.11+).
VENV ?= .venv
PYTHON ?= python3
PYTEST_ARGS ?=
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test env lint clean

demo: $(VENV)/.luthier-demo
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/.luthier-dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

env: $(VENV)/.luthier-dev

lint: $(VENV)/.luthier-dev
	$(VENV)/bin/ruff check .

$(VENV)/.luthier-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "the Python module venv is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.luthier-dev: $(VENV)/.luthier-venv pyproject.toml setup.py
	$(PIP) -e '.[dev]'
	touch $@

# rapidocr-onnxruntime is wanted for its model files alone: its own dependencies (OpenCV) and Python limit do not matter.
$(VENV)/.luthier-demo: $(VENV)/.luthier-venv pyproject.toml setup.py
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps --ignore-requires-python 'rapidocr-onnxruntime==1.4.4'
	touch $@

clean:
	rm -rf build/lib build/bdist.* dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
