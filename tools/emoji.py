"""The emoji set: five drawing styles to train on, a sixth held out for zero-shot classification.

A caption is the icon's name ("man rowing boat, light skin tone"), so a concept comes back in
several styles.

tune/: the training set once more, in two parts: four styles to train on, and in place of the test
the fifth. Settings are chosen on it, so that the test style stays unseen by whoever chooses, too.
"""

import collections
import re
import shutil
from pathlib import Path

import resvg_py
from tqdm import tqdm

from tools.drawings import SIZE, draw, fetch, read_json, rendering_processes, visible_icons
from tools.picture_shards import SEED, read_shards, write_shards, write_test

SCOPE = "@iconify-json"
# Pinned, so that everyone trains on the same pictures. To move to newer drawings, ask
# `npm view @iconify-json/noto version`, change the number here and run again with --force.
TRAIN = {
    "noto": "1.2.9",
    "openmoji": "1.2.29",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "noto-v1": "1.2.5",
}
TEST = {"twemoji": "1.2.5"}

# The training style that `tune/` holds out. It stands to the other four as the test style stands to
# all five: 98 % of its captions are known (of twemoji's, all but four), and its nearest style, noto
# for both, is as near (by pixels, the nearest of 1,014 pictures has the same name for 35 %, for
# twemoji 41 %). Openmoji is unlike any other style (12 %), and a third of its captions are its own.
# Noto and noto-v1 are two editions of one set.
TUNE = "fluent-emoji-flat"

PER_SHARD = 1000  # samples

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)-skin-tone")
TONE_WITHOUT_SUFFIX = re.compile(r"-(medium-)?(light|medium|dark)$")

# The first line of the set's README.md, by which a finished set is recognised.
TITLE = "# emoji: image-text pairs for CLIP training"


# ---- captions ----


def icons_of(icon_set: dict) -> list[dict]:
    """Icons {name, caption, body, left, top, width, height}, the plainest captions first."""
    visible = visible_icons(icon_set)
    icons = []
    for name, icon in visible.items():
        caption = caption_of(with_tone_suffix(name, visible))
        icons.append({**icon, "name": name, "caption": caption})
    return sorted(icons, key=lambda icon: (icon["caption"].count(" "), icon["caption"]))


def with_tone_suffix(name: str, names: dict) -> str:
    """The name, with "-skin-tone" where a set leaves it out: fluent writes "thumbs-up-dark".

    It is a tone only if the set has all five of them: "police-car-light" is a light.
    """
    stem = TONE_WITHOUT_SUFFIX.sub("", name)
    if stem != name and all(f"{stem}-{tone}" in names for tone in TONES):
        return name + "-skin-tone"
    return name


def caption_of(name: str) -> str:
    """The caption that an icon's name spells, skin tones moved to the end.

    "man-rowing-boat-light-skin-tone" -> "man rowing boat, light skin tone". Otherwise names stay as
    their makers wrote them ("flag for malta" in one set, "flag malta" in another), as captions on
    the web do.
    """
    tones = [f"{tone} skin tone" for tone in TONE.findall(name)]
    parts = [TONE.sub("", name), *tones]
    return ", ".join(parts).replace("-", " ")


# ---- the set ----


def build(out: Path, cache: Path, workers: int) -> None:
    """Build the emoji set in the empty folder `out`; `cache` keeps the downloaded packages.

    Raises RuntimeError (download) or OSError (disk).
    """
    sources = []
    train_icons = []
    for name, version in TRAIN.items():
        icons, info = packaged_icons(name, version, cache)
        sources.append(("train", name, version, info))
        train_icons += icons
    test_icons = []
    for name, version in TEST.items():
        icons, info = packaged_icons(name, version, cache)
        sources.append(("test", name, version, info))
        test_icons += [icon for icon in icons if "skin tone" not in icon["caption"]]

    # The same `seen` for both: no test picture is a training picture.
    seen = set()
    dropped = collections.Counter()
    total = len(train_icons) + len(test_icons)
    progress = tqdm(total=total, desc="rendering", unit="img")
    with progress, rendering_processes(workers) as processes:
        train = draw(train_icons, seen, processes, progress, dropped)
        test = draw(test_icons, seen, processes, progress, dropped)

    write_shards(train, out / "train", PER_SHARD)
    classes = write_test(test, out / "test")
    text = readme(train, test, classes, sources, dropped)
    (out / "README.md").write_text(text, encoding="utf-8")

    captions = {sample["caption"] for sample in train}
    reasons = "; ".join(f"{number:,} {reason}" for reason, number in sorted(dropped.items()))
    print(
        f"{len(train):,} training pairs, {len(captions):,} distinct captions; {len(test):,} test "
        f"images, {len(classes):,} classes. Dropped: {reasons or 'none'}"
    )


