"""Several measurements, one after the other, into one results file: what it holds is not repeated.

Each job's rows are saved when it ends. So a run that was cut off, or that ran out of its minutes,
goes on where it stopped.
"""

import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from bench import harness, report


class Job(NamedTuple):
    """One measurement of several."""

    name: str  # by which the results file knows it
    run: Callable  # args -> rows of results
    args: Namespace
    minutes: float = 0.0  # an estimate


def run_missing(jobs, args, show):
    """Run the jobs whose rows are not in the file args.out, and save each one's rows at once.

    With args.retry, those that failed there, or missed a goal, are run again.
    After args.minutes (0: no limit) no job is started, nor one that would end later by its
    estimate, except for the first.
    show: function of all rows of the file, called whenever they change.
    Returns all rows of the file.
    """
    start = time.monotonic()
    rows = report.check(args.out)["rows"]
    missing = [job for job in jobs if is_missing(job, rows, args.retry)]

    for number, job in enumerate(missing):
        spent = (time.monotonic() - start) / 60
        if number and args.minutes and spent + job.minutes > args.minutes:
            names = ", ".join(job.name for job in missing[number:])
            print(f"after {spent:.1f} minutes these are left, for the same command: {names}")
            break

        print(f"---- {job.name}", flush=True)
        job_rows = attempt(job)
        report.print_table(job_rows)
        rows = report.save(job_rows, args.out, job.name)
        show(rows)

    if not missing:
        print(f"all of it is in {args.out}: to measure again, remove it or name another --out")
    return rows


def is_missing(job, rows, retry):
    """Whether a job has no rows, or with `retry` one that failed or missed its goal."""
    own_rows = [row for row in rows if row.get("job") == job.name]
    if retry and (failures(own_rows) or missed(own_rows)):
        return True
    return not own_rows


def attempt(job):
    """The job's rows. An exception becomes a row, too, so that the jobs after it are run."""
    try:
        return job.run(job.args)
    except Exception as error:
        traceback.print_exc()
        settings = dict(model=job.args.model, batch=job.args.batch)
        return [report.failed("job", job.name, settings, harness.reason_of(error))]


def failures(rows):
    return [row for row in rows if "failed" in row]


def missed(rows):
    """Those rows that have a goal and do not meet it."""
    return [row for row in rows if not row.get("met", True)]


def exit_status(rows):
    """1 if any of the rows failed, which are printed once more; else 0."""
    failed = failures(rows)
    for row in failed:
        print(report.table_line(row), file=sys.stderr)
    return 1 if failed else 0
