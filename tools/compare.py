"""Run the experiments, keep their records, show what they found.

    python -m tools.compare experiments/batch_size.py             run what has no record yet
    python -m tools.compare experiments/batch_size.py --list      what is recorded, what is missing
    python -m tools.compare experiments/batch_size.py --report    its table and its picture

A suite (tools/suites.py says what is in one) has cases and seeds; each case with each seed is a
run. The first seed of all cases comes first, so that a suite that was cut off can be compared. The
same command goes on where it stopped. A run that another suite has made already, with the same
settings, is not made again. The records (tools/records.py) are small and are committed; tables and
pictures are made of them alone.

Exit status: 1 if a run failed, 130 after Ctrl-C or SIGTERM.
"""

import argparse
import os
import signal
import sys

import config as configs
from tools import comparison_page, records
from tools.suites import read_suite

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "docs", "results.md")


def main(argv):
    args = parse(argv)
    suites = [read_suite(path) for path in args.suites]
    if args.list:
        for suite in suites:
            show_states(suite, chosen(suite, args.only))
    elif args.report:
        for suite in suites:
            comparison_page.report(suite, records.current(suite), args.results)
    else:
        sys.exit(run(suites, args))


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare",
        description="Run experiments, several runs side by side; keep their records; show them.",
    )
    parser.add_argument("suites", nargs="+", metavar="SUITE", help="files of experiments/")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--list", action="store_true", help="what is recorded, what is missing")
    parser.add_argument("--report", action="store_true", help="write tables and pictures")
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time (default: as below)")
    parser.add_argument("--jobs_per_gpu", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the folders of finished runs")
    parser.add_argument(
        "--results", default=RESULTS, help="the page for the tables (default: docs/results.md)"
    )
    parser.epilog = (
        "--only: only runs whose names have all of these words. By default, as many runs go on at "
        "a time as there are cores or, with GPUs, --jobs_per_gpu on each."
    )
    return parser.parse_args(argv)


def chosen(suite, words):
    """Those runs of a suite whose names have all of the words."""
    return [run for run in suite.runs if all(word in run.name for word in words)]


def show_states(suite, runs):
    """Print a line for each run, and their number."""
    count = 0
    for run in runs:
        state = records.state_of(run)
        count += state.word == "recorded"
        print(f"{state.word:8}  {run.name}  {state.changes}".rstrip())
    print(f"{suite.name}: {count} of {len(runs)} runs are recorded")


def run(suites, args):
    """Run what is missing -> exit status."""
    # Imported late: it imports torch, which a report does without.
    from tools.runner import Runner, places

    failed = []
    for suite in suites:
        runs = chosen(suite, args.only)
        missing = [run for run in runs if records.state_of(run).word != "recorded"]
        missing = records.borrow(suite, missing)
        print(f"{suite.name}: {len(missing)} of {len(runs)} runs are missing", flush=True)
        runner = Runner(suite, missing, places(args.jobs, args.jobs_per_gpu), args.keep)
        runner.run()
        failed += runner.failed
        if runner.stopping:
            print("stopped; the same command goes on from here")
            return 128 + signal.SIGINT

    if failed:
        print(f"error: {len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    configs.or_exit(main, sys.argv[1:])
