"""data.py and shards.py on what should not be in a data set: damaged, hostile, missing, hanging. One test a fault."""

import ast
import functools
import glob
import io
import itertools
import json
import os
import random
import resource
import signal
import struct
import tarfile
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from samples import load, number_of, order_of, picture, png, sample, write_shards, write_tar

import data
from config import ConfigError
from helpers import same
from ingest import evaluation, images, workers
from ingest import tar as tar_files
from ingest.index import Index, count_samples, load_index
from ingest.reader import Reader, ShardError
from ingest.tar import MAX_CHARACTERS, usable_samples
from ingest.urls import expand

ROOT = os.path.dirname(data.__file__)
TOKENIZER = functools.cache(
    data.Tokenizer
)  # a quarter of a second each: made once for all of these tests
SLEEPS = itertools.count(
    1000 + os.getpid() * 1000
)  # lengths that tell our sleeping commands from all others

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch):
    monkeypatch.setattr(data, "Tokenizer", TOKENIZER)


def encoded(size=(40, 30), mode="RGB", format="JPEG", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def reason(function, *args):
    with pytest.raises(images.BadSample) as error:
        function(*args)
    return str(error.value)


def read_all(index, size=8, **options):
    """One epoch -> (numbers of the samples, in order; counts of the bad ones)."""
    order, numbers, bad = data.Order(index, 1, 1, 4), [], {}
    for batch in data.Loader(order, size, workers=0, num_steps=order.steps_per_epoch, **options):
        numbers += batch.ids.tolist()
        for name, count in batch.bad.items():
            bad[name] = bad.get(name, 0) + count
    return sorted(numbers), bad


def is_running(text):
    """Whether some process has `text` in its command line."""
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as f:
                if text.encode() in f.read():
                    return True
        except OSError:
            pass
    return False


def zombies():
    states = []
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as f:
                states.append((path, *f.read().rpartition(")")[2].split()[:2]))
        except OSError:
            pass
    return {path for path, state, parent in states if state == "Z" and int(parent) == os.getpid()}


# ---- images and captions ----


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(progressive=True),
        dict(mode="L"),
        dict(mode="CMYK"),
        dict(exif=b"Exif\0\0" + bytes(3000), icc_profile=bytes(70000)),
        dict(format="PNG"),
        dict(format="PNG", mode="1"),
        dict(format="PNG", mode="P"),
        dict(format="WEBP"),
        dict(format="WEBP", lossless=True),
        dict(format="WEBP", mode="RGBA"),
        dict(format="WEBP", icc_profile=bytes(99)),
        dict(format="WEBP", size=(300, 500), lossless=True),
    ],
    ids=str,
)
def test_declared_pixels(options):
    content = encoded(**options)
    width, height = Image.open(io.BytesIO(content)).size
    assert images.declared_size(content) == (height, width) and images.decode(
        {"jpg": content}
    ).shape == (3, height, width)


def bombs():
    jpeg, png_, lossy, lossless, extended = (
        encoded(format=format, **options)
        for format, options in (
            ("JPEG", {}),
            ("PNG", {}),
            ("WEBP", {}),
            ("WEBP", dict(lossless=True)),
            ("WEBP", dict(icc_profile=bytes(99))),
        )
    )
    frame = jpeg.index(b"\xff\xc0")
    header = b"IHDR" + struct.pack(">II", 100_000, 100_000) + png_[24:29]
    real = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(real, "PNG")
    assert len(real.getvalue()) < 100_000
    return {
        "jpg": jpeg[: frame + 5] + struct.pack(">HH", 65000, 65000) + jpeg[frame + 9 :],
        "png": png_[:12] + header + struct.pack(">I", zlib.crc32(header)) + png_[33:],
        "webp": lossy[:26] + struct.pack("<HH", 16383, 16383) + lossy[30:],
        "jpeg": lossless[:21]
        + b"\xff\xff\xff\x0f"
        + lossless[25:],  # the extension does not decide what it is
        "png ": extended[:24] + b"\xff\xff\xff\xff\xff\x00" + extended[30:],
        " png": real.getvalue(),
    }


