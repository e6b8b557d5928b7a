"""Evaluate a model: zero-shot classification and retrieval, and pictures of what it finds.

    python eval.py runs/quickstart                                on the eval_data of its config
    python eval.py runs/cc3m_v3 --eval_data=imagenet/val          on another set
    python eval.py runs/cc3m_v3 \
        --eval_data="{'imagenet': 'imagenet/val', 'flickr30k': 'f30k'}"

evaluates the newest checkpoint of a run, or one checkpoint folder, and writes eval.json, a picture
of each set, and the results in the forms of CLIP_benchmark and DataComp. train.py calls `evaluate`
during a run and at its end. ingest/layouts.py says in which layouts a set may lie on the disk. The
work is shared over the ranks.
"""

import contextlib
import dataclasses
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
from ingest.evaluation import check_class_numbers, load_sets, read_images, read_samples
from ingest.left_out import summary
from ingest.tokenizer import Tokenizer
from runtime import checkpoint, hardware, plots, ranks, results

USAGE = """usage: python eval.py RUN_OR_CHECKPOINT [--key=value ...]
the options are those of train.py; here matter --eval_data, --eval_names, --eval_templates,
--eval_batch, --caption_key, --out_dir, --workers, --precision and --device"""

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
    sets,
    c,
    device,
    autocast=contextlib.nullcontext,
    checkpoint_name="",
    progress=lambda where: None,
    stop=lambda: False,
):
    """Evaluate the model on sets -> list of their results, dicts, the same on every rank.

    sets: of ingest.evaluation.load_sets. runtime/results.py says what a result holds. All ranks
    must call it. autocast() makes the context in which the towers run. progress(where) is called
    with a line about each step of the work. Leaves the model in eval mode.

    checkpoint_name: under this name rank 0 writes results and pictures into c.out_dir; "": nothing
    is written.

    stop() says whether this rank was asked to stop. Once it is true on any rank, all ranks raise
    ranks.Interrupted after the batch at hand, and nothing is written. Raises ConfigError for a set
    without classes and captions, for class numbers that the class list does not reach, and for
    results that cannot be written.
    """
    model.eval()
    watch = partial(watched, progress=progress, stop=stop)
    encoder = Encoder(model, c, device, autocast, watch)

    found = []
    pictures = {}  # path -> PictureRows
    for data in sets:
        result, images, queries = evaluate_set(data, encoder)
        found.append(result)
        if checkpoint_name:
            pictures[picture_path(c, data)] = picture_rows(data, images, queries, encoder)

    if checkpoint_name:
        ranks.from_first_rank(write_files, found, pictures, c, checkpoint_name)
    return found


def evaluate_set(data, encoder):
    """Evaluate on one EvaluationSet -> (its result, EncodedImages, Queries for the picture)."""
    images = encoder.images(data)
    if images.bad:
        say(f"left out of {data.where}: {summary(Counter(images.bad))}")

    measures = {}
    queries = None  # what the picture shows: class names or, without classes, captions

    # Zero-shot classification, if every image has a class and there is a list of class names.
    reason = why_no_zero_shot(data.names, images.labels)
    if reason:
        say(f"no zero-shot classification on {data.where}: {reason}")
    elif data.names:
        queries = class_queries(data, images, encoder)
        labels = torch.tensor(images.labels, device=encoder.device)  # (n,)
        measures.update(zero_shot(images.features, queries.features, labels))

    # Retrieval, if any image has captions.
    if any(images.captions):
        captions = caption_queries(data, images, encoder)
        measures.update(retrieval(images.features, captions.features, captions.relevant))
        if queries is None:
            queries = captions

    if queries is None:
        raise ConfigError(
            f"{data.where} has neither classes (KEY.cls beside classnames.txt) nor captions "
            "(KEY.txt, or set caption_key)"
        )

    return result_of(data, images, measures), images, queries


def say(line):
    """Print a line once, not by every rank."""
    if dist.rank() == 0:
        print(line, flush=True)


def watched(batches, what, total, size, progress=lambda where: None, stop=lambda: False):
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


def of_set(what, data):
    """For a line of progress: "images of NAME" if the set has a name, otherwise "images"."""
    return f"{what} of {data.name}" if data.is_named else what


def why_no_zero_shot(names, labels):
    """Why a set with some classes, or some class names, cannot be classified; "" if it can be.

    names: of the classes; labels: of the images, int or None.
    """
    without = labels.count(None)
    if names and without:
        return f"{without:,} of {len(labels):,} images have no class (KEY.cls)"
    if not names and without < len(labels):
        return "there is no classnames.txt beside the shards or in the folder above"
    return ""


def class_queries(data, images, encoder):
    """-> Queries by class name."""
    check_class_numbers(images.labels, data.names, data.where)
    features = encoder.classes(data)  # (classes, d)
    relevant = [[label] for label in images.labels]
    return Queries(data.names, features, relevant)


def caption_queries(data, images, encoder):
    """-> Queries by caption. Each is one of its own, also if others have the same words."""
    texts = []
    relevant = []
    for captions in images.captions:
        first = len(texts)
        texts += captions
        relevant.append(list(range(first, len(texts))))
    return Queries(texts, encoder.texts(texts, of_set("texts", data)), relevant)


