"""Evaluation sets that are a flat folder of images and a file with their labels.

The file holds one of these, in text:

    FILE LABEL          per line, separated by a comma, a tab or spaces, with or without a header;
                        further columns are not used. Images are named with or without their
                        extension, and with the name of their folder or without
    LABEL               per line, in the order of the sorted file names of the images

A label is a WordNet id, a number counted from 0 or, in the first form, a name. The numbers of
ILSVRC2012_validation_ground_truth.txt are in an order of their own and need ImageNet's meta.mat.
"""

import csv
import os
from collections import Counter
from typing import NamedTuple

from config import ConfigError
from ingest.class_names import CLASS_NAMES, TEMPLATES, find_lists, imagenet_ids, read_lines
from ingest.classes import NUMBER, WORDNET_ID, classes_of
from ingest.folders import extension_of, list_folder
from ingest.images import IMAGES, OTHER_IMAGES
from ingest.left_out import NO_LABEL, NOT_READ, NOT_THERE
from ingest.sources import ImageFiles

LABEL_FILES = {"csv", "tsv", "txt"}
MAX_BYTES = 100_000_000  # a larger file is no list of labels
OTHER_FILES = {CLASS_NAMES, TEMPLATES, "nshards.txt", "dataset_type.txt"}

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META_MAT = "meta.mat"


class Unfit(Exception):
    """A file is not the list of labels of some images. Its text says why."""


class Labels(NamedTuple):
    """The labels of some images.

    of_image    {name of an image that is there: its label, str}
    unused      names of images that are not there, as the file has them
    keys        all labels in the file, also of images that are not there
    """

    of_image: dict
    unused: list
    keys: set


# ---- finding the file ----


def find_flat_folder(folder, listing, files):
    """A folder of images, its file of labels in it or above -> (ImageFiles, Classes).

    listing: of the folder. files: ingest.class_names.Files. None if there are no images in the
    folder. Raises ConfigError if no file fits the images, or several do, and what find_lists and
    classes_of raise.
    """
    if not listing.images:
        return None

    folder = os.path.abspath(folder)
    looked_at = []
    for place in (folder, os.path.dirname(folder)):
        candidates = [(path, folder, listing) for path in label_files(place)]
        fitting, reasons = those_that_fit(candidates)
        looked_at += reasons
        if len(fitting) > 1:
            paths = ", ".join(path for path, *_ in fitting)
            raise ConfigError(
                f"{folder}: several files hold labels of its images: {paths}; give one of them"
            )
        if fitting:
            return flat_set(*fitting[0], files)

    lines = looked_at or ["there is no .csv, .tsv or .txt in it or in the folder above"]
    raise ConfigError(
        "\n  ".join(
            [
                f"{folder} holds {len(listing.images):,} images and no folder per class, and no "
                "file has their labels, FILE LABEL per line:",
                *lines,
            ]
        )
    )


def find_labelled_images(path, files):
    """A file of labels, its images in its folder or in one beside it -> (ImageFiles, Classes).

    As find_flat_folder. Raises ConfigError if it fits the images of no folder, or of several.
    """
    here = os.path.dirname(os.path.abspath(path))
    top = list_folder(here)
    candidates = [(path, here, top)]
    for name in top.folders:
        folder = os.path.join(here, name)
        candidates.append((path, folder, list_folder(folder)))
    with_images = [candidate for candidate in candidates if candidate[2].images]

    fitting, reasons = those_that_fit(with_images)
    if len(fitting) > 1:
        folders = ", ".join(folder for _, folder, *_ in fitting)
        raise ConfigError(
            f"{path} has labels of the images of several folders: {folders}; give one of them"
        )
    if not fitting:
        lines = reasons or [f"there are no images in {here} or in a folder in it"]
        raise ConfigError("\n  ".join([f"{path} is given as a list of labels:", *lines]))
    return flat_set(*fitting[0], files)


def label_files(folder):
    """-> the paths of the files in a folder that may hold labels."""
    paths = []
    for name in list_folder(folder).others:
        if extension_of(name) in LABEL_FILES and name not in OTHER_FILES:
            paths.append(os.path.join(folder, name))
    return paths


def those_that_fit(candidates):
    """Which of some files, each with a folder of images, hold labels of these.

    candidates: list of (path, folder, Listing) -> (list of (path, folder, Listing, Labels), list of
    lines that say why the others do not fit).
    """
    fitting = []
    reasons = []
    for path, folder, listing in candidates:
        try:
            labels = read_labels(path, folder, listing)
        except Unfit as error:
            reasons.append(f"{path}, for the images in {folder}: {error}")
        else:
            fitting.append((path, folder, listing, labels))
    return fitting, reasons


def flat_set(path, folder, listing, labels, files):
    """-> (ImageFiles, Classes). Images without a label, and the reverse, count as left out."""
    where = f"{folder} with {os.path.basename(path)}"
    classes = classes_of(labels.keys, find_lists(folder, files), where)

    paths = []
    numbers = []
    left_out = Counter(f"{extension_of(name)} {NOT_READ}" for name in listing.unread)
    for name in listing.images:
        if name in labels.of_image:
            paths.append(name)
            numbers.append(classes.labels[labels.of_image[name]])
        else:
            left_out[f"{extension_of(name)} {NO_LABEL}"] += 1
    for name in labels.unused:
        left_out[f"{image_extension(name) or 'image'} {NOT_THERE}"] += 1

    description = f"folder of images with labels in {os.path.basename(path)} ({classes.kind})"
    source = ImageFiles(folder, paths, description, labels=numbers, left_out=left_out)
    return source, classes


# ---- reading the file ----


