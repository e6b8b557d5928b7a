"""A linear probe and k-NN on frozen image features, beside zero-shot classification.

    python -m tools.probe runs/cc3m_v3 --train=flowers/train --test=flowers/test
    python -m tools.probe runs/cc3m_v3 --train=A --val=B --test=C --k 20 --out probes/c

Sets are given as --eval_data is. Each image must have a class, and the sets must have the same
ones. The newest checkpoint of a run, or one checkpoint, encodes the images to features of length 1,
and these are judged by

* a linear probe: scikit-learn's logistic regression (L-BFGS, at most 1,000 iterations). C, the
  inverse of its L2 penalty, is the best on --val or, without it, on a fifth of the training set
  that is held out class by class. It is searched as in CLIP (arXiv 2103.00020, appendix A.3): among
  1e-6, 1e-4, ..., 1e6, then ever nearer to the best, down to an eighth of a decade. With this C,
  the training set and --val are fitted together. --C=1 leaves the search out;
* k-NN: the k training images of highest cosine similarity vote for their classes, each with one
  vote ("majority") or, as in DINO, with exp(similarity / 0.07) ("weighted");
* zero-shot classification, if the test set has class names. --eval_names gives it some.

A table, in percent, is printed. Into --out (default: the folder of the run) come probe.json with
shares (0 to 1), its picture probe.png, and the linear probe in CLIP_benchmark's form. Other options
are those of eval.py, such as --eval_batch, --workers and --device.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import time
import warnings
from collections import Counter
from typing import NamedTuple

import numpy
import torch

import config as configs
import dist
import eval as evaluation
import model as models
from config import ConfigError
from ingest.evaluation import NUM_LOOKED_AT, check_class_numbers
from ingest.images import BadSample
from ingest.layouts import find_set
from ingest.sources import ImageFiles
from runtime import checkpoint, hardware, plots, ranks, results

# C is 10 ** (n / 8) for an integer n: it is searched in eighths of a decade.
EIGHTHS = 8
LARGEST = 6 * EIGHTHS  # n of C = 1e6; that of the smallest is -LARGEST
FIRST_STEP = 2 * EIGHTHS

MAX_ITERATIONS = 1000
# Largest gradient at which a fit ends. scikit-learn's 1e-4 is for features that vary more: those of
# a weak model are nearly alike, and its probe would be left half-fitted.
TOLERANCE = 1e-6

HELD_OUT = 0.2  # of the training set
SPLIT_SEED = 0  # the same for all runs, so that they are compared on the same images

NEIGHBOURS = (1, 5, 10, 20, 200)
VOTE_TEMPERATURE = 0.07

NUM_GUESSES = 5  # classes of an image that are kept, the best first

# A test image whose features are so near to those of a training image is taken for the same one.
SAME_IMAGE = 1e-4

METRICS = ("acc1", "acc5", "mean_per_class_recall")


class Split(NamedTuple):
    """The encoded images of a set. There are C classes in the training set.

    features    float32 (n, d), rows of length 1, on the device
    labels      int64 (n,), 0 to C - 1, on the CPU
    """

    features: torch.Tensor
    labels: torch.Tensor


class Fit(NamedTuple):
    """A fitted LogisticRegression, and what it took."""

    classifier: object
    iterations: int
    seconds: float
    converged: bool


# ---- the sets ----


def find_sets(places, c, holds_out):
    """Find the sets -> {role: EvaluationSet}. The roles are "train", "test" and maybe "val".

    places: {role: place}, each as --eval_data would be given. holds_out: whether a part of the
    training set is held out.

    What can be checked before the images are encoded is checked here. Raises what find_set raises,
    and ConfigError as check_class_names, check_all_have_class and check_labels do.
    """
    sets = {}
    for role, place in places.items():
        sets[role] = find_one(role, place, c)
    check_class_names(sets)

    if all(isinstance(data.source, ImageFiles) for data in sets.values()):
        labels = {role: all_labels(data) for role, data in sets.items()}
        check_labels(sets, labels, holds_out)
    else:
        for data in sets.values():
            check_all_have_class(data, first_labels(data))

    if sets["train"].where == sets["test"].where:
        print("warning: train and test are the same set", file=sys.stderr, flush=True)
    return sets


def find_one(role, place, c):
    """The place of a set, str -> EvaluationSet. ConfigError if it names several sets."""
    eval_data = configs.typed("eval_data", configs.parse(place))
    named = configs.named_sets(dataclasses.replace(c, eval_data=eval_data))
    if len(named) != 1:
        raise ConfigError(f"--{role}={place} names {len(named)} sets: give one")
    ((name, patterns),) = named.items()
    return find_set(name, patterns, c)


def all_labels(data):
    """The classes of image files, which are known before they are read: int, or None."""
    return data.source.labels or [None] * data.source.num_samples


def first_labels(data):
    """The classes of the first samples, int or None. Bad samples are left out."""
    reader = data.source.reader()
    labels = []
    for position in range(min(NUM_LOOKED_AT, data.source.num_samples)):
        try:
            labels.append(reader.read(position).label)
        except BadSample:
            continue
    return labels


def check_class_names(sets):
    """ConfigError if two sets have different class lists: then class 3 is not class 3."""
    train = sets["train"]
    for data in sets.values():
        if not data.names or not train.names or data.names == train.names:
            continue
        raise ConfigError(
            f"{data.where} has another class list than {train.where}, "
            f"{first_difference(data, train)}: both must have the same classes in the same order"
        )


def first_difference(one, other):
    """In which class the class lists of two EvaluationSets differ, or else that one is longer."""
    for number, (name, other_name) in enumerate(zip(one.names, other.names)):
        if name != other_name:
            return f"where class {number} is {name!r} and {other_name!r}"
    return f"with {len(one.names):,} and {len(other.names):,} classes"


def check_all_have_class(data, labels):
    """ConfigError if a label, int or None, is missing, or beyond the list of class names."""
    missing = labels.count(None)
    if missing:
        raise ConfigError(
            f"{data.where}: {missing:,} of the {len(labels):,} images looked at have no class, "
            "but the probe needs that of each: KEY.cls in shards, or a folder per class"
        )
    if data.names:
        check_class_numbers(labels, data.names, data.where)


def check_labels(sets, labels, holds_out):
    """ConfigError if sets of which the images have these classes cannot be probed.

    labels: {role: list of int or None}. holds_out: whether a part of the training set is held out.
    """
    for role, data in sets.items():
        check_all_have_class(data, labels[role])

    train = sets["train"]
    counts = Counter(labels["train"])
    if len(counts) < 2:
        raise ConfigError(f"{train.where}: all images are of one class; a probe needs two or more")

    for role, data in sets.items():
        unknown = sorted(set(labels[role]) - set(counts))
        if unknown:
            raise ConfigError(
                f"{data.where} has {len(unknown):,} classes of which {train.where} has no image, "
                f"class {unknown[0]} for example: both must have the same classes"
            )
    if holds_out:
        check_can_hold_out(train, counts)


def check_can_hold_out(train, counts):
    """ConfigError if a fifth of the training set cannot have images of each class.

    counts: {class: number of images}.
    """
    remedy = "give a validation set by --val=PLACE, or fix C by --C=1, for example"
    label, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < 2:
        raise ConfigError(
            f"{train.where} has one image of class {label}, which cannot be in both the fifth "
            f"that is held out and the rest: {remedy}"
        )
    held_out = math.ceil(HELD_OUT * counts.total())
    if held_out < len(counts):
        raise ConfigError(
            f"a fifth of {train.where} is {held_out:,} images, too few for {len(counts):,} "
            f"classes: {remedy}"
        )


# ---- features ----


@torch.no_grad()
def encode(sets, encoder, holds_out):
    """{role: EvaluationSet} -> {role: EncodedImages}. ConfigError as check_labels raises it."""
    images = {}
    for role in ("test", "val", "train"):  # the large one comes last: an error may come before
        if role not in sets:
            continue
        data = sets[role]
        images[role] = encoder.images(data)
        if images[role].bad:
            print(f"left out of {data.where}: {images[role].bad}", flush=True)
        check_all_have_class(data, images[role].labels)

    check_labels(sets, {role: found.labels for role, found in images.items()}, holds_out)
    return images


def as_splits(images):
    """{role: EncodedImages} -> {role: Split}: the classes that occur get numbers without gaps."""
    number_of = {label: n for n, label in enumerate(sorted(set(images["train"].labels)))}
    splits = {}
    for role, found in images.items():
        numbers = [number_of[label] for label in found.labels]
        splits[role] = Split(found.features, torch.tensor(numbers))
    return splits


def hold_out(split):
    """A Split on the CPU -> (four fifths of it, one fifth), with the same shares of all classes."""
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(
        numpy.arange(len(split.labels)),
        test_size=HELD_OUT,
        stratify=split.labels.numpy(),
        random_state=SPLIT_SEED,
    )
    return part(split, rest), part(split, held_out)


def part(split, positions):
    return Split(split.features[positions], split.labels[positions])


def joined(one, other):
    features = torch.cat([one.features, other.features])
    return Split(features, torch.cat([one.labels, other.labels]))


# ---- measures ----


def best_classes(scores):
    """scores (n, C) -> int64 (n, min(5, C)): classes by falling score, equal ones by number."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :NUM_GUESSES].cpu()