def test_decompression_bombs(tmp_path, monkeypatch):
    bad = bombs()
    changes = {
        f"s{n}": {"jpg": content, "png": None, "webp": None}
        for n, content in enumerate(bad.values())
    }
    index = load_index(write_shards(tmp_path, (10,), **changes))
    decode, decoded = images.decode_image, []
    monkeypatch.setattr(
        images, "decode_image", lambda content, mode: decoded.append(1) or decode(content, mode)
    )
    numbers, counts = read_all(index)
    assert (
        counts == {"too many pixels": 6}
        and set(numbers) == set(range(6, 10))
        and len(decoded) < len(numbers) == 10
    )  # not PNGs


def test_a_line_of_pixels(tmp_path):
    """Few pixels, but a thousand times as many once the shorter side has been resized."""
    line = png(torch.zeros(3, 1, 2500, dtype=torch.uint8))
    assert (
        reason(evaluation.evaluation_sample, {"png": line, "txt": b"a line"}, 224, "")
        == "too many pixels"
    )
    assert data.training_sample(
        {"png": line, "txt": b"a line"}, np.random.default_rng(0), 24, (0.9, 1.0), ""
    )[0].shape == (3, 24, 24)


def test_no_image_under_its_name():
    film = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    for format, frames in (
        ("GIF", film[1:]),
        ("GIF", []),
        ("WEBP", film[1:]),
        ("TIFF", []),
        ("BMP", []),
    ):
        file = io.BytesIO()
        film[0].save(file, format, **(dict(save_all=True, append_images=frames) if frames else {}))
        assert reason(images.decode, {"jpg": file.getvalue()}) == "corrupt image"
    for content in (
        b"",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff" * 9999,
        b"\xff\xd8" + b"\xff\xe0\0\2" * 99999,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"RIFF\0\0\0\0WEBPVP8X",
        b"\x89PNG\r\n\x1a\n",
        picture(1, "jpg")[:900],
        b"<html>404</html>",
        bytes(5000),
    ):
        assert reason(images.decode, {"jpg": content}) == "corrupt image"
    assert reason(images.decode, {}) == "missing from shard"


