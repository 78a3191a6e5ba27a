PYTHON ?= python3
BIN := .venv/bin
RUNS := out/demo/baseline out/demo/s4
STUDY := out/study_small/results

.PHONY: setup demo study-small test test-all lint fuzz soak clean

setup: .venv/installed

# --clear removes an incomplete environment left by an interrupted setup.
.venv/installed: requirements.txt requirements-extra.txt requirements-test.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
	touch $@

# The paper's experiment with a small model.
demo: setup
	test -f data/stdlib/meta.json || $(BIN)/python fineweb.py --source stdlib --out data/stdlib
	rm -rf $(RUNS)
	$(BIN)/python train.py configs/demo.py configs/baseline.py --out_dir=out/demo/baseline
	$(BIN)/python train.py configs/demo.py configs/s4.py --continual_steps=match_paper_cost --out_dir=out/demo/s4
	$(BIN)/python plot.py $(RUNS) --out plots/demo --title "demo: 8 blocks of width 64, bytes of Python's standard library, CPU"
	@echo
	@echo "This trained a baseline and an S=4 incremental run, compute-matched in the paper's unit, and drew the"
	@echo "paper's figures 1 and 2. The model has 0.4M parameters and reads a few million bytes. It shows that the"
	@echo "experiment runs end to end, not which schedule is better for a language model of useful size."

# A study from training to its page, with two runs at a time; continues if it was stopped.
study-small: setup
	test -f data/stdlib/meta.json || $(BIN)/python fineweb.py --source stdlib --out data/stdlib
	mkdir -p $(STUDY)
	cp configs/study_small.toml $(STUDY)/study.toml
	$(BIN)/python study.py run $(STUDY) --out out/study_small/runs --jobs 2
	$(BIN)/python frontier.py $(STUDY)

test: setup
	$(BIN)/python -m pytest -m "not slow"

# Also runs the slow tests: kills, restarts, network failures, compilation.
test-all: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests 12,000 mutated inputs; takes some minutes.
fuzz: setup
	$(BIN)/python tests/fuzz.py

# Trains for two hours and kills the run every few minutes.
soak: setup
	test -f data/stdlib/meta.json || $(BIN)/python fineweb.py --source stdlib --out data/stdlib
	$(BIN)/python tests/soak.py

clean:
	rm -rf .venv out/demo out/study_small data/stdlib
