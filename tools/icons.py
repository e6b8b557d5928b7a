"""The icons set: 168 icon sets to train on, ten others for zero-shot classification.

All come out of one npm package, iconify's collection, which tells each set's licence and author. A
caption is what an icon's name says beyond its style (tools/icon_captions.py): "arrow circle". So a
thing comes back in dozens of drawing styles, and a test asks for it in a style never seen.

train/         every set under a permissive licence but those below
test/NAME/     ten sets, each a zero-shot classification test of its own
val/NAME/      three more in the same form, on which settings are chosen

The set is built in parts: each test, then each training shard. A part that is complete has a record
in parts/, and a run that was stopped, in whatever way, goes on after the last one. The bytes are
the same however often that happens, and for any number of processes: what a part holds depends on
the plan, and on the pictures of the parts before it.
"""

import collections
import hashlib
import json
import os
import random
import shutil
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import resvg_py
from tqdm import tqdm

from tools.drawings import SIZE, digest, draw, fetch, read_json, rendering_processes, visible_icons
from tools.icon_captions import captions_of
from tools.picture_shards import SEED, write_shard, write_test

# Pinned, so that everyone trains on the same pictures.
PACKAGE = "@iconify/json"
VERSION = "2.2.535"

# Whoever names the authors may use, change and pass on what is under these. So neither GPL nor NC,
# nor share-alike (CC-BY-SA, and MPL and OFL, which ask for themselves on what is derived): a set of
# all these together could have no licence at all.
LICENSES = (
    "Apache-2.0",
    "BSD-3-Clause",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "Unlicense",
)

TEST = (
    "carbon",
    "fa7-solid",
    "fluent-emoji-flat",
    "game-icons",
    "healthicons",
    "lucide",
    "noto",
    "tabler",
    "twemoji",
    "vscode-icons",
)

# For choosing settings: lines, pixels and coloured faces, all unlike the tests. No other set is an
# edition of theirs.
VAL = ("iconoir", "pixelarticons", "streamline-emojis")

# Not in training although the licence permits it, and the test that would not be unseen. Editions
# by the same makers; and sets that have taken drawings over: of the pictures that share a name with
# the test's, a tenth to a third have the same lines (correlation above 0.98, cut to the drawing and
# blurred), and not only arrows and circles. Pinhead has the organs of healthicons.
RELATIVES = {
    "fa-regular": "fa7-solid",
    "fa-solid": "fa7-solid",
    "fa6-regular": "fa7-solid",
    "fa6-solid": "fa7-solid",
    "fa7-regular": "fa7-solid",
    "feather": "lucide",
    "fluent-emoji": "fluent-emoji-flat",
    "fluent-emoji-high-contrast": "fluent-emoji-flat",
    "heroicons-outline": "tabler",
    "keyline-icons": "lucide",
    "la": "fa7-solid",
    "lucide-lab": "lucide",
    "meteor-icons": "lucide",
    "noto-v1": "noto",
    "pinhead": "healthicons",
    "vadivam": "lucide",
}

# Meteocons are animated, too, but their first pictures are whole.
UNSUITABLE = {
    "cif": "names are codes of countries",
    "circle-flags": "names are codes of countries",
    "flag": "names are codes of countries",
    "flagpack": "names are codes of countries",
    "formkit": "names are words run together",
    "fxemoji": "names are words run together",
    "k8s": "names are words run together",
    "line-md": "animated, so that a still picture lacks parts",
    "svg-spinners": "animated, so that a still picture lacks parts",
}

NUM_CLASSES = 1000  # of a test, at most
MIN_NAMED_BY = 2  # training sets that must use a caption for it to be a class
PER_SHARD = 5000  # samples that are drawn for a training shard; dropped ones leave it smaller

TITLE = "# icons: image-text pairs for CLIP training"


class IconSet(NamedTuple):
    """A set of the package. info: iconify's, with its license and author."""

    prefix: str
    split: str
    info: dict
    samples: list


class Part(NamedTuple):
    """What is drawn and written at once: a test (shard None), or a shard of the training set."""

    folder: str
    shard: int | None
    samples: list

    def record(self, out: Path) -> Path:
        """Where it is noted that this part of the set in `out` is complete."""
        name = self.folder.replace("/", "-")
        return out / "parts" / (f"{name}.json" if self.shard is None else f"{self.shard:05d}.json")


# ---- the plan ----


def read_sets(tgz: Path) -> tuple[list[IconSet], dict[str, str]]:
    """(the sets of the package that are used, {prefix: why not} of the others).

    Raises RuntimeError if the package cannot be read.
    """
    used = []
    left_out = {}
    for _, icon_set in read_json(tgz, "package/json/*.json"):
        prefix = icon_set["prefix"]
        reason = why_left_out(icon_set)
        if reason:
            left_out[prefix] = reason
            continue
        split = "test" if prefix in TEST else "val" if prefix in VAL else "train"
        used.append(IconSet(prefix, split, icon_set["info"], samples_of(icon_set)))
    return used, left_out