def accuracies(guesses, labels, num_classes):
    """guesses of best_classes, int64 (n, at most 5), labels int64 (n,) -> {metric: share}.

    acc5 is None for fewer than five classes. mean_per_class_recall is the mean of acc1 over the
    classes that occur in labels.
    """
    from sklearn.metrics import recall_score

    hit = guesses == labels[:, None]  # (n, at most 5)
    recall = recall_score(labels, guesses[:, 0], labels=labels.unique(), average="macro")
    return {
        "acc1": hit[:, 0].double().mean().item(),
        "acc5": hit.any(1).double().mean().item() if num_classes >= NUM_GUESSES else None,
        "mean_per_class_recall": float(recall),
    }


# ---- the linear probe ----


def centred(splits):
    """{role: Split} -> the same on the CPU, with the mean of the training features subtracted.

    The bias of a probe has no penalty, so this does not change which probe is the best one. But
    features of length 1 have much in common, and without that L-BFGS needs fewer iterations.
    """
    mean = splits["train"].features.mean(0)  # (d,)
    found = {}
    for role, split in splits.items():
        found[role] = Split((split.features - mean).cpu(), split.labels)
    return found


def fit(split, C):
    """Fit a logistic regression, with inverse L2 penalty C, to a Split on the CPU -> Fit."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(C=C, max_iter=MAX_ITERATIONS, tol=TOLERANCE)
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(split.features.numpy(), split.labels.numpy())

    stopped_early = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return Fit(
        classifier=classifier,
        iterations=int(classifier.n_iter_.max()),
        seconds=time.monotonic() - start,
        converged=not stopped_early,
    )


def guess(classifier, features):
    """features (n, d), on the CPU -> int64 (n, min(5, C)): the likeliest classes, best first."""
    scores = torch.from_numpy(classifier.decision_function(features.numpy()))
    if scores.dim() == 1:  # of two classes, scikit-learn gives the second one's score only
        scores = torch.stack([-scores, scores], dim=1)
    return best_classes(scores)  # of (n, C)


def search_C(train, held_out):
    """Fit train, judge on held_out, Splits -> a row for each C that was tried, by rising C.

    A row is {"C", "acc1", "iterations", "seconds", "converged"}. Prints a line for each.
    """
    rows = {}  # by n, where C = 10 ** (n / EIGHTHS)
    step = FIRST_STEP
    wanted = range(-LARGEST, LARGEST + 1, step)
    while step >= 1:
        for n in wanted:
            if n not in rows and abs(n) <= LARGEST:
                rows[n] = try_C(10 ** (n / EIGHTHS), train, held_out)

        # Between the best one and its neighbours.
        best = max(sorted(rows), key=lambda n: rows[n]["acc1"])
        step //= 2
        wanted = (best - step, best + step)

    return [rows[n] for n in sorted(rows)]


def try_C(C, train, held_out):
    """-> a row of search_C."""
    fitted = fit(train, C)
    guesses = guess(fitted.classifier, held_out.features)
    acc1 = (guesses[:, 0] == held_out.labels).double().mean().item()
    print(f"C = {C:<8.3g} {results.percent(acc1):>5} % held out, {described(fitted)}", flush=True)
    return {
        "C": C,
        "acc1": acc1,
        "iterations": fitted.iterations,
        "seconds": round(fitted.seconds, 3),
        "converged": fitted.converged,
    }


def described(fitted):
    end = "" if fitted.converged else ", not converged"
    return f"{fitted.iterations:,} iterations, {fitted.seconds:.1f} s{end}"


def linear_probe(splits, C):
    """Probe {role: Split} -> {C, how it was chosen, the rows of the search, metrics on test}.

    C: the inverse penalty, None to search it.
    """
    splits = centred(splits)
    train = splits["train"]
    rows = []
    if C is not None:
        chosen_on = "--C"
    elif "val" in splits:
        chosen_on = "val"
        rows = search_C(train, splits["val"])
    else:
        chosen_on = "a fifth of train"
        rows = search_C(*hold_out(train))
    if rows:
        # The first of equal ones has the strongest penalty.
        C = max(rows, key=lambda row: row["acc1"])["C"]

    everything = joined(train, splits["val"]) if "val" in splits else train
    fitted = fit(everything, C)
    print(f"C = {C:<8.3g} fitted to all images, {described(fitted)}", flush=True)

    guesses = guess(fitted.classifier, splits["test"].features)
    num_classes = len(fitted.classifier.classes_)
    return {
        "C": C,
        "chosen_on": chosen_on,
        "iterations": fitted.iterations,
        "converged": fitted.converged,
        **accuracies(guesses, splits["test"].labels, num_classes),
        "search": rows,
    }


# ---- k-NN ----


@torch.no_grad()
def nearest_neighbours(train, test, ks):
    """k-NN of test in train, Splits, for each k of ks -> list of rows.

    A row is {"k", "vote", metrics}. A k for which train is too small has none. The similarities of
    some test images to all training images are in memory at a time.
    """
    too_large = [k for k in ks if k > len(train.labels)]
    if too_large:
        print(f"no k-NN for k in {too_large}: train has {len(train.labels):,} images", flush=True)
    ks = [k for k in ks if k not in too_large]
    if not ks:
        return []

    num_classes = len(train.labels.unique())
    train_labels = train.labels.to(train.features.device)
    guesses = {(vote, k): [] for vote in ("majority", "weighted") for k in ks}
    same = 0
    size = evaluation.QUERIES_AT_ONCE
    blocks = test.features.split(size)
    for some in evaluation.watched(blocks, "images, for k-NN", len(test.labels), size):
        found = evaluation.nearest(some, train.features, max(ks))  # (b, K)
        neighbours = train.features[found]  # (b, K, d)
        similarity = torch.einsum("bd,bkd->bk", some, neighbours)

        distance = (some - neighbours[:, 0]).norm(dim=1)  # (b,)
        same += int((distance < SAME_IMAGE).sum())

        for (vote, k), parts in guesses.items():
            votes = count_votes(vote, train_labels[found[:, :k]], similarity[:, :k], num_classes)
            parts.append(best_classes(votes))

    if same:
        print(
            f"warning: {same:,} of {len(test.labels):,} test images have the features of a "
            "training image: are they the same images?",
            file=sys.stderr,
            flush=True,
        )
    rows = []
    for (vote, k), parts in guesses.items():
        measured = accuracies(torch.cat(parts), test.labels, num_classes)
        rows.append({"k": k, "vote": vote, **measured})
    return rows


def count_votes(vote, classes, similarity, num_classes):
    """classes int64 (b, k) of the neighbours, their similarity (b, k) -> votes (b, C).

    vote: "majority" or "weighted".
    """
    if vote == "weighted":
        weights = (similarity / VOTE_TEMPERATURE).exp()
    else:
        weights = torch.ones_like(similarity)
    votes = torch.zeros(len(classes), num_classes, device=classes.device)
    return votes.scatter_add_(1, classes, weights)


# ---- zero-shot classification ----


@torch.no_grad()
def zero_shot(data, images, encoder):
    """Of an EvaluationSet and its EncodedImages -> {metric: share}, None without class names."""
    if not data.names:
        return None
    labels = torch.tensor(images.labels, device=encoder.device)  # (n,)
    measured = evaluation.zero_shot(images.features, encoder.classes(data), labels)
    return results.classification_metrics({"classes": len(data.names), **measured})


# ---- what is written ----


def table(content):
    """The content of probe.json -> lines of text, in percent."""
    rows = {"linear probe": content["linear_probe"]}
    if content["zero_shot"]:
        rows = {"zero-shot": content["zero_shot"], **rows}
    for row in content["knn"]:
        rows[f"{row['k']}-NN, {row['vote']}"] = row

    lines = [" " * 20 + "".join(f"    {metric}" for metric in METRICS)]
    for name, row in rows.items():
        line = f"  {name:<18}"
        for metric in METRICS:
            line += f"{results.percent(row[metric]):>{len(metric) + 4}}"
        lines.append(line)
    return lines


def write_files(content, c):
    """Write probe.json, probe.png and CLIP_benchmark's file into c.out_dir, each whole or not."""
    path = os.path.join(c.out_dir, "probe.json")
    results.write_text(path, json.dumps(content, indent=1))

    record = clip_benchmark_record(content, c)
    path = os.path.join(c.out_dir, "clip_benchmark", results.file_name(record))
    results.write_text(path, json.dumps(record))

    plots.write_picture(draw, content, os.path.join(c.out_dir, "probe.png"))


