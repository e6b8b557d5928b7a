"""Tar shards: what is in them, and how many usable samples each holds.

Shards are WebDataset tars as img2dataset writes them: 000012345.jpg, .txt, .json. A sample is the
neighbouring files of one key; it is usable with an image and a caption. Its id is its shard's
offset plus its position there: dense, 0..N-1, over any number of sources, with keys of any kind.
The index holds the counts of all shards. It is kept in a file, see `index_file`.

Counts come from that file, else from ingest/counting.py: from statistics beside the shards, or
from reading their headers.
"""

import argparse
import hashlib
import json
import os
import re
import reprlib
import sys
import tarfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import numpy as np

from config import Config, ConfigError, nearest, or_exit
from ingest.counting import ShardCounter, shown
from ingest.images import BadSample
from ingest.left_out import check_share, summary
from ingest.tar import captions, may_be_captions, usable_samples
from ingest.urls import expand, is_local, split_patterns

SAVE_SECONDS = 30  # between two drafts of the counts: what a kill may cost

# Among so many samples, one at least must have the caption key.
NUM_LOOKED_AT = 20

# Captions of so many lines, in the median, are likely to be several captions.
MANY_LINES = 3


class Index(NamedTuple):
    """The shards of a set and how many samples each holds.

    shards: n URLs; counts: their usable samples, int64 (n,); kinds: a sample has a file of one of
    these extensions beside its image; left_out: Counter of what looks like a sample and
    is not usable, see ingest/left_out.py.
    """

    shards: list
    counts: np.ndarray
    kinds: tuple
    left_out: Counter = Counter()

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
    allow_left_out=Config.allow_left_out,
    progress=lambda where: None,
):
    """Patterns of shards -> Index.

    Counts are read from the index_file of each pattern (or from `path`). What is missing there, or
    was counted for a shard of another size in bytes, is counted now. The file is written when the
    whole set is accepted; until then, and if it is refused, the counts are kept in the cache.

    caption_key: '' counts samples with KEY.txt, else those with KEY.json. evaluation: KEY.cls will
    do as well. verify: decode every sample and print the bad ones. count_remote: count remote
    shards without statistics by reading them through; evaluation sets, which are read whole
    anyway, are counted in any case. allow_left_out: the share of what looks like samples (see
    ingest/left_out.py) that may be unusable.
    progress(where) is called as the work goes on.

    Raises ConfigError: shards that are missing, unreadable, damaged (up to ten are named), without
    captions or in an order in which samples cannot be read; remote ones without statistics; a
    caption_key that no sample has; too many samples left out or, with verify, bad; none at all.
    """
    kinds = ("json",) if caption_key else ("txt",)
    if evaluation:
        kinds += ("cls",)

    # All patterns are looked at before the first is counted, which may take long.
    sources = []
    for pattern in split_patterns(patterns):
        urls = expand(pattern)
        if caption_key:
            check_caption_key(urls[0], kinds, caption_key)
        place = path or index_file(urls[0], pattern, evaluation)
        sources.append((pattern, urls, os.path.abspath(place)))
    files = {place: IndexFile(place) for _, _, place in sources}
    if evaluation and not path:
        for _, urls, place in sources:
            files[place].use_index_beside(urls[0])

    counter = ShardCounter(kinds, caption_key, verify, count_remote or evaluation, progress)
    try:
        parts = [files[place].count(counter, pattern, urls) for pattern, urls, place in sources]
        counter.check()
        index = joined(parts, kinds)
        named = ", ".join(split_patterns(patterns))
        check_share(named, index, allow_left_out)
    except BaseException:
        # What was counted is kept, whatever ended the counting.
        for file in files.values():
            file.save_draft()
        raise

    for file in files.values():
        file.accept()
    if index.left_out:
        print(f"left out of {named}: {summary(index.left_out)}", file=sys.stderr)
    return index


def joined(parts, kinds):
    """Indexes -> one Index of all their shards."""
    shards = []
    counts = []
    left_out = Counter()
    for part in parts:
        shards += part.shards
        counts += part.counts.tolist()
        left_out.update(part.left_out)
    return Index(shards, np.array(counts, dtype=np.int64), kinds, left_out)


