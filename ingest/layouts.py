"""In which layouts an evaluation set may lie on the disk, and finding out which one it is.

    python -m ingest.layouts PLACE [--key=value ...]

shows what is found there; the options are those of train.py, --eval_names for example. Nothing is
written into the folders of a set.
"""

import glob
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import config as configs
from config import ConfigError, or_exit
from ingest.class_folders import find_class_folders, find_objectnet
from ingest.class_names import (
    CLASS_NAMES,
    Files,
    choose_templates,
    find_beside,
    find_lists,
    read_lines,
)
from ingest.classes import NO_CLASSES, Classes
from ingest.folders import extension_of, files_below, list_folder, no_shards
from ingest.index import load_index
from ingest.karpathy import find_karpathy, karpathy_files
from ingest.labels import LABEL_FILES, find_flat_folder, find_labelled_images
from ingest.left_out import check_share, summary
from ingest.sources import ImageFiles, TarSamples
from ingest.urls import expand, file_path, is_local, scheme_of, split_patterns

NUM_SHARDS = "nshards.txt"
DATASET_TYPE = "dataset_type.txt"

NUM_SHOWN = 8  # classes that the command shows

# Parts of a path that many sets have, and that do not name any.
COMMON_PARTS = {"val", "test", "images", "shards", "data"}

EXPECTED = """expected is one of:
  CLASS/IMAGE: a folder per class, named by WordNet id, number or name
  images, and a .csv, .tsv or .txt with FILE LABEL per line, in the folder or above
  *.tar: shards of KEY.jpg with KEY.cls, KEY.txt or KEY.json, and classnames.txt
  test/nshards.txt and test/{0..n}.tar: a CLIP_benchmark or DataComp folder
  dataset_flickr30k.json or dataset_coco.json, and their images
  images/ and mappings/: ObjectNet"""


class EvaluationSet(NamedTuple):
    """A set that can be read.

    name        as config.eval_data names it (then is_named is True); else made of its path
    where       what config.eval_data gives as its place, for messages
    source      its samples
    names       of the classes, list of str; empty without a class list
    templates   prompts, list of str, in which {c} stands for the name of a class
    """

    name: str
    where: str
    source: TarSamples | ImageFiles
    names: list
    templates: list
    is_named: bool


def find_set(name, patterns, c, progress=lambda where: None):
    """Find a set and what it is -> EvaluationSet. Prints a line that says what was found.

    name: of the set, "" to make one of its path. patterns: its place, a tuple of str: one folder or
    file, or patterns of tar shards.

    To be called on one rank: it prints what is odd about the class list, and may have to read a
    whole set of tars. progress(where) is called as the work goes on. Raises what load_index raises,
    and ConfigError if there is no set, if too much of it would be left out, and for a class list or
    templates that cannot be used.
    """
    files = Files(file_for(name, c.eval_names), file_for(name, c.eval_templates))
    load_shards = partial(
        load_index,
        caption_key=c.caption_key,
        evaluation=True,
        allow_left_out=c.allow_left_out,
        progress=progress,
    )
    where = " ".join(patterns)
    path = local_path(patterns)
    progress(f"looking at {where}")
    if path:
        source, classes = find_at(path, files, c, load_shards)
    else:
        source, classes = find_shards(patterns, files, c, load_shards)

    if isinstance(source, ImageFiles):
        check_share(where, source, c.allow_left_out, "images or their list")
        if source.left_out:
            print(f"left out of {where}: {summary(source.left_out)}", file=sys.stderr)

    found = EvaluationSet(
        name=name or name_of(patterns),
        where=where,
        source=source,
        names=classes.names,
        templates=classes.templates,
        is_named=bool(name),
    )
    print(describe(found, classes.templates_from), flush=True)
    return found


def file_for(name, option):
    """The file that config.eval_names or eval_templates gives for the set `name`, "" for none."""
    return option.get(name, "") if isinstance(option, dict) else option


def local_path(patterns):
    """The one folder or file that is given as a place, if it exists; "" for patterns of shards."""
    if len(split_patterns(patterns)) != 1:
        return ""
    (path,) = split_patterns(patterns)
    if scheme_of(path) == "file":
        path = file_path(path)
    path = os.path.expanduser(path)
    return path if os.path.exists(path) else ""


