"""How many usable samples a shard holds: from statistics beside it, or from reading its headers.

Statistics are sizes.json of webdataset and open_clip, and NNNNN_stats.json of img2dataset.

Shards may come from strangers: whatever is in one, reading it ends in samples, in bad samples that
are counted, or in OSError or tarfile.TarError. Nothing of it is ever run, or written to disk.
"""

import json
import os
import re
import shlex
import sys
import tarfile
from collections import Counter
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

from tqdm import tqdm

from config import MAX_BAD, ConfigError
from ingest.folders import pack_command
from ingest.images import IMAGES, BadSample, decode
from ingest.left_out import LeftOut, check_order, with_remedies
from ingest.tar import MAX_TEXT_BYTES, captions, members, usable_samples
from ingest.urls import is_local, open_url, shard_name, sibling

# Counting stops at so many damaged shards: all the others are likely to be damaged too.
MAX_DAMAGED = 100

# A sizes.json of a million shards has 20 MB.
MAX_SIZES_BYTES = 64 << 20

# How files begin that hold a tar, or could, and are none.
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
    b"PK\x03\x04": "zip",
}

# How pictures begin; WebP has its size in between.
PICTURES = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", re.DOTALL)

# Names of files that list images instead of holding them.
TABLES = (".csv", ".tsv", ".parquet", ".json", ".jsonl")

THREADS = 8  # disks, commands and decoders work side by side


class ShardCount(NamedTuple):
    """What is in a shard.

    count: its usable samples; None if it was not read because it is remote. left_out: Counter of
    what looks like a sample and is none, as LeftOut.counts. bad: Counter of the samples that cannot
    be decoded, by reason; empty unless they were verified.
    """

    count: int | None
    left_out: Counter
    bad: Counter


class ShardCounter:
    """Counts shards with several threads, and remembers what was wrong with them.

    The options are those of load_index. `damaged`: messages about shards that cannot be used;
    `bad`: Counter of the samples that cannot be decoded, by reason, out of `num_verified`.
    """

    def __init__(self, kinds, caption_key, verify, count_remote, progress):
        self.kinds = kinds
        self.caption_key = caption_key
        self.verify = verify
        self.count_remote = count_remote
        self.progress = progress
        self.damaged = []
        self.bad = Counter()
        self.num_verified = 0

    def count(self, pattern, todo):
        """Yield (name, ShardCount) for the shards of `todo`, {name: URL}, except for damaged ones.

        Raises ConfigError at the first remote shard that has no statistics and may not be read
        through.
        """
        urls = list(todo.values())
        with ThreadPool(THREADS) as pool:
            sizes = {} if self.verify else read_sizes(urls, self.kinds, pool, self.progress)
            results = pool.imap(partial(self.count_or_error, sizes=sizes), urls)
            # A log file gets a line now and then, a terminal a bar that moves.
            seconds = 0.1 if sys.stderr.isatty() else 10
            results = tqdm(
                results, f"indexing {pattern}", len(todo), unit="shard", mininterval=seconds
            )

            for (name, url), result in zip(todo.items(), results):
                self.progress(f"start-up, indexing {name}")
                if isinstance(result, ConfigError):
                    self.damaged.append(str(result))
                    if len(self.damaged) >= MAX_DAMAGED:
                        return
                    continue

                if result.count is None:
                    raise ConfigError(no_statistics(pattern, url, self.caption_key))
                self.bad.update(result.bad)
                self.num_verified += result.count
                yield name, result

    def count_or_error(self, url, sizes):
        """What count_samples returns, or the ConfigError that it raises."""
        try:
            return count_samples(
                url,
                kinds=self.kinds,
                verify=self.verify,
                caption_key=self.caption_key,
                count_remote=self.count_remote,
                sizes=sizes.get(sibling(url, "sizes.json")),
            )
        except ConfigError as error:
            return error

    def check(self):
        """ConfigError if shards are damaged, or if too many samples cannot be decoded."""
        if len(self.damaged) == 1:
            raise ConfigError(self.damaged[0])
        if self.damaged:
            lines = ["these shards cannot be used:", *self.damaged[:10]]
            if len(self.damaged) >= MAX_DAMAGED:
                lines.append(f"and {len(self.damaged) - 10} more, at least")
            elif len(self.damaged) > 10:
                lines.append(f"and {len(self.damaged) - 10} more")
            raise ConfigError("\n  ".join(lines))

        num_bad = self.bad.total()
        if num_bad > MAX_BAD * self.num_verified:
            raise ConfigError(
                f"{num_bad:,} of {self.num_verified:,} samples cannot be used: {dict(self.bad)}; "
                f"a run ends when more than {MAX_BAD:.0%} cannot: mend them, or take them out of "
                "the shards"
            )


