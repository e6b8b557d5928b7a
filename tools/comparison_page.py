"""What the records of a suite show, as tables for docs/results.md, and where these stand there."""

import os

from config import ConfigError
from tools.comparison import (
    array_of,
    bootstrap_interval,
    cells_of,
    differences_at,
    differences_of_seeds,
    factor,
    name_of,
    slopes_of,
    t_interval,
    xs_of,
)
from tools.comparison_picture import draw, has_picture


def report(suite, records, page):
    """Write a suite's tables into a page, and draw its picture if there is anything to draw."""
    cells = cells_of(suite, records)
    if cells and has_picture(suite):
        draw(suite, cells, suite.picture)
    write_section(page, suite.name, section(suite, records))
    print(f"{suite.name}: {len(records)} of {len(suite.runs)} runs, into {page}")


def section(suite, records):
    """What a page says about a suite: title, picture, tables. Markdown."""
    cells = cells_of(suite, records)
    command = f"`python -m tools.compare experiments/{suite.name}.py`"
    recorded = f"{len(records)} of {len(suite.runs)} runs are recorded; {command} makes the others."
    if not cells:
        return f"* {suite.title}: {recorded}"

    parts = [f"{suite.title}."]
    if has_picture(suite):
        parts.append(f"![{suite.title}](../experiments/{suite.name}.png)")
    if suite.best_of:
        parts += ["The best of each side:", best_table(suite, cells)]
    if suite.trend:
        parts += parts_of_trend(suite, records, cells)
    else:
        parts += parts_of_all(suite, cells)
    if len(records) < len(suite.runs):
        parts.append(recorded)
    return "\n\n".join(parts)


def parts_of_all(suite, cells):
    """The tables of all cases, and how to read them, a list of paragraphs."""
    parts = [values_table(suite, cells), ABOUT_VALUES]
    differences = differences_table(suite, cells)
    if differences:
        parts += ["Differences at the same x and seed:", differences]
    if differences and len(suite.seeds) > 1:
        parts.append(ABOUT_INTERVALS)
    return parts


def parts_of_trend(suite, records, cells):
    """Short tables with a column for each x, then those of all cases, folded. A list."""
    return [
        f"{name_of(suite.measure)} at each {suite.x_label}, ± the standard deviation over seeds:",
        values_grid(suite, cells),
        "Differences at the same seed, with the 95 % t interval of their mean:",
        differences_grid(suite, cells),
        f"The mean of these differences over all values of the {suite.x_label}, and their change "
        "with each of its doublings (a line fitted for each seed that has all of them):",
        trend_table(suite, records),
        "<details><summary>All numbers, with the bootstrap's intervals</summary>",
        *parts_of_all(suite, cells),
        "</details>",
    ]


# ---- tables ----

ABOUT_VALUES = (
    "± is the standard deviation over seeds, whose number is in parentheses. The best of a run's "
    "evaluations is known only with hindsight."
)

ABOUT_INTERVALS = (
    "The t interval, of 95 %, is the one to read: with few seeds the bootstrap's is hardly more "
    "than their range. Both are about other seeds, not about other test pictures."
)


def values_table(suite, cells):
    """A row for each case -> markdown. cells: of cells_of."""
    lines = heading(suite.x_label, "series", name_of(suite.measure), "best", "last tau")
    for cell in cells.values():
        last_tau = f"{array_of(cell.tau).mean():.3f}"
        values = mean_and_spread(suite.measure, cell.last)
        best = mean_of(suite.measure, cell.best)
        lines.append(row_text([str(cell.x), cell.series, values, best, last_tau]))
    return "\n".join(lines)


def differences_table(suite, cells):
    """A row for each x and each pair of series that have records there -> markdown, or ""."""
    lines = []
    for x in suite.xs:
        for series, other in suite.pairs:
            differences = differences_at(suite, cells, series, other, x)
            if len(differences):
                columns = mean_and_intervals(differences, t_interval, bootstrap_interval)
                lines.append(row_text([str(x), series, other, *columns]))
    if not lines:
        return ""
    columns = [suite.x_label, "series", "to", "difference", "t", "bootstrap"]
    return "\n".join([*heading(*columns), *lines])


