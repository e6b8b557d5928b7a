"""Evaluation sets with a folder per class, and ObjectNet, whose folders belong to mappings."""

import json
import os
from collections import Counter

from config import ConfigError
from ingest.class_names import choose_templates, find_lists
from ingest.classes import Classes, classes_of, numbered
from ingest.folders import amount, extension_of, list_folder, some
from ingest.left_out import NO_CLASS_FOLDER, NOT_READ
from ingest.sources import ImageFiles

# ObjectNet's pictures have a red border, so that nobody trains on them by mistake.
OBJECTNET_BORDER = 2  # pixels on each side

FOLDER_TO_LABEL = "folder_to_objectnet_label.json"
LABEL_TO_IMAGENET = "objectnet_to_imagenet_1k.json"


# ---- a folder per class ----


def find_class_folders(root, top, lists_given):
    """ROOT/CLASS/IMAGE -> (ImageFiles, Classes); None if fewer than two folders hold images.

    top: Listing of ROOT. lists_given: ingest.class_names.ListFiles. Raises ConfigError for images
    that lie deeper, for a class without images, and what find_lists and classes_of raise.
    """
    inside = {name: list_folder(os.path.join(root, name)) for name in top.folders}
    with_images = []
    for name, content in inside.items():
        if content.images or content.unsupported_images:
            with_images.append(name)
    if top.images and not with_images:
        return None  # a flat folder, and something else in it

    check_depth(root, inside)
    if len(with_images) < 2:
        return None

    lists = find_lists(root, lists_given)
    classes = classes_of(set(inside), lists, root, "the folders' names")
    source = images_of_classes(root, inside, classes)
    source.left_out.update(f"{extension_of(name)} {NO_CLASS_FOLDER}" for name in top.images)
    return source, classes


def images_of_classes(root, inside, classes):
    """{folder of a class: its Listing} -> ImageFiles. ConfigError if a class has no image."""
    empty = [name for name, content in inside.items() if not content.images]
    if empty:
        raise ConfigError(
            f"{root}: {len(empty):,} of its {len(inside):,} class folders hold no image that can "
            f"be read: {some(empty)}; fetch the images, or take these folders away"
        )

    paths = []
    labels = []
    left_out = Counter()
    for name, content in inside.items():
        paths += [os.path.join(name, image) for image in content.images]
        labels += [classes.labels[name]] * len(content.images)
        for image in content.unsupported_images:
            left_out[f"{extension_of(image)} {NOT_READ}"] += 1

    description = f"folder per class ({classes.kind})"
    return ImageFiles(root, paths, description, labels=labels, left_out=left_out)


def check_depth(root, inside):
    """ConfigError if a folder in a folder of ROOT holds images. inside: {folder: its Listing}."""
    for name, content in inside.items():
        for deeper in content.folders:
            path = os.path.join(root, name, deeper)
            images = list_folder(path).images
            if not images:
                continue

            example = os.path.join(name, deeper, images[0])
            advice = "give one of its folders"
            for likely in ("val", "test", "validation"):
                if likely in inside:
                    advice = f"give {os.path.join(root, likely)}"
                    break
            raise ConfigError(
                f"{root}: images lie two folders deep, as {example}, where FOLDER/CLASS/IMAGE is "
                f"expected: {advice}"
            )


# ---- ObjectNet ----


def find_objectnet(path, lists_given):
    """ObjectNet's folder, or images/ in it -> (ImageFiles, Classes); None if it is another set.

    lists_given: ingest.class_names.ListFiles. The classes are those 113 of its 313 that ImageNet
    has, too; the other folders are no part of the set. Raises ConfigError for mappings that are
    missing or cannot be read, for class folders that are not there, and what find_lists raises.
    """
    root = path
    if os.path.basename(os.path.abspath(path)) == "images":
        root = os.path.dirname(os.path.abspath(path))
    images = os.path.join(root, "images")
    mappings = os.path.join(root, "mappings")
    if not os.path.isdir(images):
        return None
    if not os.path.isfile(os.path.join(mappings, FOLDER_TO_LABEL)):
        check_is_not_objectnet(root, mappings)
        return None

    label_of = read_mapping(os.path.join(mappings, FOLDER_TO_LABEL))
    in_imagenet = read_mapping(os.path.join(mappings, LABEL_TO_IMAGENET))
    folders = sorted(folder for folder, label in label_of.items() if label in in_imagenet)

    missing = [name for name in folders if not os.path.isdir(os.path.join(images, name))]
    if missing or not folders:
        raise ConfigError(
            f"{images}: {len(missing):,} of the {len(folders):,} folders that {mappings} names are "
            f"missing: {some(missing)}; unpack all parts of ObjectNet"
        )

    lists = find_lists(root, lists_given)
    names = lists.names or [label_of[folder].lower() for folder in folders]
    if len(names) != len(folders):
        raise ConfigError(
            f"{lists.names_path} has {amount(len(names), 'line')}, but ObjectNet shares "
            f"{len(folders):,} classes with ImageNet: give one line for each, in the sorted order "
            "of their folders"
        )

    templates = choose_templates(lists, is_imagenet=True)
    names_from = lists.names_from or "its mappings"
    classes = Classes("ObjectNet's", numbered(folders), names, names_from, *templates)
    inside = {name: list_folder(os.path.join(images, name)) for name in folders}
    source = images_of_classes(images, inside, classes)
    source.description = f"ObjectNet, its border of {OBJECTNET_BORDER} pixels cut off"
    source.border = OBJECTNET_BORDER
    return source, classes


def check_is_not_objectnet(root, mappings):
    """ConfigError if a folder without ObjectNet's mappings has its name.

    As a plain folder per class it would be another set, of 313 classes and with its borders.
    """
    if "objectnet" in os.path.basename(os.path.abspath(root)).lower():
        raise ConfigError(
            f"{root} has ObjectNet's name and a folder images, but no "
            f"{os.path.join(mappings, FOLDER_TO_LABEL)}: put ObjectNet's folder mappings, which "
            "say which classes ImageNet has, beside images (a set that is not ObjectNet needs "
            "another name)"
        )


def read_mapping(path):
    """A JSON file -> {str: str}. Raises ConfigError if it is something else."""
    try:
        with open(path, encoding="utf-8") as f:
            mapping = json.load(f)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path} must hold a JSON object, a name for each name")
    return mapping
