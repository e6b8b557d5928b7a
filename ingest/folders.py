"""What is in a folder: its images and folders; what to do if shards were expected there."""

import os
import shlex
from collections import Counter
from itertools import islice
from typing import NamedTuple

from config import ConfigError
from ingest.images import IMAGES, OTHER_IMAGES

MAX_FILES = 10_000  # so many are looked at: the folder may be large, and far away

# What some call a file with a caption.
OTHER_CAPTIONS = {"caption", "cap", "text"}


# ---- listing ----


class Listing(NamedTuple):
    """The names of what is in a folder, each list sorted. Hidden files and folders are left out.

    images              files that can be read
    unsupported_images  images of a kind that is not read
    other_files         all other files
    folders             folders, and links to folders
    """

    images: list
    unsupported_images: list
    other_files: list
    folders: list


def list_folder(path):
    """-> Listing of a folder. Raises ConfigError if the folder cannot be read."""
    listing = Listing([], [], [], [])
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                add_entry(listing, entry)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error

    for names in listing:
        names.sort()
    return listing


def list_if_readable(path):
    """-> Listing of a folder; empty if it cannot be read, as folders of many users often are."""
    try:
        return list_folder(path)
    except ConfigError:
        return Listing([], [], [], [])


def add_entry(listing, entry):
    if entry.name.startswith("."):
        return
    if entry.is_dir():
        listing.folders.append(entry.name)
        return

    extension = extension_of(entry.name)
    if extension in IMAGES:
        listing.images.append(entry.name)
    elif extension in OTHER_IMAGES:
        listing.unsupported_images.append(entry.name)
    else:
        listing.other_files.append(entry.name)


def extension_of(name):
    """The extension of a file's name, in lower case and without the dot."""
    return os.path.splitext(name)[1][1:].lower()


def some(names, count=3):
    """The first names of a list, for a message: "a, b, c, ..."."""
    names = list(names)
    dots = ", ..." if len(names) > count else ""
    return ", ".join(names[:count]) + dots


def amount(number, singular, plural=""):
    """A number of things, for a message: "1 image", "1,000 images". plural: if it is no -s."""
    noun = singular if number == 1 else plural or singular + "s"
    return f"{number:,} {noun}"


# ---- a folder in place of shards ----


def pack_command(folder):
    """-> (the command that packs a folder of samples, the tar that it writes here)."""
    tar = os.path.basename(os.path.abspath(folder)) + ".tar"
    return f"tar --sort=name -cf {shlex.quote(tar)} -C {shlex.quote(folder)} .", shlex.quote(tar)


def no_shards(folder):
    """A folder -> the message that it is no shard, what it holds, and how to make shards of it."""
    paths = list(islice(files_below(folder), MAX_FILES))
    kinds = Counter(os.path.splitext(path)[1][1:].lower() for path in paths)
    tars = [path for path in paths if path.endswith(".tar")]
    if tars:
        return f"{folder} is a folder: give its shards, {common_pattern(folder, tars)!r}"

    if not paths:
        return f"{folder} is an empty folder: give tar shards"

    contents = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5) if kind)
    among = f" among the first {MAX_FILES:,} files" if len(paths) == MAX_FILES else ""
    message = f"{folder} is a folder and holds no tar, but {contents or 'other files'}{among}: "
    if kinds.keys().isdisjoint(IMAGES | OTHER_IMAGES):
        return message + "give tar shards"

    pack, tar = pack_command(folder)
    if not kinds.keys().isdisjoint({"txt", "json"}):
        return message + (
            f"pack it, `{pack}`, and give {tar}; images without a caption are then left out, and "
            "counted"
        )

    if not kinds.keys().isdisjoint({"csv", "tsv"}):
        return message + "docs/data.md has the lines of Python that pack images listed in a table"
    if not kinds.keys().isdisjoint(OTHER_CAPTIONS):
        return message + f"rename the captions to KEY.txt, then pack it, `{pack}`"

    message += f"write a caption KEY.txt beside each KEY.jpg, then pack it, `{pack}`"
    places = {os.path.dirname(path) for path in paths}
    if len(places) == 1:
        return message
    return message + (
        f"; if the {len(places)} folders are classes: eval_data takes such a folder as it is "
        "(docs/evaluating.md)"
    )


def files_below(folder):
    """Yield the path of every file in a folder and the folders in it, but hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(place, name)


def common_pattern(folder, tars):
    """The pattern that matches the tars of that depth at which most of them lie."""
    depths = Counter(os.path.relpath(path, folder).count(os.sep) for path in tars)
    depth = depths.most_common(1)[0][0]
    return os.path.join(folder, *["*"] * depth, "*.tar")