def test_pngs_with_broken_pixels():
    """On most of these torchvision's decoder ends the process."""
    content = encoded(format="PNG")

    def chunk(data):
        return (
            struct.pack(">I", len(data))
            + b"IDAT"
            + data
            + struct.pack(">I", zlib.crc32(b"IDAT" + data))
        )

    start = content.index(b"IDAT") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    data, before, after = (
        content[start + 8 : start + 8 + length],
        content[:start],
        content[start + 12 + length :],
    )
    raw = zlib.decompress(data)
    assert data and before + chunk(data) + after == content and data[0] == 0x78
    bad_ones = {
        "half": content[: len(content) // 2],
        "header": content[:29] + bytes(4) + content[33:],
        "no zlib": before + chunk(b"x" * 100) + after,
        "one bit": before
        + chunk(data)[:30]
        + bytes([chunk(data)[30] ^ 1])
        + chunk(data)[31:]
        + after,
        "filter": before + chunk(zlib.compress(b"\x09" + raw[1:])) + after,
        "too few": before + chunk(zlib.compress(raw[:1000])) + after,
    }
    for name, bad in bad_ones.items():
        assert reason(images.decode, {"png": bad}) == "corrupt image", name


def test_files_that_are_too_large(tmp_path):
    """A shard with a hole of three gigabytes in its first image: it is never read. A caption of 2 MB neither."""
    path, before = tmp_path / "large.tar", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(path, "wb") as f:
        f.write(header_of("0.jpg", 3 << 30))
        f.seek(3 << 30, os.SEEK_CUR)
        f.write(
            open(
                write_tar(
                    tmp_path / "rest.tar",
                    [("0.txt", b"0"), *sample(1), *sample(2, txt=b"word " * 400_000), *sample(3)],
                ),
                "rb",
            ).read()
        )
    index = load_index(str(path))
    assert index.num_samples == 4 and read_all(index)[1] == {"file too large": 2}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_captions_that_are_hard_to_read():
    tokenize = data.Tokenizer(77)
    for text in ("word " * 100_000, "w" * 500_000, "&lt;" * 100_000, "é" * 200_000):
        start = time.monotonic()
        (cut,) = tar_files.captions({"txt": text.encode()}, "")
        tokens = tokenize(cut)
        assert len(cut) == MAX_CHARACTERS and time.monotonic() - start < 2
        assert torch.equal(tokens, tokenize(text[:20_000]))
    for content in (
        b"[" * 200_000,
        b'{"t":' * 100_000,
        b"9" * 100_000,
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe\0",
        b'{"t": 1e999',
    ):
        assert reason(tar_files.captions, {"json": content}, "t") == "no caption"
    for content in (b'{"t": null}', b'{"t": [1, {}, "  "]}', b'{"t": {"a": "b"}}'):
        assert reason(tar_files.captions, {"json": content}, "t") == "empty caption"
    assert (
        reason(tar_files.captions, {"jpg": b""}, "") == "no caption"
        and reason(tar_files.captions, {"txt": b" \n\t"}, "") == "empty caption"
    )
    for content in (b'{"t": "\\ud800 \\u0000 x"}', b'{"t": "\\u202e"}'):
        assert tokenize(tar_files.captions({"json": content}, "t")).shape == (1, 77)
    assert tar_files.captions({"txt": b"\xff\xfe bytes"}, "") == ["\ufffd\ufffd bytes"]
    for number in (b"9" * 5000, b"-1", b"1e3", b"\xd9\xa1", b""):
        assert (
            reason(evaluation.evaluation_sample, {"jpg": encoded(), "cls": number}, 24, "")
            == "class is not a number"
        )


# ---- shards: names, what is left out, verify ----


def test_a_repeated_name_begins_another_sample(tmp_path):
    def pictures(*names):
        numbers = itertools.count(1)
        return [
            (name, picture(next(numbers), "jpg") if name.endswith("jpg") else name.encode())
            for name in names
        ]

    for names, expected, left_out in (
        (("1.jpg", "1.txt", "1.jpg", "1.txt"), [1, 2], {}),
        (("1.jpg", "1.jpg", "1.txt"), [2], {"no caption": 1}),
        (("1.jpg", "1.txt", "1.txt"), [1], {"no image": 1}),
        (("1.jpg", "1.txt", "2.jpg", "2.txt", "1.jpg", "1.txt"), [1, 2, 3], {}),
    ):
        path = write_tar(tmp_path / f"{len(names)}.{len(expected)}.tar", pictures(*names))
        index = load_index(path)
        assert index.num_samples == len(expected) and count_samples(path, ("txt",), False, "") == (
            len(expected),
            left_out,
        )
        reader = Reader(index)
        assert [number_of(images.decode(reader.read(i))) for i in range(len(expected))] == expected


def test_what_is_left_out_is_said_once(tmp_path, capsys):
    pattern = write_shards(
        tmp_path,
        (8, 8),
        s1={"txt": None},
        s9={"txt": None},
        s3={"jpg": None, "png": None, "webp": None},
    )
    assert load_index(pattern).num_samples == 13
    assert capsys.readouterr().err.count("left out: 2 no caption, 1 no image\n") == 1
    assert load_index(pattern).num_samples == 13 and "left out" not in capsys.readouterr().err


def test_damaged_shards_are_all_named(tmp_path):
    pattern = write_shards(tmp_path, (2,) * 16)
    for number in range(3, 15):
        os.truncate(tmp_path / f"{number:05d}.tar", 0 if number % 2 else 700)
    with pytest.raises(ConfigError) as error:
        load_index(pattern)
    lines = str(error.value).split("\n")
    assert (
        lines[0] == "these shards cannot be used:"
        and lines[-1] == "  and 2 more"
        and len(lines) == 12
    )
    assert all(
        f"{n:05d}.tar ({0 if n % 2 else 700} bytes) is unreadable or damaged" in line
        for n, line in zip(range(3, 13), lines[1:])
    )
    counted = json.load(open(tmp_path / "index.json"))["shards"]
    assert [name for name, entry in counted.items() if "txt" in entry] == [
        f"{n:05d}.tar" for n in (0, 1, 2, 15)
    ]
    os.truncate(tmp_path / "00000.tar", 0)
    with pytest.raises(
        ConfigError,
        match=r"^\S*00000.tar \(0 bytes\) is unreadable or damaged after 0 samples.*empty header",
    ):
        load_index(str(tmp_path / "00000.tar"))


def test_many_damaged_shards_end_the_indexing(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.index.MAX_DAMAGED", 20)
    for number in range(60):
        (tmp_path / f"{number:05d}.tar").touch()
    with pytest.raises(ConfigError, match="\n  and 10 more, at least$"):
        load_index(f"{tmp_path}/*.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes(tmp_path, workers):
    """Workers have the real back-off, seven seconds."""
    order = order_of(write_shards(tmp_path, (40, 40, 40)), 4, 4, 2)
    batches, step = (
        iter(data.Loader(order, 24, workers=workers, num_steps=order.steps_per_epoch)),
        0,
    )
    with pytest.raises(
        ShardError, match=r"0000[012].tar cannot be read \(4 attempts\): FileNotFoundError"
    ):
        for step, _ in enumerate(batches):
            for path in glob.glob(f"{tmp_path}/*.tar"):
                os.remove(path)  # the open ones are read to their end
    assert 0 < step < order.steps_per_epoch - 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_gets_shorter_while_it_is_read(tmp_path, workers):
    order = order_of(write_shards(tmp_path, (60, 60)), 4, 4, 2)
    counts, numbers = {}, []
    for step, batch in enumerate(
        data.Loader(order, 24, workers=workers, num_steps=order.steps_per_epoch)
    ):
        assert [number_of(x) for x in batch.images] == batch.ids.tolist()
        numbers += batch.ids.tolist()
        counts = {
            name: counts.get(name, 0) + batch.bad.get(name, 0) for name in {*counts, *batch.bad}
        }
        if step == 0:
            for path in glob.glob(f"{tmp_path}/*.tar"):
                os.truncate(path, os.path.getsize(path) * 3 // 4)
    assert (
        set(counts) == {"missing from shard"}
        and 0 < counts["missing from shard"] <= 30
        and len(numbers) == 120
        and len(set(numbers)) >= 90
    )


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"shards": 3}',
        '{"shards": {"00000.tar": 3}}',
        '{"shards": {"00000.tar": {"txt": "3"}}}',
        "[" * 100_000,
        "\0",
    ],
    ids=range(7),
)
def test_an_index_that_is_none(tmp_path, content):
    pattern = write_shards(tmp_path, (2,))
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(
        ConfigError, match="index.json is not an index that ingest.index wrote: move it away"
    ):
        load_index(pattern)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"successes": "3"}',
        '{"successes": -3}',
        '{"successes": 1e3}',
        '{"successes": 9999999}',
        "[" * 100_000,
        "\0",
    ],
    ids=range(7),
)
def test_statistics_that_are_none(tmp_path, content):
    pattern = write_shards(tmp_path, (2,))
    (tmp_path / "00000_stats.json").write_text(content)
    assert load_index(pattern).num_samples == 2


