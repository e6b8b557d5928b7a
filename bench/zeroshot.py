"""python -m bench zeroshot: a zero-shot evaluation of ImageNet's size, ours beside open_clip's.

Made pictures in folders with the names of ImageNet's classes, as its users have them, open_clip's
80 templates, and models of the same size with random weights, which are not the same.

First both sides evaluate a small set, by turns. Then ours evaluates the whole one, in a fresh
process. Ours is eval.evaluate. open_clip's is what its zero_shot_eval does: its classifier, 10
classes at a time, and its pass over a DataLoader, at its default batch size.

What is timed: finding the set; all images, from the start of the data workers to the last feature;
all texts, to the classifier. Both sides have the same number of threads and of data workers. What a
process does once is not timed: importing, making the model and, for ours, starting the server that
data workers are forked from. open_clip computes accuracy batch by batch, which is counted with the
images; ours computes it at the end, which is counted with the texts.

Memory is that of the process that encodes, without its data workers.
"""

import glob
import os
import tempfile
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import config as configs
import dist
import eval as evaluation
import model as models
from bench import baselines, harness, made_data, measure, report
from config import ConfigError
from ingest.class_names import imagenet_ids
from ingest.evaluation import load_sets
from ingest.workers import default_workers, start_server
from runtime import hardware

SIZE = 375  # shorter side of the pictures, pixels; the longer one is 500

# open_clip's defaults.
OPEN_CLIP_BATCH = 64  # images
OPEN_CLIP_CLASSES = 10  # whose prompts are encoded together

MIN_CLASSES = 5  # open_clip counts which images have their class among the best five


class Times(NamedTuple):
    """What one side measured in one evaluation; times in seconds."""

    finding: float
    images: float
    texts: float
    peak_bytes: int

    def total(self):
        return self.finding + self.images + self.texts


def run(args):
    """Rows of results: the small set by turns and, unless args.part_only, the whole one."""
    check(args)
    with tempfile.TemporaryDirectory() as temporary:
        part = os.path.join(temporary, "part")
        made_data.make_class_folders(part, SIZE, args.part_images, args.part_classes)
        whole = args.folder or os.path.join(temporary, "whole")
        if not args.part_only:
            make_whole(args, whole)

        turns = evaluate(args, part, ["ours", "open_clip"], args.rounds)
        rows = speed_rows(args, turns)
        if not args.part_only:
            rows += run_whole(args, whole)
    return rows


def run_whole(args, folder):
    """Rows of one evaluation of the whole set: ours and, with args.whole_peer, open_clip's."""
    sides = ["ours", "open_clip"] if args.whole_peer else ["ours"]
    rows = []
    for side in sides:
        # One after the other, so that the other's memory is free.
        turns = evaluate(args, folder, [side], rounds=1)
        rows.append(whole_row(args, side, turns[side]))
    return report.with_ratios(rows)


def check(args):
    """Raise ConfigError for sets that cannot be evaluated, before they are made."""
    classes_of_imagenet = len(imagenet_ids())
    for images, classes in ((args.images, args.classes), (args.part_images, args.part_classes)):
        if not MIN_CLASSES <= classes <= min(images, classes_of_imagenet):
            raise ConfigError(
                f"{images:,} images in {classes:,} classes cannot be evaluated: give "
                f"{MIN_CLASSES} to {classes_of_imagenet:,} classes, with an image or more in each"
            )
    if args.part_images > args.images or args.part_classes > args.classes:
        raise ConfigError(
            f"the part, {args.part_images:,} images in {args.part_classes:,} classes, is larger "
            f"than the whole, {args.images:,} in {args.classes:,}: lower --part_images or "
            "--part_classes"
        )


def make_whole(args, folder):
    """Make the whole set, unless the folder is there: then ConfigError if it holds another set."""
    if not os.path.exists(folder):
        made_data.make_class_folders(folder, SIZE, args.images, args.classes)
        return

    images = glob.glob(os.path.join(glob.escape(folder), "*", "*.JPEG"))
    classes = {os.path.dirname(path) for path in images}
    if (len(images), len(classes)) != (args.images, args.classes):
        raise ConfigError(
            f"{folder} holds {len(images):,} .JPEG in {len(classes):,} classes, not "
            f"{args.images:,} in {args.classes:,}: change --images and --classes, or name a folder "
            "that is not there yet"
        )


def evaluate(args, folder, sides, rounds):
    """Evaluate on the set in a folder, each side in a process -> {side: [Times]}, one per round."""
    workers = {side: harness.Worker(worker, args, side, folder) for side in sides}
    return harness.take_turns(workers, [None] * rounds, f"zeroshot {args.model}", args.limit)


# ---- rows ----


def speed_rows(args, turns):
    """Rows of images/s and texts/s on the small set, each with its ratio to open_clip."""
    templates = num_templates()
    settings = common_settings(args)
    of_images = dict(settings, images=args.part_images)
    of_texts = dict(settings, classes=args.part_classes, templates=templates)

    image_rows = []
    text_rows = []
    for side, times in turns.items():
        if isinstance(times[-1], harness.Failed):
            reason = times[-1].reason
            image_rows.append(report.failed("zeroshot", side, of_images, reason))
            text_rows.append(report.failed("zeroshot", side, of_texts, reason))
            continue

        peak_bytes = max(turn.peak_bytes for turn in times)
        speeds = [args.part_images / turn.images for turn in times]
        row = report.row("zeroshot", side, of_images, "images/s", speeds, peak_bytes=peak_bytes)
        image_rows.append(row)

        speeds = [args.part_classes * templates / turn.texts for turn in times]
        text_rows.append(report.row("zeroshot", side, of_texts, "texts/s", speeds))
    return report.with_ratios(image_rows) + report.with_ratios(text_rows)


