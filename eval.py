"""Evaluate a model: zero-shot classification and retrieval, and a picture of what it finds.

    python eval.py runs/quickstart                             on the eval_data of its config
    python eval.py runs/cc3m_v3 --eval_data='SET/{00..49}.tar'   on another set

evaluates the newest checkpoint of a run, or one checkpoint folder, and writes eval.json and
retrieval.png. train.py calls `evaluate` during a run and at its end. ingest/evaluation.py says what
an evaluation set may hold. The work is shared over the ranks.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config as configs
import dist
import model as models
from config import ConfigError
from ingest.evaluation import check, check_class_numbers, load_sets, read_images, read_samples
from ingest.tokenizer import Tokenizer
from runtime import checkpoint, hardware, plots, ranks

USAGE = """usage: python eval.py RUN_OR_CHECKPOINT [--key=value ...]
the options are those of train.py; here matter --eval_data, --eval_batch, --caption_key, --out_dir,
--workers, --precision and --device"""

QUERIES_AT_ONCE = 1024  # whose similarities to all targets are in memory together
QUERIES_SHOWN = 8  # rows of the picture
IMAGES_SHOWN = 5  # beside each query

PRINT_SECONDS = 10  # between two lines of progress, where there is no terminal


class EncodedImages(NamedTuple):
    """The usable images of a set, in the set's order, the same on every rank.

    features    float32 (n, d), rows of length 1, on the device
    captions    n lists of str; a list is empty if the image has no captions
    labels      n ints; None if the image has no class
    positions   n ints, where each image is in the set
    bad         {reason: number of samples that were left out}
    """

    features: torch.Tensor
    captions: list
    labels: list
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
    model,
    c,
    device,
    autocast=contextlib.nullcontext,
    picture=False,
    progress=lambda where: None,
    stop=lambda: False,
):
    """Evaluate the model on the set c.eval_data -> {name: share, 0 to 1}, the same on every rank.

    All ranks must call it. autocast() makes the context in which the towers run. With `picture`,
    rank 0 also writes eval.json and retrieval.png into c.out_dir. progress(where) is called with a
    line about each step of the work. Leaves the model in eval mode.

    stop() says whether this rank was asked to stop. Once it is true on any rank, all ranks raise
    ranks.Interrupted after the batch at hand, and nothing is written. Raises ConfigError, on rank 0
    or on all, for what ingest.evaluation.load_set refuses, for a set without classes and captions,
    for class numbers that the class list does not reach, and for an eval.json that cannot be
    written.
    """
    watch = partial(watched, progress=progress, stop=stop)

    def encode(texts):
        return encode_texts(texts, model, c, device, autocast, watch)

    model.eval()

    data = ranks.from_first_rank(load_set, c, progress=progress, waiting=progress)
    images = encode_images(data.index, model, c, device, autocast, watch)
    if images.bad:
        say(f"left out of {c.eval_data[0]}: {images.bad}")

    results = {}
    queries = None  # what the picture shows: class names or, without classes, captions

    # Zero-shot classification, if every image has a class and there is a list of class names.
    reason = why_no_zero_shot(data.names, images.classes)
    if reason:
        say(f"no zero-shot classification on {c.eval_data[0]}: {reason}")
    elif data.names:
        queries = class_queries(data.names, data.templates, images, encode, c)
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
        rows = picture_rows(data.index, images, queries, model.image_size, c, watch)
        content = report(data, images, queries, results, c)
        ranks.from_first_rank(write_files, c.out_dir, content, rows)

    return results


def say(line):
    """Print a line once, not by every rank."""
    if dist.rank() == 0:
        print(line, flush=True)


def watched(batches, what, total, size, progress, stop):
    """Yield a rank's batches, so that all ranks leave them together, and show how far they are.

    what: "images", for example; total: their number, on all ranks; size: of a batch. progress and
    stop are those of evaluate, and ranks.Interrupted is raised as there.
    """
    shows = dist.rank() == 0
    on_terminal = sys.stderr.isatty()
    bar = tqdm(
        desc=f"evaluating, {what}",
        total=total,
        disable=not (shows and on_terminal),
        leave=False,
        dynamic_ncols=True,
    )
    done = 0
    printed_at = time.monotonic()

    with bar:
        for batch in ranks.interruptible(batches, stop):
            progress(f"evaluation, {done:,} of {total:,} {what}")
            yield batch

            # All ranks are at the same batch. The last ones are smaller.
            done = min(total, done + size * dist.world_size())
            bar.update(done - bar.n)

            now = time.monotonic()
            if shows and not on_terminal and now - printed_at > PRINT_SECONDS:
                print(f"evaluating: {done:,} of {total:,} {what}", flush=True)
                printed_at = now


def why_no_zero_shot(names, classes):
    """Why a set with some classes, or some class names, cannot be classified; "" if it can be.

    names: of the classes; classes: of the images, int or None.
    """
    without = classes.count(None)
    if names and without:
        return f"{without:,} of {len(classes):,} images have no class (KEY.cls)"
    if not names and without < len(classes):
        return "there is no classnames.txt beside the shards or in the folder above"
    return ""


def class_queries(names, templates, images, encode, c):
    """-> Queries by class name: the feature of a class is the mean of its prompts' features."""
    check_class_numbers(images.classes, names, c.eval_data[0])

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