def why_left_out(icon_set: dict) -> str:
    """Why a set is not used; "" if it is."""
    prefix = icon_set["prefix"]
    info = icon_set["info"]
    spdx = info["license"].get("spdx")
    if spdx not in LICENSES:
        return f"its licence, {spdx or 'unknown'}, is not permissive"
    if prefix in RELATIVES:
        return f"related to {RELATIVES[prefix]}, which is held out"
    if info.get("hidden"):
        return "withdrawn by iconify, most for a newer edition"
    if not visible_icons(icon_set):
        return "all its icons are hidden"
    return UNSUITABLE.get(prefix, "")


def samples_of(icon_set: dict) -> list[dict]:
    """Samples {body, left, top, width, height, source, name, caption, license} of a set."""
    icons = visible_icons(icon_set)
    captions = captions_of(icon_set, list(icons))
    license = icon_set["info"]["license"]["spdx"]
    source = icon_set["prefix"]

    samples = []
    for name, icon in icons.items():
        about = {"source": source, "name": name, "caption": captions[name], "license": license}
        samples.append({**icon, **about})
    return samples


def plan(sets: list[IconSet]) -> list[Part]:
    """The parts in the order in which they are drawn: held-out sets first, then training shards.

    So a picture that two of them have stays in the held-out one.
    """
    training = []
    named_by = collections.Counter()  # caption -> training sets
    for icon_set in sets:
        if icon_set.split == "train":
            training += icon_set.samples
            named_by.update({sample["caption"] for sample in icon_set.samples})

    parts = []
    for icon_set in sorted(sets):
        if icon_set.split != "train":
            folder = f"{icon_set.split}/{icon_set.prefix}"
            parts.append(Part(folder, None, classes_of(icon_set, named_by)))

    # Shuffled before they are drawn, so that shards are complete one after another.
    random.Random(SEED).shuffle(training)
    for shard, start in enumerate(range(0, len(training), PER_SHARD)):
        parts.append(Part("train", shard, training[start : start + PER_SHARD]))
    return parts


def classes_of(icon_set: IconSet, named_by: dict[str, int]) -> list[dict]:
    """The samples of a held-out set that its test asks for: one per class.

    A class is a caption that several makers of training sets use, too: otherwise it may be a word
    of this set alone, and nothing is learned about it. Of its drawings that with the shortest name
    is shown, the plainest. Of more than NUM_CLASSES, as many are drawn by lot.
    """
    plainest = {}
    for sample in sorted(
        icon_set.samples, key=lambda sample: (len(sample["name"]), sample["name"])
    ):
        caption = sample["caption"]
        if named_by[caption] >= MIN_NAMED_BY and "skin tone" not in caption:
            plainest.setdefault(caption, sample)

    captions = sorted(plainest)
    if len(captions) > NUM_CLASSES:
        captions = random.Random(f"{SEED} {icon_set.prefix}").sample(captions, NUM_CLASSES)
    return [plainest[caption] for caption in captions]


# ---- the parts ----


def build(out: Path, cache: Path, workers: int) -> None:
    """Build the set in the folder `out`, or go on with what an earlier run has left there.

    `cache` keeps the downloaded package. Raises RuntimeError (download) or OSError (disk).
    """
    tgz = fetch(PACKAGE, VERSION, cache)
    print(f"reading {tgz.name}", flush=True)
    sets, left_out = read_sets(tgz)
    parts = plan(sets)
    keep_if_same_plan(out, parts)

    records = draw_parts(parts, out, workers)
    text = readme(sets, left_out, parts, records)
    (out / "README.md").write_text(text, encoding="utf-8")
    shutil.rmtree(out / "parts")


def keep_if_same_plan(out: Path, parts: list[Part]) -> None:
    """Empty `out` unless it was left by a run with the same plan."""
    digest = hashlib.sha256(f"{VERSION} {resvg_py.__version__} {SIZE}".encode())
    for part in parts:
        for sample in part.samples:
            key = [part.folder, part.shard, sample["source"], sample["name"], sample["caption"]]
            digest.update(json.dumps(key).encode())

    file = out / "parts" / "plan"
    if file.exists() and file.read_text() == digest.hexdigest():
        return
    shutil.rmtree(out)
    file.parent.mkdir(parents=True)
    file.write_text(digest.hexdigest())


