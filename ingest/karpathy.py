"""Retrieval sets of Karpathy's splits: Flickr30k, Flickr8k and COCO, as a JSON file and images.

    {"images": [{"filename": ..., "filepath": ..., "split": "test", "sentences": [{"raw": ...}]}]}

"filepath", the folder of an image, is there for COCO only. The images may lie in the folder of the
file, in a folder in it, or in a folder beside it.
"""

import json
import os
from collections import Counter

from config import ConfigError
from ingest.folders import extension_of, list_if_readable
from ingest.images import IMAGES
from ingest.left_out import NO_SENTENCE, NOT_READ, NOT_THERE, check_share
from ingest.sources import ImageFiles

SPLIT = "test"
HEAD_CHARACTERS = 65536  # characters of a JSON file, to see what it is


def karpathy_files(folder, listing):
    """-> the paths of the files in a folder, with this Listing, that are of this form."""
    paths = []
    for name in listing.other_files:
        path = os.path.join(folder, name)
        if extension_of(name) == "json" and looks_like_split(path):
            paths.append(path)
    return paths


def looks_like_split(path):
    """Whether a JSON file begins as one of Karpathy's. They are large, others may be larger."""
    try:
        with open(path, encoding="utf-8") as f:
            start = f.read(HEAD_CHARACTERS)
    except (OSError, UnicodeDecodeError):
        return False
    return '"images"' in start and '"sentences"' in start and '"split"' in start


def find_karpathy(path, allowed):
    """A JSON file -> ImageFiles with captions: the images of the split "test".

    allowed: the share of them that may be missing. Raises ConfigError if more are, and for a file
    of another form or without such a split.
    """
    entries = read_split(path)
    root = os.path.dirname(os.path.abspath(path))
    found = locate_images(entries, folders_in(root, entries))
    if "" in found:
        # The folder above may be large, and belong to others.
        beside = folders_in(os.path.dirname(root), entries)
        found = locate_images(entries, [*folders_in(root, entries), *beside])

    paths = []
    texts = []
    left_out = Counter()
    missing = []
    for entry, image in sorted(zip(entries, found), key=by_path):
        captions = captions_of(entry)
        extension = extension_of(entry["filename"])
        if not image:
            left_out[f"{extension} {NOT_THERE}"] += 1
            missing.append(entry["filename"])
        elif extension not in IMAGES:
            left_out[f"{extension} {NOT_READ}"] += 1
        elif not captions:
            left_out[f"{extension} {NO_SENTENCE}"] += 1
        else:
            paths.append(os.path.relpath(image, root))
            texts.append(captions)

    name = os.path.basename(path)
    source = ImageFiles(root, paths, f"Karpathy's split, {name}", texts=texts, left_out=left_out)
    where = path
    if missing:
        where = f"{path}: {missing[0]} is neither in {root} nor in a folder in it or beside it"
    check_share(where, source, allowed, "images")
    return source


def by_path(item):
    """The order of (entry, path of its image or "")."""
    entry, image = item
    return image, entry["filename"]


def read_split(path):
    """-> the entries of the images of the split "test", a list of dicts with "filename"."""
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        check_is_not_cocos(path, content)
        images = content["images"]
        splits = Counter(str(entry["split"]) for entry in images)
        entries = [entry for entry in images if entry["split"] == SPLIT]
        for entry in entries:
            check_entry(entry)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a file of Karpathy's splits, "
            '{"images": [{"filename", "split", "sentences": [{"raw"}]}]}: '
            f"{type(error).__name__}: {error}"
        ) from error

    if not entries:
        names = ", ".join(f"{count:,} {name}" for name, count in splits.most_common(8))
        raise ConfigError(f"{path} has no image of the split {SPLIT!r}, but {names or 'none'}")
    return entries


def check_is_not_cocos(path, content):
    """ConfigError if the content of a JSON file is COCO's own, as captions_val2014.json."""
    if isinstance(content, dict) and "annotations" in content:
        raise ConfigError(
            f"{path} is COCO's own file, with annotations, and not a file of Karpathy's splits, "
            "which say what is tested: take his dataset_coco.json"
        )


def check_entry(entry):
    """KeyError, TypeError or ValueError if an entry is not of the form."""
    if not isinstance(entry["filename"], str) or "/" in entry["filename"]:
        raise ValueError(f"{entry['filename']!r} is no file name")
    for sentence in entry["sentences"]:
        if not isinstance(sentence["raw"], str):
            raise TypeError("a caption is no text")


def captions_of(entry):
    """-> list of str, none of them empty."""
    texts = [sentence["raw"].strip() for sentence in entry["sentences"]]
    return [text for text in texts if text]


# ---- where the images lie ----


def folder_name(entry):
    """The name of the folder in which an image lies, "" if the file does not say it."""
    return os.path.basename(str(entry.get("filepath", "")).rstrip("/"))


def folders_in(place, entries):
    """Where images may lie -> list of folders: `place`, those in it, and those in these by name.

    The entries have the names. A place that cannot be listed counts as empty.
    """
    names = {folder_name(entry) for entry in entries} - {""}
    folders = [place]
    for name in list_if_readable(place).folders:
        folder = os.path.join(place, name)
        inside = [os.path.join(folder, inner) for inner in sorted(names)]
        folders += [folder, *filter(os.path.isdir, inside)]
    return folders


def locate_images(entries, folders):
    """-> the path of each entry's image, "" if it is in none of the folders.

    A folder of the name that the entry gives goes before all others. A file name that occurs twice
    is looked for in such a folder only.
    """
    occurrences = Counter(entry["filename"] for entry in entries)
    contents = {folder: names_in(folder) for folder in folders}
    found = []
    for entry in entries:
        name = entry["filename"]
        holding = [folder for folder in folders if name in contents[folder]]
        named = [folder for folder in holding if os.path.basename(folder) == folder_name(entry)]
        if not folder_name(entry) or occurrences[name] == 1:
            named += holding
        found.append(os.path.join(named[0], name) if named else "")
    return found


def names_in(folder):
    """-> the set of the names in a folder; empty if it cannot be read."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()
