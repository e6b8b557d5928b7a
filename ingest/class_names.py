"""The names of classes, and the prompts in which they stand.

They are given by hand (config.eval_names, config.eval_templates), or in two text files, in UTF-8,
beside a set or in the folder above it:

    classnames.txt                              the name of one class per line
    zeroshot_classification_templates.txt       one prompt per line; {c} or {} stands for the name

For ImageNet's classes there are also those of open_clip, if it is installed.
"""

import os
import re
import sys
from collections import Counter
from typing import NamedTuple

from config import ConfigError
from ingest.folders import amount
from ingest.urls import nearest_name

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"

DEFAULT_TEMPLATES = ["a photo of a {c}"]

STARTS_WITH_ID = re.compile(r"n\d{8}\b", re.ASCII)

# A line that was copied out of a list in Python.
PYTHON = re.compile(r"""\s*(lambda\b.*:|f?["'].*["'],?\s*$)""")


class ListFiles(NamedTuple):
    """The paths of lists that the user gives by hand for a set; "" for none."""

    names: str
    templates: str


NONE_GIVEN = ListFiles(names="", templates="")


class Lists(NamedTuple):
    """What the user's files say about a set's classes.

    names           list of str, empty if there is no such file
    names_path      the file of the names, "" if there is none
    names_from      where that file was found, for people
    names_given     whether the names were given by hand
    templates       list of str with {c} in each, empty if there is no such file
    templates_path  the file of the templates, "" if there is none
    templates_from  where that file was found, for people
    """

    names: list
    names_path: str
    names_from: str
    names_given: bool
    templates: list
    templates_path: str
    templates_from: str


def find_lists(folder, lists_given=NONE_GIVEN):
    """The lists for a set in a folder -> Lists.

    lists_given: by hand, they come before those beside the set. Prints a line if a name occurs
    twice. Raises ConfigError for a file that cannot be read, for an empty line between the names,
    and for a template without a place for them.
    """
    names_path = os.path.expanduser(lists_given.names) or find_beside(folder, CLASS_NAMES)
    templates_path = os.path.expanduser(lists_given.templates) or find_beside(folder, TEMPLATES)
    return Lists(
        names=read_class_names(names_path) if names_path else [],
        names_path=names_path,
        names_from=origin(names_path, folder, lists_given.names),
        names_given=bool(lists_given.names),
        templates=read_templates(templates_path) if templates_path else [],
        templates_path=templates_path,
        templates_from=origin(templates_path, folder, lists_given.templates),
    )


def origin(path, folder, given):
    """Where a list comes from, for people: "classnames.txt in the folder above".

    path: of the list, "" for none. folder: of the set. given: the path that the user gave, or "".
    """
    if given or not path:
        return given
    is_above = os.path.dirname(path) != folder
    return os.path.basename(path) + (" in the folder above" if is_above else "")


def choose_templates(lists, is_imagenet=False):
    """-> (templates, where they come from, "" for the default one).

    is_imagenet: without a file, take ImageNet's, if open_clip is installed.
    """
    if lists.templates:
        return lists.templates, lists.templates_from
    if is_imagenet:
        templates = imagenet_templates()
        if templates:
            return templates, "open_clip"
    return DEFAULT_TEMPLATES, ""


# ---- files ----


def find_beside(folder, name):
    """The path of the file `name` in the folder or in the folder above; "" if it is in neither."""
    for place in (folder, os.path.dirname(folder)):
        path = os.path.join(place, name)
        if os.path.exists(path):
            return path
    return ""


def read_class_names(path):
    """-> list of str. An empty line would shift the numbers of all later classes: ConfigError."""
    names = [line.strip() for line in read_lines(path)]
    if not names:
        raise ConfigError(f"{path} is empty: it must hold the name of one class per line")
    if all(STARTS_WITH_ID.match(name) for name in names):
        raise ConfigError(
            f"{path} lists WordNet ids, {names[0]!r} for example, as Kaggle's "
            "LOC_synset_mapping.txt does: it must hold names for prompts, one per line. For "
            "folders of ImageNet's classes leave it out; for shards write open_clip's "
            "IMAGENET_CLASSNAMES into it, by which CLIP is judged"
        )
    for number, name in enumerate(names, 1):
        if not name:
            raise ConfigError(f"{path}, line {number} is empty: line n names class n - 1")

    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        print(
            f"warning: {path} has names that occur twice: {', '.join(map(repr, twice[:4]))}; "
            "zero-shot classification cannot tell such classes apart",
            file=sys.stderr,
            flush=True,
        )
    return names


def read_templates(path):
    """-> list of str with {c} in each. ConfigError for one without {c} or {}, or if none."""
    templates = []
    for number, line in enumerate(read_lines(path), 1):
        if PYTHON.match(line):
            raise ConfigError(
                f"{path}, line {number}: {line[:80]!r} is Python: write the prompt alone, as "
                "a photo of a {c}."
            )
        template = line.replace("{}", "{c}")
        if template.strip() and "{c}" not in template:
            raise ConfigError(
                f"{path}, line {number}: {line[:80]!r} has no place for the name of the class: "
                "write {c} there"
            )
        if template.strip():
            templates.append(template)
    if not templates:
        raise ConfigError(f"{path} is empty: it must hold one prompt per line, with {{c}}")
    return templates


def read_lines(path):
    """The lines of a text file, without empty ones at its end. ConfigError if it is unreadable."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors begin a file with a mark
            lines = [line.rstrip("\n") for line in f]
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}{nearest_name(path)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error

    while lines and not lines[-1].strip():
        lines.pop()
    return lines


# ---- ImageNet ----


def imagenet_ids():
    """-> the WordNet ids of ImageNet's 1,000 classes in their order, as n01440764."""
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names()


def imagenet_names(numbers, lists, where):
    """-> (names of some of ImageNet's classes, list of str; where they come from).

    numbers: which of the 1,000. where: the set, for the message. The user's list may name these
    classes or all 1,000. Raises ConfigError if it names another number of classes and, if there is
    no list, without open_clip.
    """
    if len(lists.names) == len(numbers):
        return lists.names, lists.names_from

    names = lists.names or open_clip_names(where)
    if len(names) != 1000:
        raise ConfigError(
            f"{lists.names_path} has {amount(len(names), 'line')}, but {where} has "
            f"{amount(len(numbers), 'class', 'classes')} of ImageNet's 1,000: give one line for "
            "each of these classes, or 1,000, in ImageNet's order"
        )
    return [names[number] for number in numbers], lists.names_from or "open_clip"


def open_clip_names(where):
    try:
        from open_clip import IMAGENET_CLASSNAMES
    except ImportError as error:
        raise ConfigError(
            f"{where} has classes of ImageNet, whose names are in open_clip, which is not "
            "installed: pip install open_clip_torch, or give a file with --eval_names=FILE"
        ) from error
    return list(IMAGENET_CLASSNAMES)


def imagenet_templates():
    """-> open_clip's prompts for ImageNet, with {c}; empty if it is not installed."""
    try:
        from open_clip import OPENAI_IMAGENET_TEMPLATES
    except ImportError:
        return []
    return [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
