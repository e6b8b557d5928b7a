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
from itertools import islice
from typing import NamedTuple

import config as configs
from config import ConfigError, or_exit
from ingest.class_folders import find_class_folders, find_objectnet
from ingest.class_names import (
    CLASS_NAMES,
    ListFiles,
    choose_templates,
    find_beside,
    find_lists,
    read_lines,
)
from ingest.classes import NO_CLASSES, Classes
from ingest.folders import (
    MAX_FILES,
    amount,
    extension_of,
    files_below,
    list_folder,
    no_shards,
    some,
)
from ingest.index import load_index
from ingest.karpathy import find_karpathy, karpathy_files
from ingest.labels import LABEL_FILES, find_flat_folder, find_labelled_images
from ingest.left_out import check_share, summary
from ingest.sources import ImageFiles, TarSamples
from ingest.urls import expand, file_path, is_local, scheme_of, split_patterns

NUM_SHARDS = "nshards.txt"
DATASET_TYPE = "dataset_type.txt"

ARCHIVES = {"zip", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar"}

NUM_SHOWN = 8  # classes that the command shows

# Parts of a path that many sets have, and that do not name any.
COMMON_PARTS = {"val", "test", "images", "shards", "data"}

EXPECTED = """expected is one of:
  CLASS/IMAGE: a folder per class, named by WordNet id, number or name
  images, and a .csv, .tsv or .txt with FILE LABEL per line, put or linked beside their folder
  *.tar: shards of KEY.jpg with KEY.cls, KEY.txt or KEY.json, and classnames.txt
  test/nshards.txt and test/{0..n}.tar: a CLIP_benchmark or DataComp folder
  dataset_flickr30k.json or dataset_coco.json, and their images
  images/ and mappings/: ObjectNet"""


class EvaluationSet(NamedTuple):
    """A set that can be read.

    name            as config.eval_data names it (then is_named is True); else made of its path
    where           what config.eval_data gives as its place, for messages
    source          its samples
    names           of the classes, list of str; empty without a class list
    templates       prompts, list of str, in which {c} stands for the name of a class
    names_from      where the names come from, for people: "classnames.txt", "open_clip"
    templates_from  likewise; "" for the default template
    """

    name: str
    where: str
    source: TarSamples | ImageFiles
    names: list
    templates: list
    is_named: bool
    names_from: str = ""
    templates_from: str = ""


def find_set(name, patterns, c, progress=lambda where: None):
    """Find a set and what it is -> EvaluationSet. Prints a line that says what was found.

    name: of the set, "" to make one of its path. patterns: its place, a tuple of str: one folder or
    file, or patterns of tar shards.

    To be called on one rank: it prints what is odd about the class list, and may have to read a
    whole set of tars. progress(where) is called as the work goes on. Raises what load_index raises,
    and ConfigError if there is no set or are several, if it has only one class, if too much of it
    would be left out, and for a class list or templates that cannot be used.
    """
    check_is_one_place(patterns)
    lists_given = ListFiles(file_for(name, c.eval_names), file_for(name, c.eval_templates))
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
        source, classes = find_at(path, lists_given, c, load_shards)
    else:
        source, classes = find_shards(patterns, lists_given, c, load_shards)

    check_number_of_classes(where, classes)
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
        names_from=classes.names_from,
        templates_from=classes.templates_from,
    )
    print(describe(found), flush=True)
    return found


def file_for(name, option):
    """The file that config.eval_names or eval_templates gives for the set `name`, "" for none."""
    return option.get(name, "") if isinstance(option, dict) else option


def local_path(patterns):
    """The absolute path of the one folder or file that is given as a place, if it exists; else "".

    So that the folder above it is known, also of "." and of "val/".
    """
    if len(split_patterns(patterns)) != 1:
        return ""
    (path,) = split_patterns(patterns)
    if scheme_of(path) == "file":
        path = file_path(path)
    path = os.path.expanduser(path)
    return os.path.abspath(path) if os.path.exists(path) else ""


def check_is_one_place(patterns):
    """ConfigError if the place of one set is several that exist, and not all of them are shards."""
    if local_path(patterns):
        return
    places = []
    for pattern in split_patterns(patterns):
        if os.path.exists(os.path.expanduser(pattern)):
            places.append(pattern)
        else:
            places += re.split(r"[\s,]+", pattern.strip(" ,[]()"))

    all_exist = all(os.path.exists(os.path.expanduser(place)) for place in places)
    all_are_shards = all(place.endswith(".tar") for place in places)
    if len(places) > 1 and all_exist and not all_are_shards:
        raise ConfigError(
            f"eval_data names several places as one set: give each a name, {as_sets(places)}"
        )


