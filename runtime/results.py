"""What an evaluation leaves behind: a table to read, eval.json, and files for two benchmarks.

    eval.json                 the results of all sets, and the mean of ImageNet and its variants
    clip_benchmark/*.json     a file per set and task, for `clip_benchmark build`
    eval_results.jsonl        a line per set that DataComp scores, for its aggregate_scores.py

The result of a set is a dict of

    name                                        of the set
    eval_data, found                            its place, and what was found there
    images, captions, classes, templates        how many were used
    names_from, templates_from                  where the class names and the prompts come from
    left_out                                    {reason: number of samples}
    notes                                       sentences on why it may not be what it seems
    zeroshot_top1, _top5, _mean_per_class       shares, 0 to 1, if it has classes
    image_to_text_R@1, R@5, R@10                shares, if it has captions
    text_to_image_R@1, R@5, R@10                shares, if it has captions

The two benchmarks know sets by their names, so a set is taken for the one whose name it bears,
however that is spelt (the table TASKS).
"""

import json
import os
import re
from typing import NamedTuple

from config import MAX_BAD, ConfigError


class Task(NamedTuple):
    """A task of DataComp that classes or captions alone can judge."""

    key: str  # DataComp's name of the task
    dataset: str  # the name in its tables
    images: int  # in the set
    classes: int  # 0 for retrieval
    metric: str  # the one that it scores
    names: tuple = ()  # what else people call the set


# 33 of the 38 tasks that DataComp scores. The others need more than classes and captions: WinoGAViL
# its associations, iWildCam an F1 score, FMoW, Dollar Street and GeoDE the groups of their images.
# fmt: off
TASKS = (
    Task("imagenet1k", "ImageNet 1k", 50_000, 1000, "acc1",
         ("imagenet", "imagenet_val", "imagenet1k_val", "imagenet1k-unverified", "in1k",
          "ilsvrc2012", "ilsvrc2012_val")),
    Task("imagenet_sketch", "ImageNet Sketch", 50_889, 1000, "acc1", ("in-sketch", "sketch")),
    Task("imagenetv2", "ImageNet v2", 10_000, 1000, "acc1",
         ("in-v2", "imagenetv2-matched-frequency", "imagenetv2-matched-frequency-format-val")),
    Task("imagenet-a", "ImageNet-A", 7_500, 200, "acc1", ("in-a",)),
    Task("imagenet-o", "ImageNet-O", 2_000, 200, "acc1", ("in-o",)),
    Task("imagenet-r", "ImageNet-R", 30_000, 200, "acc1", ("in-r",)),
    Task("objectnet", "ObjectNet", 18_574, 113, "acc1", ("objectnet-1.0",)),

    Task("vtab/caltech101", "Caltech-101", 6_085, 102, "mean_per_class_recall"),
    Task("cifar10", "CIFAR-10", 10_000, 10, "acc1"),
    Task("vtab/cifar100", "CIFAR-100", 10_000, 100, "acc1"),
    Task("vtab/clevr_count_all", "CLEVR Counts", 15_000, 8, "acc1"),
    Task("vtab/clevr_closest_object_distance", "CLEVR Distance", 15_000, 6, "acc1"),
    Task("country211", "Country211", 21_100, 211, "acc1"),
    Task("vtab/dtd", "Describable Textures", 1_880, 47, "acc1"),
    Task("vtab/eurosat", "EuroSAT", 5_400, 10, "acc1"),
    Task("fgvc_aircraft", "FGVC Aircraft", 3_333, 100, "mean_per_class_recall", ("aircraft",)),
    Task("food101", "Food-101", 25_250, 101, "acc1"),
    Task("gtsrb", "GTSRB", 12_630, 43, "acc1"),
    Task("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance", 711, 4, "acc1",
         ("kitti",)),
    Task("mnist", "MNIST", 10_000, 10, "acc1"),
    Task("vtab/flowers", "Oxford Flowers-102", 6_149, 102, "mean_per_class_recall",
         ("flowers102",)),
    Task("vtab/pets", "Oxford-IIIT Pet", 3_669, 37, "mean_per_class_recall", ("oxford_pets",)),
    Task("voc2007", "Pascal VOC 2007", 14_976, 20, "acc1"),
    Task("vtab/pcam", "PatchCamelyon", 32_768, 2, "acc1"),
    Task("renderedsst2", "Rendered SST2", 1_821, 2, "acc1", ("sst2",)),
    Task("vtab/resisc45", "RESISC45", 6_300, 45, "acc1"),
    Task("cars", "Stanford Cars", 8_041, 196, "acc1"),
    Task("stl10", "STL-10", 8_000, 10, "acc1"),
    Task("sun397", "SUN397", 108_754, 397, "acc1"),
    Task("vtab/svhn", "SVHN", 26_032, 10, "acc1"),
    Task("wilds/camelyon17", "Camelyon17", 85_054, 2, "acc1"),

    Task("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", 1_000, 0, "mean_recall@1",
         ("flickr30k", "flickr30k_karpathy", "flickr_1k")),
    Task("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", 5_000, 0, "mean_recall@1",
         ("mscoco_captions", "coco", "coco_captions", "coco_karpathy", "coco_5k", "mscoco_5k")),
)
# fmt: on

