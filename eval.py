"""Evaluate a model: zero-shot classification and retrieval, and a picture of what it finds.

    python eval.py runs/quickstart                             on the eval_data of its config
    python eval.py runs/cc3m_v3 --eval_data='SET/{00..49}.tar'   on another set

evaluates the newest checkpoint of a run, or one checkpoint folder, and writes eval.json and
retrieval.png. train.py calls `evaluate` during a run and at its end. ingest/evaluation.py says what
an evaluation set may hold. The work is shared over the ranks.
"""

import contextlib
import json
import os
import sys
import textwrap
from collections import Counter
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F

import config as configs
import dist
import model as models
from config import ConfigError
from ingest.evaluation import class_list, read_samples
from ingest.tokenizer import Tokenizer
from runtime import checkpoint, hardware, ranks

USAGE = """usage: python eval.py RUN_OR_CHECKPOINT [--key=value ...]
the options are those of train.py; here matter --eval_data, --eval_batch, --caption_key, --out_dir,
--workers, --precision and --device"""

QUERIES_AT_ONCE = 1024  # whose similarities to all targets are in memory together
QUERIES_SHOWN = 8  # rows of the picture
IMAGES_SHOWN = 5  # beside each query


class EncodedImages(NamedTuple):
    """The usable images of a set, in the set's order, the same on every rank.

    features    float32 (n, d), rows of length 1, on the device
    captions    n lists of str; a list is empty if the image has no captions
    classes     n ints; None if the image has no class
    positions   n ints, where each image is in the set
    bad         {reason: number of samples that were left out}
    """

    features: torch.Tensor
    captions: list
    classes: list
    positions: list
    bad: dict


class Queries(NamedTuple):
    """Texts by which images are searched: class names or captions.

    texts       m str
    features    float32 (m, d), rows of length 1, on the device
    relevant    for each image, the list of the numbers of the texts that are right for it
    """

    texts: list
    features: torch.Tensor
    relevant: list


# ---- the evaluation ----


@torch.no_grad()
def evaluate(
    model, c, device, autocast=contextlib.nullcontext, picture=False, progress=lambda where: None
):
    """Evaluate the model on the set c.eval_data -> {name: share, 0 to 1}, the same on every rank.

    All ranks must call it. autocast() makes the context in which the towers run. With `picture`,
    rank 0 also writes eval.json and retrieval.png into c.out_dir. progress(where) is called with a
    line about each step of the work. Leaves the model in eval mode. Raises ConfigError for a set
    without classes and captions, and for class numbers that the class list does not reach.
    """

    def encode(texts):
        return encode_texts(texts, model, c, device, autocast, progress)

    model.eval()

    images = encode_images(model, c, device, autocast, progress)
    if images.bad and dist.rank() == 0:
        print(f"left out of {c.eval_data[0]}: {images.bad}", flush=True)

    results = {}
    queries = None  # what the picture shows: class names or, without classes, captions

    # Zero-shot classification, if every image has a class and there is a list of class names.
    names, templates = class_list(c)
    if names and None not in images.classes:
        queries = class_queries(names, templates, images, encode, c)
        classes = torch.tensor(images.classes, device=device)  # (n,)
        results.update(zero_shot(images.features, queries.features, classes))

    # Retrieval, if any image has captions.
    if any(images.captions):
        captions = caption_queries(images, encode)
        results.update(retrieval(images.features, captions.features, captions.relevant))
        if queries is None:
            queries = captions

    if queries is None:
        raise ConfigError(
            f"{c.eval_data[0]} has neither classes (KEY.cls beside classnames.txt) nor captions "
            "(KEY.txt, or set caption_key)"
        )

    if picture:
        rows = picture_rows(images, queries, model.image_size, c, progress)
        if dist.rank() == 0:
            os.makedirs(c.out_dir, exist_ok=True)
            write_results(os.path.join(c.out_dir, "eval.json"), c, images, queries, results)
            draw(os.path.join(c.out_dir, "retrieval.png"), rows)

    return results


