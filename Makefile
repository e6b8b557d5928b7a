# make quickstart   from nothing to a trained CLIP on the emoji set, its curves and pictures
# make test         the test suite
# make soak         the slow tests: 50 kills, thousands of steps watched for leaks, how long saving takes; 40 minutes
# Both make .venv and install into it if need be, and may be run again cheaply.

PYTHON ?= python3
RUN = .venv/bin/python

.DELETE_ON_ERROR:
.PHONY: quickstart test soak clean

quickstart: .venv/data
	$(RUN) -m tools.prepare emoji
	$(RUN) train.py configs/emoji_v3.py --out_dir=runs/quickstart --resume=auto
	$(RUN) eval.py runs/quickstart
	@echo "  curves: runs/quickstart/curves.png"

test: .venv/data .venv/test
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal tests

soak: .venv/data .venv/test
	$(RUN) -m tools.prepare emoji
	$(RUN) tests/soak.py stall
	$(RUN) tests/soak.py kills
	$(RUN) tests/soak.py memory

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
