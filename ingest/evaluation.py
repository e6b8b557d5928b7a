"""Evaluation sets: what a set may hold, and reading it.

A set is tar shards as in training, the layout that CLIP_benchmark reads. A sample is an image and,
under the same key, one or more of

    KEY.cls     the number of its class, counted from 0
    KEY.txt     its captions, one per line
    KEY.json    its captions, a string or a list of strings: the entry config.caption_key, if that
                is set, and then KEY.txt is not read

Beside the first shard, or in the folder above it, may lie two text files, in UTF-8:

    classnames.txt                              the name of one class per line
    zeroshot_classification_templates.txt       one prompt per line; {c} or {} stands for the name

A set with classnames.txt whose samples all have a class gives zero-shot classification. A set in
which any sample has captions gives retrieval. A set may give both.
"""

import math
import os
import sys
from collections import Counter
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch

from config import ConfigError
from ingest.images import BadSample, evaluation_image
from ingest.index import Index, load_index
from ingest.reader import Reader
from ingest.tar import captions, usable_samples
from ingest.urls import expand, is_local, split_patterns
from ingest.workers import default_workers, run_workers

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"

DEFAULT_TEMPLATES = ["a photo of a {c}"]
NUM_LOOKED_AT = 100  # samples, before a run starts
MAX_CLASS_BYTES = 9  # of KEY.cls: longer numbers are not of classes


# ---- opening a set ----


class EvaluationSet(NamedTuple):
    """A set that can be read.

    index       Index of its shards
    names       names of the classes, list of str; empty without classnames.txt
    templates   prompts, list of str, in which {c} stands for the name of a class
    """

    index: Index
    names: list
    templates: list


def load_set(c, progress=lambda where: None):
    """Find and index the set c.eval_data -> EvaluationSet.

    To be called on one rank: it prints what is odd about the class list, and may have to read the
    whole set. progress(where) is called as the work goes on. Raises what load_index raises, and
    ConfigError for several sets and for a class list or templates that cannot be used.
    """
    folder = folder_of_set(c.eval_data)
    names, templates = class_list(folder)
    index = load_index(
        c.eval_data,
        c.caption_key,
        evaluation=True,
        allow_left_out=c.allow_left_out,
        progress=progress,
    )
    return EvaluationSet(index, names, templates)


def check(c, progress=lambda where: None):
    """Find and index the set as load_set does, and look at its first samples -> EvaluationSet.

    So a run can ask before it starts. Raises ConfigError if there is nothing to evaluate, or for
    classes that are no numbers or have no name.
    """
    data = load_set(c, progress)
    caption_file = "json" if c.caption_key else "txt"
    first_shard = data.index.shards[0]
    samples = usable_samples(first_shard, (caption_file, "cls"), range(NUM_LOOKED_AT))
    first_files = [files for _, files in islice(samples, NUM_LOOKED_AT)]

    if caption_file not in first_files[0] and not data.names:
        raise ConfigError(
            f"{c.eval_data[0]} has classes (KEY.cls), but there is no classnames.txt beside it or "
            "in the folder above"
        )
    try:
        labels = [class_number(files) for files in first_files]
    except BadSample as error:
        raise ConfigError(
            f"{first_shard}: {error}: KEY.cls holds the number of a class, counted from 0 in the "
            "order of classnames.txt"
        ) from error
    if data.names:
        check_class_numbers(labels, data.names, c.eval_data[0])
    return data


def class_number(files):
    """{extension: bytes} -> int, None if there is no KEY.cls. BadSample if it is not a number."""
    label = files.get("cls")
    if label is None:
        return None
    if not label.strip().isdigit() or len(label) > MAX_CLASS_BYTES:
        raise BadSample("class is not a number")
    return int(label)


def check_class_numbers(labels, names, where):
    """ConfigError if a label, int or None, has no name. where: the set, for the message."""
    largest = max((label for label in labels if label is not None), default=0)
    if largest >= len(names):
        raise ConfigError(
            f"class {largest} in {where}, but {CLASS_NAMES} has {len(names)} lines: classes are "
            "counted from 0, or the file belongs to another set"
        )