# Their mean top-1 is what the paper calls IN & Variants.
IN_AND_VARIANTS = (
    "ImageNet 1k",
    "ImageNet Sketch",
    "ImageNet v2",
    "ImageNet-A",
    "ImageNet-O",
    "ImageNet-R",
    "ObjectNet",
)

# Words that names of folders have before or after the name of the set.
WORDS_AROUND = ("wds", "vtab", "retrieval", "test")

RECALLS = (1, 5, 10)

# The columns of the printed table: the key in a result, and a heading of two lines.
COLUMNS = (
    ("zeroshot_top1", "", "top-1"),
    ("zeroshot_top5", "", "top-5"),
    ("zeroshot_mean_per_class", "class", "mean"),
    ("image_to_text_R@1", "I2T", "R@1"),
    ("image_to_text_R@5", "I2T", "R@5"),
    ("image_to_text_R@10", "I2T", "R@10"),
    ("text_to_image_R@1", "T2I", "R@1"),
    ("text_to_image_R@5", "T2I", "R@5"),
    ("text_to_image_R@10", "T2I", "R@10"),
)
COLUMN_WIDTH = 7
LONGEST_NAME = 34  # in the table, so that its rows have less than 100 columns

LONGEST_PART = 80  # of the name of a file, which may have 255 bytes

# ---- which set is it ----


def plain(name):
    """The name of a set without what spellings differ in: "wds_ImageNet-A_test" -> "imageneta"."""
    words = re.split("[^a-z0-9]+", name.lower())
    return "".join(word for word in words if word not in WORDS_AROUND)


def find_task(name):
    """The name of a set -> the Task of that name in any spelling, or None."""
    wanted = plain(name)
    for task in TASKS:
        spellings = (task.key, task.dataset, *task.names)
        if wanted in [plain(spelling) for spelling in spellings]:
            return task
    return None


def differences(result, task):
    """In what a set differs from the one whose name it bears -> list of sentences."""
    found = []
    if abs(result["images"] - task.images) > MAX_BAD * task.images:
        found.append(f"it has {result['images']:,} images, and {task.dataset} has {task.images:,}")
    if "zeroshot_top1" in result and task.classes and result["classes"] != task.classes:
        found.append(
            f"it has {result['classes']:,} classes, and {task.dataset} has {task.classes:,}"
        )
    return found


def notes_on(result):
    """The result of a set -> sentences on why it may not be what it seems; [] if it is."""
    notes = []
    unused = sum(result["left_out"].values())
    total = result["images"] + unused
    if unused > MAX_BAD * total:
        notes.append(f"{unused:,} of its {total:,} images could not be used")

    task = find_task(result["name"])
    if task:
        notes += differences(result, task)
    return notes


def task_of(result):
    """The Task whose set this is, by its name and its size; None if it is none."""
    task = find_task(result["name"])
    return None if task is None or differences(result, task) else task


def imagenet_and_variants(sets):
    """Results of sets -> (mean top-1 of ImageNet and its six variants, names of missing sets).

    The mean is a share, None if a set is missing, or has another size than the one whose name it
    bears. If a set is there twice, the last result counts.
    """
    top1 = {}
    for result in sets:
        task = task_of(result)
        if task and "zeroshot_top1" in result:
            top1[task.dataset] = result["zeroshot_top1"]

    missing = [name for name in IN_AND_VARIANTS if name not in top1]
    if missing:
        return None, missing
    return sum(top1[name] for name in IN_AND_VARIANTS) / len(IN_AND_VARIANTS), []


