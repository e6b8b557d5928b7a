"""What the records of a suite show: a table for docs/results.md, and a picture.

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

import os
from typing import NamedTuple

import numpy as np

from config import ConfigError

# Student's t: 97.5 % of its distribution with 1, 2, ..., 9 degrees of freedom lies below these.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

RESAMPLES = 10_000

MAX_LINES = 10  # of a picture: matplotlib has no more colours


class Cell(NamedTuple):
    """The records of one case: a series at one x. Each dict is {seed: number}."""

    series: str
    x: float | str
    last: dict  # the measure at the end
    best: dict  # the best of all evaluations, known only with hindsight
    tau: dict  # at the end
    curves: dict  # {seed: (samples seen, measure), two lists}


# ---- numbers ----


def cells_of(suite, records):
    """{(series, x): Cell} of all cases that have a record, in the order of x, then of the series.

    records: {name of a run: its record}, of records.current.
    """
    cells = {}
    for x in suite.xs:
        for series in suite.series:
            runs = [run for run in suite.runs if (run.series, run.x) == (series, x)]
            cell = Cell(series, x, {}, {}, {}, {})
            for run in runs:
                if run.name in records:
                    add_record(cell, run.seed, records[run.name], suite.measure)
            if cell.last:
                cells[series, x] = cell
    return cells


def add_record(cell, seed, record, measure):
    evaluations = record["evaluations"]
    values = [row[measure] for row in evaluations]
    cell.last[seed] = values[-1]
    cell.best[seed] = max(values)
    cell.tau[seed] = record["curve"]["tau"][-1]
    cell.curves[seed] = [row["samples"] for row in evaluations], values


def paired_differences(cell, other):
    """Last value of `cell` minus that of `other`, for each seed that both have -> (n,)."""
    seeds = sorted(cell.last.keys() & other.last.keys())
    return np.array([cell.last[seed] - other.last[seed] for seed in seeds])


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


# ---- the table ----


def report(suite, records, page):
    """Write a suite's table into a page, and draw its picture if there is anything to draw."""
    cells = cells_of(suite, records)
    if cells and has_picture(suite):
        draw(suite, cells, suite.picture)
    write_section(page, suite.name, section(suite, records))
    print(f"{suite.name}: {len(records)} of {len(suite.runs)} runs, into {page}")


def has_picture(suite):
    """Whether a picture of the suite could be read. A tuning has a table only."""
    return len(suite.series) <= MAX_LINES


def section(suite, records):
    """What a page says about a suite: title, picture, table. Markdown."""
    cells = cells_of(suite, records)
    command = f"`python -m tools.compare experiments/{suite.name}.py`"
    recorded = f"{len(records)} of {len(suite.runs)} runs are recorded; {command} makes the others."
    if not cells:
        return f"* {suite.title}: {recorded}"

    image = f"![{suite.title}](../experiments/{suite.name}.png)"
    parts = [f"{suite.title}.", table(suite, cells), explanation(suite)]
    if suite.best_of:
        parts.insert(1, best_table(suite, cells))
    if suite.trend:
        parts.insert(2, trend_table(suite, cells))
    if has_picture(suite):
        parts.insert(1, image)
    if len(records) < len(suite.runs):
        parts.append(recorded)
    return "\n\n".join(parts)


def table(suite, cells):
    """A row for each case -> markdown. cells: of cells_of."""
    heading = [suite.x_label, "series", name_of(suite.measure), "best", "last tau"]
    if suite.reference:
        heading += ["difference"]
    if suite.reference and len(suite.seeds) > 1:
        heading += ["95 % interval (t)", "bootstrap"]

    lines = [row_text(heading), row_text(["---"] * len(heading))]
    for cell in cells.values():
        reference = cells.get((suite.reference.get(cell.series), cell.x))
        columns = [
            str(cell.x),
            cell.series,
            mean_and_spread(suite.measure, cell.last),
            mean_of(suite.measure, cell.best),
            f"{array_of(cell.tau).mean():.3f}",
        ]
        columns += difference_columns(cell, reference, factor(suite.measure))
        lines.append(row_text(columns[: len(heading)]))
    return "\n".join(lines)


def best_table(suite, cells):
    """The best series of each side of a tuning, a row for each x -> markdown."""
    heading = [suite.x_label, *suite.best_of]
    lines = [row_text(heading), row_text(["---"] * len(heading))]
    for x in suite.xs:
        columns = [str(x)]
        for side in suite.best_of:
            of_side = [
                cell for (name, at), cell in cells.items() if name.startswith(side) and at == x
            ]
            columns.append(best_of_cells(of_side, side, suite.measure))
        lines.append(row_text(columns))
    return "The best of each side:\n\n" + "\n".join(lines)


def best_of_cells(cells, side, measure):
    """-> "25.3 (tau 0.10, lr 0.001; of 3)", the best of a side's cells; "" if there is none."""
    if not cells:
        return ""
    best = max(cells, key=lambda cell: array_of(cell.last).mean())
    setting = best.series.removeprefix(side).strip(" ,")
    return f"{mean_of(measure, best.last)} ({setting}; of {len(cells)})"


