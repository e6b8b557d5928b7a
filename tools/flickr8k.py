"""Make tar shards of Flickr8k, which you bring: `python -m tools.flickr8k SOURCE`.

    python -m tools.flickr8k ~/flickr8k     # data/flickr8k: train/, val/ and test/

SOURCE holds the pictures, which may lie in folders in it, and the captions, five for each picture:

    dataset_flickr8k.json    Karpathy's, with a split of the pictures
    Flickr8k.token.txt       its authors', a caption per line: NAME.jpg#0, a tab, the caption
    captions.txt             Kaggle's, a table with the columns image and caption

The authors' split is 6,000, 1,000 and 1,000 pictures: Karpathy's file has it, and so have the lists
Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt and Flickr_8k.testImages.txt, which go with both
other files. What Kaggle has comes without it. Such a folder is refused unless --split_by_name asks
for a split of our own, because its results cannot be compared with those that others publish.

The pictures are made smaller, once. A sample is KEY.jpg and KEY.json, {"captions": [...], "file":
NAME}; training reads it with caption_key = "captions". All of it happens in OUT.tmp, which is
renamed to OUT at the end, and SOURCE is only read. The same pictures and captions give the same
bytes, whichever file the captions come from.
"""

import argparse
import csv
import hashlib
import io
import json
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

import config as configs
from config import MAX_BAD, ConfigError, require
from ingest.karpathy import captions_of, check_entry
from tools.build_folder import beside, must_build, put_in_place
from tools.picture_shards import write_shards

KARPATHY = "dataset_flickr8k.json"
TOKENS = "Flickr8k.token.txt"
TABLE = "captions.txt"
LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}

HELD_OUT = 1000  # pictures of val, and of test, where names decide
BY_NAME = "our own, by the hash of the names, not the authors'"

SIZE = 128  # pixels of the shorter side
QUALITY = 90  # of JPEG
PER_SHARD = 400  # samples: 15 or 16 shards to train on, about as many as there are lanes

# Why a picture is left out.
NOT_THERE = "not on the disk"
NO_CAPTION = "without a caption"
NOT_READABLE = "cannot be read"

# The first line of a set's README.md, by which a finished set is recognised.
TITLE = "# Flickr8k: image-text pairs for CLIP training"


class Listing(NamedTuple):
    """What the files in SOURCE say about the pictures."""

    captions: dict  # {name of a picture: list of str}
    captions_from: str  # the name of the file
    splits: dict  # {"train", "val", "test": list of names}
    splits_from: str  # the name of a file, or words


class Picture(NamedTuple):
    """A picture that is to become a sample."""

    name: str
    path: Path
    captions: list


# ---- what is there ----


def files_in(source):
    """{name: path} of the files in a folder and in folders in it, three deep.

    Of equal names the first counts, in the order of depth and path.
    """
    files = {}
    for pattern in ("*", "*/*", "*/*/*"):
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                files.setdefault(path.name, path)
    return files


def read_listing(source, files, split_by_name):
    """The captions and the split -> Listing. files: of files_in(source).

    Raises ConfigError if there is no file of captions, if one is damaged, and if there is no split
    and split_by_name is False.
    """
    captions, splits, captions_from = read_captions(source, files)
    splits_from = captions_from
    if split_by_name:
        splits = splits_by_name(captions)
        splits_from = BY_NAME
    elif not splits:
        splits = read_lists(source, files)
        splits_from = "Flickr_8k.*Images.txt"

    listed = Counter()
    for names in splits.values():
        listed.update(names)
    for name, count in listed.items():
        require(count == 1, f"{source}: {name} is {count} times in {splits_from}")
    return Listing(captions, captions_from, splits, splits_from)


def read_captions(source, files):
    """-> ({name: captions}, {split: names} or {} if the file has none, the name of the file)."""
    if KARPATHY in files:
        captions, splits = read_karpathy(files[KARPATHY])
        return captions, splits, KARPATHY
    if TOKENS in files:
        return read_tokens(files[TOKENS]), {}, TOKENS
    if TABLE in files:
        return read_table(files[TABLE]), {}, TABLE
    raise ConfigError(
        f"{source} has no captions of Flickr8k, neither in it nor in folders in it: put one of "
        f"{KARPATHY}, {TOKENS} and {TABLE} there"
    )


