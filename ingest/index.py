"""Tar shards: what is in them, and how many usable samples each holds.

Shards are WebDataset tars as img2dataset writes them: 000012345.jpg, .txt, .json. A sample is the
neighbouring files of one key; it is usable with an image and a caption. Its id is its shard's
offset plus its position there: dense, 0..N-1, over any number of sources, with keys of any kind.
The index holds the counts of all shards. It is kept in a file, see `index_file`.

Counts come from that file, else from statistics beside the shards (sizes.json of webdataset and
open_clip, NNNNN_stats.json of img2dataset), else from reading the headers of the shards.

Shards may come from strangers: whatever is in one, reading it ends in samples, in bad samples that
are counted, or in OSError or tarfile.TarError. Nothing of it is ever run, or written to disk.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
import tarfile
import warnings
from collections import Counter
from functools import partial
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import ConfigError, or_exit
from ingest.images import IMAGES, BadSample, decode
from ingest.tar import MAX_TEXT_BYTES, captions, members, usable_samples
from ingest.urls import expand, is_local, open_url, shard_name, sibling, split_patterns

# Indexing stops at so many damaged shards: all the others are likely to be damaged too.
MAX_DAMAGED = 100

# A sizes.json of a million shards has 20 MB.
MAX_SIZES_BYTES = 64 << 20

THREADS = 8  # disks, commands and decoders work side by side


class Index(NamedTuple):
    """The shards of a set and how many samples each holds.

    shards: n URLs; counts: their usable samples, int64 (n,); kinds: a sample has a file of one of
    these extensions beside its image.
    """

    shards: list
    counts: np.ndarray
    kinds: tuple

    @property
    def fingerprint(self):
        """A hash of the counts in their order, which is what ids depend on."""
        return hashlib.sha256(np.asarray(self.counts, dtype="<i8").tobytes()).hexdigest()[:16]

    @property
    def num_samples(self):
        return int(self.counts.sum())


def load_index(
    patterns,
    caption_key="",
    evaluation=False,
    verify=False,
    path=None,
    count_remote=False,
    progress=lambda where: None,
):
    """Patterns of shards -> Index.

    Counts are read from the index_file of each pattern (or from `path`). What is missing there, or
    was counted for a shard of another size in bytes, is counted now, and written.

    caption_key: '' counts samples with KEY.txt, else those with KEY.json. evaluation: KEY.cls will
    do as well. verify: decode every sample and print the bad ones. count_remote: count remote
    shards without statistics by reading them through; evaluation sets, which are read whole
    anyway, are counted in any case. progress(where) is called as the work goes on.

    Samples that are left out, an image without caption or the reverse, are reported once. Raises
    ConfigError: shards that are missing, unreadable, damaged (up to ten are named) or without
    captions, remote ones without statistics, or no samples at all.
    """
    kinds = ("json",) if caption_key else ("txt",)
    if evaluation:
        kinds += ("cls",)
    kind = "|".join(kinds)  # under which the counts are kept

    counter = ShardCounter(kinds, caption_key, verify, count_remote or evaluation, progress)
    shards = []
    counts = []
    for pattern in split_patterns(patterns):
        urls = expand(pattern)
        file = os.path.abspath(path or index_file(urls[0], pattern, evaluation))
        known = read_index(file)
        names = [entry_name(url, file) for url in urls]
        forget_changed_shards(known, names, urls)

        todo = {}
        for name, url in zip(names, urls):
            if verify or kind not in known[name]:
                todo[name] = url
        if todo:
            try:
                for name, count in counter.count(pattern, todo):
                    known[name][kind] = count
            finally:
                # What was counted is kept, whatever ended the counting.
                if any(kind in known[name] for name in todo):
                    write_index(file, known)

        shards += urls
        counts += [known[name].get(kind, 0) for name in names]

    counter.show_left_out()
    counter.raise_damaged()
    if not sum(counts):
        raise ConfigError(f"{patterns}: no usable sample in {len(shards)} shards")
    return Index(shards, np.array(counts, dtype=np.int64), kinds)


# ---- the file of an index: {"shards": {name: {"size": bytes or null, kind: count}}} ----


def index_file(url, pattern, evaluation=False):
    """Where the index of a pattern is kept, of which `url` is the first shard -> path.

    Training shards in a folder where one may write: index.json beside the first shard, so that the
    set can be copied or shared with its index. Evaluation sets often belong to others: the cache,
    unless an index that we wrote is beside the shards. Read-only folders and remote shards: the
    cache, which is $FASTCLIP_CACHE, $XDG_CACHE_HOME/fastclip or ~/.cache/fastclip.
    """
    if not is_local(url):
        # The folder, so that {0..9} and {0..99} share their counts; of a command, the whole of it.
        is_command = url.startswith("pipe:")
        return cache_file(pattern if is_command else os.path.dirname(url))

    folder = os.path.dirname(os.path.abspath(url))
    beside = os.path.join(folder, "index.json")
    if evaluation:
        return beside if is_our_index(beside) else cache_file(folder)
    if os.path.exists(beside) or is_writable(folder):
        return beside
    return cache_file(folder)


def cache_file(source):
    """The cache's file for a folder or pattern. A hash tells those with similar names apart."""
    cache = os.environ.get("FASTCLIP_CACHE")
    if not cache:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        cache = os.path.join(caches, "fastclip")

    readable = re.sub(r"\W+", "-", source, flags=re.ASCII)[-200:]
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return os.path.join(cache, f"{readable}-{digest}.json")