def trend_table(suite, cells):
    """How the differences to the reference change as x doubles, a row for each series -> markdown.

    One number for each seed, so that a suite's question ("does the lead shrink?") has one answer.
    """
    scale = factor(suite.measure)
    lines = [row_text(["series", "to", "change per doubling", "95 % interval (t)"])]
    lines.append(row_text(["---"] * 4))
    for series, other in suite.reference.items():
        slopes = slopes_of(suite, cells, series, other) * scale
        if not len(slopes):
            continue
        interval = interval_text(t_interval(slopes)) if len(slopes) > 1 else ""
        mean = f"{signed(slopes.mean())} ({len(slopes)})"
        lines.append(row_text([series, other, mean, interval]))
    return (
        f"How the differences change with each doubling of the {suite.x_label}, a line fitted for "
        "each seed that has all of them:\n\n" + "\n".join(lines)
    )


def slopes_of(suite, cells, series, other):
    """For each seed, the slope of the difference `series` - `other` against log2 x -> (seeds,).

    Only the values of x at which both have records count, and seeds that have these all.
    """
    xs = xs_of_both(suite, cells, series, other)
    pairs = [(cells[series, x].last, cells[other, x].last) for x in xs]
    slopes = []
    for seed in suite.seeds:
        differences = [a[seed] - b[seed] for a, b in pairs if seed in a and seed in b]
        if len(differences) == len(xs) >= 2:
            slopes.append(np.polyfit(np.log2(xs), differences, 1)[0])
    return np.array(slopes)


def xs_of_both(suite, cells, series, other):
    """The values of x at which both series have records, a list."""
    return [x for x in suite.xs if (series, x) in cells and (other, x) in cells]


def difference_columns(cell, reference, scale):
    """The mean paired difference to the reference and its two intervals, as texts; "" if none.

    reference: a Cell, or None. scale: factor of the values.
    """
    if reference is None:
        return ["", "", ""]
    differences = paired_differences(cell, reference) * scale
    if not len(differences):
        return ["", "", ""]

    columns = [signed(differences.mean())]
    if len(differences) == 1:
        return [*columns, "", ""]
    for interval in (t_interval(differences), bootstrap_interval(differences)):
        columns.append(interval_text(interval))
    return columns


def interval_text(interval):
    """(low, high) -> "+1.6 to +4.2"."""
    low, high = interval
    return f"{signed(low)} to {signed(high)}"


def signed(number):
    """A number with its sign and one decimal, but no sign for zero: -0.04 -> "0.0"."""
    text = f"{number:+.1f}"
    return text[1:] if float(text) == 0 else text


def explanation(suite):
    """How to read the table, a paragraph."""
    text = (
        "± is the standard deviation over seeds, whose number is in parentheses. The best of a "
        "run's evaluations is known only with hindsight."
    )
    if suite.reference:
        same = "x and seed" if len(suite.seeds) > 1 else "x"
        text += f" Differences are those at the same {same}: {pairs_of_series(suite)}."
    if suite.reference and len(suite.seeds) > 1:
        text += (
            " The t interval is the one to read: with few seeds the bootstrap's is hardly more "
            "than their range. Both are about other seeds, not about other test pictures."
        )
    return text


def pairs_of_series(suite):
    """Which series are compared, in words."""
    targets = set(suite.reference.values())
    if len(targets) == 1:
        return f"to {targets.pop()}"
    return "; ".join(f"{series} to {other}" for series, other in suite.reference.items())


def row_text(columns):
    return "| " + " | ".join(columns) + " |"


def factor(measure):
    """100 for a share, which is shown in percent, otherwise 1."""
    name = name_of(measure)
    return 100 if name.startswith("zeroshot_") or "R@" in name else 1


def name_of(measure):
    return measure.rpartition("/")[2]


def array_of(by_seed):
    """{seed: number} -> (n,)."""
    return np.array(list(by_seed.values()))


def mean_of(measure, by_seed):
    """{seed: value} -> "39.4"."""
    mean = array_of(by_seed).mean() * factor(measure)
    return f"{mean:.1f}"


def mean_and_spread(measure, by_seed):
    """{seed: value} -> "39.4 ± 0.6 (3)"."""
    mean = mean_of(measure, by_seed)
    if len(by_seed) == 1:
        return f"{mean} (1)"
    spread = array_of(by_seed).std(ddof=1) * factor(measure)
    return f"{mean} ± {spread:.1f} ({len(by_seed)})"