def measures(sets, named):
    """Results of sets -> {measure: share}, for a row of metrics.jsonl.

    named: whether config.eval_data gives the sets names. Then a measure is called NAME/measure. If
    ImageNet and all its variants are there, their mean is, too.
    """
    shares = {}
    for result in sets:
        prefix = f"{result['name']}/" if named else ""
        for key, _, _ in COLUMNS:
            if key in result:
                shares[prefix + key] = result[key]

    mean, _ = imagenet_and_variants(sets)
    if mean is not None:
        shares["imagenet_and_variants"] = mean
    return shares


# ---- the printed table ----


def table(sets):
    """Results of sets -> lines of text, in percent: a row per set; of one set a line per number."""
    if len(sets) == 1:
        return one_set(sets[0])

    columns = [column for column in COLUMNS if any(column[0] in result for result in sets)]
    names = [shortened(result["name"]) for result in sets]
    width = max(len(name) for name in names)

    lines = []
    for line in (1, 2):
        lines.append(table_row("", width, [column[line] for column in columns]))
    for name, result in zip(names, sets):
        cells = [percent(result.get(key)) for key, _, _ in columns]
        lines.append(table_row(name, width, cells))

    variants = variants_line(sets)
    if variants:
        lines += ["", f"  {variants}"]
    return [line.rstrip() for line in lines + note_lines(sets)]


def one_set(result):
    lines = []
    for key, _, _ in COLUMNS:
        if key in result:
            lines.append(f"  {key:<26}{percent(result[key]):>6} %")
    return lines + note_lines([result])


def note_lines(sets):
    """Results of sets -> a line for each of their notes."""
    lines = []
    for result in sets:
        lines += [f"  note on {result['name']}: {note}" for note in result["notes"]]
    return lines


def table_row(name, width, cells):
    return f"  {name:<{width}}" + "".join(f"{cell:>{COLUMN_WIDTH}}" for cell in cells)


def shortened(name):
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."


def percent(share):
    return "" if share is None else f"{100 * share:.1f}"


def variants_line(sets):
    """-> the mean as text, or which sets are missing; "" if fewer than two of them are there."""
    mean, missing = imagenet_and_variants(sets)
    if mean is not None:
        return f"IN & Variants: {percent(mean)} %, the mean top-1 of {len(IN_AND_VARIANTS)} sets"
    if len(IN_AND_VARIANTS) - len(missing) < 2:
        return ""
    return f"IN & Variants: not known without {', '.join(missing)}"


# ---- files ----


def checkpoint_name(folder):
    """The folder of a checkpoint -> RUN/step-00001000, the same however its path is spelt."""
    folder = os.path.realpath(folder)
    above = os.path.dirname(folder)
    if os.path.basename(above) == "checkpoints":
        above = os.path.dirname(above)
    return f"{os.path.basename(above)}/{os.path.basename(folder)}"


def write(folder, sets, model, checkpoint):
    """Write all files. Each is complete or as it was.

    sets: their results, a list. model: its name, as in a config. checkpoint: of checkpoint_name.
    Earlier results of the same checkpoint on other sets stay.

    Raises ConfigError, after eval.json, for an old eval_results.jsonl that cannot be read, and if a
    file cannot be written.
    """
    write_eval_json(folder, sets, checkpoint)
    write_clip_benchmark(folder, sets, model, checkpoint)
    write_datacomp(folder, sets, checkpoint)


def write_eval_json(folder, sets, checkpoint):
    path = os.path.join(folder, "eval.json")
    by_name = {result["name"]: result for result in read_eval_json(path, checkpoint)}
    by_name.update({result["name"]: result for result in sets})
    sets = list(by_name.values())

    mean, _ = imagenet_and_variants(sets)
    content = {"checkpoint": checkpoint, "sets": sets, "imagenet_and_variants": mean}
    write_text(path, json.dumps(content, indent=1))