def is_writable(folder):
    """Whether a folder is meant to be written; root may write anywhere, so its mode counts, too."""
    return os.access(folder, os.W_OK) and bool(os.stat(folder).st_mode & 0o222)


def is_our_index(file):
    """Whether a file is an index that ingest.index wrote. Other tools write index.json as well."""
    try:
        return bool(read_index(file))
    except ConfigError:
        return False


def read_index(file):
    """-> {name of a shard: {"size": bytes or None, kind: count}}; empty if there is no such file.

    Raises ConfigError if it is something else.
    """
    try:
        with open(file) as f:
            known = json.load(f)["shards"]
        for entry in known.values():
            for number in entry.values():
                if not isinstance(number, (int, type(None))):
                    raise ValueError("counts are numbers")
    except OSError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is not an index that ingest.index wrote: move it away"
        ) from error
    return known


def write_index(file, known):
    """Write an index atomically, so that nobody reads half of it. Warn if that is not possible."""
    temporary = f"{file}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(temporary, "w") as f:
            json.dump({"shards": known}, f, indent=1)
        os.replace(temporary, file)
        print(f"index written: {file}", file=sys.stderr)
    except OSError as error:
        warnings.warn(
            f"the index cannot be written and will be made again at the next start: {error}",
            stacklevel=2,
        )


def entry_name(url, file):
    """The name of a shard in an index; relative to it, so that both can be moved together."""
    if is_local(url):
        return os.path.relpath(url, os.path.dirname(file))
    return url


def forget_changed_shards(known, names, urls):
    """Make an empty entry for each shard that is new, or has another size than when counted."""
    for name, url in zip(names, urls):
        size = os.path.getsize(url) if is_local(url) else None
        if name not in known or known[name].get("size") != size:
            known[name] = {"size": size}


# ---- counting ----