def encode_images(index, model, c, device, autocast, watch):
    """Encode the set, each rank its share -> EncodedImages. ConfigError if no sample is usable."""
    samples = read_samples(
        index,
        model.image_size,
        c.caption_key,
        c.eval_batch,
        dist.rank(),
        dist.world_size(),
        c.workers,
    )
    features = []
    captions = []
    classes = []
    positions = []
    bad = Counter()
    for batch in watch(samples, "images", index.num_samples, c.eval_batch):
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


def encode_texts(texts, model, c, device, autocast, watch):
    """n texts -> features float32 (n, d) on the device; each of K ranks encodes every K-th text."""
    tokenizer = Tokenizer(model.context_length)
    world_size = dist.world_size()
    share = texts[dist.rank() :: world_size]
    batches = [share[i : i + c.eval_batch] for i in range(0, len(share), c.eval_batch)]

    features = []
    for batch in watch(batches, "texts", len(texts), c.eval_batch):
        tokens = tokenizer(batch)  # (b, context_length)
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


def picture_rows(index, images, queries, image_size, c, watch):
    """Random queries with their nearest images -> list of PictureRow. All ranks must call it."""
    generator = torch.Generator().manual_seed(c.seed)
    chosen = torch.randperm(len(queries.texts), generator=generator)[:QUERIES_SHOWN].tolist()
    found = nearest(queries.features[chosen], images.features, IMAGES_SHOWN).tolist()

    wanted = {images.positions[i] for i in chain.from_iterable(found)}
    pixels = pixels_at(wanted, index, image_size, watch)

    rows = []
    for query, found_images in zip(chosen, found):
        row = PictureRow(queries.texts[query], [], [])
        for i in found_images:
            row.images.append(pixels[images.positions[i]])
            row.right.append(query in queries.relevant[i])
        rows.append(row)
    return rows


def pixels_at(wanted, index, image_size, watch):
    """The images at the positions `wanted` -> {position: uint8 (3, S, S)}, on every rank.

    They are read a second time, so that no run has to keep a set in memory.
    """
    share = sorted(wanted)[dist.rank() :: dist.world_size()]
    images = read_images(index, image_size, share)
    found = dict(watch(images, "images for the picture", len(wanted), 1))

    everyones = {}
    for part in dist.all_gather_objects(found):
        everyones.update(part)
    return everyones


def report(data, images, queries, results, c):
    """-> the content of eval.json: the set, how much of it was used and left out, the results."""
    classified = "zeroshot_top1" in results
    return {
        "eval_data": list(c.eval_data),
        "images": len(images.positions),
        "texts": len(queries.texts),
        "classes": len(data.names) if classified else 0,
        "templates": len(data.templates) if classified else 0,
        "left_out": {**data.index.left_out, **images.bad},
        **results,
    }


