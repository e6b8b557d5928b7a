"""All rows of a results file as one picture of nine panels, one function each.

A panel is given its axis and the rows of its mode; without rows it stays empty.
"""

import statistics
from collections import defaultdict
from itertools import chain

from bench import report

BAR_WIDTH = 0.8  # of all bars of a group together
LINK_STYLES = (":", "--", "-")
SMALL = 8  # font size, points


def draw(rows, path):
    """Draw the rows into the PNG file at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_mode = defaultdict(list)
    for row in report.with_values(rows):
        by_mode[row["mode"]].append(row)
    projected = [row for row in by_mode["plan"] if "nodes" in row]

    figure, axes = plt.subplots(3, 3, figsize=(15, 12.5), layout="constrained")
    step_speed(axes[0, 0], by_mode["step"])
    step_memory(axes[0, 1], by_mode["step"])
    loader_speed(axes[0, 2], by_mode["loader"])
    loss_time(axes[1, 0], by_mode["loss"])
    loss_memory(axes[1, 1], by_mode["loss"])
    bytes_sent(axes[1, 2], by_mode["wire"])
    step_parts(axes[2, 0], by_mode["breakdown"])
    projection(axes[2, 1], projected)
    zero_shot_speed(axes[2, 2], by_mode["zeroshot"])
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


# ---- the panels ----


def step_speed(axis, rows):
    drawn = grouped_bars(axis, rows, step_group, [row["median"] for row in rows])
    label_ratios(axis, drawn)
    axis.set(title="training step", ylabel="samples/s")
    legend(axis)


def step_memory(axis, rows):
    grouped_bars(axis, rows, step_group, [row["peak_bytes"] / 1e9 for row in rows])
    axis.set(title="memory at its peak", ylabel="GB")
    legend(axis)


def loader_speed(axis, rows):
    drawn = grouped_bars(axis, rows, loader_group, [row["median"] for row in rows])
    label_ratios(axis, drawn)
    axis.set(title="tar to ready batch", ylabel="images/s")
    # Room for the legend above the bars.
    axis.margins(y=0.3)
    legend(axis, "upper center", columns=2)


def loss_time(axis, rows):
    lines_over_global_batch(axis, rows, [row["median"] for row in rows])
    axis.set(title=f"time of the loss, b = {usual_b(rows)}", ylabel="ms")
    legend(axis)


def loss_memory(axis, rows):
    megabytes = [(row["peak_bytes"] - row["gathered_bytes"]) / 1e6 for row in rows]
    lines_over_global_batch(axis, rows, megabytes)
    title = f"its memory at the peak, beyond the features, b = {usual_b(rows)}"
    axis.set(title=title, ylabel="MB")
    legend(axis)


def bytes_sent(axis, rows):
    """A line for each side, on it a point for each purpose."""
    purposes = distinct(chain.from_iterable(row["at_8_ranks"] for row in rows))
    purposes = [purpose for purpose in purposes if purpose != "batch"]
    for number, purpose in enumerate(purposes):
        megabytes = []
        lines = []
        for line, row in enumerate(rows):
            if row["at_8_ranks"].get(purpose):
                megabytes.append(row["at_8_ranks"][purpose] / 1e6)
                lines.append(line)
        axis.scatter(megabytes, lines, s=60, color=f"C{number}", label=purpose)

    batch = rows[0]["at_8_ranks"]["batch"] if rows else 0
    title = f"sent in a step by one of 8 ranks, {batch} pairs each"
    axis.set(title=title, xlabel="MB", xscale="log")
    axis.set_yticks(range(len(rows)), [side_and_wire(row) for row in rows], fontsize=SMALL)
    # From above, with room for the legend.
    axis.set_ylim(len(rows) - 0.5, -2.5)
    legend(axis, "upper center", columns=4)


def step_parts(axis, rows):
    """A stacked bar for each side, and below it a thin one for communication that is hidden."""
    rows = [row for row in rows if row["settings"]["bucket_mb"] == 25]
    positions = range(len(rows))
    left = [0.0] * len(rows)
    parts = distinct(chain.from_iterable(row["parts_ms"] for row in rows))
    for part in parts:
        values = [row["parts_ms"].get(part, 0) for row in rows]
        if part == "hidden":
            below = [position + 0.38 for position in positions]
            axis.barh(below, values, 0.12, color="black", label="communication, hidden")
        else:
            axis.barh(positions, values, 0.6, left=left, label=part)
            left = [start + value for start, value in zip(left, values)]

    axis.set_yticks(positions, [side_and_wire(row) for row in rows], fontsize=SMALL)
    axis.invert_yaxis()
    longest = max((row["median"] for row in rows), default=1)
    axis.set(title="where a step's time goes", xlabel="ms", xlim=(0, 1.25 * longest))
    legend(axis, "upper right")


def zero_shot_speed(axis, rows):
    """Of the evaluations by turns."""
    rows = [row for row in rows if row["unit"] != "s"]
    drawn = grouped_bars(axis, rows, zero_shot_group, [row["median"] for row in rows])
    label_ratios(axis, drawn)
    axis.set(title="zero-shot evaluation", ylabel="images/s, texts/s")
    legend(axis)


def projection(axis, rows):
    """Efficiency over the number of nodes: a colour for each side, a style for each link."""
    sides = distinct(row["side"] for row in rows)
    links = sorted(distinct(row["settings"]["gbit"] for row in rows))
    for number, side in enumerate(sides):
        for link, style in zip(links, LINK_STYLES):
            nodes = []
            efficiency = []
            for row in rows:
                if row["side"] == side and row["settings"]["gbit"] == link:
                    nodes.append(row["nodes"])
                    efficiency.append(row["efficiency"])
            label = f"{side}, {link} Gbit/s"
            axis.plot(nodes, efficiency, style, color=f"C{number}", label=label)

    B = rows[0]["settings"]["B"] if rows else 0
    title = f"projected share of computing, B = {B:,}"
    axis.set(title=title, xlabel="nodes of 8 GPUs", xscale="log", ylim=(0, 1.02))
    ticks = [1, 2, 4, 8, 16, 32, 64]
    axis.set_xticks(ticks, ticks)
    legend(axis)


# ---- what several panels use ----


def distinct(values):
    """The values without repetitions, in the order in which they first appear."""
    return list(dict.fromkeys(values))


def legend(axis, location="best", columns=1):
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=7, loc=location, ncols=columns)


def grouped_bars(axis, rows, group_of, values):
    """Groups of bars, in each one of every side; group_of(row) is a group's label.

    Returns {side: (its bars, their rows)}.
    """
    groups = distinct(group_of(row) for row in rows)
    sides = distinct(row["side"] for row in rows)
    width = BAR_WIDTH / max(1, len(sides))
    drawn = {}
    for number, side in enumerate(sides):
        offset = (number - (len(sides) - 1) / 2) * width
        side_rows = []
        positions = []
        heights = []
        for row, value in zip(rows, values):
            if row["side"] == side:
                side_rows.append(row)
                positions.append(groups.index(group_of(row)) + offset)
                heights.append(value)
        bars = axis.bar(positions, heights, width, label=side)
        drawn[side] = bars, side_rows

    axis.set_xticks(range(len(groups)), groups, fontsize=SMALL)
    return drawn


def label_ratios(axis, drawn):
    """Write the ratio to open_clip above each of our bars."""
    for side, (bars, rows) in drawn.items():
        if side.startswith("ours"):
            ratios = [f"{row['ratio']:.2f}x" if "ratio" in row else "" for row in rows]
            axis.bar_label(bars, ratios, fontsize=SMALL)


def step_group(row):
    settings = row["settings"]
    lines = [settings["model"], f"batch {settings['batch']}"]
    if settings["precision"] != "fp32":
        lines.append(settings["precision"])
    if settings.get("on_device"):
        lines.append("on the device")
    return "\n".join(lines)


def loader_group(row):
    settings = row["settings"]
    lines = settings["source"].split(" ", 1)
    lines.append(f"{settings['workers']} workers" if settings["workers"] else "one core")
    return "\n".join(lines)


def zero_shot_group(row):
    kind = row["unit"].removesuffix("/s")
    return f"{row['settings']['model']}\n{kind}"


def side_and_wire(row):
    return f"{row['side']} {row['settings']['grad_wire']}"


def usual_b(rows):
    """The b of most rows of the loss: of those that differ in B alone."""
    if not rows:
        return 0
    return statistics.mode([row["settings"]["b"] for row in rows])


def lines_over_global_batch(axis, rows, values):
    """A line for each side, of the rows with the usual b."""
    usual = usual_b(rows)
    for side in distinct(row["side"] for row in rows):
        points = []
        for row, value in zip(rows, values):
            if row["side"] == side and row["settings"]["b"] == usual:
                points.append((row["settings"]["B"], value))
        points.sort()
        x = [B for B, _ in points]
        y = [value for _, value in points]
        axis.plot(x, y, marker="o", label=side)
    axis.set(xlabel="global batch B", ylim=(0, None))
