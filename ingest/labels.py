"""Evaluation sets that are a flat folder of images and a file with their labels.

The file holds one of these, in text:

    FILE LABEL          per line, separated by a comma, a tab or spaces, with or without a header,
                        which may say which columns these are, as in split,label,filename. Images
                        are named with or without their extension, and with the name of their
                        folder or without
    LABEL               per line, in the order of the sorted file names of the images

A label is a WordNet id, a number counted from 0 or, in the first form, a name. The numbers of
ILSVRC2012_validation_ground_truth.txt are in an order of their own and need ImageNet's meta.mat.
"""

import csv
import os
import re
from collections import Counter
from typing import NamedTuple

from config import ConfigError
from ingest.class_names import CLASS_NAMES, TEMPLATES, find_lists, imagenet_ids, read_lines
from ingest.classes import NUMBER, WORDNET_ID, classes_of
from ingest.folders import Listing, amount, extension_of, list_folder, list_if_readable
from ingest.images import IMAGES, OTHER_IMAGES
from ingest.left_out import NO_LABEL, NOT_READ, NOT_THERE
from ingest.sources import ImageFiles

LABEL_FILES = {"csv", "tsv", "txt"}
MAX_BYTES = 100_000_000  # a larger file is no list of labels
OTHER_FILES = {CLASS_NAMES, TEMPLATES, "nshards.txt", "dataset_type.txt"}

# Titles of columns, in lower case and without spaces and underscores.
FILE_TITLES = {"filename", "file", "image", "imageid", "path"}
LABEL_TITLES = {"label", "class", "synset", "wnid"}

# Where Kaggle's archive of ImageNet has the images of LOC_val_solution.csv.
KAGGLE_IMAGES = os.path.join("ILSVRC", "Data", "CLS-LOC", "val")

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META_MAT = "meta.mat"


class Unfit(Exception):
    """A file is not the list of labels of some images. Its text says why."""


class Columns(NamedTuple):
    """Which cells of a row in a table hold the name of an image and its label."""

    file: int
    label: int


class Labels(NamedTuple):
    """The labels of some images.

    of_image    {name of an image that is there: its label, str}
    unused      names of images that are not there, as the file has them
    keys        all labels in the file, also of images that are not there
    """

    of_image: dict
    unused: list
    keys: set


class LabelledFolder(NamedTuple):
    """A file of labels, and the folder of the images that it may be of.

    path        of the file
    folder      of the images
    listing     ingest.folders.Listing of the folder
    """

    path: str
    folder: str
    listing: Listing


# ---- finding the file ----


def find_flat_folder(folder, listing, lists_given):
    """A folder of images, its file of labels in it or above -> (ImageFiles, Classes).

    listing: of the folder. lists_given: ingest.class_names.ListFiles. None if there are no images
    in the folder. Raises ConfigError if no file fits the images, or several do, and what find_lists
    and classes_of raise.
    """
    if not listing.images:
        return None

    folder = os.path.abspath(folder)
    looked_at = []
    for place in (folder, os.path.dirname(folder)):
        candidates = [LabelledFolder(path, folder, listing) for path in label_files(place)]
        fitting, reasons = those_that_fit(candidates)
        looked_at += reasons
        if len(fitting) > 1:
            paths = ", ".join(candidate.path for candidate, _ in fitting)
            raise ConfigError(
                f"{folder}: several files hold labels of its images: {paths}; give one of them"
            )
        if fitting:
            candidate, labels = fitting[0]
            return flat_set(candidate, labels, lists_given)

    lines = looked_at or ["there is no .csv, .tsv or .txt in it or in the folder above"]
    raise ConfigError(
        "\n  ".join(
            [
                f"{folder} holds {amount(len(listing.images), 'image')} and no folder per class, "
                "and no file has their labels, FILE LABEL per line; put or link the list beside "
                "the folder of images:",
                *lines,
            ]
        )
    )


