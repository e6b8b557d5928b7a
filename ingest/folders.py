"""What is in a folder that was given in place of shards: the message that says what to do."""

import os
import shlex
from collections import Counter
from itertools import islice

from ingest.images import IMAGES, OTHER_IMAGES

MAX_FILES = 10_000  # so many are looked at: the folder may be large, and far away


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
    more = " and more" if len(paths) == MAX_FILES else ""
    message = f"{folder} is a folder and holds no tar, but {contents or 'other files'}{more}: "
    if kinds.keys().isdisjoint(IMAGES | OTHER_IMAGES):
        return message + "give tar shards"

    tar = shlex.quote(os.path.normpath(folder) + ".tar")
    pack = f"tar --sort=name -cf {tar} -C {shlex.quote(folder)} ."
    if not kinds.keys().isdisjoint({"txt", "json"}):
        return message + f"pack it, `{pack}`, and give {tar}"

    places = {os.path.dirname(path) for path in paths}
    if len(places) > 1:
        message += f"images in {len(places)} folders, as of classes, have no captions; "
    return message + (
        "write a caption KEY.txt beside each KEY.jpg (of an evaluation set, the number of its "
        f"class, KEY.cls), then pack it, `{pack}`"
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