def check_caption_key(url, kinds, caption_key):
    """ConfigError if none of a shard's first samples has text in this entry of its KEY.json.

    A set whose samples have classes does not need captions. A shard that cannot be read is passed
    over: that is found elsewhere.
    """
    samples = first_samples(url, kinds)
    keys = Counter()
    text_keys = Counter()
    no_text = None
    for files in samples:
        entries = json_entries(files)
        texts = {key for key, value in entries.items() if may_be_captions(value)}
        if caption_key in texts or "cls" in files:
            return
        if caption_key in entries:
            no_text = entries[caption_key]
        keys.update(entries.keys())
        text_keys.update(key for key in entries if key in texts and entries[key])
    if not keys:
        return

    # A stranger's file may have many keys.
    similar = [key for key, _ in keys.most_common(50)]
    where = f"eval_data, {url}" if "cls" in kinds else url
    if caption_key in keys:
        raise ConfigError(
            f"{where}: the entry {caption_key!r} of KEY.json, the caption_key, is no text but "
            f"{shown(reprlib.repr(no_text))}; entries with text: {frequent(text_keys)}"
        )
    raise ConfigError(
        f"{where}: none of the first {len(samples)} samples has the caption_key {caption_key!r} in "
        f"its KEY.json; they have {frequent(keys)}{nearest(caption_key, similar)}"
    )


def first_samples(url, kinds):
    """A shard's first samples, without their images -> list of {extension: bytes}.

    Empty if the shard cannot be read.
    """
    texts = []
    try:
        samples = usable_samples(url, kinds, range(NUM_LOOKED_AT))
        for _, files in islice(samples, NUM_LOOKED_AT):
            texts.append({kind: files[kind] for kind in kinds if kind in files})
    except (OSError, tarfile.TarError):
        return []
    return texts


def frequent(keys):
    """Counter of keys -> the ten most frequent, to be printed."""
    return ", ".join(shown(key) for key, _ in keys.most_common(10)) or "none"


def note_caption_lines(index):
    """Print a line if KEY.txt of training data has many lines, of which each may be a caption.

    To be called if config.caption_lines is false, which makes one caption of the whole text.
    """
    numbers = []
    for files in first_samples(index.shards[0], index.kinds):
        with suppress(BadSample):
            numbers.append(len(captions(files, "", lines=True)))
    if numbers and np.median(numbers) >= MANY_LINES:
        print(
            f"captions have about {np.median(numbers):g} lines: caption_lines = True draws one of "
            "them for each use; otherwise all of the text is one caption",
            file=sys.stderr,
        )


def json_entries(files):
    """KEY.json among the files of a sample -> a dict; empty if it is not readable, or no dict."""
    try:
        entries = json.loads(files["json"])
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def warn_of_shared_shards(train, shards):
    """Warn, once, if some of these shards, of evaluation sets, are in the index of the training."""
    trained = {real_path(url) for url in train.shards}
    shared = [url for url in shards if real_path(url) in trained]
    if shared:
        print(
            f"warning: {len(shared)} of the {len(shards)} shards in eval_data are in train_data, "
            f"too, for example {shared[0]}: the evaluation is of samples that the model was "
            "trained on",
            file=sys.stderr,
        )


def warn_of_repeated_shards(train):
    """Warn, once, if shards are in the training data several times: an epoch sees them so often."""
    count = Counter(real_path(url) for url in train.shards)
    repeated = [path for path, times in count.items() if times > 1]
    if repeated:
        print(
            f"warning: {len(repeated)} shards are in train_data more than once, for example "
            f"{repeated[0]}: an epoch sees their samples as often, and each may be its own "
            "negative",
            file=sys.stderr,
        )


def real_path(url):
    return os.path.realpath(url) if is_local(url) else url


# ---- the file of an index ----


