"""Tar shards: what is in them, how many usable samples each holds, and reading them forwards.

Shards are WebDataset tars as img2dataset writes them: 000012345.jpg, .txt, .json. A sample is the neighbouring files of one
key; it is usable with an image and a caption. Its id is its shard's offset plus its position there: dense, 0..N-1, over any
number of sources, with keys of any kind. The index, the counts of all shards, is kept in index.json beside them.

Shards may come from strangers: whatever is in one, reading it ends in samples, in bad samples that are counted, or in OSError or
tarfile.TarError. Nothing of it is ever run, or written to disk.
"""

import glob
import hashlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import tarfile
import warnings
import weakref
from collections import Counter
from contextlib import suppress
from itertools import chain
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from config import ConfigError
from images import IMAGES, BadSample, decode

PIPE_TIMEOUT = 60                   # seconds without a byte from a command before it is killed
MOST_IMAGE_BYTES, MOST_TEXT_BYTES = 64 << 20, 1 << 20           # a larger file of a sample is not read
MOST_HEADER_BYTES = 8192            # tarfile searches long headers of a name, or other attributes, in quadratic time
MOST_CHARACTERS = 10_000            # of a caption: the 77 tokens lie far within, and the tokenizer takes 40 ms at most
MOST_DAMAGED = 100                  # shards; indexing stops there, as all the others are likely to be damaged too


# Of a plain file's header, from byte 100 on: mode, owner, group, size, time, sum, type.
PLAIN = re.compile(rb"(?:[0-7]{7}[\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 0")


class Header(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of a tar; here only the end-of-archive marker is the end. A plain file with
    a short name, as nearly all are, is read here: tarfile looks at everything else, and its 0.03 ms a header add up."""
    @classmethod
    def frombuf(cls, block, encoding, errors):
        plain = PLAIN.match(block, 100)
        if plain and len(block) == 512 and block[257:262] == b"ustar" and block[0] and not block[345]:      # there, longer names go on
            if int(plain[2], 8) == sum(block) - sum(block[148:156]) + 256:      # the sum itself counts as eight spaces
                header = cls(block[:100].split(b"\0", 1)[0].decode(encoding, errors))
                header.size = int(plain[1], 8)
                return header
        try:
            header = super().frombuf(block, encoding, errors)
        except tarfile.HeaderError as error:
            raise error if isinstance(error, tarfile.EOFHeaderError) else tarfile.ReadError(f"breaks off: {error}")
        if header.type in b"LKxgX" and header.size > MOST_HEADER_BYTES:         # long names and other attributes of the next file
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


class Pipe(io.RawIOBase):
    """What a shell command writes, as a stream. Reading raises TimeoutError when nothing comes for PIPE_TIMEOUT seconds; at the end,
    OSError if the command failed. Closing, or the end of the program, kills the command with all that it has started."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0,
                                        start_new_session=True)         # which makes it a process group that can be killed whole
        self.end = weakref.finalize(self, end_command, self.process)
        self.ready = select.poll()
        self.ready.register(self.process.stdout, select.POLLIN)

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.ready.poll(PIPE_TIMEOUT * 1000):
            raise TimeoutError(f"nothing came for {PIPE_TIMEOUT} s")
        n = self.process.stdout.readinto(buffer)
        if not n:
            if self.process.returncode == 0:        # tarfile would go on for hours, skipping what a header claims to be there
                raise tarfile.ReadError("breaks off")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(PIPE_TIMEOUT)
            if self.process.returncode != 0:
                raise OSError(f"the command failed, exit status {self.process.returncode}")
        return n

    def close(self):
        self.end()
        super().close()


def end_command(process):
    """Kill a command's process group, if it is still running. Killed before its pipe is closed, it cannot complain about that."""
    if process.returncode is None:                  # nobody has waited for it, so that its number is still its own
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    with suppress(subprocess.TimeoutExpired):       # what hangs inside the kernel, on a dead disk, is left to itself
        process.wait(1)


def open_url(url):
    """A path, or pipe:COMMAND -> a stream of bytes."""
    return io.BufferedReader(Pipe(url[5:]), 1 << 16) if url.startswith("pipe:") else open(url, "rb")


def members(url):
    """Yield (tar, entry, key, extension) for every file of a shard: dir/000.a.jpg has key dir/000 and extension a.jpg. Links, devices
    and folders are passed over. OSError: unreadable, or no tar; TarError: damaged later on."""
    with open_url(url) as stream:
        tar = entry = None
        while True:
            try:                    # a file can seek over what is not wanted, a pipe is read through
                tar = tar or tarfile.open(fileobj=stream, mode="r|" if url.startswith("pipe:") else "r:", tarinfo=Header)
                entry = tar.next()
                if entry and not entry.offset_data <= tar.offset < 1 << 50:     # tarfile would go round in circles
                    raise tarfile.ReadError(f"a file of {entry.size} bytes")
            except OSError:
                raise
            except Exception as error:              # a header made for it gets any exception out of tarfile
                raise tarfile.ReadError(f"{error or repr(error)}") if entry else OSError(f"not a tar: {error or repr(error)}") from error
            if not entry:
                return
            tar.members.clear()     # tarfile would remember every member it has seen
            name = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", entry.name)
            if name and entry.isfile() and not entry.issparse():
                yield tar, entry, name[1], name[2].lower()


