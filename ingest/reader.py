"""Samples by id, read forwards from shards."""

import tarfile
import time

import numpy as np

from ingest.tar import usable_samples

BACK_OFF = (1, 2, 4)  # seconds before an unreadable shard is tried again


class ShardError(RuntimeError):
    """A shard that could not be read. The message names it."""


class Reader:
    """Reads samples by id, forwards through one open shard; an id behind opens it anew. `stride`: between the ids to come."""

    def __init__(self, index, stride=1):
        self.index, self.stride, self.ends, self.shard = (
            index,
            stride,
            np.cumsum(index.counts),
            None,
        )

    def read(self, sample_id):
        """-> {extension: bytes}; empty if the shard ends, or breaks off, before it. ShardError, after retries, if it is unreadable."""
        shard = int(np.searchsorted(self.ends, sample_id, side="right"))
        url, count = self.index.shards[shard], int(self.index.counts[shard])
        position = sample_id - int(self.ends[shard]) + count
        for wait in (*BACK_OFF, None):
            try:
                if self.shard != shard or self.next > position:
                    wanted = range(position, count, self.stride)
                    self.shard, self.next, self.samples = (
                        shard,
                        0,
                        usable_samples(url, self.index.kinds, wanted),
                    )
                for _, files in self.samples:
                    self.next += 1
                    if self.next > position:
                        return files
                return {}
            except (OSError, tarfile.TarError) as error:
                reason = error
            if isinstance(reason, tarfile.TarError) and (
                wait is None or not url.startswith("pipe:")
            ):
                return {}  # a file that breaks off stays so; a command may fare better next time
            if wait is None:
                raise ShardError(
                    f"{url} cannot be read ({len(BACK_OFF) + 1} attempts): {type(reason).__name__}: {reason}"
                )
            self.shard = None
            time.sleep(wait)
