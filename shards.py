"""Tar shards: what is in them, how many usable samples each holds, and reading them forwards.

Shards are WebDataset tars as img2dataset writes them: 000012345.jpg, .txt, .json. A sample is the neighbouring files of one
key; it is usable with an image and a caption. Its id is its shard's offset plus its position there: dense, 0..N-1, over any
number of sources, with keys of any kind. The index, the counts of all shards, is kept in index.json beside them.
"""

import glob
import json
import os
import re
import sys
import tarfile
import warnings
from collections import Counter
from functools import partial
from itertools import chain
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand
from torchvision.io import ImageReadMode, decode_image
from tqdm import tqdm
from webdataset import gopen

from config import ConfigError

IMAGES = {"jpg", "jpeg", "png", "webp"}
# torchvision 0.29 announces that its decoders will move to TorchCodec some day; nothing is to be done about it in a run.
warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)


class BadSample(Exception):
    """A sample that cannot be used. Its text is the reason under which it is counted."""


class Header(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of a tar; here only the end-of-archive marker is the end."""
    @classmethod
    def frombuf(cls, *args):
        try:
            return super().frombuf(*args)
        except tarfile.HeaderError as error:
            raise error if isinstance(error, tarfile.EOFHeaderError) else tarfile.ReadError(f"breaks off: {error}")


def open_url(url):
    """A path, or pipe:COMMAND -> a stream of bytes."""
    if not url.startswith("pipe:"):
        return open(url, "rb")
    stream = gopen(url)
    stream.ignore_errors = True     # a command that fails shows in what it sends; one that is cut short dies of SIGPIPE
    return stream


def members(url):
    """Yield (tar, entry, key, extension) for every file of a shard: dir/000.a.jpg has key dir/000 and extension a.jpg."""
    with open_url(url) as stream:
        try:                        # a file can seek over what is not wanted, a pipe is read through
            tar = tarfile.open(fileobj=stream, mode="r|" if url.startswith("pipe:") else "r:", tarinfo=Header)
        except tarfile.TarError as error:
            raise OSError(f"not a tar: {error}") from error
        while entry := tar.next():
            tar.members.clear()     # tarfile would remember every member it has seen
            name = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", entry.name)
            if name and entry.isfile():
                yield tar, entry, name[1], name[2].lower()


def usable_samples(url, kinds, wanted):
    """Yield (key, {extension: bytes}) for each usable sample of a shard: neighbouring files of one key, among them an image and one
    of `kinds`. Only positions in `wanted`, a range, are read, others have no files. OSError: unreadable; TarError: damaged later on."""
    position, key, seen, files = 0, None, set(), {}
    for tar, entry, new_key, extension in chain(members(url), [(None, None, None, None)]):
        if new_key != key:
            if seen & IMAGES and seen & set(kinds):
                yield key, files
                position += 1
            key, seen, files = new_key, set(), {}
        seen.add(extension)
        if position in wanted and (extension in IMAGES or extension in kinds):
            files[extension] = tar.extractfile(entry).read()


# ---- the files of a sample ----

def decode(files):
    """The image among {extension: bytes} -> uint8 [3, h, w]. BadSample if it is corrupt, or if there are no files at all."""
    if not files:
        raise BadSample("missing from shard")
    try:
        data = next(files[extension] for extension in files if extension in IMAGES)
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise BadSample("corrupt image") from error
    return image if image.dtype == torch.uint8 else (image.int() >> 8).to(torch.uint8)          # a PNG can have 16 bits


def captions(files, caption_key):
    """The captions among {extension: bytes} -> list of str, none of them empty. BadSample if there is not one."""
    try:
        value = json.loads(files["json"])[caption_key] if caption_key else files["txt"].decode("utf-8", "replace")
    except (ValueError, KeyError, TypeError) as error:
        raise BadSample("no caption") from error
    texts = [text.strip() for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()]
    if not texts:
        raise BadSample("empty caption")
    return texts


# ---- the index ----

class Index(NamedTuple):
    """shards: n urls; counts: their usable samples, int64 [n]; kinds: a sample has one of these extensions beside its image."""
    shards: list
    counts: np.ndarray
    kinds: tuple

    @property
    def num_samples(self):
        return int(self.counts.sum())


def expand(patterns):
    """Patterns with {00..99} and, for files, * -> list of urls. ConfigError if one matches nothing, or some of its files are missing."""
    urls = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found = list(braceexpand(os.path.expanduser(pattern)))
        except ValueError as error:
            raise ConfigError(f"{pattern}: {error}") from error
        if not pattern.startswith("pipe:"):
            found = [path for name in found for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])]
            missing = [path for path in found if not os.path.exists(path)]
            if len(missing) == len(found):
                raise ConfigError(f"{pattern} matches no file, as seen from {os.getcwd()}: correct the pattern")
            if missing:
                raise ConfigError(f"{pattern}: {missing[0]} does not exist, {len(missing)} of {len(found)} shards are missing: "
                                  "fetch them, or narrow the pattern")
        urls += found
    return urls


def index_file(pattern, url):
    """index.json beside the first shard; for pipe:, and in a folder where one may not write, a file in ~/.cache/fastclip."""
    folder, is_pipe = os.path.dirname(os.path.abspath(url)), pattern.startswith("pipe:")
    beside = os.path.join(folder, "index.json")
    writable = not is_pipe and os.access(folder, os.W_OK) and os.stat(folder).st_mode & 0o222       # root may write anywhere
    if writable or not is_pipe and os.path.exists(beside):
        return beside
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return os.path.join(cache, "fastclip", re.sub(r"\W+", "-", pattern if is_pipe else folder)[-200:] + ".json")


def load_index(patterns, caption_key="", evaluation=False, verify=False, path=None):
    """Patterns of shards -> Index. Counts are read from each pattern's index_file (or `path`); what is missing there, or was made for
    a shard of another size in bytes, is counted, with progress, and written. caption_key: '' counts samples with KEY.txt, else with
    KEY.json; evaluation: KEY.cls will do as well; verify: decodes all and prints what is bad. Raises ConfigError: missing,
    unreadable or damaged shards, one without captions, no samples at all."""
    kinds = ("json" if caption_key else "txt", *(["cls"] if evaluation else []))
    kind, shards, counts = "|".join(kinds), [], []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        urls, is_pipe = expand(pattern), pattern.startswith("pipe:")
        file = os.path.abspath(path or index_file(pattern, urls[0]))
        try:
            with open(file) as f:
                known = json.load(f)["shards"]                  # {name: {"size": bytes, kind: count}}
        except OSError:
            known = {}
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{file} is not an index that data.py wrote: move it away") from error
        names = [url if is_pipe else os.path.relpath(url, os.path.dirname(file)) for url in urls]
        for name, url in zip(names, urls):
            size = None if is_pipe else os.path.getsize(url)
            if known.setdefault(name, {"size": size})["size"] != size:
                known[name] = {"size": size}
        todo = {name: url for name, url in zip(names, urls) if verify or kind not in known[name]}
        try:
            with ThreadPool(8) as pool:                         # disks, pipes and decoders work side by side
                results = pool.imap(partial(count_samples, kinds=kinds, verify=verify, caption_key=caption_key), todo.values())
                for name, count in zip(todo, tqdm(results, f"indexing {pattern}", len(todo), unit="shard", disable=not todo)):
                    known[name][kind] = count
        finally:                                                # what was counted is kept, whatever ended the counting
            if todo:
                write_index(file, known)
        shards += urls
        counts += [known[name][kind] for name in names]
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
        warnings.warn(f"the index cannot be written and will be made again at the next start: {error}")


def count_samples(url, kinds, verify, caption_key):
    """How many usable samples a shard holds: from img2dataset's NNNNN_stats.json beside it or by walking through its headers
    (verify: by decoding them all). ConfigError if it cannot be used."""
    count, bad = 0, Counter()
    try:
        if not verify and (count := count_in_statistics(url, kinds)):
            return count
        for key, files in usable_samples(url, kinds, range(sys.maxsize if verify else 0)):
            count += 1
            try:
                if verify:
                    decode(files), "cls" in files or captions(files, caption_key)
            except BadSample as error:
                bad[str(error)] += 1
                tqdm.write(f"{url} {key}: {error}")
        if verify:
            tqdm.write(f"{url}: {count} samples, bad: {dict(bad) or 'none'}")
        held = Counter() if count else Counter(extension for *_, extension in members(url))
    except (OSError, tarfile.TarError) as error:
        size = "" if url.startswith("pipe:") else f" ({os.path.getsize(url)} bytes)"
        raise ConfigError(f"{url}{size} is unreadable or damaged after {count} samples: {error}; fetch it again, or leave it out") from error
    if held:
        raise ConfigError(f"{url} has no usable sample: one needs an image ({', '.join(sorted(IMAGES))}) and, of the same key, "
                          f"{' or '.join(kinds)}; it holds {', '.join(f'{n} {extension}' for extension, n in held.most_common(8))}"
                          + ("; set caption_key if captions are in KEY.json" if "json" in held and "json" not in kinds else ""))
    return count


def count_in_statistics(url, kinds):
    """-> successes in img2dataset's statistics; 0 if there are none, or the shard's beginning and end do not look like its work."""
    (base, dot_tar, rest), is_pipe = url.rpartition(".tar"), url.startswith("pipe:")
    try:
        with open_url(f"{base}_stats.json{rest} 2>/dev/null" if is_pipe else f"{base}_stats.json") as f:
            count = json.loads(f.read() if dot_tar else b"{}")["successes"]
        if not is_pipe:
            with open(url, "rb") as f:
                f.seek(-1024, os.SEEK_END)                      # a tar ends with two empty blocks, one cut short does not
                count *= not any(f.read())
        return count if count and next(usable_samples(url, kinds, range(0)), None) else 0
    except (OSError, ValueError, KeyError, tarfile.TarError):
        return 0