# ---- commands ----


def test_a_command_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.urls.PIPE_TIMEOUT", 0.3)
    path, before = expand(write_shards(tmp_path, (30,)))[0], zombies()
    for command in (
        "cat {} | sleep {}",
        "head -c 9999 {}; sleep {}",
        "sleep {1} & cat {0} >/dev/null",
        "exec >&-; sleep {1}",
    ):
        seconds = next(SLEEPS)
        url = "pipe:" + command.format(path, seconds)
        match = r"nothing came for 0.3 s" if "exec" not in command else "the command failed"
        with pytest.raises(
            workers.ShardError, match=r"cannot be read \(4 attempts\): .*" + match
        ) as error:
            read_all(Index([url], np.array([30]), ("txt",)))
        assert url in str(error.value)
        with pytest.raises(ConfigError, match=match) as error:
            load_index(url)
        end = time.monotonic() + 10  # what was killed needs a moment to be gone
        while (
            is_running(f"sleep\0{seconds}") or is_running(f"sleep {seconds}")
        ) and time.monotonic() < end:
            time.sleep(0.05)
        assert (
            url in str(error.value)
            and not is_running(f"sleep\0{seconds}")
            and not is_running(f"sleep {seconds}")
        )
    assert zombies() <= before


def test_a_command_that_hangs_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.urls.PIPE_TIMEOUT", 0.3)
    pattern, seconds = write_shards(tmp_path / "shards", (30, 30)), next(SLEEPS)
    (tmp_path / "slow.sh").write_text(
        f'if mkdir "$0.$(basename $1)" 2>/dev/null; then head -c 9999 "$1"; sleep {seconds}; fi; cat "$1"'
    )
    index = load_index(pattern)
    expected = load(data.Order(index, 4, 4, 5, 3), 0, 15)
    piped = index._replace(shards=expand(f"pipe:sh {tmp_path}/slow.sh {pattern}"))
    assert same(load(data.Order(piped, 4, 4, 5, 3), 0, 15), expected) and not is_running(
        f"sleep\0{seconds}"
    )
    assert len(glob.glob(f"{tmp_path}/slow.sh.*")) == 2