def as_sets(places):
    """Places of sets -> what to write, with a name for each: --eval_data="{'a': 'A', 'b': 'B'}"."""
    sets = {}
    for place in places:
        name = name_of((place,))
        while name in sets:
            name += "-2"
        sets[name] = place
    return f'--eval_data="{sets}"'


def check_number_of_classes(where, classes):
    """ConfigError if zero-shot classification had one class to choose from."""
    if len(classes.names) == 1:
        raise ConfigError(
            f"{where}: there is only one class, {classes.names[0]!r} ({classes.names_from}), among "
            "which nothing can be told apart. In a table of several columns, the first line says "
            "which are meant, as in filename,split,label"
        )


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


def describe(found):
    """An EvaluationSet -> one line: what it is, how much, and where its lists come from."""
    source = found.source
    parts = [source.description, amount(source.num_samples, "image")]
    if isinstance(source, ImageFiles) and source.texts:
        parts.append(amount(sum(map(len, source.texts)), "caption"))
    if found.names:
        classes = amount(len(found.names), "class", "classes")
        templates = amount(len(found.templates), "template")
        parts.append(classes + in_brackets(found.names_from))
        parts.append(templates + in_brackets(found.templates_from))
    return f"{found.name}: {', '.join(parts)}"


def in_brackets(text):
    return f" ({text})" if text else ""


# ---- which layout it is ----


def find_at(path, lists_given, c, load_shards):
    """A folder or file -> (source, Classes). Raises ConfigError if it is no set."""
    if os.path.isfile(path):
        return find_in_file(path, lists_given, c, load_shards)

    benchmark = benchmark_folder(path)
    if benchmark:
        pattern = benchmark_shards(benchmark)
        return find_shards((pattern,), lists_given, c, load_shards, is_benchmark=True)

    objectnet = find_objectnet(path, lists_given)
    if objectnet:
        return objectnet

    listing = list_folder(path)
    captions = karpathy_files(path, listing)
    if len(captions) > 1:
        raise ConfigError(f"{path} holds several sets: give one of {', '.join(captions)}")
    if captions:
        return find_karpathy(captions[0], c.allow_left_out), NO_CLASSES

    if any(extension_of(name) == "tar" for name in listing.other_files):
        pattern = os.path.join(glob.escape(path), "*.tar")
        return find_shards((pattern,), lists_given, c, load_shards)
    return find_image_folder(path, listing, lists_given)


def find_in_file(path, lists_given, c, load_shards):
    """As find_at, of a file."""
    extension = extension_of(path)
    if extension == "tar":
        return find_shards((path,), lists_given, c, load_shards)
    if extension == "json":
        return find_karpathy(path, c.allow_left_out), NO_CLASSES
    if extension in LABEL_FILES:
        return find_labelled_images(path, lists_given)
    if extension in ARCHIVES:
        raise ConfigError(f"{path} is an archive: unpack it, and give the folder")
    raise ConfigError(
        f"{path} is no evaluation set: expected is a folder, a .tar, a .json of Karpathy's splits, "
        "or a .csv, .tsv or .txt with the labels of images"
    )


def find_image_folder(path, listing, lists_given):
    """As find_at, of a folder that may hold images, in a folder per class or flat."""
    found = find_class_folders(path, listing, lists_given)
    if not found:
        found = find_flat_folder(path, listing, lists_given)
    if found:
        return found

    # One folder of images beside their list, as in TinyImageNet's val.
    for name in listing.folders:
        folder = os.path.join(path, name)
        found = find_flat_folder(folder, list_folder(folder), lists_given)
        if found:
            return found

    raise ConfigError(why_no_set(path, listing))


def why_no_set(path, listing):
    """A folder in which no layout was found, and its Listing -> the message."""
    sets = benchmark_folders_below(path)
    if len(sets) > 1:
        return f"{path} holds several sets: give each a name, {as_sets(sets)}"
    if sets:
        return f"{path} holds a set in a folder: give {sets[0]}"
    if any(file.endswith(".tar") for file in files_below(path)):
        return no_shards(path)

    files = listing.unsupported_images + listing.other_files
    if not files and not listing.folders:
        return f"{path} is an empty folder; {EXPECTED}"
    archives = [name for name in files if extension_of(name) in ARCHIVES]
    advice = f"unpack {some(archives)}; " if archives else ""
    return f"{path} holds no evaluation set, but {contents_of(files, listing)}; {advice}{EXPECTED}"