class ShardCounter:
    """Counts shards with several threads, and remembers what was wrong with them.

    The options are those of load_index. `damaged`: messages about shards that cannot be used;
    `left_out`: Counter of the samples that are not usable, by reason.
    """

    def __init__(self, kinds, caption_key, verify, count_remote, progress):
        self.kinds = kinds
        self.caption_key = caption_key
        self.verify = verify
        self.count_remote = count_remote
        self.progress = progress
        self.damaged = []
        self.left_out = Counter()

    def count(self, pattern, todo):
        """Yield (name, count) for the shards of `todo`, {name: URL}, except for damaged ones.

        Raises ConfigError at the first remote shard that has no statistics and may not be read
        through.
        """
        urls = list(todo.values())
        with ThreadPool(THREADS) as pool:
            sizes = {} if self.verify else read_sizes(urls, self.kinds, pool, self.progress)
            results = pool.imap(partial(self.count_or_error, sizes=sizes), urls)
            results = tqdm(results, f"indexing {pattern}", len(todo), unit="shard")

            for (name, url), result in zip(todo.items(), results):
                self.progress(f"start-up, indexing {name}")
                if isinstance(result, ConfigError):
                    self.damaged.append(str(result))
                    if len(self.damaged) >= MAX_DAMAGED:
                        return
                    continue

                count, left_out = result
                if count is None:
                    raise ConfigError(no_statistics(pattern, url, self.caption_key))
                self.left_out.update(left_out)
                yield name, count

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

    def show_left_out(self):
        if not self.left_out:
            return
        parts = [f"{number:,} {reason}" for reason, number in self.left_out.most_common()]
        print("left out: " + ", ".join(parts), file=sys.stderr)

    def raise_damaged(self):
        if not self.damaged:
            return
        if len(self.damaged) == 1:
            raise ConfigError(self.damaged[0])

        lines = ["these shards cannot be used:", *self.damaged[:10]]
        if len(self.damaged) >= MAX_DAMAGED:
            lines.append(f"and {len(self.damaged) - 10} more, at least")
        elif len(self.damaged) > 10:
            lines.append(f"and {len(self.damaged) - 10} more")
        raise ConfigError("\n  ".join(lines))


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
    """A shard -> (how many usable samples it holds, Counter of those left out by reason).

    The count is that of the statistics beside the shard if they are plausible, otherwise from a
    walk through its headers; verify: from decoding every sample. sizes: the content of the
    folder's sizes.json. The count is None if the shard is remote, has no statistics and
    count_remote is false. Raises ConfigError if the shard cannot be used.
    """
    left_out = Counter()
    if not verify:
        count = count_in_statistics(url, kinds, sizes or {})
        if count:
            return count, left_out
        if not is_local(url) and not count_remote:
            return None, left_out

    count = 0
    bad = Counter()
    found = Counter()
    wanted = range(sys.maxsize if verify else 0)
    try:
        for key, files in usable_samples(url, kinds, wanted, left_out):
            count += 1
            if verify:
                reason = reason_against(files, caption_key)
                if reason:
                    bad[reason] += 1
                    tqdm.write(f"{url} {shown(key)}: {reason}")
        if not count:
            found.update(extension for *_, extension in members(url))
    except (OSError, tarfile.TarError) as error:
        size = f" ({os.path.getsize(url)} bytes)" if os.path.exists(url) else ""
        raise ConfigError(
            f"{url}{size} is unreadable or damaged after {count} samples: {error}; "
            "fetch it again, or leave it out"
        ) from error

    if verify:
        tqdm.write(f"{url}: {count} samples, bad: {dict(bad) or 'none'}")
    if found:
        raise ConfigError(no_usable_sample(url, kinds, found))
    return count, left_out


def reason_against(files, caption_key):
    """Decode a sample -> why it is bad, '' if it is good."""
    try:
        decode(files)
        if "cls" not in files:
            captions(files, caption_key)
    except BadSample as error:
        return str(error)
    return ""


def no_usable_sample(url, kinds, found):
    """The message about a shard without a usable sample. found: Counter of its extensions."""
    contents = [f"{number} {shown(extension)}" for extension, number in found.most_common(8)]
    message = (
        f"{url} has no usable sample: one needs an image ({', '.join(sorted(IMAGES))}) and, of the "
        f"same key, {' or '.join(kinds)}; it holds {', '.join(contents)}"
    )
    if "json" in found and "json" not in kinds:
        message += "; set caption_key if captions are in KEY.json"
    return message


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


# ---- command line ----


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m ingest.index", description="Count the usable samples of tar shards."
    )
    parser.add_argument(
        "patterns",
        nargs="+",
        help="'shards/{00000..00331}.tar', 'shards/*.tar', 's3://BUCKET/{00..99}.tar' or "
        "'pipe:CMD {00..99}.tar'",
    )
    parser.add_argument(
        "--caption_key", default="", help="captions are this entry of KEY.json, not KEY.txt"
    )
    parser.add_argument(
        "--evaluation", action="store_true", help="a sample may have KEY.cls instead of a caption"
    )
    parser.add_argument(
        "--verify", action="store_true", help="decode every sample and print the bad ones"
    )
    parser.add_argument("--out", help="write this file instead of index.json or the cache's")
    a = parser.parse_args(argv)

    index = load_index(a.patterns, a.caption_key, a.evaluation, a.verify, a.out, count_remote=True)
    print(f"{index.num_samples:,} samples in {len(index.shards):,} shards")


if __name__ == "__main__":
    or_exit(main, sys.argv[1:])