def test_a_command_that_fails(tmp_path):
    path = expand(write_shards(tmp_path, (30,)))[0]
    for command, status in (
        (f"head -c 9999 {path}; exit 3", 3),
        ("exit 3", 3),
        (f"head -c 9999 {path}; kill -9 $$", -9),
        (f"cat {tmp_path}/none.tar 2>/dev/null", 1),
    ):
        match = f"the command failed, exit status {status}"
        with pytest.raises(
            workers.ShardError, match=rf"cannot be read \(4 attempts\): OSError: {match}"
        ) as error:
            read_all(Index([f"pipe:{command}"], np.array([30]), ("txt",)))
        assert command in str(error.value)
        with pytest.raises(ConfigError, match=match):
            load_index(f"pipe:{command}")
    assert read_all(Index([f"pipe:cat {path}; exit 3"], np.array([30]), ("txt",))) == (
        list(range(30)),
        {},
    )  # all has come


def test_a_command_nobody_reads_to_its_end(tmp_path, capfd):
    path, seconds, before = expand(write_shards(tmp_path, (30,)))[0], next(SLEEPS), zombies()
    url = f"pipe:while cat {path}; do sleep 0; done | (dd bs=100 2>/dev/null; sleep {seconds})"
    samples = usable_samples(url, ("txt",), range(30))
    assert len(next(samples)[1]) == 2 and is_running(str(seconds))
    samples.close()
    assert not is_running(str(seconds))
    batches = iter(
        data.Loader(
            data.Order(Index([url] * 4, np.array([30] * 4), ("txt",)), 4, 4, 2),
            8,
            workers=2,
            num_steps=20,
        )
    )
    next(batches)
    assert is_running(str(seconds))
    del batches
    for _ in range(100):
        if not is_running(str(seconds)):
            break
        time.sleep(0.1)
    assert not is_running(str(seconds)) and zombies() <= before and capfd.readouterr().err == ""


# ---- hostile tars ----


def header_of(name, length, type=tarfile.REGTYPE, **other):
    """A tar header of 512 bytes; `other` overwrites fields of it, and the sum is made right again."""
    info = tarfile.TarInfo(name)
    info.size, info.type = length, type
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    for field, content in other.items():
        start = {"size": 124, "isextended": 482, "realsize": 483}[field]
        block[start : start + len(content)] = content
    return summed(block)


