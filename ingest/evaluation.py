"""Evaluation sets: what a set may hold, and reading it.

A set is tar shards as in training, the layout that CLIP_benchmark reads. A sample is an image and,
under the same key, one or more of

    KEY.cls     the number of its class, counted from 0
    KEY.txt     its captions, one per line
    KEY.json    its captions, a string or a list of strings: the entry config.caption_key, if that
                is set, and then KEY.txt is not read

Beside the first shard, or in the folder above it, may lie two text files:

    classnames.txt                              the name of one class per line
    zeroshot_classification_templates.txt       one prompt per line; {c} stands for the class name

A set with classnames.txt whose samples all have a class gives zero-shot classification. A set in
which any sample has captions gives retrieval. A set may give both.
"""

import math
import os
from collections import Counter
from functools import partial
from typing import NamedTuple

import torch

from config import ConfigError
from ingest.images import BadSample, evaluation_image
from ingest.index import load_index
from ingest.reader import Reader
from ingest.tar import captions, usable_samples
from ingest.urls import expand
from ingest.workers import default_workers, run_workers

DEFAULT_TEMPLATES = ["a photo of a {c}"]
MAX_CLASS_BYTES = 9  # of KEY.cls: longer numbers are not of classes


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
    patterns, image_size, caption_key="", batch_size=256, rank=0, world_size=1, workers="auto"
):
    """Yield this rank's share of an evaluation set as EvaluationBatches, in no particular order.

    The share is the samples at positions rank, rank + world_size, ..., each once. The whole set has
    load_index(patterns, caption_key, evaluation=True).num_samples. workers: processes that decode;
    "auto": as many as the CPUs allow. Raises what load_index raises; while iterating, ShardError.
    """
    index = load_index(patterns, caption_key, evaluation=True)
    if workers == "auto":
        workers = default_workers()
    batches = math.ceil(index.num_samples / world_size / batch_size)

    read = partial(read_share, index, image_size, caption_key, batch_size, rank, world_size)
    yield from run_workers(read, min(batches, workers), torch.cuda.is_initialized())


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

    label = files.get("cls")
    if label is not None:
        if not label.strip().isdigit() or len(label) > MAX_CLASS_BYTES:
            raise BadSample("class is not a number")
        label = int(label)

    try:
        texts = captions(files, caption_key, lines=True)
    except BadSample:
        texts = []
    return image, texts, label


# ---- the class list ----


def class_list(c):
    """-> (class names, prompt templates), lists of str, from the files beside the set c.eval_data.

    Both files are looked for beside the first shard, then in the folder above it. Without
    classnames.txt there are no names; without a file of templates there is one default template.
    """
    shards = os.path.dirname(expand(c.eval_data)[0])
    names = read_lines(shards, "classnames.txt")
    templates = read_lines(shards, "zeroshot_classification_templates.txt")
    return names, templates or DEFAULT_TEMPLATES


def read_lines(folder, name):
    """The lines, but no blank ones, of a file in `folder` or the folder above; [] if absent."""
    for place in (folder, os.path.dirname(folder)):
        path = os.path.join(place, name)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                return [line.rstrip("\n") for line in f if line.strip()]
    return []


def check(c):
    """Raise ConfigError if the set c.eval_data has nothing to evaluate.

    It looks at the first sample only, so that a run can ask before it starts.
    """
    caption_file = "json" if c.caption_key else "txt"
    first_shard = expand(c.eval_data)[0]
    _, files = next(usable_samples(first_shard, (caption_file, "cls"), range(1)))

    names, _ = class_list(c)
    if caption_file not in files and not names:
        raise ConfigError(
            f"{c.eval_data[0]} has classes (KEY.cls), but there is no classnames.txt beside it or "
            "in the folder above"
        )
