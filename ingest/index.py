"""Tar shards: what is in them, how many usable samples each holds, and reading them forwards.

Shards are WebDataset tars as img2dataset writes them: 000012345.jpg, .txt, .json. A sample is the neighbouring files of one
key; it is usable with an image and a caption. Its id is its shard's offset plus its position there: dense, 0..N-1, over any
number of sources, with keys of any kind. The index, the counts of all shards, is kept in index.json beside them.

Shards may come from strangers: whatever is in one, reading it ends in samples, in bad samples that are counted, or in OSError or
tarfile.TarError. Nothing of it is ever run, or written to disk.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tarfile
import warnings
from collections import Counter
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import ConfigError, or_exit
from ingest.images import IMAGES, BadSample, decode
from ingest.tar import MAX_TEXT_BYTES, captions, members, usable_samples
from ingest.urls import expand, open_url

MAX_DAMAGED = 100  # shards; indexing stops there, as all the others are likely to be damaged too


class Index(NamedTuple):
    """shards: n urls; counts: their usable samples, int64 [n]; kinds: a sample has one of these extensions beside its image."""

    shards: list
    counts: np.ndarray
    kinds: tuple

    @property
    def fingerprint(self):
        """Of the counts, in their order: what ids depend on."""
        return hashlib.sha256(np.asarray(self.counts, dtype="<i8").tobytes()).hexdigest()[:16]

    @property
    def num_samples(self):
        return int(self.counts.sum())


def index_file(pattern, url):
    """index.json beside the first shard; for pipe:, and in a folder where one may not write, a file in ~/.cache/fastclip."""
    folder, is_pipe = os.path.dirname(os.path.abspath(url)), pattern.startswith("pipe:")
    beside = os.path.join(folder, "index.json")
    writable = (
        not is_pipe and os.access(folder, os.W_OK) and os.stat(folder).st_mode & 0o222
    )  # root may write anywhere
    if writable or not is_pipe and os.path.exists(beside):
        return beside
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return os.path.join(
        cache, "fastclip", re.sub(r"\W+", "-", pattern if is_pipe else folder)[-200:] + ".json"
    )


def load_index(
    patterns, caption_key="", evaluation=False, verify=False, path=None, progress=lambda where: None
):
    """Patterns of shards -> Index. Counts are read from each pattern's index_file (or `path`); what is missing there, or was made for
    a shard of another size in bytes, is counted, with progress, and written. caption_key: '' counts samples with KEY.txt, else with
    KEY.json; evaluation: KEY.cls will do as well; verify: decodes all and prints what is bad. What is left out, an image without
    caption or the reverse, is said once. Raises ConfigError: missing, unreadable or damaged shards (up to ten are named), one without
    captions, no samples at all. progress(where) is told of progress."""
    kinds = ("json" if caption_key else "txt", *(["cls"] if evaluation else []))
    kind, shards, counts, damaged, left_out = "|".join(kinds), [], [], [], Counter()

    def counted(url):
        try:
            return count_samples(url, kinds=kinds, verify=verify, caption_key=caption_key)
        except ConfigError as error:
            return error

    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        urls, is_pipe = expand(pattern), pattern.startswith("pipe:")
        file = os.path.abspath(path or index_file(pattern, urls[0]))
        try:
            with open(file) as f:
                known = json.load(f)["shards"]  # {name: {"size": bytes, kind: count}}
            if not all(
                isinstance(n, (int, type(None))) for entry in known.values() for n in entry.values()
            ):
                raise ValueError("counts are numbers")
        except OSError:
            known = {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{file} is not an index that ingest.index wrote: move it away"
            ) from error
        names = [url if is_pipe else os.path.relpath(url, os.path.dirname(file)) for url in urls]
        for name, url in zip(names, urls):
            size = None if is_pipe else os.path.getsize(url)
            if known.setdefault(name, {"size": size})["size"] != size:
                known[name] = {"size": size}
        todo = {name: url for name, url in zip(names, urls) if verify or kind not in known[name]}
        try:
            with ThreadPool(8) as pool:  # disks, pipes and decoders work side by side
                results = pool.imap(counted, todo.values())
                for name, result in zip(
                    todo,
                    tqdm(results, f"indexing {pattern}", len(todo), unit="shard", disable=not todo),
                ):
                    progress(f"start-up, indexing {name}")
                    if isinstance(result, ConfigError):
                        damaged.append(str(result))
                    else:
                        known[name][kind] = result[0]
                        left_out += result[1]
                    if len(damaged) == MAX_DAMAGED:
                        break
        finally:  # what was counted is kept, whatever ended the counting
            if todo:
                write_index(file, known)
        shards += urls
        counts += [known[name].get(kind, 0) for name in names]
    if left_out:
        print(
            "left out: " + ", ".join(f"{n:,} {reason}" for reason, n in left_out.most_common()),
            file=sys.stderr,
        )
    if damaged:
        more = (
            f"\n  and {len(damaged) - 10} more" + ", at least" * (len(damaged) >= MAX_DAMAGED)
            if len(damaged) > 10
            else ""
        )
        raise ConfigError(
            damaged[0]
            if len(damaged) == 1
            else "these shards cannot be used:\n  " + "\n  ".join(damaged[:10]) + more
        )
    if not sum(counts):
        raise ConfigError(f"{patterns}: no usable sample in {len(shards)} shards")
    return Index(shards, np.array(counts, dtype=np.int64), kinds)


def write_index(file, known):
    """Atomically, so that nobody reads half of it; a warning if it cannot be done."""
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(f"{file}.{os.getpid()}", "w") as f:
            json.dump({"shards": known}, f, indent=1)
        os.replace(f.name, file)
        print(f"index written: {file}", file=sys.stderr)
    except OSError as error:
        warnings.warn(
            f"the index cannot be written and will be made again at the next start: {error}"
        )


def count_samples(url, kinds, verify, caption_key):
    """-> (how many usable samples a shard holds, Counter of those left out): from img2dataset's NNNNN_stats.json beside it or by
    walking through its headers (verify: by decoding them all). ConfigError if it cannot be used."""
    count, bad, left_out = 0, Counter(), Counter()
    try:
        if not verify and (count := count_in_statistics(url, kinds)):
            return count, left_out
        for key, files in usable_samples(url, kinds, range(sys.maxsize if verify else 0), left_out):
            count += 1
            try:
                if verify:
                    decode(files), "cls" in files or captions(files, caption_key)
            except BadSample as error:
                bad[str(error)] += 1
                tqdm.write(f"{url} {shown(key)}: {error}")
        if verify:
            tqdm.write(f"{url}: {count} samples, bad: {dict(bad) or 'none'}")
        held = Counter() if count else Counter(extension for *_, extension in members(url))
    except (OSError, tarfile.TarError) as error:
        size = f" ({os.path.getsize(url)} bytes)" if os.path.exists(url) else ""
        raise ConfigError(
            f"{url}{size} is unreadable or damaged after {count} samples: {error}; fetch it again, or leave it out"
        ) from error
    if held:
        raise ConfigError(
            f"{url} has no usable sample: one needs an image ({', '.join(sorted(IMAGES))}) and, of the same key, "
            f"{' or '.join(kinds)}; it holds {', '.join(f'{n} {shown(extension)}' for extension, n in held.most_common(8))}"
            + (
                "; set caption_key if captions are in KEY.json"
                if "json" in held and "json" not in kinds
                else ""
            )
        )
    return count, left_out


def shown(name):
    """A name out of a tar, fit to be printed: it can hold anything, even what moves a terminal's cursor."""
    return (name if name.isprintable() else ascii(name))[:200]