def summed(block):
    """A header with a right checksum."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content):
    return content + bytes(-len(content) % 512)


def pax(*records):
    """A pax header with these records, "key=value" or bytes as they are."""
    content = b"".join(
        r
        if isinstance(r, bytes)
        else next(
            b"%d %s\n" % (n, r.encode())
            for n in range(999)
            if len(b"%d %s\n" % (n, r.encode())) == n
        )
        for r in records
    )
    return header_of("x", len(content), tarfile.XHDTYPE) + padded(content)


HOSTILE = {
    "a size below zero, which leads back to itself": pax("size=-1536") + header_of("9.jpg", 10),
    "a size below zero, which leads nowhere": pax("size=-99999") + header_of("9.jpg", 10),
    "a size below zero in the header": header_of("9.jpg", 0, size=b"\xff" * 12),
    "a size of 2 ** 87": header_of("9.jpg", 0, size=b"\x80" + b"\x7f" * 11),
    "a name of 4 GB": header_of("x", 4 << 30, tarfile.GNUTYPE_LONGNAME),
    "a name of 60 kB": header_of("x", 60_000, tarfile.GNUTYPE_LONGNAME) + bytes(60_416),
    "a pax header of 4 GB": header_of("x", 4 << 30, tarfile.XHDTYPE),
    "a pax header made for quadratic search": header_of("x", 60_000, tarfile.XHDTYPE)
    + padded(b"1" * 60_000)
    + header_of("9.jpg", 0),
    "a thousand pax headers": pax("path=x") * 3000,
    "a pax header in an unknown script": pax("hdrcharset=\xff", "path=\xff")
    + header_of("9.jpg", 0),
    "a pax record of length 0": pax(b"0 path=x\n") + header_of("9.jpg", 0),
    "a sparse file of 1 TB": header_of(
        "9.jpg", 512, tarfile.GNUTYPE_SPARSE, realsize=b"10000000000000"
    )
    + bytes(512),
    "a sparse map without an end": header_of(
        "9.jpg", 512, tarfile.GNUTYPE_SPARSE, isextended=b"\1"
    ),
    "a sparse file by pax": pax(
        "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=99999999999"
    )
    + header_of("9.jpg", 512)
    + padded(b"9\n1\n"),
    "an unknown type": header_of("9.jpg", 1 << 40, b"~"),
    "a name that is no text": header_of("\udcff\udcfe.jpg", 0) + header_of("\udcff\udcfe.txt", 0),
    "a name that moves the cursor": header_of("\x1b[2J.jpg", 0) + header_of("\x1b[2J.txt", 0),
    "an absolute size of nothing": header_of("9.jpg", 0, size=b"x" * 12),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("scheme", ["", "pipe:cat "])
def test_hostile_headers(tmp_path, name, scheme, monkeypatch):
    monkeypatch.setattr("ingest.reader.BACK_OFF", ())
    good = b"".join(
        header_of(n, len(content)) + padded(content) for n, content in sample(1) + sample(2)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start, content in (("first", HOSTILE[name] + good), ("later", good + HOSTILE[name])):
        path = tmp_path / f"{start}.tar"
        path.write_bytes(content + bytes(1024))
        assert bounded(f"{scheme}{path}", 2, str(tmp_path / "index.json"), verify=True) in (
            "refused",
            "read",
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_names_do_not_move_the_cursor(tmp_path, capsys):
    key = "\x1b[2J\udcff"
    path = tmp_path / "x.tar"
    path.write_bytes(header_of(f"{key}.jpg", 0) + header_of(f"{key}.txt", 0) + bytes(1024))
    assert load_index(str(path), verify=True).num_samples == 1
    assert r"x.tar '\x1b[2J\udcff': corrupt image" in capsys.readouterr().out
    path.write_bytes(header_of(f"0.{key}", 0) + header_of("0.txt", 0) + bytes(1024))
    with pytest.raises(ConfigError, match=r"it holds 1 '\\x1b\[2j\\udcff', 1 txt"):
        load_index(str(path), verify=True)


def test_sparse_files_are_passed_over(tmp_path):
    """A header of one block would become up to 64 MB of zeros in memory."""
    sparse = header_of("9.jpg", 0, tarfile.GNUTYPE_SPARSE, realsize=b"%011o\0" % 50_000_000)
    text = header_of("9.txt", 1) + padded(b"9") + bytes(1024)
    (tmp_path / "x.tar").write_bytes(
        b"".join(header_of(name, len(content)) + padded(content) for name, content in sample(1))
        + sparse
        + text
    )
    assert count_samples(str(tmp_path / "x.tar"), ("txt",), False, "") == (1, {"no image": 1})


REASONS = {
    "corrupt image",
    "no caption",
    "empty caption",
    "missing from shard",
    "too many pixels",
    "file too large",
}


def bounded(url, count, index_path, seconds=20, **options):
    """Index a shard and read it, and read it by an index that says `count` -> "read" or "refused". Whatever else happens is a failure."""

    def too_long(*_):
        raise AssertionError(f"{url}: {seconds} s have passed")

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    result = "read"
    try:
        for make in (
            lambda: load_index(url, path=index_path, **options),
            lambda: Index([url], np.array([count]), ("txt",)),
        ):
            try:
                numbers, bad = read_all(make())
                assert set(bad) <= REASONS
            except (ConfigError, workers.ShardError):
                result = "refused"
            if os.path.exists(index_path):
                os.remove(index_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return result


def test_nothing_is_written_and_no_link_followed(tmp_path):
    """Names that lead elsewhere are only names; links, devices and folders are passed over."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    outside = tmp_path / "deep" / "er"
    outside.mkdir(parents=True)
    path = str(outside / "x.tar")
    with tarfile.open(path, "w") as tar:

        def add(name, content=b"", **fields):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(content))

        for number, key in enumerate(
            ("../../up", "/etc/absolute", "~/home", "a/../../b", "$(touch bad)", "; touch bad")
        ):
            add(f"{key}.jpg", picture(number, "jpg"), mode=0o4777)
            add(f"{key}.txt", b"__import__('os').system('touch bad')")
        for number, (type, target) in enumerate(
            [
                (tarfile.SYMTYPE, str(secret)),
                (tarfile.LNKTYPE, "../../up.txt"),
                (tarfile.SYMTYPE, "../../secret.txt"),
                (tarfile.CHRTYPE, ""),
                (tarfile.FIFOTYPE, ""),
                (tarfile.DIRTYPE, ""),
            ]
        ):
            add(f"link{number}.jpg", picture(9, "jpg"))
            add(f"link{number}.txt", type=type, linkname=target, devmajor=1, devminor=5)

    def everything():
        return sorted(
            os.path.join(folder, name) for folder, _, names in os.walk(tmp_path) for name in names
        )

    before = everything()
    for url in (path, f"pipe:cat {path}"):
        index = load_index(url, path=str(tmp_path / "index.json"))
        assert index.num_samples == 6 and read_all(index) == (list(range(6)), {})
        reader = Reader(index)
        assert all(
            tar_files.captions(reader.read(i), "") == ["__import__('os').system('touch bad')"]
            for i in range(6)
        )
        assert count_samples(url, ("txt",), False, "")[1] == {"no caption": 6}
    os.remove(tmp_path / "index.json")
    assert everything() == before and not os.path.exists("bad")