# ---- features ----


class Encoder:
    """Encodes images and texts of evaluation sets, each rank its share."""

    def __init__(self, model, c, device, autocast, watch):
        """autocast() makes the context in which the towers run. watch: `watched`, maybe with its
        last two arguments given."""
        self.model = model
        self.config = c
        self.device = device
        self.autocast = autocast
        self.watch = watch
        self.tokenizer = Tokenizer(model.context_length)

        # Several sets may have the same classes: (name, templates) -> feature (d,).
        self.known_classes = {}

    def images(self, data):
        """Encode a set -> EncodedImages. ConfigError if no sample is usable."""
        c = self.config
        samples = read_samples(
            data.source,
            self.model.image_size,
            c.eval_batch,
            dist.rank(),
            dist.world_size(),
            c.workers,
        )
        features = []
        captions = []
        labels = []
        positions = []
        bad = Counter()
        total = data.source.num_samples
        for batch in self.watch(samples, of_set("images", data), total, c.eval_batch):
            bad.update(batch.bad)
            if len(batch.images) == 0:
                continue
            with self.autocast():
                pixels = batch.images.to(self.device, non_blocking=True)
                encoded = self.model.encode_image(pixels)  # (b, d)
            features.append(encoded.float().cpu())
            captions += batch.captions
            labels += batch.labels
            positions += batch.positions.tolist()

        features = from_all_ranks(features)
        captions = from_all_ranks(captions)
        labels = from_all_ranks(labels)
        positions = from_all_ranks(positions)
        bad = sum(dist.all_gather_objects(bad), Counter())
        if not features:
            raise ConfigError(f"no sample of {data.where} can be used: {dict(bad)}")

        order = torch.tensor(positions).argsort().tolist()
        return EncodedImages(
            features=torch.cat(features)[order].to(self.device),  # (n, d)
            captions=[captions[i] for i in order],
            labels=[labels[i] for i in order],
            positions=[positions[i] for i in order],
            bad=dict(bad),
        )

    def classes(self, data):
        """Features of a set's classes, float32 (classes, d): the mean over the prompts of each.

        Each rank encodes its share of the prompts of those classes that are not known yet.
        """
        templates = tuple(data.templates)
        new = []
        for name in dict.fromkeys(data.names):  # each once
            if (name, templates) not in self.known_classes:
                new.append(name)

        if new:
            prompts = []
            for name in new:
                for template in templates:
                    prompts.append(template.replace("{c}", name))
            features = self.texts(prompts, of_set("texts", data))  # (new * templates, d)
            features = features.unflatten(0, (len(new), len(templates))).mean(1)  # (new, d)
            for name, feature in zip(new, F.normalize(features, dim=-1)):
                self.known_classes[name, templates] = feature

        return torch.stack([self.known_classes[name, templates] for name in data.names])

    def texts(self, texts, what="texts"):
        """n texts -> features float32 (n, d) on the device; each of K ranks encodes every K-th."""
        size = self.config.eval_batch
        world_size = dist.world_size()
        share = texts[dist.rank() :: world_size]
        batches = [share[i : i + size] for i in range(0, len(share), size)]

        features = []
        for batch in self.watch(batches, what, len(texts), size):
            tokens = self.tokenizer(batch)  # (b, context_length)
            lengths = 1 + tokens.argmax(1)  # the end of a text is the largest token
            longest = int(lengths.max())
            with self.autocast():
                token_index = models.pack(lengths, longest, self.device)
                tokens = tokens[:, :longest].to(self.device)
                encoded = self.model.encode_text(tokens, token_index)  # (b, d)
            features.append(encoded.float().cpu())

        shares = dist.all_gather_objects(features)
        in_order = torch.empty(len(texts), self.model.embed_dim)  # (n, d)
        for rank, parts in enumerate(shares):
            if parts:  # there may be fewer texts than ranks
                in_order[rank::world_size] = torch.cat(parts)
        return in_order.to(self.device)


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


def zero_shot(images, prompts, labels):
    """Accuracy of taking each image for the class with the nearest prompt feature.

    images (n, d), prompts (number of classes, d), labels int64 (n,) -> top-1 accuracy, top-5
    with five classes or more, and the mean over the classes that occur of their top-1 accuracy.
    """
    guesses = nearest(images, prompts, 5)  # (n, 5)
    hit = guesses == labels[:, None]  # (n, 5)
    first_hit = hit[:, 0].float()  # (n,)

    right = torch.zeros(len(prompts), device=images.device).index_add_(0, labels, first_hit)
    count = torch.bincount(labels, minlength=len(prompts))
    occurs = count > 0
    measures = {"zeroshot_top1": first_hit.mean().item()}
    if len(prompts) >= 5:
        measures["zeroshot_top5"] = hit.any(1).float().mean().item()
    measures["zeroshot_mean_per_class"] = (right[occurs] / count[occurs]).mean().item()
    return measures


