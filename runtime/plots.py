"""Pictures: the curves of one or many runs, and what an evaluation has found.

python -m runtime.plots runs/emoji_v3                        # into runs/emoji_v3/curves.png
python -m runtime.plots runs/emoji_v3 runs/emoji_openclip    # into curves.png, here
"""

import argparse
import json
import os
import sys
import textwrap
import unicodedata
from collections import Counter
from itertools import chain
from typing import NamedTuple

# ---- curves ----

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


class Curve(NamedTuple):
    """One quantity of one run.

    label: of the legend. key: of metrics.jsonl. rows: of metrics.jsonl, all of the run.
    """

    label: str
    key: str
    rows: list


def plot(folders, out):
    """Draw the curves of the runs in `folders` into one picture -> its path, `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {}
    for folder, name in zip(folders, run_names(folders)):
        runs[name] = read_metrics(folder)
    panels = choose_panels(runs)

    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(13, 7), layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels):
        draw_panel(axis, title, curves)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)

    # The first panel may have a curve for each set, the second has one for each run.
    for axis in axes.flat[:2]:
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def run_names(folders):
    """-> a name for each folder: its last part, or its whole path where several end alike."""
    paths = [os.path.normpath(folder) for folder in folders]
    last_parts = [os.path.basename(os.path.abspath(path)) for path in paths]
    count = Counter(last_parts)

    names = []
    for path, last_part in zip(paths, last_parts):
        names.append(last_part if count[last_part] == 1 else path)
    return names


def read_metrics(folder):
    """-> the rows of metrics.jsonl, dicts. A run that was killed may have left half of a line."""
    rows = []
    with open(os.path.join(folder, "metrics.jsonl"), errors="replace") as f:
        for line in f:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def choose_panels(runs):
    """-> [(title, [Curve])]: the evaluations, if there are any, then PANELS, as there is room."""
    panels = []
    evaluations = evaluation_curves(runs)
    if evaluations:
        panels.append(("unseen data", evaluations))
    for key, title in PANELS:
        panels.append((title, [Curve(name, key, rows) for name, rows in runs.items()]))
    return panels[: ROWS * COLUMNS]


def evaluation_curves(runs):
    """-> a Curve for each set of each run."""
    curves = []
    for run, rows in runs.items():
        for set_name, key in main_measures(rows).items():
            if not set_name:
                label = run
            elif len(runs) == 1:
                label = set_name
            else:
                label = f"{run}, {set_name}"
            curves.append(Curve(label, key, rows))
    return curves


def main_measures(rows):
    """-> {name of a set, "" if it has none: the key of its top-1 or, without classes, a recall}."""
    keys = sorted(set(chain.from_iterable(rows)))
    found = {}
    for measure in ("text_to_image_R@1", "zeroshot_top1"):  # a set with both is shown by the latter
        for key in keys:
            if key.startswith("eval/") and key.endswith(f"/{measure}"):
                set_name = key.removeprefix("eval/").removesuffix(measure).rstrip("/")
                found[set_name] = key
    return found


def draw_panel(axis, title, curves):
    """One quantity of all runs, against the step."""
    for curve in curves:
        rows = [row for row in curve.rows if row.get(curve.key) is not None]
        steps = [row["step"] for row in rows]
        values = [row[curve.key] for row in rows]
        draw_curve(axis, curve.key, curve.label, steps, values)

    measures = {curve.key.rpartition("/")[2] for curve in curves}
    if curves[0].key.startswith("eval/"):
        axis.set_ylim(bottom=0)
    axis.set(title=title, xlabel="step", ylabel=", ".join(sorted(measures)))
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


# ---- what an evaluation has found ----


def write_picture(draw, content, path):
    """Call draw(content, PATH), which writes a PNG: it is complete at `path`, or as it was.

    A picture that cannot be drawn is told of: the results must not be lost for it.
    """
    try:
        draw(content, path + ".partial")
        os.replace(path + ".partial", path)
    except Exception as error:
        print(f"{path} could not be drawn: {type(error).__name__}: {error}", flush=True)


def draw_found(rows, path):
    """Draw a line per row into a PNG: its text, then its images, framed green where they are right.

    rows: list of objects with `text`, str in any script; `images`, list of uint8 (3, S, S); and
    `right`, list of bool. path: of the PNG, whatever its name ends with.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts, families = drawable([row.text for row in rows])
    columns = len(rows[0].images)
    figure, axes = plt.subplots(
        len(rows),
        1 + columns,
        figsize=(2.6 + 1.3 * columns, 1.35 * len(rows)),
        squeeze=False,
        width_ratios=[2.2] + [1] * columns,
        layout="constrained",
    )
    for row, text, line in zip(rows, texts, axes):
        draw_text(line[0], text, families)
        for axis, image, right in zip(line[1:], row.images, row.right):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            for edge in axis.spines.values():
                if right:
                    edge.set(color="#2a9d3a", linewidth=4)
                else:
                    edge.set(color="#cccccc", linewidth=1)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def draw_text(axis, text, families):
    """A text on up to four lines, in place of an axis. families: names of fonts."""
    wide = sum(is_wide(character) for character in text)
    width = 32 * len(text) // (len(text) + wide) if text else 32
    lines = textwrap.fill(text, width, max_lines=4, placeholder=" ...")

    # In a caption $ is a currency, not the beginning of a formula.
    axis.text(
        0.95, 0.5, lines, va="center", ha="right", fontsize=10, family=families, parse_math=False
    )
    axis.axis("off")


