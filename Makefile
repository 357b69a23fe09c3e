# Two commands: `make demo` and `make test`. Each makes its own environment; both are safe to repeat.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint tests/constraints.txt

.PHONY: demo test test-slow portability faults lint bench clean

demo: $(READY)
	$(BIN)/python -P tests/demo.py

# A process per worker, a file of tests at a time, in the order of the folders: the two long files of
# tests/gpu must not come last; idle threads of torch do not spin on the other worker's core. Tests
# marked slow (short runs of benchmarks, four of six GPU targets, tuning in two processes) are in
# `test-slow`.
WORKERS ?= 2
test: $(READY) lint
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -P -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m 'not slow' --durations 15

test-slow: $(READY)
	$(PIP) -e '.[bench]'
	$(BIN)/python -P -m pytest -q -m slow tests

# The kernels' tests as CPUs without AVX-512 run them: an unguarded intrinsic ends the process. Not a
# part of `test`, which checks one product on each such CPU: it compiles all kernels twice more.
portability: $(READY)
	NUMBA_CPU_NAME=generic $(BIN)/python -P -m pytest -q tests/kernels tests/decoder
	NUMBA_CPU_NAME=haswell $(BIN)/python -P -m pytest -q tests/kernels tests/decoder

# The whole scorecard, twenty minutes of a quiet core; --short takes minutes, and --minutes 20 leaves
# cases out to end by then. Coverage-guided: tests/faults/atheris_target.py.
faults: $(READY)
	$(BIN)/python -P tests/faults/scorecard.py --out tests/faults/SCORECARD.md

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && mkdir -p build/typecheck/sketchconv
	ln -s $(CURDIR)/sketchconv/* $(CURDIR)/formats $(CURDIR)/kernels build/typecheck/sketchconv/
	$(BIN)/mypy

bench: $(READY)
	$(PIP) -e '.[bench]'
	$(BIN)/python -P tests/bench/bench_solver.py
	$(BIN)/python -P tests/bench/bench_gemv.py
	$(BIN)/python -P tests/bench/bench_blocks.py
	$(BIN)/python -P tests/bench/bench_decode.py --threads 1 2
	$(BIN)/python -P tests/bench/bench_tuning.py
	$(BIN)/python -P tests/bench/bench_deltas.py

# torch first and alone: the pinned build must not be replaced while other packages resolve.
$(READY): pyproject.toml tests/constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else f"Python 3.10 or newer is needed, got {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the environment into $(VENV) (a few minutes the first time) ..."
	$(PIP) torch
	$(PIP) -e '.[test,lint]'
	@$(PIP) -e '.[mlx]' || echo "No MLX here (its CPU build needs glibc 2.35 and Python 3.11): its tests are skipped"
	@touch $@

clean:
	rm -rf $(VENV) .demo build *.egg-info
