"""The names of classes, and the prompts in which they stand.

Two text files, in UTF-8, may lie beside a set or in the folder above it:

    classnames.txt                              the name of one class per line
    zeroshot_classification_templates.txt       one prompt per line; {c} or {} stands for the name
"""

import os
import sys
from collections import Counter

from config import ConfigError

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"

DEFAULT_TEMPLATES = ["a photo of a {c}"]


def class_list(folder):
    """-> (class names, prompt templates), lists of str, from the files beside the shards.

    Both files are looked for in the folder of the first shard, then in the folder above it.
    Without classnames.txt there are no names; without a file of templates there is one default
    template. Prints a line if a name occurs twice, or if there are templates only. Raises
    ConfigError for an empty line between the names, and for a template without a place for them.
    """
    names_path = find_beside(folder, CLASS_NAMES)
    names = read_class_names(names_path) if names_path else []

    templates_path = find_beside(folder, TEMPLATES)
    templates = read_templates(templates_path) if templates_path else []
    if templates and not names:
        print(f"{templates_path} is not used: there is no {CLASS_NAMES} beside it", flush=True)
    return names, templates or DEFAULT_TEMPLATES


def find_beside(folder, name):
    """The path of the file `name` in the folder or in the folder above; "" if it is in neither."""
    for place in (folder, os.path.dirname(folder)):
        path = os.path.join(place, name)
        if os.path.exists(path):
            return path
    return ""


def read_class_names(path):
    """-> list of str. An empty line would shift the numbers of all later classes: ConfigError."""
    names = read_lines(path)
    for number, name in enumerate(names, 1):
        if not name.strip():
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
    """-> list of str with {c} in each. ConfigError for one without {c} or {}."""
    templates = []
    for number, line in enumerate(read_lines(path), 1):
        template = line.replace("{}", "{c}")
        if template.strip() and "{c}" not in template:
            raise ConfigError(
                f"{path}, line {number}: {line[:80]!r} has no place for the name of the class: "
                "write {c} there"
            )
        if template.strip():
            templates.append(template)
    return templates


def read_lines(path):
    """The lines of a text file, without empty ones at its end. ConfigError if it is unreadable."""
    try:
        with open(path, encoding="utf-8-sig") as f:  # some editors begin a file with a mark
            lines = [line.rstrip("\n") for line in f]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error

    while lines and not lines[-1].strip():
        lines.pop()
    return lines