def no_statistics(pattern, url, caption_key):
    """The message about a remote set that would have to be read through before training."""
    command = f"python -m ingest.index {shlex.quote(pattern)}"
    if caption_key:
        command += f" --caption_key {shlex.quote(caption_key)}"

    looked_for = "no file name in it ends with .tar, beside which to look for them"
    if shard_name(url):
        looked_for = (
            f"{sibling(url, 'sizes.json')} (shard name: count, as open_clip's) and "
            f"{sibling(url, '{stem}_stats.json')} (img2dataset's) are missing, cannot be read or "
            "cannot be true"
        )
    return (
        f"{url} is remote and has no statistics: {looked_for}. To count the samples, the whole set "
        f"must be read once: do it now with `{command}`, which keeps the counts in the cache, or "
        "set index_remote = True to do it when the training starts. train_samples cannot replace "
        "the counts: a sample's id is its shard's offset plus its position there, so the count of "
        "each shard is needed"
    )


def count_samples(url, kinds, verify, caption_key, count_remote=True, sizes=None):
    """A shard -> ShardCount.

    The count is that of the statistics beside the shard if they are plausible, otherwise from a
    walk through its headers; verify: from decoding every sample. sizes: the content of the
    folder's sizes.json. The count is None if the shard is remote, has no statistics and
    count_remote is false. Raises ConfigError if the shard cannot be used.
    """
    left_out = LeftOut(kinds)
    bad = Counter()
    if not verify:
        count = count_in_statistics(url, kinds, sizes or {})
        if count:
            return ShardCount(count, left_out.counts, bad)
        if not is_local(url) and not count_remote:
            return ShardCount(None, left_out.counts, bad)

    count = 0
    found = Counter()
    wanted = range(sys.maxsize if verify else 0)
    try:
        for key, files in usable_samples(url, kinds, wanted, left_out):
            count += 1
            if verify:
                reason = reason_against(files, caption_key)
                if reason:
                    bad[reason] += 1
                    say(f"{url} {shown(key)}: {reason}")
        if not count:
            found.update(extension.rpartition(".")[2] for *_, extension in members(url))
    except (OSError, tarfile.TarError) as error:
        size = f" ({os.path.getsize(url)} bytes)" if os.path.exists(url) else ""
        raise ConfigError(
            f"{url}{size} is unreadable or damaged after {count} samples: {error}; "
            f"{remedy_for(url)}"
        ) from error

    if verify:
        num_left_out = left_out.counts.total()
        say(f"{url}: {count} samples, left out: {num_left_out}, bad: {dict(bad) or 'none'}")
    check_order(url, left_out)
    if found:
        raise ConfigError(no_usable_sample(url, left_out, found))
    return ShardCount(count, left_out.counts, bad)


def say(line):
    """Print a line while the bar of `count` may be shown.

    On a terminal tqdm moves the bar out of the way. Into a file it would repeat the bar each time.
    """
    if sys.stderr.isatty():
        tqdm.write(line)
    else:
        print(f"{line}\n", end="", flush=True)  # one write, as several threads may print


def reason_against(files, caption_key):
    """Decode a sample -> why it is bad, '' if it is good."""
    try:
        decode(files)
        if "cls" not in files:
            captions(files, caption_key)
    except BadSample as error:
        return str(error)
    return ""


