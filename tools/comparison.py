"""Numbers of a suite from its records: means, paired differences, how sure these are.

Two runs with the same seed and the same x have the same data order, crops and, with the same model,
the same first weights. So series are compared by the differences of such pairs, in which much of
the chance is common to both.

How sure is a mean difference? Seeds are few, three as a rule, and then the usual interval, the
bootstrap, is no answer. It draws n of the n differences with replacement, so that it never leaves
their range, and with three of them the range itself holds the median of all seeds' differences in
only 3 of 4 cases (all three lie on one side of it with probability 2/8). What an interval of 95 %
must cover lies outside of the values that were seen, so something has to be assumed about them.
The t interval assumes that differences are normally distributed, and takes into account that their
spread is known from n values only: for three, it is 2.48 standard deviations wide on either side.
It is the one to read; the bootstrap's stands beside it because readers look for it.

Neither says how another test set would judge: all runs see the same test images.
"""

from typing import NamedTuple

import numpy as np

from tools.records import value_of

# Student's t: 97.5 % of its distribution with 1, 2, ..., 9 degrees of freedom lies below these.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

RESAMPLES = 10_000


class Cell(NamedTuple):
    """The records of one case: a series at one x. Each dict is {seed: number}."""

    series: str
    x: float | str
    last: dict  # the measure at the end
    best: dict  # the best of all evaluations, known only with hindsight
    tau: dict  # at the end
    curves: dict  # {seed: (samples seen, measure), two lists}


# ---- from records ----


def cells_of(suite, records, measure=None):
    """{(series, x): Cell} of all cases that have a record, in the order of x, then of the series.

    records: {name of a run: its record}, of records.current. measure: by default the suite's.
    """
    cells = {}
    for x in suite.xs:
        for series in suite.series:
            runs = [run for run in suite.runs if (run.series, run.x) == (series, x)]
            cell = Cell(series, x, {}, {}, {}, {})
            for run in runs:
                if run.name in records:
                    add_record(cell, run.seed, records[run.name], measure or suite.measure)
            if cell.last:
                cells[series, x] = cell
    return cells


def add_record(cell, seed, record, measure):
    evaluations = record["evaluations"]
    values = [value_of(row, measure) for row in evaluations]
    cell.last[seed] = values[-1]
    cell.best[seed] = max(values)
    cell.tau[seed] = record["curve"]["tau"][-1]
    cell.curves[seed] = [row["samples"] for row in evaluations], values


def factor(measure):
    """100 for a share, which is shown in percent, otherwise 1."""
    name = name_of(measure)
    return 100 if name.startswith("zeroshot_") or "R@" in name else 1


def name_of(measure):
    return measure.rpartition("/")[2]


def array_of(by_seed):
    """{seed: number} -> (n,)."""
    return np.array(list(by_seed.values()))


# ---- differences ----


def paired_differences(cell, other):
    """Last value of `cell` minus that of `other`, for each seed that both have -> (n,)."""
    seeds = sorted(cell.last.keys() & other.last.keys())
    return np.array([cell.last[seed] - other.last[seed] for seed in seeds])


def xs_of(cells):
    """The values of x that have records, in order, a list."""
    return list(dict.fromkeys(x for _, x in cells))


def differences_at(suite, cells, series, other, x):
    """Paired differences at x, in points if the measure is a share -> (n,), n may be 0."""
    if (series, x) not in cells or (other, x) not in cells:
        return np.empty(0)
    return paired_differences(cells[series, x], cells[other, x]) * factor(suite.measure)


def xs_of_both(suite, cells, series, other):
    """The values of x at which both series have records, a list."""
    return [x for x in suite.xs if (series, x) in cells and (other, x) in cells]


def differences_of_seeds(suite, cells, series, other):
    """`series` - `other` by seed and x -> (xs, (seeds, xs)), for the x at which both have records.

    Only of seeds that both have at all of these.
    """
    xs = xs_of_both(suite, cells, series, other)
    pairs = [(cells[series, x].last, cells[other, x].last) for x in xs]
    rows = []
    for seed in suite.seeds:
        if all(seed in ours and seed in theirs for ours, theirs in pairs):
            rows.append([ours[seed] - theirs[seed] for ours, theirs in pairs])
    return xs, np.array(rows).reshape(-1, len(xs))


def slopes_of(xs, differences):
    """By how much differences change as x doubles, a line fitted for each seed -> (seeds,).

    differences: (seeds, xs), of differences_of_seeds, with two values of x or more.
    """
    return np.array([np.polyfit(np.log2(xs), row, 1)[0] for row in differences])


def t_interval(differences):
    """(n,), n from 2 to 10 -> (low, high), the 95 % interval of their mean by Student's t."""
    n = len(differences)
    error = differences.std(ddof=1) / np.sqrt(n)
    half = T_QUANTILES[n - 2] * error
    return differences.mean() - half, differences.mean() + half


def bootstrap_interval(differences):
    """(n,) -> (low, high): 95 % of the means of n values drawn from them, with replacement."""
    generator = np.random.default_rng(0)
    drawn = generator.choice(differences, (RESAMPLES, len(differences)))
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return low, high
