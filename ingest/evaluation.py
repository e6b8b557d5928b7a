"""Evaluation sets: finding what config.eval_data names, and reading it.

ingest/layouts.py says in which layouts a set may lie on the disk. However that may be, a sample is
an image with a class, with captions, or with both. A set with class names whose samples all have a
class gives zero-shot classification. A set in which any sample has captions gives retrieval.
"""

import math
from collections import Counter
from functools import partial
from typing import NamedTuple

import torch

from config import ConfigError, named_sets
from ingest.images import BadSample, evaluation_image
from ingest.layouts import find_set
from ingest.sources import BadClass
from ingest.workers import default_workers, run_workers

NUM_LOOKED_AT = 100  # samples, before a run starts


# ---- finding the sets ----


def load_sets(c, progress=lambda where: None):
    """Find the sets of c.eval_data, look at their first samples -> list of EvaluationSet.

    So a run can ask before it starts. To be called on one rank: it may have to read a whole set,
    and it prints a line about each. progress(where) is called as the work goes on. Raises
    ConfigError as ingest.layouts.find_set does, if there is nothing to evaluate, and for classes
    that are no numbers or have no name.
    """
    sets = []
    for name, patterns in named_sets(c).items():
        data = find_set(name, patterns, c, progress)
        check_first_samples(data)
        sets.append(data)
    return sets


def check_first_samples(data):
    reader = data.source.reader()
    labels = []
    has_captions = False
    for position in range(min(NUM_LOOKED_AT, data.source.num_samples)):
        try:
            raw = reader.read(position)
        except BadClass as error:
            raise ConfigError(
                f"{data.where}: {error}: KEY.cls holds the number of a class, counted from 0 in "
                "the order of classnames.txt"
            ) from error
        except BadSample:
            continue  # such samples are left out, and counted
        labels.append(raw.label)
        has_captions = has_captions or bool(raw.captions)

    if data.names:
        check_class_numbers(labels, data.names, data.where)
    elif not has_captions:
        raise ConfigError(
            f"{data.where} has classes (KEY.cls), but there is no classnames.txt beside it or in "
            "the folder above"
        )


def check_class_numbers(labels, names, where):
    """ConfigError if a label, int or None, has no name. where: the set, for the message."""
    largest = max((label for label in labels if label is not None), default=0)
    if largest >= len(names):
        raise ConfigError(
            f"class {largest} in {where}, but the class list (classnames.txt) has {len(names)} "
            "lines: classes are counted from 0, or the list belongs to another set"
        )


# ---- reading a set ----


class EvaluationBatch(NamedTuple):
    """Some samples of a set, on the CPU. n is 0 if all samples of the batch are bad.

    images      uint8 (n, 3, S, S)
    captions    n lists of str; a list is empty if the sample has no captions
    labels      n ints; None if the sample has no class
    positions   int64 (n,), where each sample is in the set
    bad         {reason: number of samples that were left out}
    """

    images: torch.Tensor
    captions: list
    labels: list
    positions: torch.Tensor
    bad: dict


def read_samples(source, image_size, batch_size=256, rank=0, world_size=1, workers="auto"):
    """Yield this rank's share of a set as EvaluationBatches, in no particular order.

    source: TarSamples or ImageFiles. The share is the samples at positions rank,
    rank + world_size, ..., each once, of source.num_samples. workers: processes that decode;
    "auto": as many as the CPUs allow. Raises ShardError.
    """
    if workers == "auto":
        workers = default_workers()
    batches = math.ceil(source.num_samples / world_size / batch_size)

    read = partial(read_share, source, image_size, batch_size, rank, world_size)
    yield from run_workers(read, min(batches, workers), torch.cuda.is_initialized())


def read_images(source, image_size, positions):
    """Yield (position, image uint8 (3, S, S)) for a few samples of a set, at rising positions.

    What lies between them is not decoded. Raises ShardError, and BadSample for a bad image.
    """
    reader = source.reader()
    for position in positions:
        files = reader.read(position).files
        yield position, evaluation_image(files, image_size, source.border)


def read_share(source, image_size, batch_size, rank, world_size, worker, workers):
    """Yield one worker's part of a rank's share: every `workers`-th sample of it, in batches."""
    stride = world_size * workers
    positions = range(rank + world_size * worker, source.num_samples, stride)
    reader = source.reader(stride)
    for start in range(0, len(positions), batch_size):
        some = positions[start : start + batch_size]
        yield read_batch(reader, some, image_size, source.border)


def read_batch(reader, positions, image_size, border=0):
    """The samples at increasing positions -> EvaluationBatch, without the bad ones."""
    images = []
    captions = []
    labels = []
    good = []
    bad = Counter()
    for position in positions:
        try:
            raw = reader.read(position)
            image = evaluation_image(raw.files, image_size, border)
        except BadSample as error:
            bad[str(error)] += 1
            continue
        images.append(image)
        captions.append(raw.captions)
        labels.append(raw.label)
        good.append(position)

    if images:
        images = torch.stack(images)
    else:
        images = torch.empty(0, 3, image_size, image_size, dtype=torch.uint8)
    positions = torch.tensor(good, dtype=torch.int64)
    return EvaluationBatch(images, captions, labels, positions, dict(bad))