def write_files(folder, content, rows):
    """Write eval.json and retrieval.png. Each is complete or as it was.

    content: of eval.json; rows: of the picture, PictureRows. Raises ConfigError if eval.json cannot
    be written. A picture that cannot be drawn is told of: the results must not be lost for it.
    """
    results = os.path.join(folder, "eval.json")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(results + ".partial", "w") as f:
            json.dump(content, f, indent=1)
        os.replace(results + ".partial", results)
    except OSError as error:
        raise ConfigError(f"{results} cannot be written: {error.strerror or error}") from error

    picture = os.path.join(folder, "retrieval.png")
    try:
        plots.draw_found(rows, picture + ".partial")
        os.replace(picture + ".partial", picture)
    except Exception as error:
        print(f"{picture} could not be drawn: {type(error).__name__}: {error}", flush=True)


def table(results):
    """The results as lines of text, in percent."""
    return "\n".join(f"  {name:<26}{100 * share:6.1f} %" for name, share in results.items())


# ---- the command ----


def find_checkpoint(path):
    """A run's folder, or a checkpoint's -> the folder of the checkpoint to evaluate.

    Raises ConfigError, which names the nearest run or checkpoint, if it is neither.
    """
    if not is_run(path) and not is_checkpoint(path):
        raise ConfigError(f"{why_not_evaluable(path)}{nearest_folder(path)}")
    where = configs.Config(out_dir=path, resume="auto" if is_run(path) else path)
    folder = checkpoint.find(where, names=("model.pt", "train.pt"))
    if not folder:
        raise ConfigError(f"the run {path} has no checkpoint yet{nearest_folder(path)}")
    return folder


def is_run(path):
    return os.path.isdir(os.path.join(path, "checkpoints"))


def is_checkpoint(path):
    return os.path.exists(os.path.join(path, "model.pt"))


def why_not_evaluable(path):
    if not os.path.exists(path):
        return f"there is no folder {path!r}"
    if not os.path.isdir(path):
        return f"{path!r} is a file: give the folder of a run, or of a checkpoint"
    return (
        f"{path!r} is neither a run (runs/NAME) nor a checkpoint of one "
        "(runs/NAME/checkpoints/step-00001000)"
    )


def nearest_folder(path):
    """A hint at a run or checkpoint inside `path` or else around it, the one spelt most alike."""
    path = os.path.normpath(path)
    above = os.path.dirname(path)
    found = evaluable(folders_in(path)) or evaluable([above, *folders_in(above)])
    return configs.nearest(path, found, cutoff=0.0)  # any is better than none


def folders_in(place):
    place = place or "."
    if not os.path.isdir(place):
        return []
    return [os.path.normpath(os.path.join(place, name)) for name in os.listdir(place)]


def evaluable(folders):
    return [folder for folder in folders if is_checkpoint(folder) or has_checkpoint(folder)]


def has_checkpoint(path):
    return is_run(path) and bool(checkpoint.steps(os.path.join(path, "checkpoints")))


def load_config(folder, argv):
    """The config that a checkpoint was trained with, changed by the words of the command line."""
    saved = dataclasses.asdict(checkpoint.saved_config(folder))
    saved["out_dir"] = argv[0]

    for word in argv[1:]:
        if not word.startswith("--"):
            raise ConfigError(f"unexpected word {word!r}: after the folder come only --key=value")

    c = configs.load(argv[1:], saved)
    if not c.eval_data:
        raise ConfigError(
            "eval_data is empty: name the shards, for example --eval_data='data/emoji/test/*.tar'"
        )
    return c


def check_writable(folder):
    """ConfigError, with the reason, if results could not be written to the folder."""
    with configs.writing_to(folder):
        checkpoint.check_writable(folder)


def main(argv):
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not argv or argv[0].startswith("--"):
        raise ConfigError(f"a folder comes first\n{USAGE}")
    folder = find_checkpoint(argv[0])
    c = load_config(folder, argv)

    device = dist.init(c.device, c.timeout)
    ranks.from_first_rank(check_writable, c.out_dir)
    ranks.from_first_rank(check, c)
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