def clip_benchmark_record(content, c):
    """The linear probe as CLIP_benchmark writes its own, with C in place of its weight decay."""
    probe = content["linear_probe"]
    metrics = {f"lp_{metric}": probe[metric] for metric in METRICS}
    return {
        "dataset": content["sets"]["test"]["name"],
        "model": c.model,
        "pretrained": content["checkpoint"],
        "task": "linear_probe",
        "metrics": {**metrics, "C": probe["C"], "fewshot_k": -1, "normalized": True},
        "language": "en",
    }


def draw(content, path):
    """Draw the content of probe.json into a PNG: the search for C, and the test accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    was_searched = bool(content["linear_probe"]["search"])
    panels = 2 if was_searched else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(5.5 * panels, 4), squeeze=False, layout="constrained"
    )
    if was_searched:
        draw_search(axes[0, 0], content["linear_probe"])
    draw_test(axes[0, -1], content)
    for axis in axes.flat:
        axis.set_ylabel("top-1 accuracy, %")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def draw_search(axis, probe):
    """The accuracy of the linear probe on the held-out images, against C."""
    Cs = [row["C"] for row in probe["search"]]
    accuracy = [100 * row["acc1"] for row in probe["search"]]
    axis.plot(Cs, accuracy, marker=".")

    chosen = Cs.index(probe["C"])
    axis.plot(Cs[chosen], accuracy[chosen], "o", markersize=9, label=f"chosen: {probe['C']:.3g}")
    axis.set(xscale="log", xlabel="C, inverse L2 penalty")
    axis.set_title(f"linear probe, on {probe['chosen_on']}")
    axis.legend()


def draw_test(axis, content):
    """The accuracies on the test set: of k-NN against k, the others as lines."""
    for vote in ("majority", "weighted"):
        rows = [row for row in content["knn"] if row["vote"] == vote]
        ks = [row["k"] for row in rows]
        axis.plot(ks, [100 * row["acc1"] for row in rows], marker="o", label=f"k-NN, {vote}")

    axis.axhline(100 * content["linear_probe"]["acc1"], color="black", label="linear probe")
    if content["zero_shot"]:
        axis.axhline(
            100 * content["zero_shot"]["acc1"], color="grey", linestyle="--", label="zero-shot"
        )
    axis.set(xscale="log", xlabel="k")
    ks = sorted({row["k"] for row in content["knn"]})
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.set_title(f"on the test set, {content['sets']['test']['images']:,} images")
    axis.legend()


def describe_set(data, images):
    return {
        "name": data.name,
        "place": data.where,
        "images": len(images.labels),
        "left_out": {**data.source.left_out, **images.bad},
    }


def versions():
    import sklearn

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
    }


# ---- the command ----


def probe(sets, folder, c, C, ks, holds_out):
    """Probe the checkpoint in `folder` on sets of find_sets -> the content of probe.json.

    C: the inverse penalty, None to search it. ks: the numbers of neighbours. holds_out: as there.
    """
    device = dist.init(c.device, c.timeout)
    model = models.create(c.model, c.tau_init, **c.model_numbers()).to(device)
    checkpoint.load_model(folder, model, c)
    model.eval()
    autocast = hardware.autocast(hardware.precision(c.precision, device), device)
    encoder = evaluation.Encoder(model, c, device, autocast, evaluation.watched)

    images = encode(sets, encoder, holds_out)
    splits = as_splits(images)
    return {
        "checkpoint": folder,
        "sets": {role: describe_set(data, images[role]) for role, data in sets.items()},
        "classes": len(splits["train"].labels.unique()),
        "features": splits["train"].features.shape[1],
        "zero_shot": zero_shot(sets["test"], images["test"], encoder),
        "knn": nearest_neighbours(splits["train"], splits["test"], ks),
        "linear_probe": linear_probe(splits, C),
        "versions": versions(),
    }


def parse(argv):
    """-> (the options that are this program's own, the words of the others)"""
    parser = argparse.ArgumentParser(
        prog="python -m tools.probe",
        description="A linear probe and k-NN on frozen image features.",
        epilog="The other options are those of eval.py, as --key=value.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="folder of a run (its newest one), or of a checkpoint")
    parser.add_argument("--train", required=True, help="the set to fit, given as --eval_data is")
    parser.add_argument("--test", required=True, help="the set to judge on")
    parser.add_argument("--val", help="the set to choose C on (default: a fifth of --train)")
    parser.add_argument("--C", type=float, help="inverse L2 penalty (default: it is searched)")
    parser.add_argument(
        "--k", type=int, nargs="+", default=NEIGHBOURS, help="neighbours (default: %(default)s)"
    )
    parser.add_argument("--out", help="folder of the results (default: the first word)")
    args, others = parser.parse_known_args(argv)

    if args.C is not None and not 0 < args.C < math.inf:
        raise ConfigError(f"--C={args.C} must be positive: it is the inverse of a penalty")
    if min(args.k) < 1:
        raise ConfigError(f"--k {min(args.k)} must be 1 or more")
    return args, others


def check_can_run():
    """ConfigError without scikit-learn, and under a torchrun of several ranks."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"tools.probe needs scikit-learn: pip install scikit-learn ({error})"
        ) from error

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        raise ConfigError(
            f"tools.probe runs in one process, but torchrun has started {world_size}: start it by "
            "python -m tools.probe"
        )


def main(argv):
    args, others = parse(argv)
    check_can_run()
    folder = evaluation.find_checkpoint(args.checkpoint)

    # Class names and templates of the run's own evaluation sets are of no use here.
    words = [f"--eval_data={args.test}", "--eval_names=", "--eval_templates=", *others]
    if args.out:
        words.append(f"--out_dir={args.out}")
    c = evaluation.load_config(folder, [args.checkpoint, *words])
    evaluation.check_writable(c.out_dir)

    places = {"train": args.train, "test": args.test}
    if args.val:
        places["val"] = args.val
    holds_out = args.C is None and not args.val
    sets = find_sets(places, c, holds_out)

    content = probe(sets, folder, c, args.C, sorted(set(args.k)), holds_out)
    write_files(content, c)
    print(folder)
    print("\n".join(table(content)))
    print(f"  {c.out_dir}/probe.json and probe.png")


if __name__ == "__main__":
    ranks.run(main, sys.argv[1:])