def find_labelled_images(path, lists_given):
    """A file of labels, its images in its folder or in one beside it -> (ImageFiles, Classes).

    The images of Kaggle's LOC_val_solution.csv may also lie where Kaggle's archive has them.

    As find_flat_folder. Raises ConfigError if it fits the images of no folder, or of several.
    """
    here = os.path.dirname(os.path.abspath(path))
    top = list_folder(here)
    candidates = [LabelledFolder(path, here, top)]
    for name in [*top.folders, KAGGLE_IMAGES]:
        folder = os.path.join(here, name)
        candidates.append(LabelledFolder(path, folder, list_if_readable(folder)))
    with_images = [candidate for candidate in candidates if candidate.listing.images]

    fitting, reasons = those_that_fit(with_images)
    if len(fitting) > 1:
        folders = ", ".join(candidate.folder for candidate, _ in fitting)
        raise ConfigError(
            f"{path} has labels of the images of several folders: {folders}; give one of them"
        )
    if not fitting:
        nothing = (
            f"there are no images in {here} or in a folder in it: put or link the list beside the "
            "folder of images"
        )
        lines = reasons or [nothing]
        raise ConfigError("\n  ".join([f"{path} is given as a list of labels:", *lines]))
    candidate, labels = fitting[0]
    return flat_set(candidate, labels, lists_given)


def label_files(folder):
    """-> the paths of the files in a folder that may hold labels; none if it cannot be read."""
    paths = []
    for name in list_if_readable(folder).other_files:
        if extension_of(name) in LABEL_FILES and name not in OTHER_FILES:
            paths.append(os.path.join(folder, name))
    return paths


def those_that_fit(candidates):
    """Which of some files, each with a folder of images, hold labels of these.

    candidates: list of LabelledFolder -> (list of (LabelledFolder, Labels), list of lines that say
    why the others do not fit).
    """
    fitting = []
    reasons = []
    for candidate in candidates:
        try:
            labels = read_labels(*candidate)
        except Unfit as error:
            reasons.append(f"{candidate.path}, for the images in {candidate.folder}: {error}")
        else:
            fitting.append((candidate, labels))
    return fitting, reasons


def flat_set(labelled, labels, lists_given):
    """A LabelledFolder and its Labels -> (ImageFiles, Classes).

    Images without a label, and labels without an image, count as left out.
    """
    folder = labelled.folder
    listing = labelled.listing
    file = os.path.basename(labelled.path)
    lists = find_lists(folder, lists_given)
    classes = classes_of(labels.keys, lists, f"{folder} with {file}", f"the labels in {file}")

    paths = []
    numbers = []
    left_out = Counter(f"{extension_of(name)} {NOT_READ}" for name in listing.unsupported_images)
    for name in listing.images:
        if name in labels.of_image:
            paths.append(name)
            numbers.append(classes.labels[labels.of_image[name]])
        else:
            left_out[f"{extension_of(name)} {NO_LABEL}"] += 1
    for name in labels.unused:
        left_out[f"{image_extension(name) or 'image'} {NOT_THERE}"] += 1

    description = f"folder of images with labels in {file} ({classes.kind})"
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
    images = sorted(listing.images + listing.unsupported_images)
    if len(words) != len(images):
        lines = amount(len(words), "line")
        raise Unfit(f"it has {lines} of one label, for {amount(len(images), 'image')}")

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
    columns = columns_of(rows[0])
    of_image = {}
    unused = []
    keys = set()
    for number, row in enumerate(rows, 1):
        if len(row) <= max(columns) or not row[columns.label].strip():
            raise Unfit(f"its line {number} is not FILE LABEL: {' '.join(row)[:60]!r}")

        file = row[columns.file]
        if is_of_other_folder(file, folder):
            continue
        name = name_in_folder(file, names)
        is_header = number == 1 and not name and not image_extension(file)
        if is_header:
            continue

        label = label_in(row[columns.label])
        keys.add(label)
        if not name:
            unused.append(file)
        elif of_image.setdefault(name, label) != label:
            raise Unfit(f"{name} has two labels in it, {of_image[name]!r} and {label!r}")

    if not of_image:
        raise Unfit(
            f"it names none of the images; its first line has {rows[0][columns.file][:60]!r}"
        )
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


def columns_of(header):
    """The first row of a table -> Columns: those that it names if it names both, else the first."""
    titles = [re.sub(r"[\s_]", "", cell).lower() for cell in header]
    files = [column for column, title in enumerate(titles) if title in FILE_TITLES]
    labels = [column for column, title in enumerate(titles) if title in LABEL_TITLES]
    if files and labels:
        return Columns(files[0], labels[0])
    return Columns(0, 1)


def label_in(cell):
    """The label in a cell. ImageNet's LOC_val_solution.csv has a box after each WordNet id."""
    words = cell.split()
    return words[0] if WORDNET_ID.fullmatch(words[0]) else cell.strip()


def names_of_images(listing):
    """-> {how a list may call an image: its file name}, with and without the extension."""
    images = listing.images + listing.unsupported_images
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
