"""What tools/bias.py has measured: lines, a table and a picture, from its records alone."""

from tools.comparison_page import row_text, write_section

# How an estimate is drawn: (its name in a record, in words, colour). Stored u is in the table only.
DRAWN = (("batch", "g of the batch", "#d1701f"), ("u", "u", "#1f5fa8"))
SIDES = ("image", "text")

COLUMNS = 3  # of the picture, a run each

EXPLANATION = (
    "An error is log(eps + estimate) - log(eps + true g): the weight of an anchor in the gradient "
    "is exp(-error) times what it should be, on average the factor in the column weight. Above: "
    "medians and bands from 5 % to 95 %, means over the two sides. Below: image anchors, at the "
    "last checkpoint that was measured. The table is of the same checkpoint, and has means over "
    "the two sides. The divergence is what v3's temperature goes by, which is at rest where it is "
    "rho; the last column has it without any estimate. `tools/bias.py` says how all of this is "
    "defined."
)


# ---- numbers ----


def line(row):
    """A measured checkpoint, of bias.row_of, in words."""
    text = f"  epoch {row['epoch']:5.1f}  gamma {row['gamma']:.2f}"
    for name in names_of(row):
        low, _, _, _, high = mean_of(row, name, "quantiles")
        text += f"  {name} {mean_of(row, name, 'mean'):+.3f} ({low:+.2f} to {high:+.2f})"
    return text


def names_of(row):
    """The estimates that a checkpoint has: batch and, with state, u and stored u."""
    return [name for name in ("batch", "u", "stored u") if name in row["image"]]


def mean_of(row, name, statistic):
    """A statistic of an estimate, a number or a list of them, as its mean over the two sides."""
    image, text = (row[side][name][statistic] for side in SIDES)
    if isinstance(image, list):
        return [(x + y) / 2 for x, y in zip(image, text)]
    return (image + text) / 2


def title_of(run):
    return f"{run.series}, batch {run.config.batch_size}"


# ---- the table ----


def report(suite, found, page):
    """Write the table into a page, and draw the picture if there is anything to draw.

    suite: suites.Suite. found: {name of a run: its record}.
    """
    if found:
        draw(suite, found, suite.picture)
    write_section(page, suite.name, section(suite, found))
    print(f"{suite.name}: {len(found)} of {len(suite.runs)} runs, into {page}")


def section(suite, found):
    """What a page says: title, picture, table. Markdown."""
    recorded = (
        f"{len(found)} of {len(suite.runs)} runs are recorded; "
        "`python -m tools.bias --experiment` makes the others."
    )
    if not found:
        return f"{suite.title}.\n\n{recorded}"

    parts = [
        f"{suite.title}.",
        f"![{suite.title}](../experiments/measured/{suite.name}.png)",
        table(suite, found),
        EXPLANATION,
    ]
    if len(found) < len(suite.runs):
        parts.append(recorded)
    return "\n\n".join(parts)


def table(suite, found):
    """A row for each estimate of each run -> markdown."""
    heading = ["run", "gamma", "estimate", "mean error", "deviation", "5 % to 95 %", "weight"]
    heading += ["rank correlation", "divergence", "true divergence"]
    lines = [row_text(heading), row_text(["---"] * len(heading))]
    for run in suite.runs:
        if run.name in found:
            row = found[run.name]["bias"][-1]
            for name in names_of(row):
                lines.append(row_text(columns_of(run, row, name)))
    return "\n".join(lines)


def columns_of(run, row, name):
    """The columns of an estimate in the row of a run, texts."""
    low, _, _, _, high = mean_of(row, name, "quantiles")
    return [
        title_of(run),
        f"{row['gamma']:.2f}",
        name,
        f"{mean_of(row, name, 'mean'):+.3f}",
        f"{mean_of(row, name, 'deviation'):.3f}",
        f"{low:+.2f} to {high:+.2f}",
        f"{mean_of(row, name, 'weight'):.2f}",
        f"{mean_of(row, name, 'rank_correlation'):.2f}",
        f"{mean_of(row, name, 'divergence'):.2f}",
        f"{mean_of(row, 'true', 'divergence'):.2f}",
    ]


# ---- the picture ----


def draw(suite, found, path):
    """Draw two panels for each run into a PNG: errors along training, and the last estimates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [run for run in suite.runs if run.name in found]
    columns = min(COLUMNS, len(runs))
    lines = -(-len(runs) // columns)
    figure, axes = plt.subplots(
        2 * lines,
        columns,
        figsize=(3.8 * columns, 6.2 * lines),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)

    largest = max(largest_error(found[run.name]["bias"]) for run in runs)
    limit = 1.4 * largest  # with room for the legend
    for number, run in enumerate(runs):
        line, column = divmod(number, columns)
        record = found[run.name]
        draw_errors(axes[2 * line, column], title_of(run), record["bias"], limit)
        draw_points(axes[2 * line + 1, column], record["points"])

    # Without the version of matplotlib, which the file otherwise names.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def largest_error(rows):
    """The end, farthest from 0, of the bands of one run."""
    ends = []
    for row in rows:
        for name, _, _ in DRAWN:
            if name in names_of(row):
                low, _, _, _, high = mean_of(row, name, "quantiles")
                ends += [abs(low), abs(high)]
    return max(ends)


def draw_errors(axis, title, rows, limit):
    """The errors of one run along training: median, and a band from 5 to 95 %.

    limit: the largest error that the panel shows, the same for all runs.
    """
    epochs = [row["epoch"] for row in rows]
    for name, words, color in DRAWN:
        if name in names_of(rows[-1]):
            quantiles = [mean_of(row, name, "quantiles") for row in rows]
            low, _, median, _, high = zip(*quantiles)
            axis.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
            axis.plot(epochs, median, "o-", markersize=3, color=color, label=words)

    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title=title, xlabel="epoch", ylabel="error of log(eps + g)", visible=True)
    axis.set_xlim(left=0)
    axis.set_ylim(-limit, limit)
    axis.legend(loc="upper left", ncols=2, fontsize=8)
    axis.grid(alpha=0.3)


def draw_points(axis, points):
    """The estimates of the image anchors at the last checkpoint, against the truth."""
    true = points["true"]
    for name, _, color in DRAWN:
        if name in points:
            axis.plot(true, points[name], ".", markersize=2, alpha=0.5, color=color)

    ends = [min(true), max(true)]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.set(xlabel="log(eps + g), true", ylabel="estimated", visible=True)
    axis.grid(alpha=0.3)
