"""Samples by id, read forwards from shards."""

import tarfile
import time

import numpy as np

from config import BadRun
from ingest.tar import usable_samples
from ingest.urls import is_local

BACK_OFF = (1, 2, 4)  # seconds before an unreadable shard is tried again


class ShardError(BadRun):
    """A shard that could not be read. The message names it."""


class Reader:
    """Reads samples by id, forwards through one open shard. An id behind opens the shard anew.

    index: an Index. stride: the distance between the ids that will be asked for; the samples
    between them are not read.
    """

    def __init__(self, index, stride=1):
        self.index = index
        self.stride = stride
        self.ends = np.cumsum(index.counts)  # the first id after each shard

        # The open shard, its samples, and the position of the next one of them.
        self.shard = None
        self.samples = None
        self.next_position = 0

    def read(self, sample_id):
        """An id -> {extension: bytes}; empty if the shard ends, or breaks off, before the sample.

        Raises ShardError if the shard is unreadable and remains so after the retries.
        """
        shard = int(np.searchsorted(self.ends, sample_id, side="right"))
        url = self.index.shards[shard]
        first_id = int(self.ends[shard] - self.index.counts[shard])
        position = sample_id - first_id

        for wait in (*BACK_OFF, None):
            is_last_attempt = wait is None
            try:
                return self.read_position(shard, position)
            except tarfile.TarError:
                # A file that breaks off stays so; a command may do better next time.
                if is_local(url) or is_last_attempt:
                    return {}
            except OSError as error:
                if is_last_attempt:
                    raise ShardError(
                        f"{url} cannot be read ({len(BACK_OFF) + 1} attempts): "
                        f"{type(error).__name__}: {error}"
                    ) from error

            self.shard = None
            time.sleep(wait)

    def read_position(self, shard, position):
        """The sample at a position of a shard -> {extension: bytes}; empty behind its end."""
        if self.shard != shard or self.next_position > position:
            self.open_shard(shard, position)

        for _, files in self.samples:
            self.next_position += 1
            if self.next_position > position:
                return files
        return {}

    def open_shard(self, shard, position):
        """Begin to read a shard, of which nothing before `position` is wanted."""
        url = self.index.shards[shard]
        count = int(self.index.counts[shard])
        wanted = range(position, count, self.stride)
        self.samples = usable_samples(url, self.index.kinds, wanted)
        self.shard = shard
        self.next_position = 0
