"""Tar files read forwards: their members, and the samples that these make up."""

import codecs
import json
import re
import tarfile
from itertools import chain

from ingest.images import IMAGES, BadSample
from ingest.urls import is_local, open_url

# A sample's file that is larger than this is not read.
MAX_IMAGE_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 20

# tarfile searches long headers (of a name, or of other attributes) in quadratic time.
MAX_HEADER_BYTES = 8192

# No tar is as large as this; a header that leads further is damaged.
MAX_TAR_BYTES = 1 << 50

# A caption is cut to this length. The 77 tokens lie far within, and the tokenizer needs 40 ms at
# most for it.
MAX_CHARACTERS = 10_000

# The header of a plain file, from byte 100 on: mode, owner, group, size, time, checksum, type.
PLAIN = re.compile(rb"(?:[0-7]{7}[\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 0")

# These types of header carry long names and other attributes of the next file.
ATTRIBUTE_TYPES = b"LKxgX"

# dir/000.a.jpg has the key dir/000 and the extension a.jpg, as in webdataset.
KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


class Header(tarfile.TarInfo):
    """A header of a tar; unlike tarfile's own class, it does not take damage for the end.

    tarfile treats a damaged or missing header as the end of the archive. Here only the
    end-of-archive marker is the end, and anything else raises ReadError.
    """

    @classmethod
    def frombuf(cls, block, encoding, errors):
        """A block of 512 bytes -> Header. Called by tarfile."""
        # Nearly every header is that of a plain file with a short name. It is parsed here, because
        # tarfile takes 0.03 ms a header, which adds up. tarfile parses all others.
        plain = plain_header(block)
        if plain:
            name, size = plain
            header = cls(name.decode(encoding, errors))
            header.size = size
            return header

        try:
            header = super().frombuf(block, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"breaks off: {error}") from error

        if header.type in ATTRIBUTE_TYPES and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def plain_header(block):
    """The header of a plain file with a short name -> (name as bytes, size); otherwise None."""
    if len(block) != 512 or block[257:262] != b"ustar":
        return None

    # A name that does not fit begins with a zero byte or goes on at byte 345.
    if not block[0] or block[345]:
        return None

    fields = PLAIN.match(block, 100)
    if not fields:
        return None

    # The checksum's own eight bytes count as spaces.
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if int(fields[2], 8) != checksum:
        return None
    return block[:100].split(b"\0", 1)[0], int(fields[1], 8)


def open_tar(stream, seekable):
    """A stream of bytes -> TarFile, its first header read. OSError: unreadable, or not a tar."""
    mode = "r:" if seekable else "r|"
    try:
        return tarfile.open(fileobj=stream, mode=mode, tarinfo=Header)
    except OSError:
        raise
    except Exception as error:  # a hostile header can get any exception out of tarfile
        raise OSError(f"not a tar: {str(error) or repr(error)}") from error


def next_entry(tar):
    """The next header of a TarFile, None at its end. OSError: unreadable; TarError: damaged."""
    try:
        entry = tar.next()
    except OSError:
        raise
    except Exception as error:  # a hostile header can get any exception out of tarfile
        raise tarfile.ReadError(str(error) or repr(error)) from error

    # tarfile would remember every member that it has seen.
    tar.members.clear()

    # A header with a negative size would lead tarfile backwards, in a circle.
    if entry and not entry.offset_data <= tar.offset < MAX_TAR_BYTES:
        raise tarfile.ReadError(f"a file of {entry.size} bytes")
    return entry


def members(url):
    """Yield (tar, entry, key, extension) for every plain file of a shard.

    dir/000.a.jpg has key dir/000 and extension a.jpg. Links, devices, folders, sparse files and
    names without an extension are passed over. Raises OSError: the shard is unreadable or no tar;
    TarError: it is damaged further on.
    """
    with open_url(url) as stream:
        # A file can seek over what is not wanted; anything else is read through.
        tar = open_tar(stream, seekable=is_local(url))

        while entry := next_entry(tar):
            name = KEY_AND_EXTENSION.fullmatch(entry.name)
            if name and entry.isfile() and not entry.issparse():
                yield tar, entry, name[1], name[2].lower()


def usable_samples(url, kinds, wanted, left_out=None):
    """Yield (key, {extension: bytes, or None if the file is too large}) for each usable sample.

    A sample is the neighbouring files of one key; a second file of the same name begins another
    sample. It is usable with an image and a file of one of `kinds`, a tuple of extensions. Only
    the samples at positions in `wanted`, a range, are read; the others come without files.
    left_out: a LeftOut, which is told of all that is not usable. Raises what `members` raises.
    """
    position = 0  # among the usable samples of the shard
    key = None
    extensions = set()
    files = {}

    end = (None, None, None, None)
    for tar, entry, new_key, extension in chain(members(url), [end]):
        if new_key != key or extension in extensions:
            # The sample before is complete.
            has_image = not extensions.isdisjoint(IMAGES)
            has_text = not extensions.isdisjoint(kinds)
            is_usable = has_image and has_text
            if left_out is not None:
                left_out.look(key, extensions, is_usable)
            if is_usable:
                yield key, files
                position += 1

            key = new_key
            extensions = set()
            files = {}

        extensions.add(extension)
        if position in wanted and (extension in IMAGES or extension in kinds):
            files[extension] = read_up_to_limit(tar, entry, extension)


def read_up_to_limit(tar, entry, extension):
    """A plain file of a tar -> bytes, or None if it is larger than a file of its kind may be."""
    limit = MAX_IMAGE_BYTES if extension in IMAGES else MAX_TEXT_BYTES
    if entry.size > limit:
        return None

    # The same as tar.extractfile(entry).read(), without its layers of buffers.
    tar.fileobj.seek(entry.offset_data)
    content = tar.fileobj.read(entry.size)
    if len(content) != entry.size:
        raise tarfile.ReadError("breaks off")
    return content


def text_of(data):
    """The bytes of a text file -> str: UTF-8 or, if a mark at the beginning says so, UTF-16."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "replace")


def captions(files, caption_key, lines=False):
    """The captions of a sample -> list of str, none of them empty, each up to MAX_CHARACTERS long.

    files: {extension: bytes}. caption_key: this entry of KEY.json, a string or a list of strings;
    '': the text of KEY.txt, which is one caption, or one caption per line if `lines` is true.
    Raises BadSample if there is no caption, or none that is text.
    """
    try:
        if caption_key:
            value = json.loads(files["json"])[caption_key]
        else:
            value = text_of(files["txt"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSample("no caption") from error

    if lines and not caption_key:
        value = value.splitlines()
    elif not isinstance(value, list):
        value = [value]

    texts = [text.strip() for text in value if isinstance(text, str)]
    texts = [text[:MAX_CHARACTERS] for text in texts if text]
    if not texts:
        raise BadSample("empty caption" if may_be_captions(value) else "caption is no text")
    return texts


def may_be_captions(value):
    """Whether an entry of KEY.json is text, a list with text in it, or empty: null or []."""
    values = value if isinstance(value, list) else [value]
    return not values or any(value is None or isinstance(value, str) for value in values)
