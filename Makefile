# `make demo` and `make test` work in a fresh clone: they make .venv first. PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
RANKS ?= 4

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FRAMEWORKS := $(VENV)/.frameworks
JUPYTER := $(VENV)/.jupyter
TYPED := build/typed

.PHONY: demo test test-ranks test-interpreter test-all test-triton lint bench tutorials clean

# GPUs are hidden, so that the demo is the same everywhere; run the module under torchrun by hand to use them. WATCH=run.jsonl
# records the run for `fusedfog watch`.
demo: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(RANKS) \
		-m fusedfog.examples.digits $(if $(WATCH),--watch $(WATCH))

# All at a time: mypy has one core, and its answer is there long before the tests are through.
test: $(INSTALLED)
	$(MAKE) --no-print-directory -j 3 lint test-ranks test-interpreter

# Ranks wait for one another half of the time: two files of tests at a time, each process with a pool of ranks of its own.
test-ranks:
	$(BIN)/python -m pytest tests -n 2 --dist loadfile -m "not slow"

# The interpreter is chosen when kernels are imported, so its tests need a process of their own: beside the others, and after
# them where there is time to lose.
test-interpreter:
	mkdir -p build
	TRITON_INTERPRET=1 nice -n 10 $(BIN)/python -m pytest -p no:cacheprovider tests/interpreter -m "not slow" \
		> build/interpreter.log 2>&1; status=$$?; cat build/interpreter.log; exit $$status

test-all: lint $(FRAMEWORKS)
	$(BIN)/python -m pytest tests -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreter

# With every supported Triton, unpacked in build/triton; `make test` does so with the oldest. FULL=1 tries all combinations.
test-triton: $(INSTALLED)
	$(BIN)/python tests/support/triton_versions.py $(if $(FULL),--full)

# mypy cannot see that kernels/ is installed as fusedfog.kernels: show it the files where they are imported from.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	rm -rf $(TYPED) && mkdir -p $(TYPED) && cp -Rp fusedfog $(TYPED)/ && cp -Rp kernels $(TYPED)/fusedfog/kernels
	cd $(TYPED) && "$(CURDIR)/$(BIN)/python" -m mypy --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p fusedfog

# Not here: bench/gpu.py, which needs a GPU, bench/digits_table.py, which takes ten minutes by itself, and bench/loss.py: hours.
bench: $(INSTALLED)
	set -e; for name in kernels papers network plan; do $(BIN)/python bench/$$name.py; done

# The notebooks are made from the scripts beside them, with all outputs: change a script, and make them anew.
tutorials: $(JUPYTER)
	cd fusedfog/examples/tutorial && OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= \
		"$(CURDIR)/$(BIN)/jupytext" --to ipynb --execute --set-kernel python3 [0-9]_*.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis digits*.png digits*.json
	find fusedfog kernels tests bench -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test,examples]'
	touch $@

# transformers, accelerate and Lightning, whose tests `make test` skips.
$(FRAMEWORKS): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt -e '.[frameworks]'
	touch $@

$(JUPYTER): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt -e '.[tutorials]'
	touch $@