def class_queries(names, templates, images, encode, c):
    """-> Queries by class name: the feature of a class is the mean of its prompts' features."""
    largest = max(images.classes)
    if largest >= len(names):
        raise ConfigError(
            f"class {largest} in {c.eval_data[0]}, but classnames.txt has {len(names)} lines: "
            "it belongs to another set"
        )

    prompts = []
    for name in names:
        for template in templates:
            prompts.append(template.replace("{c}", name))

    features = encode(prompts)  # (classes * templates, d)
    features = features.unflatten(0, (len(names), len(templates))).mean(1)  # (classes, d)
    features = F.normalize(features, dim=-1)

    relevant = [[label] for label in images.classes]
    return Queries(names, features, relevant)


def caption_queries(images, encode):
    """-> Queries by caption; a caption that several images have is one query."""
    number = {}  # caption -> its number
    relevant = []
    for captions in images.captions:
        for caption in captions:
            number.setdefault(caption, len(number))
        relevant.append([number[caption] for caption in captions])

    texts = list(number)
    return Queries(texts, encode(texts), relevant)


# ---- features ----


def encode_images(model, c, device, autocast, progress):
    """Encode the set, each rank its share -> EncodedImages. ConfigError if no sample is usable."""
    features = []
    captions = []
    classes = []
    positions = []
    bad = Counter()
    for number, batch in enumerate(samples_of_this_rank(model.image_size, c)):
        progress(f"evaluation, batch {number} of images")
        bad.update(batch.bad)
        if len(batch.images) == 0:
            continue
        with autocast():
            encoded = model.encode_image(batch.images.to(device, non_blocking=True))  # (b, d)
        features.append(encoded.float().cpu())
        captions += batch.captions
        classes += batch.classes
        positions += batch.positions.tolist()

    features = from_all_ranks(features)
    captions = from_all_ranks(captions)
    classes = from_all_ranks(classes)
    positions = from_all_ranks(positions)
    bad = sum(dist.all_gather_objects(bad), Counter())
    if not features:
        raise ConfigError(f"no sample of {c.eval_data[0]} can be used: {dict(bad)}")

    order = torch.tensor(positions).argsort().tolist()
    return EncodedImages(
        features=torch.cat(features)[order].to(device),  # (n, d)
        captions=[captions[i] for i in order],
        classes=[classes[i] for i in order],
        positions=[positions[i] for i in order],
        bad=dict(bad),
    )


def encode_texts(texts, model, c, device, autocast, progress):
    """n texts -> features float32 (n, d) on the device; each of K ranks encodes every K-th text."""
    tokenizer = Tokenizer(model.context_length)
    world_size = dist.world_size()
    share = texts[dist.rank() :: world_size]

    features = []
    for start in range(0, len(share), c.eval_batch):
        progress(f"evaluation, text {start} of {len(share)}")
        tokens = tokenizer(share[start : start + c.eval_batch])  # (b, context_length)
        lengths = 1 + tokens.argmax(1)  # the end of a text is the largest token
        longest = int(lengths.max())
        with autocast():
            token_index = models.pack(lengths, longest, device)
            encoded = model.encode_text(tokens[:, :longest].to(device), token_index)  # (b, d)
        features.append(encoded.float().cpu())

    shares = dist.all_gather_objects(features)
    width = shares[0][0].shape[1]
    in_order = torch.empty(len(texts), width)  # (n, d)
    for rank, parts in enumerate(shares):
        if parts:  # there may be fewer texts than ranks
            in_order[rank::world_size] = torch.cat(parts)
    return in_order.to(device)


def samples_of_this_rank(image_size, c):
    """Iterate over this rank's share of the set, in EvaluationBatches."""
    return read_samples(
        c.eval_data,
        image_size,
        c.caption_key,
        c.eval_batch,
        dist.rank(),
        dist.world_size(),
        c.workers,
    )