def is_wide(character):
    """Whether a character takes the space of two, as Chinese ones do."""
    return character == MISSING or unicodedata.east_asian_width(character) in "WF"


# ---- text in any script ----

DEFAULT_FONT = "DejaVu Sans"  # comes with matplotlib: Latin, Greek, Cyrillic, Arabic, some symbols
MISSING = "\ufffd"  # a question mark in a diamond, which it has


def drawable(texts):
    """Texts in any script -> (the same, fit to be drawn; names of the fonts that have them).

    Control characters become spaces. What no installed font has becomes a question mark in a
    diamond, and a line says which package to install.
    """
    texts = [without_controls(text) for text in texts]
    families, missing = find_fonts(set("".join(texts)))

    replacements = {}
    for character in missing:
        # Marks of format, such as the direction of writing, are not seen anyway.
        is_format = unicodedata.category(character) == "Cf"
        replacements[ord(character)] = "" if is_format else MISSING
    texts = [text.translate(replacements) for text in texts]

    packages = sorted({package_for(character) for character in missing} - {""})
    if packages:
        print(
            f"the picture lacks characters that no installed font has: install "
            f"{' and '.join(packages)} (packages of Debian and Ubuntu)",
            flush=True,
        )
    return texts, families


def without_controls(text):
    """The text with a space for each control character and each end of a line."""
    characters = []
    for character in text:
        is_control = unicodedata.category(character) in ("Cc", "Zl", "Zp")
        characters.append(" " if is_control else character)
    return "".join(characters)


def find_fonts(characters):
    """A set of characters -> (names of the fonts that have them, set of those that none has)."""
    from matplotlib import font_manager

    families = [DEFAULT_FONT]
    missing = characters - characters_of(font_manager.findfont(DEFAULT_FONT))
    known = {font.fname for font in font_manager.fontManager.ttflist}

    # matplotlib keeps a list of fonts, which does not know those that were installed later.
    for path in sorted(font_manager.findSystemFonts()):
        if not missing:
            break
        found = missing & characters_of(path)
        if found:
            if path not in known:
                font_manager.fontManager.addfont(path)
            families.append(font_manager.get_font(path).family_name)
            missing -= found
    return families, missing


def characters_of(path):
    """The file of a font -> set of its characters; empty if matplotlib cannot draw with it."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
    except (OSError, RuntimeError):
        return set()

    # Fonts made of bitmaps cannot be scaled. "Last Resort" has a box for every character.
    if not font.scalable or "resort" in font.family_name.lower():
        return set()
    return {chr(code) for code in font.get_charmap()}


def package_for(character):
    """The package of fonts, as Debian and Ubuntu name it, that has a character; "" if unknown."""
    name = unicodedata.name(character, "")
    category = unicodedata.category(character)
    if name.startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "FULLWIDTH", "IDEOGRAPHIC")):
        return "fonts-noto-cjk"
    if category in ("So", "Sk"):
        return "fonts-symbola"
    if category[0] in "LMN":
        return "fonts-noto-core"
    return ""


# ---- the command ----


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m runtime.plots", description="Curves of one or many runs."
    )
    parser.add_argument("runs", nargs="+", help="run folders, each with a metrics.jsonl")
    parser.add_argument(
        "--out", help="the picture (default: curves.png, in the folder of a single run or here)"
    )
    arguments = parser.parse_args(argv)

    for run in arguments.runs:
        if not os.path.exists(os.path.join(run, "metrics.jsonl")):
            sys.exit(f"error: no metrics.jsonl in {run}")
        if not read_metrics(run):
            sys.exit(f"error: {run} has no rows in its metrics.jsonl yet")

    out = arguments.out
    if not out:
        out = os.path.join(arguments.runs[0] if len(arguments.runs) == 1 else "", "curves.png")
    try:
        print(plot(arguments.runs, out))
    except OSError as error:
        sys.exit(f"error: {out} cannot be written: {error.strerror or error}")


if __name__ == "__main__":
    main(sys.argv[1:])
