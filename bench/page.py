"""A results file of python -m bench gpu as a page that people can read, in Markdown."""

import json
import operator
import os

from bench import report
from runtime import plan

# Mode -> the title of its section, in the order of the page.
SECTIONS = {
    "job": "What could not even begin",
    "machine": "The machine",
    "numbers": "Gradients, compared with float32",
    "hooks": "Gradient hooks in a group of one",
    "ranks": "Two ranks on one GPU, compared with one rank",
    "watch": "What a step waits for",
    "tests": "Tests that need a GPU",
    "step": "Training steps beside open_clip",
    "run": "Whole runs of train.py on JPEGs",
    "loss": "The loss",
}

# What is shown of a row beside its value: key -> form.
DETAILS = {
    "norm_ratio": "norms {:.3f} : 1",
    "ratio": "{:.2f} x open_clip",
    "mfu": "MFU {:.0%}",
    "mfu_padded": "padded {:.0%}",
    "share_of_step": "{:.2%} of a step",
    "share_of_bench": "{:.0%} of the step alone",
    "buckets": "{} buckets",
    "seconds": "{:.0f} s",
}

# What is shown of a row that counts several things: key -> how many of them.
COUNTED = {"counts": 9, "places": 9, "reasons": 5, "parts_ms": 6, "longest_ms": 5}


def write(rows, out, plot):
    """Write the page of the results file `out`, with the picture `plot`, beside it, as .md."""
    with open(out) as f:
        document = json.load(f)
    lines = [
        "# The first half hour on a GPU",
        "",
        "Written by `python -m bench gpu`, which goes on with what is missing here.",
        "",
        *machine_lines(document),
        *goal_lines(rows),
        *failure_lines(rows),
    ]
    for mode, title in SECTIONS.items():
        lines += section_lines(title, rows, mode)

    picture = os.path.relpath(plot, os.path.dirname(out) or ".")
    lines += ["", f"![all of it in one picture]({picture})", ""]
    with open(os.path.splitext(out)[0] + ".md", "w") as f:
        f.write("\n".join(lines))


def machine_lines(document):
    machine = document["machine"]
    versions = [f"{name} {version}" for name, version in document["versions"].items() if version]
    return [
        f"* {machine['gpu'] or 'no GPU'}; {machine['cpu']}, {machine['cores']} cores",
        f"* {', '.join(versions)}",
        f"* commit {document['commit'] or 'not known'}, {document['date']}",
    ]


# ---- goals ----


def goal_lines(rows):
    """The table of the goals: a line for each, with what was measured."""
    lines = ["", "## Goals", "", "| goal | measured | |", "|---|---|---|"]
    for goal, measured, least, form in goals(rows):
        if measured is None:
            lines.append(f"| {goal} | not yet | |")
        else:
            verdict = "met" if measured >= least else "**missed**"
            lines.append(f"| {goal} | {form.format(measured)} | {verdict} |")
    return lines


def goals(rows):
    """A list of (the goal in words, what was measured or None, the least that meets it, form)."""
    result = []
    for model in ("ViT-B-32", "RN50", "ViT-B-16"):
        over_released = lead_over(rows, model, "released")
        over_theirs = lead_over(rows, model, "open_clip compiled")
        result.append((f"{model}: 1.5 times the released code", over_released, 1.5, "{:.2f} x"))
        result.append((f"{model}: 1.2 times compiled open_clip", over_theirs, 1.2, "{:.2f} x"))

    ours = fastest(step_rows(rows, "ViT-B-16", "ours compiled"))
    mfu = ours["mfu_padded"] if ours else None
    speed = ours["median"] if ours else None
    result.append(("ViT-B-16: 50 % MFU, counted at padded FLOPs", mfu, 0.5, "{:.0%}"))
    result.append(("ViT-B-16: more than 926 pairs/s on one H100", speed, 926, "{:.0f} pairs/s"))
    return result


def lead_over(rows, model, side):
    """How many times faster our compiled steps are, at the largest batch that both can do."""
    ours = {row["settings"]["batch"]: row for row in step_rows(rows, model, "ours compiled")}
    theirs = {row["settings"]["batch"]: row for row in step_rows(rows, model, side)}
    common = ours.keys() & theirs.keys()
    if not common:
        return None
    largest = max(common)
    return report.median_ratio(ours[largest]["all"], theirs[largest]["all"])


def step_rows(rows, model, side):
    """The side's rows of steps of this model, from batches on the host."""
    result = []
    for row in report.with_values(rows):
        is_step = row["mode"] == "step" and not row["settings"].get("on_device")
        if is_step and row["side"] == side and row["settings"]["model"] == model:
            result.append(row)
    return result


def fastest(rows):
    """The row with the highest speed, or None if there is none."""
    if not rows:
        return None
    return max(rows, key=operator.itemgetter("median"))


# ---- sections ----


def failure_lines(rows):
    """What failed, and what was measured and missed its goal."""
    lines = []
    for row in rows:
        name = f"{row['mode']} {name_of(row)}"
        if "failed" in row:
            lines.append(f"* {name}: {in_table(row['failed'])}")
        elif not row.get("met", True):
            lines.append(f"* {name}: {report.value_of(row)} instead of {row['goal']}")
    if not lines:
        return []
    return ["", "## What failed, or missed its goal", "", *lines]


def section_lines(title, rows, mode):
    """A mode's table, and the note that belongs to it."""
    rows = with_shares(rows, mode)
    if not rows:
        return []
    lines = ["", f"## {title}", "", "| what | value | goal | more |", "|---|---|---|---|"]
    for row in rows:
        verdict = row.get("goal", "")
        if "met" in row:
            verdict += ": met" if row["met"] else ": **missed**"
        lines.append(f"| {name_of(row)} | {result_of(row)} | {verdict} | {details_of(row)} |")
    if mode in report.NOTES:
        lines += ["", report.NOTES[mode]]
    return lines


def with_shares(rows, mode):
    """The mode's rows; the speed of a whole run also as a share of that of the step alone."""
    result = []
    for row in rows:
        if row["mode"] != mode:
            continue
        if mode == "run" and row["side"] == "speed":
            row = dict(row)
            step = fastest(step_rows(rows, row["settings"]["model"], "ours compiled"))
            if step:
                row["share_of_bench"] = row["median"] / step["median"]
        result.append(row)
    return result


def name_of(row):
    """The row's side and settings, in words."""
    settings = row["settings"]
    words = [str(settings[key]) for key in ("model", "batch") if key in settings]
    for key in ("b", "B", "workers"):
        if key in settings:
            words.append(f"{key}={settings[key]}")
    if settings.get("compiled"):
        words.append("compiled")
    if settings.get("on_device"):
        words.append("on the device")
    return " ".join([row["side"] + ("," if words else ""), *words])


def result_of(row):
    if "failed" in row:
        return "failed: " + in_table(row["failed"])
    if "skipped" in row:
        return "skipped: " + row["skipped"]
    return report.value_of(row)


def details_of(row):
    parts = [form.format(row[key]) for key, form in DETAILS.items() if key in row]
    if "peak_bytes" in row:
        parts.append(f"peak {plan.size(row['peak_bytes'])}")
    for key, most in COUNTED.items():
        for name, value in list(row.get(key, {}).items())[:most]:
            parts.append(f"{in_table(name)} {value:.4g}")
    parts += [in_table(name) for name in row.get("failed_tests", [])]
    return "; ".join(parts)


def in_table(text):
    """Text that can stand in a cell of a table."""
    return text.replace("|", "/")