def values_grid(suite, cells):
    """A row for each series, a column for each x -> markdown."""
    xs = xs_of(cells)
    lines = heading("series", *map(str, xs))
    for series in suite.series:
        of_series = [cells.get((series, x)) for x in xs]
        texts = [mean_and_spread(suite.measure, cell.last) if cell else "" for cell in of_series]
        lines.append(row_text([series, *texts]))
    return "\n".join(lines)


def differences_grid(suite, cells):
    """A row for each pair of series, a column for each x -> markdown."""
    xs = xs_of(cells)
    lines = heading("series", "to", *map(str, xs))
    for series, other in suite.pairs:
        columns = []
        for x in xs:
            differences = differences_at(suite, cells, series, other, x)
            columns.append(mean_with_interval(differences) if len(differences) else "")
        lines.append(row_text([series, other, *columns]))
    return "\n".join(lines)


def trend_table(suite, records):
    """Means over x and changes with x of the differences, for each measure -> markdown.

    One number for each seed, so that a suite's questions ("does it lead?", "does the lead shrink?")
    have one answer.
    """
    lines = heading("measure", "series", "to", "mean", "t", "change per doubling", "t")
    for measure in (suite.measure, *suite.also):
        cells = cells_of(suite, records, measure)
        for series, other in suite.pairs:
            xs, differences = differences_of_seeds(suite, cells, series, other)
            if len(xs) > 1 and len(differences):
                differences = differences * factor(measure)
                means = mean_and_intervals(differences.mean(axis=1), t_interval)
                slopes = mean_and_intervals(slopes_of(xs, differences), t_interval)
                lines.append(row_text([name_of(measure), series, other, *means, *slopes]))
    return "\n".join(lines)


def best_table(suite, cells):
    """The best series of each side of a tuning, a row for each x -> markdown."""
    lines = heading(suite.x_label, *suite.best_of)
    for x in suite.xs:
        columns = [str(x)]
        for side in suite.best_of:
            of_side = [
                cell for (name, at), cell in cells.items() if name.startswith(side) and at == x
            ]
            columns.append(best_of_cells(of_side, side, suite.measure))
        lines.append(row_text(columns))
    return "\n".join(lines)


def best_of_cells(cells, side, measure):
    """-> "25.3 (tau 0.10, lr 0.001; of 3)", the best of a side's cells; "" if there is none."""
    if not cells:
        return ""
    best = max(cells, key=lambda cell: array_of(cell.last).mean())
    setting = best.series.removeprefix(side).strip(" ,")
    return f"{mean_of(measure, best.last)} ({setting}; of {len(cells)})"


# ---- texts ----


def heading(*columns):
    """The first two lines of a table, a list."""
    return [row_text(columns), row_text(["---"] * len(columns))]


def row_text(columns):
    return "| " + " | ".join(columns) + " |"


def mean_and_intervals(differences, *intervals):
    """(n,) -> ["+2.9 (3)", "+1.6 to +4.2", ...], the mean and intervals; "" for those of one."""
    columns = [f"{signed(differences.mean())} ({len(differences)})"]
    for interval in intervals:
        columns.append(interval_text(interval(differences)) if len(differences) > 1 else "")
    return columns


def mean_with_interval(differences):
    """(n,) -> "+2.9 (+1.6 to +4.2)"; "+2.9 (one seed)"."""
    if len(differences) == 1:
        return f"{signed(differences[0])} (one seed)"
    return f"{signed(differences.mean())} ({interval_text(t_interval(differences))})"


def interval_text(interval):
    """(low, high) -> "+1.6 to +4.2"."""
    low, high = interval
    return f"{signed(low)} to {signed(high)}"


def signed(number):
    """A number with its sign and one decimal, but no sign for zero: -0.04 -> "0.0"."""
    text = f"{number:+.1f}"
    return text[1:] if float(text) == 0 else text


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


# ---- the page ----


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