def contents_of(files, listing):
    """What is in a folder, for a message: "3 folders, 12 txt"."""
    parts = [amount(len(listing.folders), "folder")] if listing.folders else []
    counts = Counter(extension_of(name) for name in files)
    for extension, count in counts.most_common(8):
        parts.append(f"{count:,} {extension}" if extension else amount(count, "other file"))
    return ", ".join(parts)


# ---- tar shards ----


def find_shards(patterns, lists_given, c, load_shards, is_benchmark=False):
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
    lists = find_lists(folder, lists_given)
    if is_benchmark and kind != "retrieval" and not lists.names:
        raise ConfigError(
            f"{folder}: a CLIP_benchmark folder without {DATASET_TYPE} is for zero-shot "
            f"classification, but there is no {CLASS_NAMES} in it or in the folder above: add "
            "it, or give --eval_names=FILE"
        )
    if lists.templates and not lists.names:
        print(f"{lists.templates_path} is not used: there are no class names", flush=True)

    source = TarSamples(load_shards(patterns), c.caption_key)
    classes = Classes("KEY.cls", {}, lists.names, lists.names_from, *choose_templates(lists))
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


def benchmark_folders_below(path):
    """-> the folders of CLIP_benchmark that lie in a folder, also deep in it.

    Of a large folder, only the first MAX_FILES files are looked at.
    """
    found = []
    for file in islice(files_below(path), MAX_FILES):
        folder, name = os.path.split(file)
        if name == NUM_SHARDS:
            is_in_test = os.path.basename(folder) == "test"
            found.append(os.path.dirname(folder) if is_in_test else folder)
    return found


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
            f"{folder}: {NUM_SHARDS} says {amount(number, 'shard')}, but {len(missing):,} of them "
            f"cannot be found, {missing[0]} for example: fetch what is missing"
        )
    return os.path.join(glob.escape(folder), f"{{0..{number - 1}}}.tar")


def folder_of_shards(patterns):
    """The folder of a set's first shard. Raises ConfigError if the patterns are of several sets.

    Several patterns are one set if all shards lie in one folder. One pattern is one set, wherever
    its shards lie, unless their folders have different class names, or each its own nshards.txt.
    """
    folders = list(dict.fromkeys(folder_of(url) for url in expand(patterns)))
    if len(folders) == 1:
        return folders[0]

    places = split_patterns(patterns)
    counted = [folder for folder in folders if os.path.isfile(os.path.join(folder, NUM_SHARDS))]
    class_lists = {class_list(folder) for folder in folders}
    if len(places) == 1 and len(counted) <= 1 and len(class_lists) == 1:
        return folders[0]

    if len(places) == 1:
        places = [os.path.join(folder, "*.tar") for folder in folders]
    raise ConfigError(
        f"eval_data names several sets, one in {folders[0]} and another in {folders[1]}, which "
        f"would be merged into one result: give each a name, {as_sets(places)}"
    )


def class_list(folder):
    """The lines of the class list for a folder, as a tuple; empty if there is none."""
    path = find_beside(folder, CLASS_NAMES)
    return tuple(read_lines(path)) if path else ()


def folder_of(url):
    folder = os.path.dirname(url)
    return os.path.abspath(folder) if is_local(url) else folder


# ---- command line ----


def main(argv):
    if not argv or argv[0].startswith("--"):
        raise ConfigError("usage: python -m ingest.layouts PLACE [--key=value ...]")
    c = replace(configs.load(argv[1:], saved={}), eval_data=(argv[0],))
    found = find_set("", c.eval_data, c)

    # Which class a sample in a tar has is known only after reading it.
    labels = getattr(found.source, "labels", None) or []
    numbers = Counter(labels)
    for number, name in enumerate(found.names[:NUM_SHOWN]):
        images = f", {amount(numbers[number], 'image')}" if labels else ""
        print(f"  class {number}: {name}{images}")
    if found.names:
        print(f"  prompt: {found.templates[0].replace('{c}', found.names[0])}")


if __name__ == "__main__":
    or_exit(main, sys.argv[1:])
