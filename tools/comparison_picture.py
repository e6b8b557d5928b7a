"""The picture of a suite: the measure against x, differences with intervals, learning curves."""

import numpy as np

from tools.comparison import (
    array_of,
    differences_at,
    factor,
    name_of,
    t_interval,
    xs_of,
    xs_of_both,
)

MAX_LINES = 10  # of a picture: matplotlib has no more colours


def has_picture(suite):
    """Whether a picture of the suite could be read. A tuning has tables only."""
    return len(suite.series) <= MAX_LINES


def draw(suite, cells, path):
    """Draw the measure against x into a PNG.

    With suite.trend, a second panel has the differences to the first reference of each series;
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

    for number, series in enumerate(suite.series):
        points = []
        for cell in cells.values():
            if cell.series == series:
                at_last_tau = series in suite.at_last_tau
                place = array_of(cell.tau).mean() if at_last_tau else places[cell.x]
                values = array_of(cell.last) * factor(suite.measure)
                points.append((place, values))
        if points:
            draw_series(axis, series, f"C{number}", points)

    set_x(axis, suite, places)


def places_of(xs):
    """{x: its place on the axis}: its own number or, if there are words, its number in the list."""
    xs = list(dict.fromkeys(xs))
    if any(isinstance(x, str) for x in xs):
        return {x: number for number, x in enumerate(xs)}
    return {x: x for x in sorted(xs)}


def draw_series(axis, name, color, points):
    """A line and its points. points: [(place on the axis, a value for each seed (n,))]."""
    points = sorted(points, key=lambda point: point[0])
    places = [place for place, _ in points]
    means = [values.mean() for _, values in points]
    axis.plot(places, means, color=color, label=name)

    for place, values in points:
        same_place = np.full(len(values), place)
        axis.plot(same_place, values, "o", markersize=3.5, alpha=0.6, color=color)


def draw_differences(axis, suite, cells):
    """The mean paired difference to the first reference at each x, with its 95 % interval (t).

    A series has the colour that it has in the first panel. Its points stand a little beside those
    of the others, so that no interval hides another.
    """
    width = 0.025  # of the distance between two series, as a share of x
    for number, (series, other) in enumerate(first_pairs(suite)):
        places, means, halves = [], [], []
        for x in xs_of_both(suite, cells, series, other):
            differences = differences_at(suite, cells, series, other, x)
            if len(differences) > 1:
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
    set_x(axis, suite, {x: x for x in xs_of(cells)})
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.25 * (high - low))  # room for the legend
    axis.legend(fontsize=7, loc="upper right")


def first_pairs(suite):
    """The pairs of a suite (series, other), the first of each series: a line has one colour."""
    first = {}
    for series, other in suite.pairs:
        first.setdefault(series, other)
    return list(first.items())


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