def folder_of_set(patterns):
    """The folder of a set's first shard. Raises ConfigError if the patterns are of several sets.

    Several patterns are one set if all shards lie in one folder. One pattern is one set, wherever
    its shards lie.
    """
    folders = [folder_of(url) for url in expand(patterns)]
    if len(split_patterns(patterns)) > 1 and len(set(folders)) > 1:
        other = next(folder for folder in folders if folder != folders[0])
        raise ConfigError(
            f"eval_data names several sets, one in {folders[0]} and another in {other}, which "
            "would be merged into one result: evaluate one set at a time, each by a call of eval.py"
        )
    return folders[0]


def folder_of(url):
    folder = os.path.dirname(url)
    return os.path.abspath(folder) if is_local(url) else folder


# ---- the class list ----


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


# ---- reading a set ----


class EvaluationBatch(NamedTuple):
    """Some samples of a set, on the CPU. n is 0 if all samples of the batch are bad.

    images      uint8 (n, 3, S, S)
    captions    n lists of str; a list is empty if the sample has no captions
    classes     n ints; None if the sample has no class
    positions   int64 (n,), where each sample is in the set
    bad         {reason: number of samples that were left out}
    """

    images: torch.Tensor
    captions: list
    classes: list
    positions: torch.Tensor
    bad: dict


def read_samples(
    index, image_size, caption_key="", batch_size=256, rank=0, world_size=1, workers="auto"
):
    """Yield this rank's share of an evaluation set as EvaluationBatches, in no particular order.

    The share is the samples at positions rank, rank + world_size, ..., each once, of the whole
    set's index.num_samples. workers: processes that decode; "auto": as many as the CPUs allow.
    Raises ShardError.
    """
    if workers == "auto":
        workers = default_workers()
    batches = math.ceil(index.num_samples / world_size / batch_size)

    read = partial(read_share, index, image_size, caption_key, batch_size, rank, world_size)
    yield from run_workers(read, min(batches, workers), torch.cuda.is_initialized())


def read_images(index, image_size, positions):
    """Yield (position, image uint8 (3, S, S)) for a few samples of a set, at rising positions.

    What lies between them is not decoded. Raises ShardError, and BadSample for a bad image.
    """
    reader = Reader(index)
    for position in positions:
        yield position, evaluation_image(reader.read(position), image_size)


def read_share(index, image_size, caption_key, batch_size, rank, world_size, worker, workers):
    """Yield one worker's part of a rank's share: every `workers`-th sample of it, in batches."""
    stride = world_size * workers
    positions = range(rank + world_size * worker, index.num_samples, stride)
    reader = Reader(index, stride)
    for start in range(0, len(positions), batch_size):
        some = positions[start : start + batch_size]
        yield read_batch(reader, some, image_size, caption_key)


def read_batch(reader, positions, image_size, caption_key):
    """The samples at increasing positions -> EvaluationBatch, without the bad ones."""
    images = []
    texts = []
    classes = []
    good = []
    bad = Counter()
    for position in positions:
        try:
            sample = evaluation_sample(reader.read(position), image_size, caption_key)
        except BadSample as error:
            bad[str(error)] += 1
            continue
        images.append(sample[0])
        texts.append(sample[1])
        classes.append(sample[2])
        good.append(position)

    if images:
        images = torch.stack(images)
    else:
        images = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    return EvaluationBatch(images, texts, classes, torch.tensor(good, dtype=torch.int64), dict(bad))


def evaluation_sample(files, size, caption_key):
    """{extension: bytes} -> (image uint8 (3, size, size), list of captions, class number or None).

    The list is empty if there are no usable captions. Raises BadSample, which gives the reason, for
    an image that cannot be decoded and for a class that is not a number.
    """
    image = evaluation_image(files, size)

    label = class_number(files)

    try:
        texts = captions(files, caption_key, lines=True)
    except BadSample:
        texts = []
    return image, texts, label