def remedy_for(url):
    """What to do about a shard that cannot be read."""
    start = b""
    if is_local(url):
        with suppress(OSError), open(url, "rb") as f:
            start = f.read(12)
    if url.lower().endswith(TABLES):
        return (
            "it is a table: img2dataset makes shards out of one with URLs and captions "
            "(docs/data.md, also for one with file names)"
        )
    if PICTURES.match(start):
        command, tar = pack_command(os.path.dirname(url) or ".")
        return f"it is a picture: pack its folder, `{command}`, and give {tar}"
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            return f"it is compressed ({program}), and a shard is a plain tar: unpack it"
    return "fetch it again, or leave it out"


def no_usable_sample(url, left_out, found):
    """The message about a shard without a usable sample.

    left_out: the LeftOut that has looked at it. found: Counter of the extensions in it.
    """
    contents = [f"{number} {shown(extension)}" for extension, number in found.most_common(8)]
    texts = [f"KEY.{kind}" for kind in sorted(left_out.kinds)]
    lines = [
        f"{url} has no usable sample: one is an image, KEY.jpg ({', '.join(sorted(IMAGES))}), and "
        f"{' or '.join(texts)}; it holds {', '.join(contents)}",
        *with_remedies(left_out.counts),
    ]
    return "; ".join(lines)


def shown(name):
    """A name out of a tar, fit to be printed: as it is, it could move a terminal's cursor."""
    return (name if name.isprintable() else ascii(name))[:200]


# ---- statistics beside the shards ----


def read_json(url, limit):
    """A small JSON file beside a shard -> its content; None if it is missing or no JSON."""
    if not url:
        return None
    try:
        with open_url(url, quiet=True) as f:
            return json.loads(f.read(limit))
    except (OSError, ValueError, RecursionError, tarfile.TarError):
        return None


def read_sizes(urls, kinds, pool, progress):
    """The files sizes.json in the folders of shards -> {URL of the file: {shard name: count}}.

    Of a remote folder, the first shard must begin with a usable sample. To open every remote shard
    for this check would take hours for a large set.
    """
    first_shards = {}
    for url in urls:
        first_shards.setdefault(sibling(url, "sizes.json"), url)

    def read(item):
        sizes_url, first_shard = item
        sizes = read_json(sizes_url, MAX_SIZES_BYTES)
        if not isinstance(sizes, dict):
            return {}
        if not is_local(first_shard) and not begins_with_sample(first_shard, kinds):
            return {}
        return sizes

    results = {}
    for sizes_url, sizes in zip(first_shards, pool.imap(read, first_shards.items())):
        progress(f"start-up, looking for {sizes_url}")
        results[sizes_url] = sizes
    return results


def count_in_statistics(url, kinds, sizes):
    """The count of a shard in sizes.json or in img2dataset's statistics; 0 if there is none.

    A count is believed if it is plausible, and if the shard begins with a usable sample (of remote
    shards in sizes.json, read_sizes has checked the first).
    """
    count = sizes.get(shard_name(url))
    if is_plausible(url, count):
        if not is_local(url) or begins_with_sample(url, kinds):
            return count

    statistics = read_json(sibling(url, "{stem}_stats.json"), MAX_TEXT_BYTES)
    if isinstance(statistics, dict):
        count = statistics.get("successes")
        if is_plausible(url, count) and begins_with_sample(url, kinds):
            return count
    return 0


def is_plausible(url, count):
    """Whether a shard can hold so many samples and, if it is a file, is complete."""
    if not isinstance(count, int) or isinstance(count, bool):
        return False
    if not is_local(url):
        return 0 < count < 1 << 31

    try:
        # A sample has two headers of 512 bytes at least.
        if not 0 < count < os.path.getsize(url) // 1024:
            return False
        # A tar ends with two empty blocks; one that is cut short does not.
        with open(url, "rb") as f:
            f.seek(-1024, os.SEEK_END)
            return not any(f.read())
    except OSError:
        return False


def begins_with_sample(url, kinds):
    """Whether a shard can be opened and its first sample is found."""
    try:
        return next(usable_samples(url, kinds, range(0)), None) is not None
    except (OSError, tarfile.TarError):
        return False
