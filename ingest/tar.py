"""Tar files read forwards: their members, and the samples that these make up."""

import json
import re
import tarfile
from itertools import chain

from ingest.images import IMAGES, BadSample
from ingest.urls import open_url

MAX_IMAGE_BYTES, MAX_TEXT_BYTES = 64 << 20, 1 << 20  # a larger file of a sample is not read
MAX_HEADER_BYTES = (
    8192  # tarfile searches long headers of a name, or other attributes, in quadratic time
)
MAX_CHARACTERS = (
    10_000  # of a caption: the 77 tokens lie far within, and the tokenizer takes 40 ms at most
)
# Of a plain file's header, from byte 100 on: mode, owner, group, size, time, sum, type.
PLAIN = re.compile(rb"(?:[0-7]{7}[\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 0")


class Header(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of a tar; here only the end-of-archive marker is the end. A plain file with
    a short name, as nearly all are, is read here: tarfile looks at everything else, and its 0.03 ms a header add up."""

    @classmethod
    def frombuf(cls, block, encoding, errors):
        plain = PLAIN.match(block, 100)
        if (
            plain
            and len(block) == 512
            and block[257:262] == b"ustar"
            and block[0]
            and not block[345]
        ):  # there, longer names go on
            if (
                int(plain[2], 8) == sum(block) - sum(block[148:156]) + 256
            ):  # the sum itself counts as eight spaces
                header = cls(block[:100].split(b"\0", 1)[0].decode(encoding, errors))
                header.size = int(plain[1], 8)
                return header
        try:
            header = super().frombuf(block, encoding, errors)
        except tarfile.HeaderError as error:
            raise (
                error
                if isinstance(error, tarfile.EOFHeaderError)
                else tarfile.ReadError(f"breaks off: {error}")
            )
        if (
            header.type in b"LKxgX" and header.size > MAX_HEADER_BYTES
        ):  # long names and other attributes of the next file
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def members(url):
    """Yield (tar, entry, key, extension) for every file of a shard: dir/000.a.jpg has key dir/000 and extension a.jpg. Links, devices
    and folders are passed over. OSError: unreadable, or no tar; TarError: damaged later on."""
    with open_url(url) as stream:
        tar = entry = None
        while True:
            try:  # a file can seek over what is not wanted, a pipe is read through
                tar = tar or tarfile.open(
                    fileobj=stream, mode="r|" if url.startswith("pipe:") else "r:", tarinfo=Header
                )
                entry = tar.next()
                if (
                    entry and not entry.offset_data <= tar.offset < 1 << 50
                ):  # tarfile would go round in circles
                    raise tarfile.ReadError(f"a file of {entry.size} bytes")
            except OSError:
                raise
            except Exception as error:  # a header made for it gets any exception out of tarfile
                raise (
                    tarfile.ReadError(f"{error or repr(error)}")
                    if entry
                    else OSError(f"not a tar: {error or repr(error)}")
                ) from error
            if not entry:
                return
            tar.members.clear()  # tarfile would remember every member it has seen
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
            most = MAX_IMAGE_BYTES if extension in IMAGES else MAX_TEXT_BYTES
            files[extension] = read(tar, entry) if entry.size <= most else None


def read(tar, entry):
    """A plain file of a tar -> bytes. As tar.extractfile(entry).read(), without its layers of buffers."""
    tar.fileobj.seek(entry.offset_data)
    content = tar.fileobj.read(entry.size)
    if len(content) != entry.size:
        raise tarfile.ReadError("breaks off")
    return content


def captions(files, caption_key, lines=False):
    """The captions among {extension: bytes} -> list of str of up to MAX_CHARACTERS, none of them empty. BadSample if there is none."""
    try:
        value = (
            json.loads(files["json"])[caption_key]
            if caption_key
            else files["txt"].decode("utf-8", "replace")
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSample("no caption") from error
    if lines and isinstance(value, str):
        value = value.split("\n")
    texts = [
        text.strip()
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str) and text.strip()
    ]
    if not texts:
        raise BadSample("empty caption")
    return [text[:MAX_CHARACTERS] for text in texts]