def draw_parts(parts: list[Part], out: Path, workers: int) -> list[dict]:
    """Draw and write the parts that `out` has not yet -> the records of all parts.

    A record is {"sources": {prefix: count}, "captions": a list, "digests": a list in hexadecimal}
    of the pictures of a part, and "dropped": {reason: count} of the samples that became none.
    """
    seen = set()
    records = []
    done = [part for part in parts if part.record(out).exists()]
    progress = tqdm(
        total=sum(len(part.samples) for part in parts),
        initial=sum(len(part.samples) for part in done),
        desc="rendering",
        unit="img",
    )
    with progress, rendering_processes(workers) as processes:
        for part in parts:
            file = part.record(out)
            if file.exists():
                record = json.loads(file.read_text())
                seen.update(bytes.fromhex(digest) for digest in record["digests"])
            else:
                record = draw_part(part, seen, processes, progress, out)
                write_record(record, file)
            records.append(record)
    return records


def draw_part(part: Part, seen: set[bytes], processes: Executor, progress: tqdm, out: Path) -> dict:
    """Draw and write one part -> its record, see draw_parts. What it adds to `seen` is in there."""
    dropped = collections.Counter()
    kept = draw(part.samples, seen, processes, progress, dropped)

    folder = out / part.folder
    if part.shard is None:
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run may have begun it
        write_test(kept, folder)
    else:
        folder.mkdir(exist_ok=True)
        write_shard(kept, folder, part.shard, first=part.shard * PER_SHARD)

    return {
        "sources": collections.Counter(sample["source"] for sample in kept),
        "captions": [sample["caption"] for sample in kept],
        "digests": [digest(sample["png"]).hex() for sample in kept],
        "dropped": dropped,
    }


def write_record(record: dict, file: Path) -> None:
    """Under its name a record is always complete, and so is the part that it tells of."""
    tmp = file.with_suffix(".tmp")
    tmp.write_text(json.dumps(record))
    os.replace(tmp, file)


# ---- its description ----


def readme(
    sets: list[IconSet], left_out: dict[str, str], parts: list[Part], records: list[dict]
) -> str:
    """README.md of the set: what it is, from where, under which licences. Without a date."""
    images = collections.Counter()
    dropped = collections.Counter()
    captions = collections.Counter()
    for part, record in zip(parts, records):
        images.update(record["sources"])
        dropped.update(record["dropped"])
        if part.folder == "train":
            captions.update(record["captions"])

    tests = test_table(parts, records, captions)
    not_drawn = "".join(f"- {number:,} icons: {why}\n" for why, number in sorted(dropped.items()))
    not_used = "".join(f"- {prefix}: {why}\n" for prefix, why in sorted(left_out.items()))
    return f"""{TITLE}

{captions.total():,} training pairs with {len(captions):,} distinct captions. Each folder in \
`test/` and `val/` is a zero-shot
classification test, one image per class, in a drawing style that training never sees:

{tests}
All from the npm package {PACKAGE} {VERSION}. Each image's licence and set are in its json member. \
The images are
changed: drawn at {SIZE} x {SIZE} pixels on white, proportions kept, in black where an icon has no \
colour of its own, by
`python -m tools.prepare icons` (resvg_py {resvg_py.__version__}). A caption is the icon's name \
without the words for its style,
weight and size. A class of a test is a caption that at least {MIN_NAMED_BY} training sets use; \
of more than {NUM_CLASSES:,}, as many
are drawn by lot. WebDataset tar shards, shuffled with seed {SEED}. Members: `png`, `txt` (the \
caption), `json`; in tests also
`cls`, the line (from 0) of its class in `classnames.txt`.

Left out: hidden icons and aliases, skin tones in tests, and

{not_drawn}
## The sets

{set_table(sets, images)}
## Sets that are not used

{not_used}"""


def test_table(parts: list[Part], records: list[dict], captions: dict[str, int]) -> str:
    """A row per test: its images, and how many of its classes are captions in training."""
    rows = []
    for part, record in zip(parts, records):
        if part.shard is None:
            known = sum(caption in captions for caption in record["captions"])
            rows.append(f"| {part.folder} | {len(record['captions']):,} | {known:,} |\n")
    head = "| test | images | classes in training, word for word |\n|---|---|---|\n"
    return head + "".join(sorted(rows))


def set_table(sets: list[IconSet], images: dict[str, int]) -> str:
    """A row per set: its images, its licence and its author."""
    rows = "| split | set | images | licence | name, author |\n|---|---|---|---|---|\n"
    for icon_set in sorted(sets, key=lambda icon_set: (icon_set.split, icon_set.prefix)):
        license = icon_set.info["license"]
        author = icon_set.info["author"]
        rows += (
            f"| {icon_set.split} | {icon_set.prefix} | {images[icon_set.prefix]:,} "
            f"| {link(license['spdx'], license)} "
            f"| {link(icon_set.info['name'], author)}, {author['name']} |\n"
        )
    return rows


def link(text: str, about: dict) -> str:
    """The text, as a link if iconify knows where it leads."""
    return f"[{text}]({about['url']})" if about.get("url") else text
