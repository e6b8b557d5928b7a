"""How fast, how large, how much is sent: this project measured beside open_clip, in one run.

    python -m bench MODE                   the modes and their options: python -m bench --help

Not here: the method. Nothing in this folder is needed to train, or to change an algorithm, a model
or a schedule, and nothing outside this folder imports it, except its tests.

    __main__.py                            the command line, and what the mode `all` runs
    step, loader, loss, wire,
    breakdown, plan (.py)                  one file per mode: run(args) -> rows of results
    gpu.py                                 the mode `gpu`: a GPU's first half hour, in parts
    checks.py, end_to_end.py               what its parts A and D measure beside the modes
    jobs.py                                several measurements, continued where they stopped
    ours.py, baselines.py                  the two sides: trainers with the same interface
    harness.py                             processes that take turns, ranks on this machine
    made_data.py                           the pictures and captions that both sides are measured on
    measure.py                             time, peak memory, and a profile taken apart
    report.py, picture.py, page.py         the results file (JSON), a table, a picture, a page
"""

import os

import runtime  # noqa: F401 before torch: it says how torch's threads wait

# Read when torch's profiler is loaded: no warning about GPUs on machines that have none.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
