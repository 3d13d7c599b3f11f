# make setup | demo | test | test-slow | tritons | gpu | lint | docs | clean
# PYTHON=python3.12        the Python that the environment is made with, 3.10 or newer
# TORCH_INDEX=URL          one more pip index, such as PyTorch's own for its CPU-only builds

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN = $(VENV)/bin
# Of each minor version that a PyTorch from 2.7 on requires, one; from 0.6 to 0.7 GB a version.
TRITONS ?= 3.3.1 3.4.0 3.5.1 3.6.0 3.7.1 3.8.0
STAMP = $(VENV)/.setup-done

.PHONY: setup demo test test-slow tritons gpu lint docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("gsr needs Python 3.10 or newer: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,triton,train,bench,test]' \
	    -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $(STAMP)

demo: setup
	@mkdir -p out
	$(BIN)/gsr upscale assets/demo.png --scale 3.7 --overwrite -o out/demo_x3.7.png \
	    --compare out/demo_x3.7_compare.png

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

# For `python -m bench static --triton` and the slow test of it. Up to 3.6 Triton's interpreter
# does not go with NumPy 2.4.
tritons: setup
	for version in $(TRITONS); do \
	    case $$version in 3.[3456].*) numpy='numpy<2.4' ;; *) numpy= ;; esac; \
	    test -d build/triton/$$version/triton || $(BIN)/python -m pip install --quiet \
	        --disable-pip-version-check --no-deps --target build/triton/$$version \
	        triton==$$version $$numpy || exit 1; \
	done

# Installs nothing: with the environment of `make setup` where there is one, or else with PYTHON.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench gpu --output out/gpu

lint: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	$(BIN)/mkdocs build --quiet

clean:
	rm -rf out build dist site *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
