"""In which layouts an evaluation set may lie on the disk, and finding out which one it is."""

import os
from typing import NamedTuple

from config import ConfigError
from ingest.class_names import class_list
from ingest.index import load_index
from ingest.sources import ImageFiles, TarSamples
from ingest.urls import expand, is_local, split_patterns


class EvaluationSet(NamedTuple):
    """A set that can be read.

    name        as config.eval_data names it; else made of its path
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
    is_named: bool = False  # by config.eval_data


def find_set(name, patterns, c, progress=lambda where: None):
    """Find a set and what it is -> EvaluationSet.

    name: of the set, "" to make one of its path. patterns: its place, a tuple of str.

    To be called on one rank: it prints what is odd about the class list, and may have to read a
    whole set of tars. progress(where) is called as the work goes on. Raises what load_index raises,
    and ConfigError for a class list or templates that cannot be used.
    """
    folder = folder_of_shards(patterns)
    names, templates = class_list(folder)
    index = load_index(
        patterns,
        c.caption_key,
        evaluation=True,
        allow_left_out=c.allow_left_out,
        progress=progress,
    )
    source = TarSamples(index, c.caption_key)
    return EvaluationSet(name, " ".join(patterns), source, names, templates)


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
