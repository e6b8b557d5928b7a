"""Evaluation sets: what is in them, and reading them."""

import math
from collections import Counter
from functools import partial
from typing import NamedTuple

import torch

from ingest.images import (
    BadSample,
    evaluation_image,
)
from ingest.index import load_index
from ingest.reader import Reader
from ingest.tar import captions
from ingest.workers import default_workers, run_workers


def evaluation_sample(files, size, caption_key):
    """{extension: bytes} -> (image uint8 [3, size, size]; list of captions, maybe empty; class number or None). BadSample says why
    not."""
    image, label = evaluation_image(files, size), files.get("cls")
    if label is not None and not (label.strip().isdigit() and len(label) < 10):
        raise BadSample("class is not a number")
    try:
        texts = captions(files, caption_key)
    except BadSample:
        texts = []
    return image, texts, int(label) if label else None


class EvaluationBatch(NamedTuple):
    """images uint8 [n, 3, S, S]; captions: n lists of str; classes: n ints or None; positions in the set, int64 [n]; bad {reason:
    how many samples were left out}. All on the CPU."""

    images: torch.Tensor
    captions: list
    classes: list
    positions: torch.Tensor
    bad: dict


def evaluation_shares(
    index, image_size, caption_key, batch_size, rank, world_size, worker, workers
):
    positions = range(rank + world_size * worker, index.num_samples, world_size * workers)
    reader = Reader(index, positions.step)
    for start in range(0, len(positions), batch_size):
        bad, rows = Counter(), []
        for position in positions[start : start + batch_size]:
            try:
                rows.append(
                    (*evaluation_sample(reader.read(position), image_size, caption_key), position)
                )
            except BadSample as error:
                bad[str(error)] += 1
        if rows:
            images, texts, classes, ids = zip(*rows)
            yield EvaluationBatch(
                torch.stack(images), list(texts), list(classes), torch.tensor(ids), dict(bad)
            )


def read_samples(
    patterns, image_size, caption_key="", batch_size=256, rank=0, world_size=1, workers="auto"
):
    """An evaluation set -> iterator over EvaluationBatch: this rank's samples rank, rank + world_size, ... each once, in no particular
    order. The whole set has load_index(patterns, caption_key, evaluation=True).num_samples. Raises what load_index raises;
    ShardError while iterating."""
    index = load_index(patterns, caption_key, evaluation=True)
    batches = math.ceil(index.num_samples / world_size / batch_size)
    yield from run_workers(
        partial(evaluation_shares, index, image_size, caption_key, batch_size, rank, world_size),
        min(batches, default_workers() if workers == "auto" else workers),
        torch.cuda.is_initialized(),
    )


def check(c):
    pass