def test_nothing_of_the_data_is_run():
    """The modules that read data call nothing that runs or unpickles it, or unpacks a tar to disk."""
    for name in (
        "data.py",
        "runtime/checkpoint.py",
        *sorted(glob.glob("ingest/*.py", root_dir=ROOT)),
    ):
        with open(os.path.join(ROOT, name)) as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {"pickle", "marshal", "shelve", "dill"} & {
                    getattr(node, "module", None),
                    *(a.name for a in node.names),
                }, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "os.system") and called.rpartition(
                    "."
                )[2] not in ("extract", "extractall"), (name, called)
                if called == "torch.load":
                    assert "weights_only=True" in ast.unparse(node)


# ---- bad inputs by the hundred ----


def mutated(content, random, headers=()):
    """Bytes, damaged in one of many ways; some headers of a tar are damaged and their sums made right again."""
    content = bytearray(content)
    at, length, kind = (
        random.randrange(len(content)),
        random.choice((1, 3, 100, 512, 1536)),
        random.randrange(9),
    )
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        del content[at : at + length]
    elif kind == 2:
        at -= at % 512 * random.randrange(2)
        content[at:at] = random.choice(
            (bytes(length), random.randbytes(length), content[at : at + length])
        )
    elif kind == 3:
        content[at : at + length] = random.choice(
            (bytes(length), b"\xff" * length, random.randbytes(length))
        )
    elif kind < 6 or not headers:
        for _ in range(random.choice((1, 2, 20))):
            content[random.randrange(len(content))] = random.randrange(256)
    else:
        start = random.choice(headers)
        block = content[start : start + 512]
        if kind == 6:
            block[124:136] = random.choice(
                (
                    b"%011o\0" % random.randrange(1 << 33),
                    b"\x80" + random.randbytes(11),
                    b"\xff" + random.randbytes(11),
                    random.randbytes(12),
                )
            )
        elif kind == 7:
            block[156] = random.choice(b"01234567LKxgXSDMVN\0~")
        else:
            block[random.randrange(512)] = random.randrange(256)
        content[start : start + 512] = summed(block)
    return bytes(content)