def count_in_statistics(url, kinds):
    """-> successes in img2dataset's statistics; 0 if there are none, or the shard's beginning and end do not look like its work."""
    (base, dot_tar, rest), is_pipe = url.rpartition(".tar"), url.startswith("pipe:")
    try:
        with open_url(
            f"{base}_stats.json{rest} 2>/dev/null" if is_pipe else f"{base}_stats.json"
        ) as f:
            count = json.loads(f.read(MAX_TEXT_BYTES) if dot_tar else b"{}")["successes"]
        if not isinstance(count, int) or not 0 < count < (
            1 << 31 if is_pipe else os.path.getsize(url) // 1024
        ):
            return 0  # a sample has two headers of 512 bytes at least
        if not is_pipe:
            with open(url, "rb") as f:
                f.seek(
                    -1024, os.SEEK_END
                )  # a tar ends with two empty blocks, one cut short does not
                count *= not any(f.read())
        return count if count and next(usable_samples(url, kinds, range(0)), None) else 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError, tarfile.TarError):
        return 0


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python -m ingest.index", description="Count the usable samples of tar shards."
    )
    parser.add_argument(
        "patterns",
        nargs="+",
        help="'shards/{00000..00331}.tar', 'shards/*.tar' or 'pipe:CMD {00..99}.tar'",
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
    parser.add_argument("--out", help="write this file instead of index.json beside the shards")
    a = parser.parse_args(argv)
    index = load_index(a.patterns, a.caption_key, a.evaluation, a.verify, a.out)
    print(f"{index.num_samples:,} samples in {len(index.shards):,} shards")


if __name__ == "__main__":
    or_exit(main, sys.argv[1:])
