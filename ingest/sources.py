"""Where the samples of an evaluation set lie: in tar shards, or in image files of their own.

Both kinds of source have num_samples, left_out (Counter, what looks like a sample and is none),
shards (URLs, maybe none), border (pixels to cut from each side of an image), description (a few
words) and reader(), an object whose read(position) returns a RawSample.
"""

import os
from collections import Counter
from typing import NamedTuple

from ingest.folders import amount
from ingest.images import BadSample
from ingest.reader import Reader, ShardError
from ingest.tar import MAX_IMAGE_BYTES, captions

MAX_CLASS_BYTES = 9  # of KEY.cls: longer numbers are not of classes


class BadClass(BadSample):
    """KEY.cls is not the number of a class."""


class RawSample(NamedTuple):
    """A sample before its image is decoded.

    files       {extension: bytes}, the image among them
    captions    list of str, empty if there are none
    label       the number of its class, int, or None
    """

    files: dict
    captions: list
    label: int | None


# ---- tar shards ----


class TarSamples:
    """The samples of tar shards: KEY.jpg (png, webp), and KEY.cls, KEY.txt or KEY.json."""

    border = 0

    def __init__(self, index, caption_key):
        """index: ingest.index.Index. caption_key: as in load_index."""
        self.index = index
        self.caption_key = caption_key
        self.num_samples = index.num_samples
        self.left_out = index.left_out
        self.shards = index.shards
        self.description = amount(len(index.shards), "tar shard")

    def reader(self, stride=1):
        """-> a reader of samples at rising positions, `stride` apart."""
        return TarReader(Reader(self.index, stride), self.caption_key)


class TarReader:
    """Reads TarSamples forwards."""

    def __init__(self, reader, caption_key):
        self.reader = reader
        self.caption_key = caption_key

    def read(self, position):
        """-> RawSample. Raises ShardError, and BadClass for a class that is not a number."""
        files = self.reader.read(position)
        label = class_number(files)
        try:
            texts = captions(files, self.caption_key, lines=True)
        except BadSample:
            texts = []
        return RawSample(files, texts, label)


def class_number(files):
    """{extension: bytes} -> int, None if there is no KEY.cls. BadClass if it is not a number."""
    label = files.get("cls")
    if label is None:
        return None
    if not label.strip().isdigit() or len(label) > MAX_CLASS_BYTES:
        raise BadClass("class is not a number")
    return int(label)


# ---- image files ----


class ImageFiles:
    """Samples whose images are files, with classes, captions, or both. It is its own reader."""

    def __init__(self, root, paths, description, labels=None, texts=None, left_out=(), border=0):
        """root: a folder. paths: of n images in it, relative. description: a few words.

        labels: n ints, or None. texts: n lists of str, or None. left_out: {"EXTENSION REASON":
        number}. border: pixels to cut from each side.
        """
        self.root = root
        self.paths = paths
        self.description = description
        self.labels = labels
        self.texts = texts
        self.left_out = Counter(left_out)
        self.border = border
        self.shards = []
        self.num_samples = len(paths)

    def reader(self, stride=1):
        return self

    def read(self, position):
        """-> RawSample. Raises BadSample if there is no such file, or it may not be read.

        Raises ShardError if the disk fails. A file that is too large is read as None, as in a tar.
        """
        path = os.path.join(self.root, self.paths[position])
        content = read_plain_file(path)
        extension = os.path.splitext(path)[1][1:].lower()
        return RawSample(
            files={extension: content},
            captions=self.texts[position] if self.texts else [],
            label=self.labels[position] if self.labels else None,
        )


def read_plain_file(path):
    """A file's bytes, or None if it is larger than an image may be. Raises as ImageFiles.read."""
    try:
        if not os.path.isfile(path):
            # A pipe of this name would never end.
            raise BadSample("no such file")
        with open(path, "rb") as f:
            content = f.read(MAX_IMAGE_BYTES + 1)
    except PermissionError as error:
        raise BadSample("file may not be read") from error
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror or error}") from error
    return content if len(content) <= MAX_IMAGE_BYTES else None
