"""Suites: files that say which runs an experiment consists of, and what its picture shows.

A suite is plain Python, like a config. These assignments count, others are the file's own affair:

    title       what the experiment asks, a line
    base        a config file, by its path from the suite
    settings    dict of the settings that all runs have, besides those of the base
    seeds       tuple of up to ten
    cases       list of dict(series=NAME, x=NUMBER OR WORD, settings=DICT), each run with all seeds;
                with base=PATH, too, if it has another base
    x_label     what x is
    measure     what is compared, a key of metrics.jsonl; by default eval/zeroshot_top1. With a * it
                is the mean of all that match: eval/*/zeroshot_top1
    reference   the series with which the others are compared, by default the first; or a dict
                {series: the one with which it is compared, or a tuple of these}; {}: nothing is
    trend       whether x is a number with whose doubling differences change: a table of that, and a
                panel of the differences
    also        tuple of further measures that this table has
    log_x       whether the axis of x is logarithmic
    curves      whether a further panel shows the measure against the samples seen
    at_last_tau    tuple of series that are drawn at the temperature at which they end, not at x
    best_of     of a tuning: tuple of beginnings of the names of series, one for each side of the
                comparison; a table tells the best series of each side
"""

import os
import re
import traceback
from typing import NamedTuple

import config as configs
from config import ConfigError, require

RUNS = os.path.join("runs", "experiments")  # where a suite is run, in a folder of its own
MAX_SEEDS = 10


class Run(NamedTuple):
    """One run of a suite: a case with a seed."""

    name: str  # of its folder and of its record
    series: str  # the line of the picture that it belongs to
    x: float | str  # its place on that line
    seed: int
    words: list  # of train.py's command line, without out_dir
    config: configs.Config  # what these words come to
    folder: str  # in which it is run
    record: str  # path of its record


class Suite(NamedTuple):
    """An experiment, as read_suite gives it. The assignments of the file, and:"""

    name: str  # of the file
    path: str
    runs: list  # of Run, all cases with the first seed, then all with the second, ...

    title: str
    seeds: tuple
    x_label: str
    measure: str
    pairs: tuple  # of (series, the one with which it is compared)
    trend: bool
    also: tuple
    log_x: bool
    at_last_tau: tuple
    best_of: tuple
    curves: bool

    @property
    def series(self):
        """The names of the series, in the order of the cases."""
        return list(dict.fromkeys(run.series for run in self.runs))

    @property
    def xs(self):
        """The values of x, in the order of the cases."""
        return list(dict.fromkeys(run.x for run in self.runs))

    @property
    def picture(self):
        """The path of its picture."""
        return os.path.splitext(self.path)[0] + ".png"


def read_suite(path):
    """The file of a suite -> Suite. Raises ConfigError for what cannot work, before anything runs.

    A suite is code: read it before you run it.
    """
    names = execute(path)
    for key in ("title", "base", "seeds", "cases", "x_label"):
        require(key in names, f"{path}: a suite needs {key} (tools/suites.py says what it is)")
    cases = names["cases"]
    seeds = tuple(names["seeds"])
    require(cases, f"{path}: cases is empty")
    require(
        0 < len(seeds) == len(set(seeds)) <= MAX_SEEDS,
        f"{path}: seeds = {seeds} must be one to {MAX_SEEDS} different numbers",
    )

    runs = []
    for seed in seeds:
        for case in cases:
            runs.append(run_of(path, names, case, seed))
    check_names(path, runs)

    trend = names.get("trend", False)
    require(
        not trend or all(isinstance(run.x, int | float) and run.x > 0 for run in runs),
        f"{path}: trend = True needs numbers above 0 for x, to speak of doublings",
    )

    return Suite(
        name=suite_name(path),
        path=path,
        runs=runs,
        title=names["title"],
        seeds=seeds,
        x_label=names["x_label"],
        measure=names.get("measure", "eval/zeroshot_top1"),
        pairs=pairs_of(path, names, runs),
        trend=trend,
        also=names.get("also", ()),
        log_x=names.get("log_x", False),
        at_last_tau=names.get("at_last_tau", ()),
        best_of=names.get("best_of", ()),
        curves=names.get("curves", False),
    )


def pairs_of(path, names, runs):
    """Which series are compared with which -> ((series, other), ...), in the order of the suite."""
    series = list(dict.fromkeys(run.series for run in runs))
    reference = names.get("reference", series[0])
    if not isinstance(reference, dict):
        reference = {name: reference for name in series if name != reference}

    pairs = []
    for name, others in reference.items():
        for other in others if isinstance(others, tuple) else (others,):
            pairs.append((name, other))
    for name in sum(pairs, ()):
        require(name in series, f"{path}: reference: no series is called {name!r}, but {series}")
    return tuple(pairs)


def execute(path):
    """Run the file of a suite -> {name: value}. Raises ConfigError, with the line, if it fails."""
    require(os.path.isfile(path), f"no suite {path!r}; there are some in experiments/")
    names = {}
    try:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), names)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = getattr(error, "lineno", None) or frame.lineno
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return names


def suite_name(path):
    return os.path.splitext(os.path.basename(path))[0]


def run_of(path, names, case, seed):
    """A case of the suite at `path`, with a seed -> Run. names: what the file assigns."""
    require(
        isinstance(case, dict) and set(case) - {"base"} == {"series", "x", "settings"},
        f"{path}: a case is dict(series=..., x=..., settings=dict(...)), and may have base=..., "
        f"not {case}",
    )
    base = case.get("base", names["base"])
    base = os.path.relpath(os.path.join(os.path.dirname(path), base))
    settings = {**names.get("settings", {}), **case["settings"], "seed": seed}
    words = [base]
    for key, value in settings.items():
        words.append(f"--{key}={value!r}")
    config = configs.load(words)

    require(config.eval_data, f"{path}: a suite compares evaluations, so it needs eval_data")
    name = plain(f"{case['series']}_{case['x']}_seed{seed}")
    for patterns in (config.train_data, *configs.named_sets(config).values()):
        require(
            not any(os.path.isabs(pattern) for pattern in patterns),
            f"{path}, {name}: {patterns} would be of this machine alone: records are for others, "
            "too, so give the place of the data from the project's folder (a link will do)",
        )
    return Run(
        name=name,
        series=case["series"],
        x=case["x"],
        seed=seed,
        words=words,
        config=config,
        folder=os.path.join(RUNS, suite_name(path), name),
        record=os.path.join(os.path.splitext(path)[0], name + ".json.gz"),
    )


def plain(text):
    """A text as the name of a file: other characters than letters, digits, . and - become -."""
    return re.sub(r"[^\w.]+", "-", text).strip("-")


def check_names(path, runs):
    """ConfigError if two runs have the same name: they would share a folder and a record."""
    names = set()
    for run in runs:
        require(
            run.name not in names,
            f"{path}: two cases have the name {run.name!r}: give them another series or x",
        )
        names.add(run.name)


def settings_of(config):
    """{key: value} of all settings on which the outcome of a run depends, as JSON knows them."""
    settings = {}
    for key in configs.HINTS:
        if key not in configs.RUNNING_KEYS:
            value = getattr(config, key)
            settings[key] = list(value) if isinstance(value, tuple) else value
    return settings
