"""The curves of one or many runs.

python -m runtime.plots runs/emoji_v3 runs/emoji_openclip --out=curves.png
"""

import argparse
import json
import os
import sys

ROWS, COLUMNS = 2, 3  # panels of a figure

# After the evaluation: keys of metrics.jsonl and the titles of their panels.
PANELS = (
    ("objective", "the algorithm's own objective"),
    ("mbcl", "in-batch contrastive loss (mbcl)"),
    ("tau", "temperature"),
    ("gamma", "inner learning rate gamma"),
    ("lr", "learning rate"),
    ("samples_per_second", "speed"),
)

# These vary from step to step, so they are smoothed.
NOISY = ("objective", "mbcl", "samples_per_second")


def plot(folders, out):
    """Draw the curves of the runs in `folders` into one picture -> its path, `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {run_name(folder): read_metrics(folder) for folder in folders}
    panels = choose_panels(runs)

    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(13, 7), layout="constrained")
    for axis, (key, title) in zip(axes.flat, panels):
        draw_panel(axis, key, title, runs)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)

    axes.flat[0].legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def run_name(folder):
    return os.path.basename(os.path.normpath(folder))


def read_metrics(folder):
    """-> the rows of metrics.jsonl, dicts."""
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def choose_panels(runs):
    """-> [(key, title)]: one evaluation, if there is any, then PANELS as far as there is room."""
    evaluations = set()
    for rows in runs.values():
        for row in rows:
            evaluations.update(key for key in row if key.startswith("eval/"))

    panels = list(PANELS)
    if evaluations:
        key = "eval/zeroshot_top1"
        if key not in evaluations:
            key = min(evaluations)
        panels.insert(0, (key, "unseen data"))
    return panels[: ROWS * COLUMNS]


def draw_panel(axis, key, title, runs):
    """One quantity of all runs, against the step."""
    for name, rows in runs.items():
        rows = [row for row in rows if row.get(key) is not None]
        steps = [row["step"] for row in rows]
        values = [row[key] for row in rows]
        draw_curve(axis, key, name, steps, values)

    if key.startswith("eval/"):
        axis.set_ylim(bottom=0)
    axis.set(title=title, xlabel="step", ylabel=key.removeprefix("eval/"))
    axis.grid(alpha=0.3)


def draw_curve(axis, key, name, steps, values):
    """One quantity of one run. A long noisy one is drawn faintly, and its running mean on top."""
    width = len(steps) // 50
    if key in NOISY and len(steps) > 50:
        (line,) = axis.plot(steps, values, alpha=0.25)
        axis.plot(steps, running_mean(values, width), color=line.get_color(), label=name)
    else:
        marker = "o" if key.startswith("eval/") else None
        axis.plot(steps, values, marker=marker, label=name)


def running_mean(values, width):
    """The mean over `width` values on either side, and the value itself; fewer at the ends."""
    means = []
    for i in range(len(values)):
        window = values[max(0, i - width) : i + width + 1]
        means.append(sum(window) / len(window))
    return means


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m runtime.plots", description="Curves of one or many runs."
    )
    parser.add_argument("runs", nargs="+", help="run folders, each with a metrics.jsonl")
    parser.add_argument("--out", default="curves.png", help="the picture (default: %(default)s)")
    arguments = parser.parse_args(argv)

    missing = []
    for run in arguments.runs:
        if not os.path.exists(os.path.join(run, "metrics.jsonl")):
            missing.append(run)
    if missing:
        sys.exit(f"error: no metrics.jsonl in {', '.join(missing)}")
    print(plot(arguments.runs, arguments.out))


if __name__ == "__main__":
    main(sys.argv[1:])
