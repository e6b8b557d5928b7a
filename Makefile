# make quickstart   from nothing to a trained CLIP on the emoji set, its curves and pictures
# make compare      then OpenCLIP on the same data, as usual and with its best temperature, and the
#                   curves of all three in one picture
# make results      the tables and pictures of the experiments, from their records
# make check        what to run after an edit: lint, and the tests of the files at the top level
# make test         the whole test suite
# make lint         ruff: style and likely bugs
# make soak         the slow tests: 50 kills, thousands of steps watched for leaks, how long saving
#                   takes; 40 minutes
# Each makes .venv and installs into it what is missing. Run again, it installs nothing.

PYTHON ?= python3
RUN = .venv/bin/python
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal

.DELETE_ON_ERROR:
.PHONY: quickstart compare openclip openclip_tuned results check test lint soak clean

quickstart: .venv/data
	$(RUN) -m tools.prepare emoji
	$(RUN) train.py configs/emoji_v3.py --out_dir=runs/quickstart --resume=auto
	$(RUN) eval.py runs/quickstart
	@echo "  curves: runs/quickstart/curves.png"

# The two runs go side by side, a thread each: on two cores that is faster than one after the other.
compare: quickstart
	OMP_NUM_THREADS=1 $(MAKE) -j 2 openclip openclip_tuned
	$(RUN) -m runtime.plots runs/quickstart runs/quickstart-openclip \
	    runs/quickstart-openclip_tuned --out=runs/compare.png

openclip openclip_tuned:
	$(RUN) train.py configs/emoji_$@.py --out_dir=runs/quickstart-$@ --resume=auto --workers=0

results: .venv/run
	$(RUN) -m tools.compare experiments/*.py --report
	$(RUN) -m tools.bias --report

check: lint .venv/data
	$(PYTEST) -m "not slow" tests/test_config.py tests/test_dist.py tests/test_loss.py \
	    tests/test_model.py tests/test_optim.py tests/test_data.py tests/test_eval.py \
	    tests/test_train.py

test: .venv/data .venv/test
	$(PYTEST) --durations=15 --durations-min=5 tests

lint: .venv/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

soak: .venv/data .venv/test
	$(RUN) -m tools.prepare emoji
	$(RUN) tests/soak.py stall
	$(RUN) tests/soak.py kills
	$(RUN) tests/soak.py memory --steps=2500

clean:
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "error: Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

# One stamp per requirements file, so that a second run installs nothing.
.venv/run: requirements.txt .venv/bin/python
	@echo "installing (torch and its CUDA libraries are about 3 GB; a few minutes)"
	$(RUN) -m pip install -q --disable-pip-version-check -r $<
	@touch $@
.venv/data .venv/test: .venv/%: requirements-%.txt .venv/run
	$(RUN) -m pip install -q --disable-pip-version-check -r $<
	@touch $@
