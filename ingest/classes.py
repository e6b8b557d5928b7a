"""What names a class on the disk, and which class that is.

A class is named by a folder or by a label in a file: by a WordNet id, as n01440764, by a number
counted from 0, or by its name.
"""

import re
import sys
from typing import NamedTuple

from config import ConfigError
from ingest.class_names import DEFAULT_TEMPLATES, choose_templates, imagenet_ids, imagenet_names
from ingest.folders import amount, some

WORDNET_ID = re.compile(r"n\d{8}", re.ASCII)
NUMBER = re.compile(r"\d{1,9}", re.ASCII)


class Classes(NamedTuple):
    """The classes of a set.

    kind            of what names them on the disk, for people
    labels          {what names a class on the disk: its number, an index into names}
    names           n str, which stand in the prompts
    names_from      the file of the names, or "open_clip", or "the folders' names", for people
    templates       the prompts, list of str, in which {c} stands for the name of a class
    templates_from  the file of the templates, or "open_clip"; "" for the default one
    """

    kind: str
    labels: dict
    names: list
    names_from: str
    templates: list
    templates_from: str = ""


NO_CLASSES = Classes(kind="", labels={}, names=[], names_from="", templates=DEFAULT_TEMPLATES)


def classes_of(keys, lists, where, keys_from):
    """What names the classes on the disk -> Classes.

    keys: a set of str. lists: ingest.class_names.Lists. where: the set, for the messages.
    keys_from: "the folders' names", for people. Raises ConfigError for keys that belong to no
    class, and for a list that does not fit or is missing.
    """
    if any(WORDNET_ID.fullmatch(key) for key in keys):
        return wordnet_classes(keys, lists, where)
    if all(NUMBER.fullmatch(key) for key in keys):
        return numbered_classes(keys, lists, where)
    return named_classes(keys, lists, where, keys_from)


def wordnet_classes(ids, lists, where):
    """As classes_of. The classes are in ImageNet's order, which is that of their ids."""
    number_of = {wordnet_id: number for number, wordnet_id in enumerate(imagenet_ids())}

    unknown = sorted(key for key in ids if key not in number_of)
    if unknown:
        raise ConfigError(
            f"{where}: {len(unknown):,} of its {len(ids):,} classes are none of ImageNet's 1,000: "
            f"{some(unknown)}; take them away, or name all classes by words, one folder or label "
            "each"
        )

    order = sorted(ids)
    numbers = [number_of[wordnet_id] for wordnet_id in order]
    names, names_from = imagenet_names(numbers, lists, where)
    templates = choose_templates(lists, is_imagenet=True)
    return Classes("WordNet ids", numbered(order), names, names_from, *templates)


def numbered_classes(keys, lists, where):
    """As classes_of. All numbers from 0 to 999 are ImageNet's classes, others those of a list."""
    labels = {key: int(key) for key in keys}
    largest = max(labels.values())
    if set(labels.values()) == set(range(1000)):
        names, names_from = imagenet_names(range(1000), lists, where)
        templates = choose_templates(lists, is_imagenet=True)
        return Classes("numbers of ImageNet's classes", labels, names, names_from, *templates)

    if not lists.names:
        raise ConfigError(
            f"{where}: its classes ({len(keys):,}) are numbers up to {largest:,}, which are "
            "ImageNet's if all of 0 to 999 are there: otherwise give their names, line n for "
            "class n - 1, in classnames.txt beside it or by --eval_names=FILE"
        )
    if largest >= len(lists.names):
        raise ConfigError(
            f"{where} has a class {largest:,}, but {lists.names_path} has "
            f"{amount(len(lists.names), 'line')}: classes are counted from 0, or the list "
            "belongs to another set"
        )
    if 0 not in labels.values():
        warn(
            f"no image in {where} has class 0: classes are counted from 0, line n of "
            f"{lists.names_path} names class n - 1; are these counted from 1?"
        )
    templates = choose_templates(lists)
    return Classes("numbers", labels, lists.names, lists.names_from, *templates)


def named_classes(keys, lists, where, keys_from):
    """As classes_of. A list may hold the names themselves, or others in the order of the keys."""
    order = sorted(keys)
    own_names = [key.replace("_", " ") for key in order]
    templates = choose_templates(lists)
    if not lists.names:
        return Classes("names", numbered(order), own_names, keys_from, *templates)

    line_of = {}
    for number, name in enumerate(lists.names):
        line_of.setdefault(name.replace("_", " ").lower(), number)
    lines = [line_of.get(name.lower()) for name in own_names]
    if None not in lines:
        labels = dict(zip(order, lines))
        return Classes("names", labels, lists.names, lists.names_from, *templates)

    if len(lists.names) != len(order):
        raise ConfigError(
            f"{lists.names_path} has {amount(len(lists.names), 'line')}, but {where} has "
            f"{amount(len(order), 'class', 'classes')}, of which the list lacks "
            f"{order[lines.index(None)]!r}: give the names of all classes, or one line for each in "
            "the sorted order of the folders or labels"
        )
    for number, line in enumerate(lines):
        if line not in (None, number):
            raise ConfigError(
                f"{lists.names_path} is in another order than the classes of {where}: line "
                f"{line + 1} is {lists.names[line]!r}, but {order[number]!r} is number "
                f"{number + 1} in sorted order"
            )
    if not lists.names_given and set(lines) == {None}:
        warn(
            f"{lists.names_path} has none of the names on the disk: {where} has {some(order)}, the "
            f"list {some(lists.names)}; they are matched in this order. If the list belongs to "
            "another set, give the right one by --eval_names=FILE"
        )
    return Classes("names", numbered(order), lists.names, lists.names_from, *templates)


def numbered(keys):
    """-> {key: its place in the list}."""
    return {key: number for number, key in enumerate(keys)}


def warn(text):
    print(f"warning: {text}", file=sys.stderr, flush=True)