def read_text(path):
    """The text of a file. ConfigError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def read_karpathy(path):
    """Karpathy's JSON file -> ({name: captions}, {split: names})."""
    text = read_text(path)
    captions = {}
    splits = {"train": [], "val": [], "test": []}
    try:
        for entry in json.loads(text)["images"]:
            check_entry(entry)
            name = entry["filename"]
            captions[name] = captions_of(entry)
            splits[entry["split"]].append(name)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not Karpathy's file of Flickr8k, "
            '{"images": [{"filename", "split": train, val or test, "sentences": [{"raw"}]}]}: '
            f"{type(error).__name__}: {error}"
        ) from error
    return captions, splits


def read_tokens(path):
    """The authors' file, NAME.jpg#NUMBER TAB CAPTION per line -> {name: captions}."""
    captions = defaultdict(list)
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, mark, _ = key.rpartition("#")
        require(
            tab and mark,
            f"{path}, line {number}: {line!r:.80} is not NAME.jpg#NUMBER, a tab, and a caption",
        )
        if caption.strip():
            captions[name].append(caption.strip())
    return dict(captions)


def read_table(path):
    """Kaggle's table with the columns image and caption -> {name: captions}."""
    rows = csv.reader(io.StringIO(read_text(path)))
    heading = next(rows, [])
    require(
        heading == ["image", "caption"],
        f"{path}, line 1: the columns must be image,caption, and are {','.join(heading)!r:.80}",
    )
    captions = defaultdict(list)
    for row in rows:
        if not row:
            continue
        require(
            len(row) == 2,
            f"{path}, line {rows.line_num}: {len(row)} columns in place of 2; a caption with a "
            "comma must stand in quotation marks",
        )
        name, caption = row
        if caption.strip():
            captions[name].append(caption.strip())
    return dict(captions)


def read_lists(source, files):
    """The authors' three lists, a name per line -> {split: names}.

    Raises ConfigError if one is missing.
    """
    missing = [name for name in LISTS.values() if name not in files]
    if missing:
        raise ConfigError(
            f"{source} has no split of the pictures, for lack of {', '.join(missing)}: put the "
            f"authors' lists (Flickr8k_text.zip) or {KARPATHY} there; or take --split_by_name, a "
            "split of our own, whose results cannot be compared with those that others publish"
        )
    splits = {}
    for split, file in LISTS.items():
        splits[split] = read_text(files[file]).split()
    return splits


def splits_by_name(names):
    """Names of pictures -> {split: names}: test and val have those with the smallest hashes.

    So the split depends on nothing but the names, and hardly changes if some are missing.
    """
    ordered = sorted(names, key=hash_of_name)
    return {
        "train": ordered[2 * HELD_OUT :],
        "val": ordered[HELD_OUT : 2 * HELD_OUT],
        "test": ordered[:HELD_OUT],
    }


def hash_of_name(name):
    return hashlib.sha256(name.encode()).hexdigest()


# ---- the pictures ----


def find_pictures(names, listing, files, left_out):
    """Names of pictures -> list of Picture, sorted by name. Adds to left_out, {reason: names}."""
    pictures = []
    for name in sorted(names):
        if name not in files:
            left_out[NOT_THERE].append(name)
        elif not listing.captions.get(name):
            left_out[NO_CAPTION].append(name)
        else:
            pictures.append(Picture(name, files[name], listing.captions[name]))
    return pictures


def make_samples(pictures, size, split, left_out):
    """Pictures -> samples {name, captions, jpg} of those that can be read. Adds to left_out."""
    samples = []
    for picture in tqdm(pictures, desc=split, unit="img"):
        try:
            jpg = make_smaller(picture.path, size)
        except Exception:  # Pillow raises errors of many kinds
            left_out[NOT_READABLE].append(picture.name)
            continue
        samples.append(dict(name=picture.name, captions=picture.captions, jpg=jpg))
    return samples