class IndexFile:
    """The counts of shards, and the file that keeps them.

    The file: {"shards": {name: entry}}. An entry has the "size" of the shard in bytes (None of a
    remote one) and, for each kind of sample ("txt", "json", "txt|cls"), the count under that kind
    and, if there were any, the numbers of those left out under "KIND left out".

    Counts that are not yet accepted are kept in a draft in the cache: nothing is written beside
    shards that may turn out to be of no use.
    """

    def __init__(self, path):
        """Raises ConfigError if the file is something else."""
        self.path = path
        self.draft = cache_file(f"draft of {path}")
        self.known = read_index(path)
        unfinished = read_index(self.draft)
        self.has_news = bool(unfinished)  # something that is not in the file
        if unfinished:
            self.known = unfinished
        self.saved_at = time.monotonic()

    def use_index_beside(self, url):
        """Take the counts that are not known here from an index of ours beside a shard, if any."""
        beside = index_beside(url)
        if not is_local(url) or not is_our_index(beside):
            return
        for name, entry in read_index(beside).items():
            path = os.path.join(os.path.dirname(beside), name)
            self.known.setdefault(self.name_of(path), entry)

    def count(self, counter, pattern, urls):
        """Count those shards of a pattern that are not known -> Index.

        The counts of damaged ones, which the counter has noted, are 0.
        """
        kind = "|".join(counter.kinds)
        names = [self.name_of(url) for url in urls]
        self.forget_changed_shards(names, urls)

        todo = {}
        for name, url in zip(names, urls):
            if counter.verify or kind not in self.known[name]:
                todo[name] = url
        if todo:
            for name, result in counter.count(pattern, todo):
                self.keep(name, kind, result)

        counts = [self.known[name].get(kind, 0) for name in names]
        left_out = Counter()
        for name in names:
            left_out.update(self.known[name].get(f"{kind} left out", {}))
        return Index(urls, np.array(counts, dtype=np.int64), counter.kinds, left_out)

    def name_of(self, url):
        """The name of a shard in the file; relative to it, so that both can be moved together."""
        if is_local(url):
            return os.path.relpath(url, os.path.dirname(self.path))
        return url

    def forget_changed_shards(self, names, urls):
        """Make an empty entry for each shard that is new or of another size than when counted."""
        for name, url in zip(names, urls):
            size = os.path.getsize(url) if is_local(url) else None
            if name not in self.known or self.known[name].get("size") != size:
                self.known[name] = {"size": size}

    def keep(self, name, kind, result):
        """Keep the ShardCount of a shard, now and then also on the disk."""
        self.known[name][kind] = result.count
        self.known[name].pop(f"{kind} left out", None)
        if result.left_out:
            self.known[name][f"{kind} left out"] = dict(result.left_out)

        self.has_news = True
        if time.monotonic() - self.saved_at >= SAVE_SECONDS:
            self.save_draft()

    def save_draft(self):
        """Keep in the cache what is not in the file. A disk that refuses costs only time."""
        if self.has_news:
            with suppress(OSError):
                write_index(self.draft, self.known)
        self.saved_at = time.monotonic()

    def accept(self):
        """Write the file, if there is something new. Warn if that is not possible."""
        if not self.has_news:
            return
        try:
            write_index(self.path, self.known)
        except OSError as error:
            warnings.warn(
                f"the index cannot be written and will be made again at the next start: {error}",
                stacklevel=3,
            )
            return

        print(f"index written: {self.path}", file=sys.stderr)
        with suppress(OSError):
            os.remove(self.draft)


def index_file(url, pattern, evaluation=False):
    """Where the index of a pattern is kept, of which `url` is the first shard -> path.

    Training shards in a folder where one may write: index.json beside the first shard, so that the
    set can be copied or shared with its index. Evaluation sets often belong to others: the cache;
    an index that we wrote beside the shards is read only. Read-only folders and remote shards: the
    cache, which is $FASTCLIP_CACHE, $XDG_CACHE_HOME/fastclip or ~/.cache/fastclip.
    """
    if not is_local(url):
        # The folder, so that {0..9} and {0..99} share their counts; of a command, the whole of it.
        is_command = url.startswith("pipe:")
        return cache_file(pattern if is_command else os.path.dirname(url))

    beside = index_beside(url)
    folder = os.path.dirname(beside)
    if evaluation:
        return cache_file(folder)
    if os.path.exists(beside) or is_writable(folder):
        return beside
    return cache_file(folder)


def index_beside(url):
    return os.path.join(os.path.dirname(os.path.abspath(url)), "index.json")


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
    """-> {name of a shard: its entry}, see IndexFile; empty if there is no such file.

    Raises ConfigError if it is something else.
    """
    try:
        with open(file) as f:
            known = json.load(f)["shards"]
        for entry in known.values():
            check_entry(entry)
    except OSError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is not an index that ingest.index wrote: move it away"
        ) from error
    return known


def check_entry(entry):
    """Raise ValueError or AttributeError if this is no entry of an index."""
    for key, value in entry.items():
        numbers = value.values() if key.endswith(" left out") else [value]
        if not all(isinstance(number, (int, type(None))) for number in numbers):
            raise ValueError("counts are numbers")


def write_index(file, known):
    """Write an index atomically, so that nobody reads half of it. Raises OSError."""
    temporary = f"{file}.{os.getpid()}"
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(temporary, "w") as f:
        json.dump({"shards": known}, f, indent=1)
    os.replace(temporary, file)


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
    parser.add_argument(
        "--allow_left_out",
        type=float,
        default=Config.allow_left_out,
        metavar="SHARE",
        help="accept a set of which this share of what looks like samples is not usable",
    )
    parser.add_argument("--out", help="write this file instead of index.json or the cache's")
    a = parser.parse_args(argv)

    index = load_index(
        a.patterns,
        a.caption_key,
        a.evaluation,
        a.verify,
        a.out,
        count_remote=True,
        allow_left_out=a.allow_left_out,
    )
    print(f"{index.num_samples:,} samples in {len(index.shards):,} shards")


if __name__ == "__main__":
    or_exit(main, sys.argv[1:])