def write_section(page, name, text):
    """Put a text into a page, between the marks <!-- name --> and <!-- end of name -->.

    Raises ConfigError if there is no such page, or the page has no such marks.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if not os.path.exists(page):
        raise ConfigError(f"no page {page}: make it, with the lines {start} and {end}")
    with open(page, encoding="utf-8") as f:
        before, found_start, rest = f.read().partition(start + "\n")
    _, found_end, after = rest.partition(end + "\n")
    if not (found_start and found_end):
        raise ConfigError(f"{page} has no place for this table: add the lines {start} and {end}")
    with open(page, "w", encoding="utf-8") as f:
        f.write(f"{before}{start}\n\n{text}\n\n{end}\n{after}")


# ---- the picture ----


def draw(suite, cells, path):
    """Draw the measure against x into a PNG.

    With suite.trend, a second panel has the differences to the references, with their intervals;
    with suite.curves, a further one the measure against the samples seen.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 1 + suite.trend + suite.curves
    height = 4.6 + 0.05 * len(suite.series)
    figure, axes = plt.subplots(
        1, panels, figsize=(7.5 * panels, height), squeeze=False, layout="constrained"
    )
    draw_against_x(axes[0, 0], suite, cells)
    # Below, because a suite may have many series.
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    if suite.trend:
        draw_differences(axes[0, 1], suite, cells)
    if suite.curves:
        draw_curves(axes[0, -1], suite, cells)
        axes[0, -1].legend(fontsize=7)

    for axis in axes.flat:
        axis.set_ylabel(axis.get_ylabel() or label_of(suite.measure))
        axis.grid(alpha=0.3)
    figure.suptitle(suite.title, fontsize=10)
    # Without the version of matplotlib, which the file otherwise names.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def draw_against_x(axis, suite, cells):
    """A line through the means of each series, and a small point for each seed."""
    own_xs = [cell.x for cell in cells.values() if cell.series not in suite.at_last_tau]
    places = places_of(own_xs)

    for series in suite.series:
        points = []
        for cell in cells.values():
            if cell.series == series:
                at_last_tau = series in suite.at_last_tau
                place = array_of(cell.tau).mean() if at_last_tau else places[cell.x]
                values = array_of(cell.last) * factor(suite.measure)
                points.append((place, values))
        draw_series(axis, series, points)

    set_x(axis, suite, places)


def places_of(xs):
    """{x: its place on the axis}: its own number or, if there are words, its number in the list."""
    xs = list(dict.fromkeys(xs))
    if any(isinstance(x, str) for x in xs):
        return {x: number for number, x in enumerate(xs)}
    return {x: x for x in sorted(xs)}


def draw_series(axis, name, points):
    """A line and its points. points: [(place on the axis, a value for each seed (n,))]."""
    points = sorted(points, key=lambda point: point[0])
    places = [place for place, _ in points]
    means = [values.mean() for _, values in points]
    (line,) = axis.plot(places, means, label=name)

    color = line.get_color()
    for place, values in points:
        same_place = np.full(len(values), place)
        axis.plot(same_place, values, "o", markersize=3.5, alpha=0.6, color=color)


def draw_differences(axis, suite, cells):
    """The mean paired difference to the reference at each x, with its 95 % interval (t).

    A series has the colour that it has in the first panel. Its points stand a little beside those
    of the others, so that no interval hides another.
    """
    width = 0.025  # of the distance between two series, as a share of x
    for number, (series, other) in enumerate(suite.reference.items()):
        places, means, halves = [], [], []
        for x in xs_of_both(suite, cells, series, other):
            differences = paired_differences(cells[series, x], cells[other, x])
            if len(differences) > 1:
                differences = differences * factor(suite.measure)
                low, high = t_interval(differences)
                places.append(x * (1 + width * (number - 1)))
                means.append(differences.mean())
                halves.append((high - low) / 2)
        color = f"C{suite.series.index(series)}"
        label = f"{series} - {other}"
        axis.errorbar(places, means, halves, fmt="o-", capsize=3, color=color, label=label)

    axis.axhline(0, color="black", linewidth=0.8)
    unit = ", points" if factor(suite.measure) == 100 else ""
    axis.set_ylabel(f"difference{unit} (95 % interval)")
    set_x(axis, suite, {x: x for x in suite.xs if any(at == x for _, at in cells)})
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    axis.legend(fontsize=7, loc="upper right")


def set_x(axis, suite, places):
    """Scale, ticks and label of the axis of x. places: {x: its place on the axis}."""
    if suite.log_x:
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(list(places.values()), [str(x) for x in places])
    axis.set_xlabel(suite.x_label)


def draw_curves(axis, suite, cells):
    """The mean over seeds of each evaluation, against the samples seen, a line for each case."""
    for cell in cells.values():
        # All runs of a case evaluate at the same steps.
        curves = list(cell.curves.values())
        samples, _ = curves[0]
        values = np.array([values for _, values in curves])  # (seeds, evaluations)

        means = values.mean(axis=0) * factor(suite.measure)
        axis.plot(samples, means, marker="o", markersize=3, label=f"{cell.series}, {cell.x}")
    axis.set_xlabel("samples seen")


def label_of(measure):
    unit = ", %" if factor(measure) == 100 else ""
    return name_of(measure) + unit
