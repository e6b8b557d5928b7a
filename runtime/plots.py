"""The curves of one or many runs.

python -m runtime.plots runs/emoji_v3 runs/emoji_openclip --out=curves.png
"""

import argparse
import json
import os
import sys

NOISY = ("objective", "mbcl", "samples_per_second")


def plot(folders, out):
    """Curves of the runs in `folders` -> one picture at `out` (its path is returned): evaluation, objective, MBCL, tau, gamma, speed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {}
    for folder in folders:
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            runs[os.path.basename(os.path.normpath(folder))] = [json.loads(line) for line in f]
    evals = sorted(
        {key for rows in runs.values() for row in rows for key in row if key.startswith("eval/")}
    )
    panels = (
        [("eval/zeroshot_top1" if "eval/zeroshot_top1" in evals else evals[0], "unseen data")]
        if evals
        else []
    )
    panels += [
        ("objective", "the algorithm's own objective"),
        ("mbcl", "in-batch contrastive loss (mbcl)"),
        ("tau", "temperature"),
        ("gamma", "inner learning rate gamma"),
        ("lr", "learning rate"),
    ]
    panels += [("samples_per_second", "speed")][: 6 - len(panels)]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (key, title) in zip(axes.flat, panels):
        for name, rows in runs.items():
            x, y = zip(
                *(
                    [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                    or [((), ())]
                )
            )
            if (
                key in NOISY and len(x) > 50
            ):  # a faint line of what was measured, a firm one of its running mean
                (line,) = axis.plot(x, y, alpha=0.25)
                width = len(x) // 50
                parts = [y[max(0, i - width) : i + width + 1] for i in range(len(y))]
                axis.plot(
                    x, [sum(part) / len(part) for part in parts], color=line.get_color(), label=name
                )
            else:
                axis.plot(x, y, marker="o" if key.startswith("eval/") else None, label=name)
        if key.startswith("eval/"):
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="step", ylabel=key.removeprefix("eval/"))
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Curves of one or many runs.")
    parser.add_argument("runs", nargs="+", help="run folders, each with a metrics.jsonl")
    parser.add_argument("--out", default="curves.png")
    arguments = parser.parse_args()
    missing = [
        run for run in arguments.runs if not os.path.exists(os.path.join(run, "metrics.jsonl"))
    ]
    if missing:
        sys.exit(f"error: no metrics.jsonl in {', '.join(missing)}")
    print(plot(arguments.runs, arguments.out))