def packaged_icons(name: str, version: str, cache: Path) -> tuple[list[dict], dict]:
    """(the icons of a package, with their source and licence; its info.json)."""
    files = dict(read_json(fetch(f"{SCOPE}/{name}", version, cache), "package/i*.json"))
    info = files["package/info.json"]
    icons = []
    for icon in icons_of(files["package/icons.json"]):
        icons.append({**icon, "source": name, "license": info["license"]["spdx"]})
    return icons, info


def build_tune(out: Path, held_out: str) -> None:
    """Write out/tune: the training set of a finished set, without and with the style `held_out`.

    tune/train has the other styles; tune/val has this one, as a test set. Nothing else in `out` is
    touched. Raises RuntimeError if there is no such style, OSError (disk).
    """
    train = []
    val = []
    for sample in read_shards(out / "train"):
        if sample["source"] != held_out:
            train.append(sample)
        elif "skin tone" not in sample["caption"]:  # as in the test
            val.append(sample)
    if not train or not val:
        raise RuntimeError(
            f"{out / 'train'} cannot be divided: it must have pictures of {held_out} and of other "
            "styles. Build it anew: --force"
        )

    # As with the whole set, a folder of the name `tune` is always complete.
    tmp = out / "tune.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    write_shards(train, tmp / "train")
    classes = write_test(val, tmp / "val")
    tmp.rename(out / "tune")
    print(
        f"{out / 'tune'}: {len(train):,} training pairs without {held_out}, whose {len(val):,} "
        f"pictures of {len(classes):,} classes are in val"
    )


# ---- its description ----


def readme(
    train: list[dict], test: list[dict], classes: list[str], sources: list[tuple], dropped: dict
) -> str:
    """README.md of the set: what it is, from where, under which licences. Without a date.

    sources: (split, package, version, info.json) of each package. dropped: {reason: count}.
    """
    images = collections.Counter(sample["source"] for sample in train + test)
    rows = []
    for split, name, version, info in sources:
        license_link = f"[{info['license']['spdx']}]({info['license'].get('url', '')})"
        set_link = f"[{info['name']}]({info['author'].get('url', '')})"
        rows.append(
            f"| {split} | {SCOPE}/{name} {version} | {images[name]:,} | {license_link} | "
            f"{set_link}, {info['author']['name']} |"
        )
    table = "\n".join(rows)

    captions = {sample["caption"] for sample in train}
    known_classes = [name for name in classes if name in captions]
    dropped_lines = "".join(
        f"- {number:,} pictures: {reason}\n" for reason, number in sorted(dropped.items())
    )
    return f"""{TITLE}

{len(train):,} training pairs with {len(captions):,} distinct captions, and \
{len(test):,} test images of {len(classes):,} classes in a drawing
style that training never sees; {len(known_classes):,} of the class names are captions in \
training, word for word.

| split | npm package | images | licence | set, author |
|---|---|---|---|---|
{table}

Each image's licence is in its json member. The images are changed: drawn at {SIZE} x {SIZE} \
pixels on white, proportions kept,
by `python -m tools.prepare emoji` (resvg_py {resvg_py.__version__}). A caption is the icon's \
name, skin tones last. Left out:

- hidden icons and aliases; in test, icons with a skin tone
{dropped_lines}
WebDataset tar shards of up to {PER_SHARD:,} samples, shuffled with seed {SEED}. Members: `png`, \
`txt` (the caption), `json`; in
`test/` also `cls`, the line (from 0) of its class in `test/classnames.txt`.

For choosing settings without looking at the test, `python -m tools.prepare emoji --tune` adds \
`tune/train/`, this training
set without {TUNE}, and `tune/val/`, the pictures of that style, in the form of `test/`.
"""