def read_eval_json(path, checkpoint):
    """The results of sets in an eval.json; [] without one, or if it is of another checkpoint."""
    try:
        with open(path) as f:
            content = json.load(f)
        return content["sets"] if content["checkpoint"] == checkpoint else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_text(path, text):
    """Write a file that is complete or as it was, and its folder. ConfigError if it cannot be."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".partial", "w") as f:
            f.write(text)
        os.replace(path + ".partial", path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def classification_metrics(result):
    """The result of a set -> its accuracies under the names of the benchmarks; {} without any."""
    if "zeroshot_top1" not in result:
        return {}
    return {
        "acc1": result["zeroshot_top1"],
        # Missing with fewer than five classes. None becomes null in the file.
        "acc5": result.get("zeroshot_top5"),
        "mean_per_class_recall": result["zeroshot_mean_per_class"],
    }


def retrieval_metrics(result):
    """The result of a set -> its recalls under the names of the benchmarks; {} without any.

    There, image retrieval is the search for images, by a text.
    """
    metrics = {}
    if "image_to_text_R@1" in result:
        for k in RECALLS:
            metrics[f"image_retrieval_recall@{k}"] = result[f"text_to_image_R@{k}"]
            metrics[f"text_retrieval_recall@{k}"] = result[f"image_to_text_R@{k}"]
    return metrics


# ---- CLIP_benchmark ----


def write_clip_benchmark(folder, sets, model, checkpoint):
    """Write a file for each set and task into the folder clip_benchmark.

    Files of other checkpoints stay: together they make a table that compares the checkpoints.
    """
    for result in sets:
        for record in clip_benchmark_records(result, model, checkpoint):
            path = os.path.join(folder, "clip_benchmark", file_name(record))
            write_text(path, json.dumps(record))


def clip_benchmark_records(result, model, checkpoint):
    """The result of a set -> list of dicts, one for each task that it was judged by."""
    metrics_of_tasks = {
        "zeroshot_classification": classification_metrics(result),
        "zeroshot_retrieval": retrieval_metrics(result),
    }
    records = []
    for task, metrics in metrics_of_tasks.items():
        if not metrics:
            continue
        record = {
            "dataset": result["name"],
            "model": model,
            "pretrained": checkpoint,
            "task": task,
            "metrics": metrics,
            "language": "en",
        }
        records.append(record)
    return records


def file_name(record):
    """CLIP_benchmark's own name for a file of results. Of long names it has the end."""
    keys = ("dataset", "pretrained", "model", "language", "task")
    parts = [record[key][-LONGEST_PART:] for key in keys]
    return f"{safe('_'.join(parts))}.json"


def safe(name):
    """A name without what a file system may refuse."""
    return re.sub(r"[^\w.-]+", "_", name)


# ---- DataComp ----


def write_datacomp(folder, sets, checkpoint):
    """Write a line for each set that DataComp scores; without any, no file.

    Lines that are already there stay, so that the 38 tasks can be judged piece by piece, some of
    them by DataComp itself. A new result of the same set replaces its line. A file with lines of
    another checkpoint is put aside, because a score over two checkpoints would mean nothing.
    """
    new = datacomp_lines(sets, checkpoint)
    if not new:
        return

    path = os.path.join(folder, "eval_results.jsonl")
    old = read_datacomp(path)
    # DataComp's own lines do not name the checkpoint.
    others = {line.get("checkpoint", checkpoint) for line in old} - {checkpoint}
    if others:
        aside = os.path.join(folder, f"eval_results-{safe(min(others))}.jsonl")
        print(f"{path} is of another checkpoint: it is {aside} now", flush=True)
        os.replace(path, aside)
        old = []

    lines = {line["key"]: line for line in old}
    lines.update(new)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines.values()))


def datacomp_lines(sets, checkpoint):
    """Results of sets -> {DataComp's key: its line, a dict}, of those sets that it scores."""
    lines = {}
    for result in sets:
        task = task_of(result)
        metrics = datacomp_metrics(result)
        if task and task.metric in metrics:
            lines[task.key] = {
                "key": task.key,
                "dataset": task.dataset,
                "metrics": {**metrics, "main_metric": metrics[task.metric]},
                "checkpoint": checkpoint,
            }
    return lines


def datacomp_metrics(result):
    metrics = {**classification_metrics(result), **retrieval_metrics(result)}
    if "image_retrieval_recall@1" in metrics:
        both = metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]
        metrics["mean_recall@1"] = both / 2
    return metrics


def read_datacomp(path):
    """-> the lines of an eval_results.jsonl, dicts; [] if there is no file.

    Raises ConfigError for a line that is no result of DataComp.
    """
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as f:
            texts = f.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error

    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or "key" not in line:
            raise ConfigError(
                f"{path}, line {number}: {text[:60]!r} is no result of DataComp, which is JSON "
                "with a key: repair the file, move it away or choose another --out_dir"
            )
        lines.append(line)
    return lines