def retrieval(images, texts, relevant):
    """Recall at 1, 5 and 10, from image to text and from text to image.

    images (n, d), texts (m, d); relevant: for each image, the numbers of its texts.
    """
    texts_of = [set(numbers) for numbers in relevant]  # of each image
    images_of = [set() for _ in texts]  # of each text
    for image, numbers in enumerate(relevant):
        for text in numbers:
            images_of[text].add(image)

    # Each k has a search of its own, because the first of ten equally near targets need not be the
    # one that a search for the nearest finds. CLIP_benchmark does the same.
    measures = {}
    for k in (1, 5, 10):
        measures[f"image_to_text_R@{k}"] = recall(nearest(images, texts, k), texts_of)
    for k in (1, 5, 10):
        measures[f"text_to_image_R@{k}"] = recall(nearest(texts, images, k), images_of)
    return measures


def recall(found, right):
    """The share of queries that have a right target among those found.

    found: int64 (n, k), targets of each query; right: for each query the set of its right targets.
    """
    hits = 0
    for targets, wanted in zip(found.tolist(), right):
        if not wanted.isdisjoint(targets):
            hits += 1
    return hits / len(found)


# ---- what is written ----


class PictureRow(NamedTuple):
    """A query's text, its nearest images, uint8 (3, S, S) each, and which of these are right."""

    text: str
    images: list
    right: list


def picture_rows(data, images, queries, encoder):
    """Random queries with their nearest images -> list of PictureRow. All ranks must call it."""
    generator = torch.Generator().manual_seed(encoder.config.seed)
    chosen = torch.randperm(len(queries.texts), generator=generator)[:QUERIES_SHOWN].tolist()
    found = nearest(queries.features[chosen], images.features, IMAGES_SHOWN).tolist()

    wanted = {images.positions[i] for i in chain.from_iterable(found)}
    pixels = pixels_at(wanted, data, encoder)

    rows = []
    for query, found_images in zip(chosen, found):
        row = PictureRow(queries.texts[query], [], [])
        for i in found_images:
            row.images.append(pixels[images.positions[i]])
            row.right.append(query in queries.relevant[i])
        rows.append(row)
    return rows


def pixels_at(wanted, data, encoder):
    """The images at the positions `wanted` -> {position: uint8 (3, S, S)}, on every rank.

    They are read a second time, so that no run has to keep a set in memory.
    """
    share = sorted(wanted)[dist.rank() :: dist.world_size()]
    images = read_images(data.source, encoder.model.image_size, share)
    what = of_set("images for the picture", data)
    found = dict(encoder.watch(images, what, len(wanted), 1))

    everyones = {}
    for part in dist.all_gather_objects(found):
        everyones.update(part)
    return everyones


def result_of(data, images, measures):
    """-> the result of a set: how much of it was used and left out, and the measures."""
    classified = "zeroshot_top1" in measures
    result = {
        "name": data.name,
        "eval_data": data.where,
        "found": data.source.description,
        "images": len(images.positions),
        "captions": sum(map(len, images.captions)),
        "classes": len(data.names) if classified else 0,
        "names_from": data.names_from if classified else "",
        "templates": len(data.templates) if classified else 0,
        "templates_from": data.templates_from if classified else "",
        "left_out": {**data.source.left_out, **images.bad},
        **measures,
    }
    result["notes"] = results.notes_on(result)
    return result


def write_files(found, pictures, c, checkpoint_name):
    """Write the results and a picture of each set. Each file is complete or as it was.

    Raises ConfigError if the results cannot be written. A picture that cannot be drawn is told of.
    """
    results.write(c.out_dir, found, c.model, checkpoint_name)

    for path, rows in pictures.items():
        plots.write_picture(plots.draw_found, rows, path)


def picture_path(c, data):
    """Of a set's picture: retrieval.png or, if config.eval_data names it, retrieval-NAME.png."""
    name = f"retrieval-{data.name}.png" if data.is_named else "retrieval.png"
    return os.path.join(c.out_dir, name)


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
        if word.partition("=")[0] == "--eval_data":
            # The lists belong to the sets of the training.
            saved["eval_names"] = ""
            saved["eval_templates"] = ""

    c = configs.load(argv[1:], saved)
    if not c.eval_data:
        raise ConfigError(
            "eval_data is empty: name a set, for example --eval_data=imagenet/val or "
            "--eval_data='data/emoji/test/*.tar'"
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
    sets = ranks.from_first_rank(load_sets, c)
    model = models.create(c.model, c.tau_init, **c.model_numbers()).to(device)
    checkpoint.load_model(folder, model, c)

    autocast = hardware.autocast(hardware.precision(c.precision, device), device)
    name = results.checkpoint_name(folder)
    found = evaluate(model, sets, c, device, autocast, name)
    if dist.rank() == 0:
        print(folder)
        print("\n".join(results.table(found)))
        print(f"  {c.out_dir}/eval.json, and a picture of each set beside it")
    dist.barrier()  # a rank that ended earlier could break a collective of the others


if __name__ == "__main__":
    ranks.run(main, sys.argv[1:])