def test_damaged_shards_at_random(tmp_path, monkeypatch):
    """Each is read, with its bad samples counted, or refused: no other exception, no hang, no memory."""
    monkeypatch.setattr("ingest.reader.BACK_OFF", ())
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    monkeypatch.setattr("ingest.index.tqdm", lambda results, *_, **__: results)
    draw, originals, results = random.Random(0), [], {"read": 0, "refused": 0}
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "good.tar"
        with tarfile.open(path, "w", format=format) as tar:
            for name, content in sample(1) + sample(2) + sample(3) + sample(4):
                long = "ü" * 60 + "/" + "n" * 90 + "/" + name
                info = tarfile.TarInfo(name if format == tarfile.USTAR_FORMAT else long)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        content = path.read_bytes()
        headers = [
            at
            for at in range(0, len(content) - 512, 512)
            if content[at + 257 : at + 262] == b"ustar"
        ]
        originals.append((content, headers))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "bad.tar"
    for number in range(300):
        content, headers = draw.choice(originals)
        path.write_bytes(mutated(content, draw, headers))
        results[
            bounded(
                f"pipe:cat {path}" if number % 10 == 0 else str(path),
                4,
                str(tmp_path / "index.json"),
            )
        ] += 1
    print(results)
    assert sum(results.values()) == 300 and min(results.values()) > 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_damaged_files_at_random(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    draw, results, tokenize = random.Random(0), {"read": 0, "bad": 0}, data.Tokenizer(77)
    pictures = [
        encoded(),
        encoded(progressive=True),
        encoded(format="PNG"),
        encoded(format="WEBP"),
        encoded(format="WEBP", mode="RGBA"),
    ]
    texts = [
        json.dumps({"t": ["a caption", "é日本 \ud83d\ude00"]}).encode(),
        '{"t": "été"}'.encode(),
        json.dumps({"t": "x" * 300}).encode(),
    ]
    for _ in range(300):
        for content in pictures + texts:
            bad = mutated(content, draw)
            try:
                if content in texts:
                    assert (
                        tokenize(tar_files.captions({"txt": bad}, "")).shape == (1, 77)
                        and tokenize(tar_files.captions({"json": bad}, "t")).shape[1] == 77
                    )
                else:
                    assert data.training_sample(
                        {"jpg": bad, "txt": b"x"}, np.random.default_rng(0), 8, (0.9, 1.0), ""
                    )[0].shape == (3, 8, 8)
                results["read"] += 1
            except images.BadSample:
                results["bad"] += 1
    print(results)
    assert sum(results.values()) == 2400 and min(results.values()) > 300