def usable_samples(url, kinds, wanted, left_out=None):
    """Yield (key, {extension: bytes, or None if it is too large}) for each usable sample of a shard: neighbouring files of one key,
    among them an image and one of `kinds`. A second file of the same name begins another sample. Only positions in `wanted`, a range,
    are read, others have no files. Unusable samples are counted by reason in the Counter `left_out`. Raises what `members` raises."""
    position, key, seen, files = 0, None, set(), {}
    for tar, entry, new_key, extension in chain(members(url), [(None, None, None, None)]):
        if new_key != key or extension in seen:
            image, text = seen & IMAGES, seen & set(kinds)
            if image and text:
                yield key, files
                position += 1
            elif (image or text) and left_out is not None:
                left_out["no caption" if image else "no image"] += 1
            key, seen, files = new_key, set(), {}
        seen.add(extension)
        if position in wanted and (extension in IMAGES or extension in kinds):
            most = MOST_IMAGE_BYTES if extension in IMAGES else MOST_TEXT_BYTES
            files[extension] = read(tar, entry) if entry.size <= most else None


def read(tar, entry):
    """A plain file of a tar -> bytes. As tar.extractfile(entry).read(), without its layers of buffers."""
    tar.fileobj.seek(entry.offset_data)
    content = tar.fileobj.read(entry.size)
    if len(content) != entry.size:
        raise tarfile.ReadError("breaks off")
    return content


# ---- the files of a sample ----

def captions(files, caption_key):
    """The captions among {extension: bytes} -> list of str of up to MOST_CHARACTERS, none of them empty. BadSample if there is none."""
    try:
        value = json.loads(files["json"])[caption_key] if caption_key else files["txt"].decode("utf-8", "replace")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSample("no caption") from error
    texts = [text.strip() for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()]
    if not texts:
        raise BadSample("empty caption")
    return [text[:MOST_CHARACTERS] for text in texts]


# ---- the index ----

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


def load_index(patterns, caption_key="", evaluation=False, verify=False, path=None, beat=lambda where: None):
    """Patterns of shards -> Index. Counts are read from each pattern's index_file (or `path`); what is missing there, or was made for
    a shard of another size in bytes, is counted, with progress, and written. caption_key: '' counts samples with KEY.txt, else with
    KEY.json; evaluation: KEY.cls will do as well; verify: decodes all and prints what is bad. What is left out, an image without
    caption or the reverse, is said once. Raises ConfigError: missing, unreadable or damaged shards (up to ten are named), one without
    captions, no samples at all. beat(where) is told of progress."""
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
                known = json.load(f)["shards"]                  # {name: {"size": bytes, kind: count}}
            if not all(isinstance(n, (int, type(None))) for entry in known.values() for n in entry.values()):
                raise ValueError("counts are numbers")
        except OSError:
            known = {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{file} is not an index that data.py wrote: move it away") from error
        names = [url if is_pipe else os.path.relpath(url, os.path.dirname(file)) for url in urls]
        for name, url in zip(names, urls):
            size = None if is_pipe else os.path.getsize(url)
            if known.setdefault(name, {"size": size})["size"] != size:
                known[name] = {"size": size}
        todo = {name: url for name, url in zip(names, urls) if verify or kind not in known[name]}
        try:
            with ThreadPool(8) as pool:                         # disks, pipes and decoders work side by side
                results = pool.imap(counted, todo.values())
                for name, result in zip(todo, tqdm(results, f"indexing {pattern}", len(todo), unit="shard", disable=not todo)):
                    beat(f"start-up, indexing {name}")
                    if isinstance(result, ConfigError):
                        damaged.append(str(result))
                    else:
                        known[name][kind] = result[0]
                        left_out += result[1]
                    if len(damaged) == MOST_DAMAGED:
                        break
        finally:                                                # what was counted is kept, whatever ended the counting
            if todo:
                write_index(file, known)
        shards += urls
        counts += [known[name].get(kind, 0) for name in names]
    if left_out:
        print("left out: " + ", ".join(f"{n:,} {reason}" for reason, n in left_out.most_common()), file=sys.stderr)
    if damaged:
        more = f"\n  and {len(damaged) - 10} more" + ", at least" * (len(damaged) >= MOST_DAMAGED) if len(damaged) > 10 else ""
        raise ConfigError(damaged[0] if len(damaged) == 1 else "these shards cannot be used:\n  " + "\n  ".join(damaged[:10]) + more)
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
        raise ConfigError(f"{url}{size} is unreadable or damaged after {count} samples: {error}; fetch it again, or leave it out") from error
    if held:
        raise ConfigError(f"{url} has no usable sample: one needs an image ({', '.join(sorted(IMAGES))}) and, of the same key, "
                          f"{' or '.join(kinds)}; it holds {', '.join(f'{n} {shown(extension)}' for extension, n in held.most_common(8))}"
                          + ("; set caption_key if captions are in KEY.json" if "json" in held and "json" not in kinds else ""))
    return count, left_out


def shown(name):
    """A name out of a tar, fit to be printed: it can hold anything, even what moves a terminal's cursor."""
    return (name if name.isprintable() else ascii(name))[:200]


def count_in_statistics(url, kinds):
    """-> successes in img2dataset's statistics; 0 if there are none, or the shard's beginning and end do not look like its work."""
    (base, dot_tar, rest), is_pipe = url.rpartition(".tar"), url.startswith("pipe:")
    try:
        with open_url(f"{base}_stats.json{rest} 2>/dev/null" if is_pipe else f"{base}_stats.json") as f:
            count = json.loads(f.read(MOST_TEXT_BYTES) if dot_tar else b"{}")["successes"]
        if not isinstance(count, int) or not 0 < count < (1 << 31 if is_pipe else os.path.getsize(url) // 1024):
            return 0                                            # a sample has two headers of 512 bytes at least
        if not is_pipe:
            with open(url, "rb") as f:
                f.seek(-1024, os.SEEK_END)                      # a tar ends with two empty blocks, one cut short does not
                count *= not any(f.read())
        return count if count and next(usable_samples(url, kinds, range(0)), None) else 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError, tarfile.TarError):
        return 0