def name_of(patterns):
    """A name for a set: the last part of its path that is not common to many sets."""
    path = split_patterns(patterns)[0]
    if is_local(path):
        path = os.path.abspath(os.path.expanduser(path))
        if os.path.isfile(path) and not path.endswith(".tar"):
            path = os.path.dirname(path)  # of a list of labels, or of captions

    for part in reversed(path.split("/")):
        stem = part.removesuffix(".tar")
        is_pattern = re.search(r"[*?{\[]", stem)
        is_shard = part.endswith(".tar") and stem.isdigit()
        if stem and not is_pattern and not is_shard and stem not in COMMON_PARTS:
            return re.sub(r"[^\w.-]+", "_", stem)
    return "set"


def describe(found, templates_from=""):
    """An EvaluationSet -> one line: what it is, and how much."""
    source = found.source
    parts = [source.description, f"{source.num_samples:,} images"]
    if isinstance(source, ImageFiles) and source.texts:
        parts.append(f"{sum(map(len, source.texts)):,} captions")
    if found.names:
        number = len(found.templates)
        origin = f" ({templates_from})" if templates_from else ""
        parts.append(f"{len(found.names):,} classes")
        parts.append(f"{number:,} template{'s' if number > 1 else ''}{origin}")
    return f"{found.name}: {', '.join(parts)}"


# ---- which layout it is ----


def find_at(path, files, c, load_shards):
    """A folder or file -> (source, Classes). Raises ConfigError if it is no set."""
    if os.path.isfile(path):
        return find_in_file(path, files, c, load_shards)

    benchmark = benchmark_folder(path)
    if benchmark:
        pattern = benchmark_shards(benchmark)
        return find_shards((pattern,), files, c, load_shards, is_benchmark=True)

    objectnet = find_objectnet(path, files)
    if objectnet:
        return objectnet

    listing = list_folder(path)
    captions = karpathy_files(path, listing)
    if len(captions) > 1:
        raise ConfigError(f"{path} holds several sets: give one of {', '.join(captions)}")
    if captions:
        return find_karpathy(captions[0], c.allow_left_out), NO_CLASSES

    if any(extension_of(name) == "tar" for name in listing.others):
        pattern = os.path.join(glob.escape(path), "*.tar")
        return find_shards((pattern,), files, c, load_shards)
    return find_images(path, listing, files)


def find_in_file(path, files, c, load_shards):
    """As find_at, of a file."""
    extension = extension_of(path)
    if extension == "tar":
        return find_shards((path,), files, c, load_shards)
    if extension == "json":
        return find_karpathy(path, c.allow_left_out), NO_CLASSES
    if extension in LABEL_FILES:
        return find_labelled_images(path, files)
    raise ConfigError(
        f"{path} is no evaluation set: expected is a folder, a .tar, a .json of Karpathy's splits, "
        "or a .csv, .tsv or .txt with the labels of images"
    )


def find_images(path, listing, files):
    """As find_at, of a folder that may hold images, in a folder per class or flat."""
    found = find_class_folders(path, listing, files) or find_flat_folder(path, listing, files)
    if found:
        return found

    # One folder of images beside their list, as in TinyImageNet's val.
    for name in listing.folders:
        folder = os.path.join(path, name)
        found = find_flat_folder(folder, list_folder(folder), files)
        if found:
            return found

    if any(file.endswith(".tar") for file in files_below(path)):
        raise ConfigError(no_shards(path))
    raise ConfigError(f"{path} holds no evaluation set, but {contents_of(listing)}; {EXPECTED}")


def contents_of(listing):
    """What is in a folder, for a message: "3 folders, 12 txt"."""
    counts = Counter()
    if listing.folders:
        counts["folders"] = len(listing.folders)
    counts.update(extension_of(name) or "other files" for name in listing.unread + listing.others)
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common(8)) or "nothing"


# ---- tar shards ----