def make_smaller(path, size):
    """An image file -> a JPEG, bytes, RGB, whose shorter side has `size` pixels at most."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    scale = size / min(image.size)
    if scale < 1:
        width, height = image.size
        image = image.resize(
            (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
        )
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def check_left_out(source, left_out, total):
    """ConfigError if more than 1 % of `total` pictures are left out. left_out: {reason: names}."""
    number = sum(map(len, left_out.values()))
    require(
        number <= MAX_BAD * total,
        f"{source}: {number:,} of {total:,} pictures would be left out, more than {MAX_BAD:.0%}: "
        f"{describe(left_out)}",
    )


def describe(left_out):
    """{reason: names} -> "3 not on the disk (a.jpg, b.jpg, ...)"."""
    parts = []
    for reason, names in left_out.items():
        some = ", ".join(names[:3])
        more = ", ..." if len(names) > 3 else ""
        parts.append(f"{len(names):,} {reason} ({some}{more})")
    return "; ".join(parts)


# ---- the set ----


def members_of(sample, key):
    """A sample {name, captions, jpg} as TarWriter takes it."""
    about = {"captions": sample["captions"], "file": sample["name"]}
    return {"__key__": key, "jpg": sample["jpg"], "json": json.dumps(about).encode()}


def build(source, tmp, size, split_by_name):
    """Build the set of the pictures in `source` in the folder `tmp`, which is not there yet.

    Raises ConfigError for what is wrong with the source; OSError (disk).
    """
    files = files_in(source)
    listing = read_listing(source, files, split_by_name)
    left_out = defaultdict(list)
    pictures = {}
    for split, names in listing.splits.items():
        require(names, f"{source}: no picture is in {split}, by {listing.splits_from}")
        pictures[split] = find_pictures(names, listing, files, left_out)
    total = sum(map(len, listing.splits.values()))
    check_left_out(source, left_out, total)

    samples = {}
    for split in pictures:
        samples[split] = make_samples(pictures[split], size, split, left_out)
    check_left_out(source, left_out, total)

    for split in samples:
        write_shards(samples[split], tmp / split, PER_SHARD, members=members_of)
    text = description(samples, listing, left_out, size)
    (tmp / "README.md").write_text(f"{TITLE}\n\n{text}", encoding="utf-8")
    print(text, end="")


def description(samples, listing, left_out, size):
    """What the set is: a text for its README.md and for the screen. samples: of each split."""
    lines = []
    for split, some in samples.items():
        captions = sum(len(sample["captions"]) for sample in some)
        lines.append(f"- {split}: {len(some):,} pictures with {captions:,} captions")

    listed = set().union(*listing.splits.values())
    unlisted = len(listing.captions.keys() - listed)
    if unlisted:
        lines.append(f"- {unlisted:,} pictures with captions are in no part of the split")
    if left_out:
        lines.append(f"- left out: {describe(left_out)}")
    found = "\n".join(lines)
    return f"""{found}

Captions: {listing.captions_from}
Split: {listing.splits_from}
Pictures: JPEG of quality {QUALITY}, the shorter side of {size} pixels at most

Flickr8k is by M. Hodosh, P. Young and J. Hockenmaier (Framing Image Description as a Ranking Task,
2013). The pictures belong to those who took them: use them for research, and do not pass them on.
"""


# ---- the command ----


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.flickr8k",
        description="Make tar shards of a folder of Flickr8k.",
    )
    parser.add_argument("source", type=Path, help="the folder with the pictures and their captions")
    parser.add_argument(
        "--out", type=Path, default="data/flickr8k", help="folder to build (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=SIZE,
        help="pixels of the shorter side, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--split_by_name",
        action="store_true",
        help="a split of our own, where the authors' is not at hand",
    )
    parser.add_argument("--force", action="store_true", help="rebuild a finished set")
    return parser.parse_args(argv)


def check_places(source, out):
    """ConfigError if there is no source, or if OUT lies in it: nothing is written there."""
    require(source.is_dir(), f"there is no folder {source}: give the one that holds Flickr8k")
    require(
        source != out and source not in out.parents,
        f"{out} lies in {source}, where nothing is to be written: choose another --out",
    )


def main(argv):
    args = parse(argv)
    require(args.size > 0, f"--size {args.size} must be positive")
    source = args.source.expanduser().resolve()
    out = args.out.expanduser().resolve()
    check_places(source, out)
    if not must_build(out, TITLE, args.force):
        return

    tmp = beside(out, ".tmp")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # an interrupted run may have left it
        build(source, tmp, args.size, args.split_by_name)
        put_in_place(out)
    except OSError as error:
        raise ConfigError(f"cannot write {out} (or its .tmp beside it): {error}") from error
    print(f"{out} is ready.")


if __name__ == "__main__":
    configs.or_exit(main, sys.argv[1:])