def whole_row(args, side, turns):
    """The row of one evaluation of the whole set, in seconds."""
    settings = dict(
        common_settings(args),
        images=args.images,
        classes=args.classes,
        templates=num_templates(),
    )
    (times,) = turns
    if isinstance(times, harness.Failed):
        return report.failed("zeroshot", side, settings, times.reason)
    return report.row(
        "zeroshot",
        side,
        settings,
        "s",
        [times.total()],
        finding_seconds=times.finding,
        image_seconds=times.images,
        text_seconds=times.texts,
        peak_bytes=times.peak_bytes,
    )


def common_settings(args):
    return dict(
        model=args.model,
        precision=args.precision,
        workers=num_workers(args),
        cores=harness.cores(),
        **args.numbers,
    )


def num_workers(args):
    """Of each side: --workers or, without it, as many as eval.py takes."""
    return args.workers or default_workers()


def num_templates():
    return len(baselines.load().OPENAI_IMAGENET_TEMPLATES)


# ---- the sides ----


def worker(args, side, folder):
    """One side's process: evaluates on the set in a folder and yields Times, whenever asked."""
    device = dist.init(args.device)
    if side == "ours":
        evaluator = Ours(args, folder, device)
    else:
        evaluator = OpenClip(args, folder, device)
    yield

    while True:
        measure.reset_peak_memory(device)
        finding, images, texts = evaluator.evaluate()
        yield Times(finding, images, texts, measure.peak_memory(device))


class Ours:
    """eval.evaluate, as eval.py calls it."""

    def __init__(self, args, folder, device):
        self.config = configs.Config(
            model=args.model,
            eval_data=(folder,),
            eval_batch=args.batch,
            workers=num_workers(args),
            precision=args.precision,
            **args.numbers,
        )
        self.device = device
        self.autocast = hardware.autocast(hardware.precision(args.precision, device), device)
        torch.manual_seed(0)
        self.model = models.create(args.model, **args.numbers).to(device)
        start_server()

    def evaluate(self):
        """-> seconds for (finding the set, images, texts)."""
        start = time.perf_counter()
        sets = load_sets(self.config)
        found = time.perf_counter()

        watch = TextWatch()
        evaluation.evaluate(
            self.model, sets, self.config, self.device, self.autocast, progress=watch.note
        )
        end = time.perf_counter()
        return found - start, watch.first_texts - found, end - watch.first_texts


class TextWatch:
    """Notes when an evaluation, whose images come first, is at its first texts."""

    def __init__(self):
        self.first_texts = None

    def note(self, where):
        """where: a line about its progress."""
        if self.first_texts is None and where.endswith("texts"):
            self.first_texts = time.perf_counter()


class OpenClip:
    """What zero_shot_eval of open_clip_train does, with its parts timed."""

    def __init__(self, args, folder, device):
        if device.type == "cuda":
            baselines.set_gpu_defaults()
        self.package = baselines.load()
        self.code = baselines.load("open_clip_train.zero_shot")
        # That of open_clip 3.3 makes a float of an array with one number, which numpy 2.4 refuses.
        self.code.accuracy = accuracy
        self.folder = folder
        self.device = device
        self.workers = num_workers(args)
        # Its command line, as zero_shot.run reads it.
        self.args = SimpleNamespace(
            device=str(device),
            precision=baselines.PRECISIONS[args.precision],
            batch_size=OPEN_CLIP_BATCH,
        )

        torch.manual_seed(0)
        model = baselines.create_model(args.model, args.numbers, self.package)
        self.model = model.to(device).eval()
        shape = harness.model_shape(args)
        self.transform = self.package.image_transform(shape.image_size, is_train=False)
        self.tokenizer = self.package.SimpleTokenizer(context_length=shape.context_length)

    def evaluate(self):
        """-> seconds for (finding the set, images, texts)."""
        start = time.perf_counter()
        loader = self.loader()
        found = time.perf_counter()

        classifier = self.classifier(len(loader.dataset.classes))
        hardware.synchronize(self.device)
        classified = time.perf_counter()

        self.code.run(self.model, classifier, loader, self.args)
        end = time.perf_counter()
        return found - start, end - classified, classified - found

    def loader(self):
        """As its get_imagenet makes it."""
        dataset = ImageFolder(self.folder, self.transform)
        return DataLoader(dataset, batch_size=OPEN_CLIP_BATCH, num_workers=self.workers)

    def classifier(self, num_classes):
        """-> float32 (d, num_classes) of the first of ImageNet's classes."""
        autocast = self.code.get_autocast(self.args.precision, device_type=self.device.type)
        with autocast():
            return self.code.build_zero_shot_classifier(
                self.model,
                tokenizer=self.tokenizer,
                classnames=self.package.IMAGENET_CLASSNAMES[:num_classes],
                templates=self.package.OPENAI_IMAGENET_TEMPLATES,
                num_classes_per_batch=OPEN_CLIP_CLASSES,
                device=self.device,
                use_tqdm=True,
            )


def accuracy(output, target, topk):
    """As open_clip's: logits (b, classes), target int64 (b,) -> right ones in the best k, for each.

    Waits for the device, as that does.
    """
    best = output.topk(max(topk), 1, True, True)[1].t()  # (k, b)
    correct = best.eq(target.view(1, -1).expand_as(best))
    return [correct[:k].reshape(-1).float().sum().item() for k in topk]