def from_all_ranks(items):
    """A list on every rank -> all of them joined, in the order of the ranks."""
    return list(chain.from_iterable(dist.all_gather_objects(items)))


# ---- measures ----


def nearest(queries, targets, k):
    """queries (n, d), targets (m, d), rows of length 1 -> int64 (n, min(k, m)): each query's k most
    similar targets, the most similar first."""
    k = min(k, len(targets))
    found = []
    for some in queries.split(QUERIES_AT_ONCE):
        similarity = some @ targets.T  # (at most QUERIES_AT_ONCE, m)
        found.append(similarity.topk(k, dim=1).indices)
    return torch.cat(found)


def zero_shot(images, prompts, classes):
    """Accuracy of taking each image for the class with the nearest prompt feature.

    images (n, d), prompts (number of classes, d), classes int64 (n,) -> top-1 and top-5 accuracy,
    and the mean over the classes that occur of their top-1 accuracy.
    """
    guesses = nearest(images, prompts, 5)  # (n, 5)
    hit = guesses == classes[:, None]  # (n, 5)
    first_hit = hit[:, 0].float()  # (n,)

    right = torch.zeros(len(prompts), device=images.device).index_add_(0, classes, first_hit)
    count = torch.bincount(classes, minlength=len(prompts))
    occurs = count > 0
    return {
        "zeroshot_top1": first_hit.mean().item(),
        "zeroshot_top5": hit.any(1).float().mean().item(),
        "zeroshot_mean_per_class": (right[occurs] / count[occurs]).mean().item(),
    }


def retrieval(images, texts, relevant):
    """Recall at 1, 5 and 10, from image to text and from text to image.

    images (n, d), texts (m, d); relevant: for each image, the numbers of its texts.
    """
    texts_of = [set(numbers) for numbers in relevant]  # of each image
    images_of = [set() for _ in texts]  # of each text
    for image, numbers in enumerate(relevant):
        for text in numbers:
            images_of[text].add(image)

    found_texts = nearest(images, texts, 10).tolist()
    found_images = nearest(texts, images, 10).tolist()

    results = {}
    for k in (1, 5, 10):
        results[f"image_to_text_R@{k}"] = recall(found_texts, texts_of, k)
    for k in (1, 5, 10):
        results[f"text_to_image_R@{k}"] = recall(found_images, images_of, k)
    return results


def recall(found, right, k):
    """R@k: the share of queries that have a right target among the first k that were found.

    found: for each query a list of targets; right: for each query the set of its right targets.
    """
    hits = 0
    for targets, wanted in zip(found, right):
        if not wanted.isdisjoint(targets[:k]):
            hits += 1
    return hits / len(found)


# ---- what is written ----


class PictureRow(NamedTuple):
    """A query's text, its nearest images, uint8 (3, S, S) each, and which of these are right."""

    text: str
    images: list
    right: list


def picture_rows(images, queries, image_size, c, progress):
    """Random queries with their nearest images -> list of PictureRow. All ranks must call it."""
    generator = torch.Generator().manual_seed(c.seed)
    chosen = torch.randperm(len(queries.texts), generator=generator)[:QUERIES_SHOWN].tolist()
    found = nearest(queries.features[chosen], images.features, IMAGES_SHOWN).tolist()

    wanted = {images.positions[i] for i in chain.from_iterable(found)}
    pixels = read_images(wanted, image_size, c, progress)

    rows = []
    for query, found_images in zip(chosen, found):
        row = PictureRow(queries.texts[query], [], [])
        for i in found_images:
            row.images.append(pixels[images.positions[i]])
            row.right.append(query in queries.relevant[i])
        rows.append(row)
    return rows