def read_labels(path, folder, listing):
    """The labels, in a file, of the images in a folder -> Labels. Raises Unfit."""
    if os.path.getsize(path) > MAX_BYTES:
        raise Unfit("it is too large for a list of labels")
    try:
        lines = [line for line in read_lines(path) if line.strip()]
    except ConfigError as error:
        raise Unfit("it is no text in UTF-8") from error
    if not lines:
        raise Unfit("it is empty")

    words = [line.strip() for line in lines]
    are_ids = all(WORDNET_ID.fullmatch(word) for word in words)
    are_numbers = all(NUMBER.fullmatch(word) for word in words)
    if are_ids or are_numbers:
        return labels_in_order(path, words, listing, are_numbers)
    return labels_by_name(rows_of(lines), folder, listing)


def labels_in_order(path, words, listing, are_numbers):
    """One label per line -> Labels."""
    # Also those that cannot be read have a line.
    images = sorted(listing.images + listing.unread)
    if len(words) != len(images):
        raise Unfit(f"it has {len(words):,} lines of one label, for {len(images):,} images")

    if are_numbers and os.path.basename(path) == GROUND_TRUTH:
        words = wordnet_ids_of_devkit(path, words)
    elif are_numbers and 0 not in map(int, words):
        raise Unfit(
            "it holds numbers without a 0: classes are counted from 0, in ImageNet's order. "
            "Numbers from 1 are likely to be the devkit's, in an order of its own: name such a "
            f"file {GROUND_TRUTH}, with {META_MAT} beside it, or write FILE LABEL per line"
        )
    elif len(words) == 1000 and words == imagenet_ids():
        raise Unfit("it is the list of ImageNet's classes")
    return Labels(dict(zip(images, words)), [], set(words))


def labels_by_name(rows, folder, listing):
    """Rows of FILE and LABEL -> Labels."""
    names = names_of_images(listing)
    of_image = {}
    unused = []
    keys = set()
    for number, row in enumerate(rows, 1):
        if len(row) < 2 or not row[1].strip():
            raise Unfit(f"its line {number} is not FILE LABEL: {' '.join(row)[:60]!r}")
        if is_of_other_folder(row[0], folder):
            continue

        name = name_in_folder(row[0], names)
        is_header = number == 1 and not name and not image_extension(row[0])
        if is_header:
            continue

        label = label_in(row[1])
        keys.add(label)
        if not name:
            unused.append(row[0])
        elif of_image.setdefault(name, label) != label:
            raise Unfit(f"{name} has two labels in it, {of_image[name]!r} and {label!r}")

    if not of_image:
        raise Unfit(f"it names none of the images; its first line has {rows[0][0][:60]!r}")
    return Labels(of_image, unused, keys)


def rows_of(lines):
    """Lines of a table -> lists of cells. Raises Unfit."""
    for separator in ("\t", ",", ";"):
        if separator in lines[0]:
            try:
                return list(csv.reader(lines, delimiter=separator))
            except csv.Error as error:
                raise Unfit(f"it is no table: {error}") from error
    return [line.split(None, 1) for line in lines]


def label_in(cell):
    """The label in a cell. ImageNet's LOC_val_solution.csv has a box after each WordNet id."""
    words = cell.split()
    return words[0] if WORDNET_ID.fullmatch(words[0]) else cell.strip()


def names_of_images(listing):
    """-> {how a list may call an image: its file name}, with and without the extension."""
    images = listing.images + listing.unread
    stems = Counter(os.path.splitext(name)[0] for name in images)

    names = {}
    for name in images:
        stem = os.path.splitext(name)[0]
        if stems[stem] == 1:
            names[stem] = name
    for name in images:
        names[name] = name
    return names


def name_in_folder(given, names):
    """A file in a list -> its name in the folder, "" if it is not there."""
    name = os.path.basename(given.strip())
    if name in names:
        return names[name]
    # JPEG in the list and jpg on the disk.
    stem = os.path.splitext(name)[0] if image_extension(name) else name
    return names.get(stem, "")


def is_of_other_folder(given, folder):
    """Whether a list says, with FOLDER/FILE, that an image lies in another folder."""
    parent = os.path.basename(os.path.dirname(given.strip()))
    return parent not in ("", ".", os.path.basename(folder))


def image_extension(name):
    """The extension of an image's name, "" if it is no image's."""
    extension = extension_of(name.strip())
    return extension if extension in IMAGES | OTHER_IMAGES else ""


# ---- ImageNet's devkit ----


def wordnet_ids_of_devkit(path, numbers):
    """The devkit's numbers from 1, list of str -> list of WordNet ids, by its meta.mat.

    Raises Unfit if there is no meta.mat, if scipy is not installed, or if a number is not in it.
    """
    here = os.path.dirname(os.path.abspath(path))
    above = os.path.dirname(here)
    places = [here, above, os.path.join(above, "data")]
    found = [os.path.join(place, META_MAT) for place in places]
    found = [meta for meta in found if os.path.isfile(meta)]
    if not found:
        raise Unfit(
            "it holds the devkit's numbers, whose order is not ImageNet's usual one: put the "
            f"devkit's {META_MAT}, which says what they mean, beside it (looked for in "
            f"{', '.join(places)})"
        )

    id_of = read_meta(found[0])
    unknown = sorted(set(numbers) - set(id_of))
    if unknown:
        raise Unfit(f"{found[0]} has no class of the number {unknown[0]}")
    return [id_of[number] for number in numbers]


def read_meta(path):
    """The devkit's meta.mat -> {number as str: WordNet id}. Raises Unfit."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise Unfit(f"{path} can only be read with scipy: pip install scipy") from error

    try:
        synsets = loadmat(path, simplify_cells=True)["synsets"]
        return {str(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # loadmat raises errors of many kinds
        raise Unfit(f"{path} is not the devkit's {META_MAT}: {error}") from error