def find_shards(patterns, files, c, load_shards, is_benchmark=False):
    """Patterns of tar shards -> (source, Classes).

    is_benchmark: the shards are those of a CLIP_benchmark folder, which must have class names
    unless it is for retrieval. Raises ConfigError for a set with several classes per image.
    """
    folder = folder_of_shards(patterns)
    kind = dataset_type(folder)
    if kind == "multilabel":
        raise ConfigError(
            f"{folder}: {DATASET_TYPE} says multilabel: sets with several classes per image are "
            "not evaluated here; CLIP_benchmark can do that on an export"
        )
    lists = find_lists(folder, files)
    if is_benchmark and kind != "retrieval" and not lists.names:
        raise ConfigError(
            f"{folder}: a CLIP_benchmark folder without {DATASET_TYPE} is for zero-shot "
            f"classification, but there is no {CLASS_NAMES} in it or in the folder above: add "
            "it, or give --eval_names=FILE"
        )
    if lists.templates and not lists.names:
        print(f"{lists.templates_path} is not used: there are no class names", flush=True)

    source = TarSamples(load_shards(patterns), c.caption_key)
    classes = Classes("KEY.cls", {}, lists.names, *choose_templates(lists))
    return source, classes


def dataset_type(folder):
    """What CLIP_benchmark's dataset_type.txt says, in the folder or above; "" without one."""
    path = find_beside(folder, DATASET_TYPE)
    lines = read_lines(path) if path else []
    return lines[0].strip() if lines else ""


def benchmark_folder(path):
    """The folder with nshards.txt, `path` or its test/; "" if there is none."""
    for folder in (os.path.join(path, "test"), path):
        if os.path.isfile(os.path.join(folder, NUM_SHARDS)):
            return folder
    return ""


def benchmark_shards(folder):
    """A folder with nshards.txt -> the pattern of its shards. ConfigError if one is missing."""
    path = os.path.join(folder, NUM_SHARDS)
    words = "".join(read_lines(path)).strip()
    if not words.isdecimal() or int(words) == 0:
        raise ConfigError(f"{path} must hold the number of shards, and holds {words[:40]!r}")

    number = int(words)
    shards = [f"{shard}.tar" for shard in range(number)]
    missing = [name for name in shards if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise ConfigError(
            f"{folder}: {NUM_SHARDS} says {number:,} shards, of which {len(missing):,} are "
            f"missing, {missing[0]} for example: fetch them"
        )
    return os.path.join(glob.escape(folder), f"{{0..{number - 1}}}.tar")


def folder_of_shards(patterns):
    """The folder of a set's first shard. Raises ConfigError if the patterns are of several sets.

    Several patterns are one set if all shards lie in one folder. One pattern is one set, wherever
    its shards lie.
    """
    folders = [folder_of(url) for url in expand(patterns)]
    if len(split_patterns(patterns)) > 1 and len(set(folders)) > 1:
        other = next(folder for folder in folders if folder != folders[0])
        raise ConfigError(
            f"eval_data names several sets, one in {folders[0]} and another in {other}, which "
            "would be merged into one result: give each a name, "
            "--eval_data=\"{'a': 'A/*.tar', 'b': 'B/*.tar'}\""
        )
    return folders[0]


def folder_of(url):
    folder = os.path.dirname(url)
    return os.path.abspath(folder) if is_local(url) else folder


# ---- command line ----


def main(argv):
    if not argv or argv[0].startswith("--"):
        raise ConfigError("usage: python -m ingest.layouts PLACE [--key=value ...]")
    c = replace(configs.load(argv[1:]), eval_data=(argv[0],))
    found = find_set("", c.eval_data, c)

    # Which class a sample in a tar has is known only after reading it.
    labels = getattr(found.source, "labels", None) or []
    numbers = Counter(labels)
    for number, name in enumerate(found.names[:NUM_SHOWN]):
        images = f", {numbers[number]:,} images" if labels else ""
        print(f"  class {number}: {name}{images}")
    if found.names:
        print(f"  prompt: {found.templates[0].replace('{c}', found.names[0])}")


if __name__ == "__main__":
    or_exit(main, sys.argv[1:])
