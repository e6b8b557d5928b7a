"""Records: what is kept of a run of a suite, a compressed JSON file of a few kB to be committed.

    suite, series, x, seed          which run it is
    settings                        all that may change what a run finds
    curve                           {step, samples, objective, mbcl, tau, gamma: list}, 200 at most
    evaluations                     [{step, samples, eval/...}], all of them
    seconds, samples_per_second     of the training, without evaluations and restarts
    machine, threads, torch, commit, date    where, with what and when; the commit has a + if files
                                    of the clone were changed

The same content gives the same bytes. Nothing in it is of one machine alone: no path, no user.
"""

import datetime
import fnmatch
import glob
import gzip
import io
import json
import os
from typing import NamedTuple

from config import Config, ConfigError
from runtime.plots import read_metrics
from tools.suites import settings_of

CURVE_ROWS = 200
CURVE_KEYS = ("objective", "mbcl", "tau", "gamma")


class State(NamedTuple):
    """What is known of a run of a suite, before or after it was run."""

    word: str  # recorded, stale, begun or missing
    changes: str  # of a stale record: how its settings differ from those of the suite today


# ---- writing ----


def make(suite, run, about):
    """The record of a run that is done, from its folder -> dict.

    about: {machine, torch, threads, commit}. Raises ConfigError if there is nothing to compare.
    """
    rows = read_metrics(run.folder)
    training = [row for row in rows if "samples_per_second" in row]
    evaluations = []
    for row in rows:
        if value_of(row, suite.measure) is not None:
            evaluations.append({**row, "samples": row["step"] * run.config.batch_size})
    if not evaluations:
        raise ConfigError(
            f"{run.folder}: no row of metrics.jsonl has {suite.measure}; set eval_data in the "
            "suite, or another measure"
        )

    seconds = training_seconds(training)
    record = {
        "suite": suite.name,
        "series": run.series,
        "x": run.x,
        "seed": run.seed,
        "settings": settings_of(run.config),
        "curve": curve_of(training),
        "evaluations": evaluations,
        "seconds": seconds,
        "samples_per_second": training[-1]["samples"] / seconds,
        "date": datetime.date.today().isoformat(),
        **about,
    }
    return rounded(record)


def value_of(row, measure):
    """The measure in a row of metrics.jsonl, or None.

    If the measure has a *, it is the mean of all keys that match.
    """
    values = [row[key] for key in fnmatch.filter(row, measure)]
    return sum(values) / len(values) if values else None


def training_seconds(rows):
    """Seconds that the training took, by the speeds in its rows. Lost steps do not count."""
    seconds = 0.0
    before = 0
    for row in rows:
        seconds += (row["samples"] - before) / row["samples_per_second"]
        before = row["samples"]
    return seconds


def curve_of(rows):
    """Rows of metrics -> {key: list}, of at most CURVE_ROWS rows that are equally far apart.

    The last row is always among them.
    """
    step = -(-len(rows) // CURVE_ROWS)
    kept = rows[::-1][::step][::-1]
    return {key: [row[key] for row in kept] for key in ("step", "samples", *CURVE_KEYS)}


def rounded(value):
    """The same with floats of six digits; settings are exact with those."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return value


def write(record, path):
    """Write a record. The file is there whole or not at all."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    file = io.BytesIO()
    # Neither the time nor a name goes into the file.
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped:
        zipped.write(text.encode())

    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".partial", "wb") as f:
        f.write(file.getvalue())
    os.replace(path + ".partial", path)


# ---- reading ----


def read(path):
    """The record in a file -> dict. Raises ConfigError, naming the file, if it is damaged."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as f:
            return json.load(f)
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"{path} is no record ({error}): remove it and run its suite") from error


def current(suite):
    """{name of a run: its record} of all runs of a suite whose record has the settings of today."""
    found = {}
    for run in suite.runs:
        if os.path.exists(run.record):
            record = read(run.record)
            if not differences(record["settings"], run.config):
                found[run.name] = record
    return found


def borrow(suite, runs):
    """Write the records of those runs that another suite beside this one has made already.

    runs: of the suite, without a record of today's settings. A run is the same if all of its
    settings are. Returns those that are still without a record.
    """
    if not runs:
        return []

    elsewhere = {}
    for path in sorted(glob.glob(os.path.join(os.path.dirname(suite.path), "*", "*.json.gz"))):
        record = read(path)
        if value_of(record["evaluations"][-1], suite.measure) is not None:
            elsewhere[as_text(record["settings"])] = record

    missing = []
    for run in runs:
        record = elsewhere.get(as_text(settings_of(run.config)))
        if record is None:
            missing.append(run)
        else:
            write({**record, "suite": suite.name, "series": run.series, "x": run.x}, run.record)
    return missing


def as_text(settings):
    """A text that is the same for the same settings."""
    return json.dumps(rounded(settings), sort_keys=True)


def state_of(run):
    """-> State of a run."""
    if os.path.exists(run.record):
        changes = differences(read(run.record)["settings"], run.config)
        return State("stale", changes) if changes else State("recorded", "")
    if os.path.exists(os.path.join(run.folder, "metrics.jsonl")):
        return State("begun", "")
    return State("missing", "")


def differences(settings, config):
    """How the settings of a record differ from those of a Config -> "lr 0.001, now 0.002", or "".

    An option that came after the record does not count as long as it is left at its default, nor
    does one that is gone since.
    """
    defaults = rounded(settings_of(Config()))
    changes = []
    for key, value in rounded(settings_of(config)).items():
        recorded = settings.get(key, defaults[key])
        if recorded != value:
            changes.append(f"{key} {recorded}, now {value}")
    return ", ".join(changes)