def read_images(wanted, image_size, c, progress):
    """The images at the positions `wanted` -> {position: uint8 (3, S, S)}, on every rank.

    They are read a second time, so that no run has to keep a set in memory.
    """
    found = {}
    for number, batch in enumerate(samples_of_this_rank(image_size, c)):
        progress(f"evaluation, batch {number} of images for the picture")
        for position, image in zip(batch.positions.tolist(), batch.images):
            if position in wanted:
                found[position] = image.clone()  # the rest of the batch can be freed

    everyones = {}
    for part in dist.all_gather_objects(found):
        everyones.update(part)
    return everyones


def write_results(path, c, images, queries, results):
    """Write eval.json: the set, its numbers of images and texts, what was left out, the results."""
    content = {
        "eval_data": list(c.eval_data),
        "images": len(images.positions),
        "texts": len(queries.texts),
        "left_out": images.bad,
        **results,
    }
    with open(path, "w") as f:
        json.dump(content, f, indent=1)


def draw(path, rows):
    """Draw a line per PictureRow: its text, then its images, framed green where they are right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len(rows[0].images)
    figure, axes = plt.subplots(
        len(rows),
        1 + columns,
        figsize=(2.6 + 1.3 * columns, 1.35 * len(rows)),
        squeeze=False,
        width_ratios=[2.2] + [1] * columns,
        layout="constrained",
    )
    for row, line in zip(rows, axes):
        text = textwrap.fill(row.text, 32, max_lines=4, placeholder=" ...")
        line[0].text(0.95, 0.5, text, va="center", ha="right", fontsize=10)
        line[0].axis("off")
        for axis, image, right in zip(line[1:], row.images, row.right):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            for edge in axis.spines.values():
                if right:
                    edge.set(color="#2a9d3a", linewidth=4)
                else:
                    edge.set(color="#cccccc", linewidth=1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(results):
    """The results as lines of text, in percent."""
    return "\n".join(f"  {name:<26}{100 * share:6.1f} %" for name, share in results.items())


# ---- the command ----


def find_checkpoint(path):
    """A run's folder, or a checkpoint's -> the folder of the checkpoint to evaluate."""
    is_run = os.path.isdir(os.path.join(path, "checkpoints"))
    if not is_run and not os.path.exists(os.path.join(path, "model.pt")):
        raise ConfigError(
            f"{path!r} is neither a run (runs/NAME) nor a checkpoint of one "
            "(runs/NAME/checkpoints/step-00001000)"
        )
    where = configs.Config(out_dir=path, resume="auto" if is_run else path)
    folder = checkpoint.find(where, names=("model.pt", "train.pt"))
    if not folder:
        raise ConfigError(f"{path} has no checkpoint yet")
    return folder


def load_config(folder, argv):
    """The config that a checkpoint was trained with, changed by the words of the command line."""
    saved = checkpoint.read(os.path.join(folder, "train.pt"))["config"]
    words = []
    for key, value in saved.items():
        if key in configs.HINTS:  # an older checkpoint may have settings that are gone
            words.append(f"--{key}={value!r}")
    words.append(f"--out_dir={argv[0]}")

    c = configs.load(words + argv[1:])
    if not c.eval_data:
        raise ConfigError(
            "eval_data is empty: name the shards, for example --eval_data='data/emoji/test/*.tar'"
        )
    return c


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not argv or argv[0].startswith("--"):
        raise ConfigError(f"a folder comes first\n{USAGE}")
    folder = find_checkpoint(argv[0])
    c = load_config(folder, argv)

    device = dist.init(c.device, c.timeout)
    model = models.create(c.model, c.tau_init, **c.model_numbers()).to(device)
    checkpoint.load_model(folder, model, c)

    autocast = hardware.autocast(hardware.precision(c.precision, device), device)
    results = evaluate(model, c, device, autocast, picture=True)
    if dist.rank() == 0:
        print(f"{folder} on {' '.join(c.eval_data)}")
        print(table(results))
        print(f"  {c.out_dir}/eval.json, {c.out_dir}/retrieval.png")
    dist.barrier()  # a rank that ended earlier could break a collective of the others


if __name__ == "__main__":
    ranks.run(main, sys.argv[1:])
