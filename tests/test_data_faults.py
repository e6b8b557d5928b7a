"""Data with what should not be in it: damaged, hostile, missing, hanging. One test a fault."""

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
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data
from config import ConfigError
from helpers import equal, refused
from ingest import images
from ingest import tar as tar_files
from ingest.counting import count_samples
from ingest.index import Index, load_index
from ingest.reader import Reader, ShardError
from ingest.sources import class_number
from ingest.tar import MAX_CHARACTERS, usable_samples
from ingest.urls import expand
from samples import load, number_of, order_of, picture, png, sample, write_shards, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = os.path.dirname(data.__file__)

# A tokenizer takes a quarter of a second to make: it is made once for all of these tests.
TOKENIZER = functools.cache(data.Tokenizer)

# Lengths of sleep that tell the commands of these tests from all others on the machine.
SLEEPS = itertools.count(1000 + os.getpid() * 1000)


@pytest.fixture(autouse=True)
def one_tokenizer(monkeypatch):
    monkeypatch.setattr(data, "Tokenizer", TOKENIZER)


def encoded(size=(40, 30), mode="RGB", format="JPEG", **options):
    """An image of noise -> bytes. size: (width, height); options are Pillow's."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format, **options)
    return file.getvalue()


def reason(function, *args):
    """Why a function finds a sample bad."""
    with pytest.raises(images.BadSample) as error:
        function(*args)
    return str(error.value)


def read_all(index, size=8, **options):
    """One epoch -> (numbers of the samples, sorted; counts of the bad ones by reason)."""
    order = data.Order(index, 1, 1, 4)
    numbers = []
    bad = Counter()
    for batch in data.Loader(order, size, workers=0, num_steps=order.steps_per_epoch, **options):
        numbers += batch.ids.tolist()
        bad.update(batch.bad)
    return sorted(numbers), bad


def memory():
    """The most memory that this process has had so far, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def count_file(path, kinds=("txt",)):
    """-> (usable samples, {"EXTENSION REASON": number} of what looks like one and is none)."""
    count, left_out, _ = count_samples(str(path), kinds, verify=False, caption_key="")
    return count, left_out


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


def sleeps(seconds):
    """Whether a command `sleep SECONDS` is running."""
    return is_running(f"sleep\0{seconds}") or is_running(f"sleep {seconds}")


def wait_until_gone(is_there, seconds=10):
    """Whether a process ends in time: what was killed needs a moment to be gone."""
    end = time.monotonic() + seconds
    while is_there() and time.monotonic() < end:
        time.sleep(0.05)
    return not is_there()


def zombies():
    """The children of this process that have ended and that nobody has waited for."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as f:
                state, parent = f.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state == "Z" and int(parent) == os.getpid():
            found.add(path)
    return found


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
    assert images.declared_size(content) == (height, width)
    assert images.decode({"jpg": content}).shape == (3, height, width)


def bombs():
    """Small files that declare, or have, far too many pixels -> {extension: bytes}."""
    jpeg = encoded()
    plain_png = encoded(format="PNG")
    lossy = encoded(format="WEBP")
    lossless = encoded(format="WEBP", lossless=True)
    extended = encoded(format="WEBP", icc_profile=bytes(99))

    frame = jpeg.index(b"\xff\xc0")
    header = b"IHDR" + struct.pack(">II", 100_000, 100_000) + plain_png[24:29]
    true_pixels = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(true_pixels, "PNG")
    assert len(true_pixels.getvalue()) < 100_000

    # fmt: off
    return {
        "jpg": jpeg[: frame + 5] + struct.pack(">HH", 65000, 65000) + jpeg[frame + 9 :],
        "png": plain_png[:12] + header + struct.pack(">I", zlib.crc32(header)) + plain_png[33:],
        "webp": lossy[:26] + struct.pack("<HH", 16383, 16383) + lossy[30:],
        # The extension does not decide what an image is.
        "jpeg": lossless[:21] + b"\xff\xff\xff\x0f" + lossless[25:],
        "png ": extended[:24] + b"\xff\xff\xff\xff\xff\x00" + extended[30:],
        " png": true_pixels.getvalue(),
    }
    # fmt: on


def test_decompression_bombs(tmp_path, monkeypatch):
    changes = {}
    for number, content in enumerate(bombs().values()):
        changes[f"s{number}"] = {"jpg": content, "png": None, "webp": None}
    index = load_index(write_shards(tmp_path, (10,), **changes))

    decoded = []
    decode = images.decode_image

    def counting(content, mode):
        decoded.append(1)
        return decode(content, mode)

    monkeypatch.setattr(images, "decode_image", counting)
    numbers, bad = read_all(index)
    assert bad == {"too many pixels": 6}
    assert set(numbers) == set(range(6, 10))
    assert len(numbers) == 10
    assert len(decoded) < 10  # PNGs are Pillow's


def test_a_line_of_pixels(tmp_path):
    """Few pixels, but a thousand times as many once the shorter side has been resized."""
    files = {"png": png(torch.zeros(3, 1, 2500, dtype=torch.uint8)), "txt": b"a line"}
    assert reason(images.evaluation_image, files, 224) == "too many pixels"

    generator = np.random.default_rng(0)
    image, _ = data.training_sample(files, generator, 24, (0.9, 1.0), "")
    assert image.shape == (3, 24, 24)


def test_no_image_under_its_name():
    film = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    for format, more_frames in (
        ("GIF", film[1:]),
        ("GIF", []),
        ("WEBP", film[1:]),
        ("TIFF", []),
        ("BMP", []),
    ):
        options = {"save_all": True, "append_images": more_frames} if more_frames else {}
        file = io.BytesIO()
        film[0].save(file, format, **options)
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


def png_chunk(content):
    """Compressed pixels -> a chunk of a PNG with its length and checksum."""
    checksum = zlib.crc32(b"IDAT" + content)
    return struct.pack(">I", len(content)) + b"IDAT" + content + struct.pack(">I", checksum)


def test_pngs_with_broken_pixels():
    """On most of these, torchvision's decoder ends the process."""
    content = encoded(format="PNG")
    start = content.index(b"IDAT") - 4
    (length,) = struct.unpack(">I", content[start : start + 4])
    end = start + 12 + length
    before = content[:start]
    pixels = content[start + 8 : end - 4]
    after = content[end:]
    assert before + png_chunk(pixels) + after == content
    assert pixels[0] == 0x78  # zlib's first byte

    raw = zlib.decompress(pixels)
    chunk = bytearray(png_chunk(pixels))
    chunk[30] ^= 1
    broken = {
        "half": content[: len(content) // 2],
        "header": content[:29] + bytes(4) + content[33:],
        "no zlib": before + png_chunk(b"x" * 100) + after,
        "one bit": before + bytes(chunk) + after,
        "filter": before + png_chunk(zlib.compress(b"\x09" + raw[1:])) + after,
        "too few": before + png_chunk(zlib.compress(raw[:1000])) + after,
    }
    for name, bad in broken.items():
        assert reason(images.decode, {"png": bad}) == "corrupt image", name


def test_files_that_are_too_large(tmp_path):
    """An image of three gigabytes (a hole in the file) and a caption of 2 MB are never read."""
    before = memory()
    files = [("0.txt", b"0"), *sample(1), *sample(2, txt=b"word " * 400_000), *sample(3)]
    rest = write_tar(tmp_path / "rest.tar", files)
    path = tmp_path / "large.tar"
    with open(path, "wb") as f, open(rest, "rb") as rest_of_tar:
        f.write(header_of("0.jpg", 3 << 30))
        f.seek(3 << 30, os.SEEK_CUR)
        f.write(rest_of_tar.read())

    index = load_index(str(path))
    assert index.num_samples == 4
    _, bad = read_all(index)
    assert bad == {"file too large": 2}
    assert memory() - before < 300_000


def test_long_captions_are_cut_before_they_cost_time():
    tokenize = data.Tokenizer(77)
    for text in ("word " * 100_000, "w" * 500_000, "&lt;" * 100_000, "é" * 200_000):
        start = time.monotonic()
        (cut,) = tar_files.captions({"txt": text.encode()}, "")
        tokens = tokenize(cut)
        assert len(cut) == MAX_CHARACTERS
        assert time.monotonic() - start < 2
        assert torch.equal(tokens, tokenize(text[:20_000]))


def test_captions_that_are_hard_to_read():
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
    for content in (b'{"t": null}', b'{"t": []}', b'{"t": [1, {}, "  "]}'):
        assert reason(tar_files.captions, {"json": content}, "t") == "empty caption"
    for content in (b'{"t": {"a": "b"}}', b'{"t": 7}', b'{"t": [1, {}]}'):
        assert reason(tar_files.captions, {"json": content}, "t") == "caption is no text"
    assert reason(tar_files.captions, {"jpg": b""}, "") == "no caption"
    assert reason(tar_files.captions, {"txt": b" \n\t"}, "") == "empty caption"

    tokenize = data.Tokenizer(77)
    for content in (b'{"t": "\\ud800 \\u0000 x"}', b'{"t": "\\u202e"}'):
        assert tokenize(tar_files.captions({"json": content}, "t")).shape == (1, 77)
    assert tar_files.captions({"txt": b"\xff bytes"}, "") == ["\ufffd bytes"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_as_windows_writes_them(encoding):
    """A mark at the beginning says that a text is UTF-16; it is not part of the caption."""
    assert tar_files.captions({"txt": "ein Bär\r\n".encode(encoding)}, "") == ["ein Bär"]


def test_classes_that_are_no_numbers():
    for content in (b"9" * 5000, b"-1", b"1e3", b"\xd9\xa1", b""):
        assert reason(class_number, {"cls": content}) == "class is not a number"
    assert class_number({"cls": b"7\n"}) == 7


# ---- shards: names, what is left out, verify ----


@pytest.mark.parametrize(
    "names, expected, left_out",
    [
        (("1.jpg", "1.txt", "1.jpg", "1.txt"), [1, 2], {}),
        (("1.jpg", "1.jpg", "1.txt"), [2], {"jpg without caption": 1}),
        (("1.jpg", "1.txt", "1.txt"), [1], {"txt without image": 1}),
        (("1.jpg", "1.txt", "2.jpg", "2.txt", "1.jpg", "1.txt"), [1, 2, 3], {}),
    ],
)
def test_a_repeated_name_begins_another_sample(tmp_path, names, expected, left_out):
    """expected: the numbers of the images, in the order of the file, that make up samples."""
    files = []
    numbers = itertools.count(1)
    for name in names:
        is_image = name.endswith("jpg")
        files.append((name, picture(next(numbers), "jpg") if is_image else name.encode()))
    path = write_tar(tmp_path / "x.tar", files)
    assert count_file(path) == (len(expected), left_out)

    index = load_index(path, allow_left_out=0.5)
    assert index.num_samples == len(expected)
    reader = Reader(index)
    read = [number_of(images.decode(reader.read(i))) for i in range(len(expected))]
    assert read == expected


def test_what_is_left_out_is_said_at_each_start(tmp_path, capsys):
    without_text = {"txt": None, "json": None}
    without_image = {"jpg": None, "png": None, "webp": None}
    pattern = write_shards(tmp_path, (8, 8), s3=without_text, s9=without_text, s1=without_image)
    expected = f"left out of {pattern}: 2 jpg without caption, 1 txt without image\n"
    for _ in range(2):
        index = load_index(pattern, allow_left_out=0.2)
        assert index.num_samples == 13
        assert index.left_out.total() == 3
        assert capsys.readouterr().err.count(expected) == 1


def test_a_set_of_which_too_much_is_left_out_is_refused_at_each_start(tmp_path):
    changes = {f"s{number}": {"txt": None, "json": None} for number in (0, 3, 6)}
    pattern = write_shards(tmp_path, (8, 8), **changes)
    for _ in range(2):
        with pytest.raises(ConfigError) as error:
            load_index(pattern)
        lines = str(error.value).split("\n  ")
        assert "3 of 16 samples (18.8%) would be left out, more than allow_left_out = 0" in lines[0]
        assert lines[1].startswith("3 jpg without caption: add it")
        assert lines[2].endswith("--allow_left_out=0.19")
        assert not (tmp_path / "index.json").exists()

    assert load_index(pattern, allow_left_out=0.19).num_samples == 13
    with pytest.raises(ConfigError, match="3 of 16 samples"):
        load_index(pattern)


def test_a_run_refuses_a_set_of_which_too_much_is_left_out(tmp_path):
    changes = {f"s{number}": {"txt": None, "json": None} for number in (0, 3, 6)}
    settings = {
        "train_data": write_shards(tmp_path / "a", (16,), **changes),
        "out_dir": str(tmp_path / "run"),
    }
    refused("3 of 16 samples", "--allow_left_out=0.19", **settings)
    refused("3 of 16 samples", plan=True, **settings)
    refused("batch_size", allow_left_out=0.19, **settings)

    good = write_shards(tmp_path / "b", (64,))
    evaluated = dict(train_data=good, eval_data=settings["train_data"], out_dir=str(tmp_path / "x"))
    refused("3 of 16 samples", **evaluated)
    assert sorted(os.listdir(tmp_path / "a")) == ["00000.tar", "index.json"]


NAMES_LEFT_OUT = [
    (["1.svg", "1.txt"], {"svg of a kind that is not read": 1}),
    (["1.gif"], {"gif of a kind that is not read": 1}),
    (["1.svg", "1.png", "1.txt"], {}),
    (["1.jpg", "1.json"], {"jpg with KEY.json but without KEY.txt": 1}),
    (["1.json", "2.wav"], {}),
    (["1.jpg", "1.cap"], {"jpg with KEY.caption, KEY.cap or KEY.text, but without KEY.txt": 1}),
    (["a.b.jpg", "a.b.txt", "a.c.jpg", "a.c.txt"], {"jpg with a dot in the name": 2}),
    (["a.jpg", "a.txt", "a.b.png", "a.b.txt"], {"png with a dot in the name": 1}),
    (["a.jpg", "a.txt", "a.seg.png"], {}),
]


@pytest.mark.parametrize("names, expected", NAMES_LEFT_OUT, ids=str)
def test_what_looks_like_a_sample(tmp_path, names, expected):
    files = [("0.jpg", b""), ("0.txt", b""), *((name, b"") for name in names)]
    _, left_out = count_file(write_tar(tmp_path / "x.tar", files))
    assert left_out == expected


def test_a_caption_of_the_other_kind(tmp_path):
    files = [("0.jpg", b""), ("0.json", b""), ("1.jpg", b""), ("1.txt", b"")]
    _, left_out = count_file(write_tar(tmp_path / "x.tar", files), ("json",))
    assert left_out == {"jpg with KEY.txt but without KEY.json": 1}


def test_an_index_without_numbers_of_what_is_left_out_is_valid(tmp_path):
    """As earlier versions wrote them."""
    pattern = write_shards(tmp_path, (4,), s0={"txt": None, "json": None})
    load_index(pattern, allow_left_out=0.3)
    with open(tmp_path / "index.json") as f:
        stored = json.load(f)
    assert stored["shards"]["00000.tar"].pop("txt left out") == {"jpg without caption": 1}

    (tmp_path / "index.json").write_text(json.dumps(stored))
    assert load_index(pattern).num_samples == 3


# ---- shards whose files are in no order ----


def write_scattered(path, number=6):
    """A tar as plain `tar -cf` makes it of a folder: captions and images in any order."""
    files = []
    for i in range(number):
        files += sample(i)
    random.Random(1).shuffle(files)
    return write_tar(path, files)


@pytest.mark.parametrize("scheme", ["", "pipe:cat "])
@pytest.mark.parametrize("options", [{}, {"verify": True}, {"evaluation": True}], ids=str)
def test_a_shard_whose_files_are_scattered_is_refused(tmp_path, scheme, options):
    """However much may be left out."""
    url = scheme + write_scattered(tmp_path / "x.tar")
    match = r"x.tar holds image and caption of \d samples apart .*tar --sort=name -cf NEW.tar"
    with pytest.raises(ConfigError, match=match):
        load_index(url, count_remote=True, allow_left_out=1, **options)


def test_the_number_of_torn_samples(tmp_path):
    names = ["0.jpg", "0.txt", "1.jpg", "2.txt", "3.jpg", "2.jpg", "1.txt", "4.txt"]
    path = write_tar(tmp_path / "x.tar", [(name, b"") for name in names])
    with pytest.raises(ConfigError, match="image and caption of 2 samples apart"):
        load_index(path)


def test_a_scattered_shard_packed_again_as_the_message_says(tmp_path):
    path = write_scattered(tmp_path / "x.tar")
    folder = tmp_path / "files"
    with pytest.raises(ConfigError) as error:
        load_index(path)
    unpack, pack = str(error.value).split("pack it again: ")[1].split(", then ")
    for command in (unpack, pack):
        command = command.replace("FOLDER", str(folder)).replace("NEW", str(tmp_path / "new"))
        subprocess.run(command, shell=True, check=True)
    assert load_index(str(tmp_path / "new.tar")).num_samples == 6


# ---- indexing that is ended before its end ----


KILLED_AT_THE_THIRD_SHARD = """
import os
import sys
from ingest import counting, index

def slow_count(self, pattern, todo):
    for number, result in enumerate(count(self, pattern, todo)):
        if number == 2:
            os.kill(os.getpid(), 9)
        yield result

count = counting.ShardCounter.count
counting.ShardCounter.count = slow_count
index.SAVE_SECONDS = 0
index.load_index(sys.argv[1])
"""


def test_indexing_that_is_killed_goes_on_where_it_was(tmp_path, own_cache, monkeypatch, capsys):
    """Nothing is written beside the shards before the end."""
    pattern = write_shards(tmp_path / "a", (2, 3, 4, 5))
    command = [sys.executable, "-c", KILLED_AT_THE_THIRD_SHARD, pattern]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert not (tmp_path / "a" / "index.json").exists()

    counted = []

    def count(url, **options):
        counted.append(os.path.basename(url))
        return count_samples(url, **options)

    monkeypatch.setattr("ingest.counting.count_samples", count)
    assert load_index(pattern).counts.tolist() == [2, 3, 4, 5]
    assert sorted(counted) == ["00002.tar", "00003.tar"]
    assert capsys.readouterr().err.count("index written: ") == 1
    assert (tmp_path / "a" / "index.json").exists()
    assert os.listdir(own_cache) == []


def test_damaged_shards_are_all_named(tmp_path, own_cache):
    pattern = write_shards(tmp_path, (2,) * 16)
    sizes = {number: 0 if number % 2 else 700 for number in range(3, 15)}
    for number, size in sizes.items():
        os.truncate(tmp_path / f"{number:05d}.tar", size)

    with pytest.raises(ConfigError) as error:
        load_index(pattern)
    first, *named, last = str(error.value).split("\n")
    assert first == "these shards cannot be used:"
    assert last == "  and 2 more"
    assert len(named) == 10
    for line, (number, size) in zip(named, sizes.items()):
        assert f"{number:05d}.tar ({size} bytes) is unreadable or damaged" in line

    # The good ones are kept, but not among the user's data.
    assert not (tmp_path / "index.json").exists()
    (draft,) = own_cache.glob("*.json")
    shards = json.loads(draft.read_text())["shards"]
    counted = [name for name, entry in shards.items() if "txt" in entry]
    assert counted == [f"{number:05d}.tar" for number in (0, 1, 2, 15)]


def test_a_single_damaged_shard_is_named(tmp_path):
    write_shards(tmp_path, (2,))
    os.truncate(tmp_path / "00000.tar", 0)
    match = r"^\S*00000.tar \(0 bytes\) is unreadable or damaged after 0 samples.*empty header"
    with pytest.raises(ConfigError, match=match):
        load_index(str(tmp_path / "00000.tar"))


def test_many_damaged_shards_end_the_indexing(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.counting.MAX_DAMAGED", 20)
    for number in range(60):
        (tmp_path / f"{number:05d}.tar").touch()
    with pytest.raises(ConfigError, match="\n  and 10 more, at least$"):
        load_index(f"{tmp_path}/*.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes(tmp_path, workers):
    """Workers have the real back-off, seven seconds."""
    order = order_of(write_shards(tmp_path, (40, 40, 40)), 4, 4, 2)
    loader = data.Loader(order, 24, workers=workers, num_steps=order.steps_per_epoch)
    match = r"0000[012].tar cannot be read \(4 attempts\): FileNotFoundError"
    steps = 0
    with pytest.raises(ShardError, match=match):
        for _ in loader:
            steps += 1
            # Those that are open are read to their end.
            for path in glob.glob(f"{tmp_path}/*.tar"):
                os.remove(path)
    assert 1 < steps < order.steps_per_epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_gets_shorter_while_it_is_read(tmp_path, workers):
    order = order_of(write_shards(tmp_path, (60, 60)), 4, 4, 2)
    loader = data.Loader(order, 24, workers=workers, num_steps=order.steps_per_epoch)
    bad = Counter()
    numbers = []
    for step, batch in enumerate(loader):
        assert [number_of(image) for image in batch.images] == batch.ids.tolist()
        numbers += batch.ids.tolist()
        bad.update(batch.bad)
        if step == 0:
            for path in glob.glob(f"{tmp_path}/*.tar"):
                os.truncate(path, os.path.getsize(path) * 3 // 4)

    assert set(bad) == {"missing from shard"}
    assert 0 < bad["missing from shard"] <= 30
    assert len(numbers) == 120
    assert len(set(numbers)) >= 90


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
    match = "index.json is not an index that ingest.index wrote: move it away"
    with pytest.raises(ConfigError, match=match):
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


@pytest.mark.parametrize(
    "command, match",
    [
        ("cat {path} | sleep {seconds}", "nothing came for 0.3 s"),
        ("head -c 9999 {path}; sleep {seconds}", "nothing came for 0.3 s"),
        ("sleep {seconds} & cat {path} >/dev/null", "nothing came for 0.3 s"),
        ("exec >&-; sleep {seconds}", "the command failed"),
    ],
)
def test_a_command_that_hangs(tmp_path, monkeypatch, command, match):
    monkeypatch.setattr("ingest.urls.PIPE_TIMEOUT", 0.3)
    (path,) = expand(write_shards(tmp_path, (30,)))
    before = zombies()
    seconds = next(SLEEPS)
    url = "pipe:" + command.format(path=path, seconds=seconds)

    with pytest.raises(ShardError, match=rf"cannot be read \(4 attempts\): .*{match}") as error:
        read_all(Index([url], np.array([30]), ("txt",)))
    assert url in str(error.value)
    with pytest.raises(ConfigError, match=match) as error:
        load_index(url, count_remote=True)
    assert url in str(error.value)

    assert wait_until_gone(lambda: sleeps(seconds))
    assert zombies() <= before


def test_a_command_that_hangs_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.urls.PIPE_TIMEOUT", 0.3)
    pattern = write_shards(tmp_path / "shards", (30, 30))
    seconds = next(SLEEPS)
    (tmp_path / "slow.sh").write_text(f"""
        if mkdir "$0.$(basename $1)" 2>/dev/null; then
            head -c 9999 "$1"
            sleep {seconds}
        fi
        cat "$1"
    """)

    index = load_index(pattern)
    expected = load(data.Order(index, 4, 4, 5, 3), 0, 15)
    piped = index._replace(shards=expand(f"pipe:sh {tmp_path}/slow.sh {pattern}"))
    assert equal(load(data.Order(piped, 4, 4, 5, 3), 0, 15), expected)
    assert not sleeps(seconds)
    assert len(glob.glob(f"{tmp_path}/slow.sh.*")) == 2


@pytest.mark.parametrize(
    "command, status",
    [
        ("head -c 9999 {path}; exit 3", 3),
        ("exit 3", 3),
        ("head -c 9999 {path}; kill -9 $$", -9),
        ("cat {folder}/none.tar 2>/dev/null", 1),
    ],
)
def test_a_command_that_fails(tmp_path, command, status):
    (path,) = expand(write_shards(tmp_path, (30,)))
    command = command.format(path=path, folder=tmp_path)
    match = f"the command failed, exit status {status}"
    with pytest.raises(
        ShardError, match=rf"cannot be read \(4 attempts\): OSError: {match}"
    ) as error:
        read_all(Index([f"pipe:{command}"], np.array([30]), ("txt",)))
    assert command in str(error.value)
    with pytest.raises(ConfigError, match=match):
        load_index(f"pipe:{command}", count_remote=True)


def test_a_command_that_fails_after_its_last_byte(tmp_path):
    (path,) = expand(write_shards(tmp_path, (30,)))
    index = Index([f"pipe:cat {path}; exit 3"], np.array([30]), ("txt",))
    assert read_all(index) == (list(range(30)), {})


def test_a_command_nobody_reads_to_its_end(tmp_path, capfd):
    before = zombies()
    (path,) = expand(write_shards(tmp_path, (30,)))
    seconds = next(SLEEPS)
    url = f"pipe:while cat {path}; do sleep 0; done | (dd bs=100 2>/dev/null; sleep {seconds})"
    samples = usable_samples(url, ("txt",), range(30))
    _, files = next(samples)
    assert len(files) == 2
    assert is_running(str(seconds))
    samples.close()
    assert not is_running(str(seconds))

    order = data.Order(Index([url] * 4, np.array([30] * 4), ("txt",)), 4, 4, 2)
    batches = iter(data.Loader(order, 8, workers=2, num_steps=20))
    next(batches)
    assert is_running(str(seconds))
    del batches
    assert wait_until_gone(lambda: is_running(str(seconds)))
    assert zombies() <= before
    assert capfd.readouterr().err == ""


# ---- hostile tars ----


def header_of(name, length, type=tarfile.REGTYPE, **other):
    """A tar header of 512 bytes with a right checksum. `other` overwrites fields of it."""
    info = tarfile.TarInfo(name)
    info.size = length
    info.type = type
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    starts = {"size": 124, "isextended": 482, "realsize": 483}
    for field, content in other.items():
        start = starts[field]
        block[start : start + len(content)] = content
    return with_checksum(block)


def with_checksum(block):
    """A header with its checksum made right."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content):
    return content + bytes(-len(content) % 512)


def entry_of(name, content):
    """A file of a tar: its header and its content."""
    return header_of(name, len(content)) + padded(content)


def pax(*records):
    """A pax header with these records, "key=value" or bytes as they are."""
    content = b"".join(r if isinstance(r, bytes) else pax_record(r.encode()) for r in records)
    return header_of("x", len(content), tarfile.XHDTYPE) + padded(content)


def pax_record(text):
    """A record begins with its length, of which the digits of the length are a part."""
    for length in range(999):
        record = b"%d %s\n" % (length, text)
        if len(record) == length:
            return record


# fmt: off
HOSTILE = {
    "a size below zero, which leads back to itself":
        pax("size=-1536") + header_of("9.jpg", 10),
    "a size below zero, which leads nowhere":
        pax("size=-99999") + header_of("9.jpg", 10),
    "a size below zero in the header":
        header_of("9.jpg", 0, size=b"\xff" * 12),
    "a size of 2 ** 87":
        header_of("9.jpg", 0, size=b"\x80" + b"\x7f" * 11),
    "a name of 4 GB":
        header_of("x", 4 << 30, tarfile.GNUTYPE_LONGNAME),
    "a name of 60 kB":
        header_of("x", 60_000, tarfile.GNUTYPE_LONGNAME) + bytes(60_416),
    "a pax header of 4 GB":
        header_of("x", 4 << 30, tarfile.XHDTYPE),
    "a pax header made for quadratic search":
        header_of("x", 60_000, tarfile.XHDTYPE) + padded(b"1" * 60_000) + header_of("9.jpg", 0),
    "a thousand pax headers":
        pax("path=x") * 3000,
    "a pax header in an unknown script":
        pax("hdrcharset=\xff", "path=\xff") + header_of("9.jpg", 0),
    "a pax record of length 0":
        pax(b"0 path=x\n") + header_of("9.jpg", 0),
    "a sparse file of 1 TB":
        header_of("9.jpg", 512, tarfile.GNUTYPE_SPARSE, realsize=b"10000000000000") + bytes(512),
    "a sparse map without an end":
        header_of("9.jpg", 512, tarfile.GNUTYPE_SPARSE, isextended=b"\1"),
    "a sparse file by pax":
        pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=99999999999")
        + header_of("9.jpg", 512) + padded(b"9\n1\n"),
    "an unknown type":
        header_of("9.jpg", 1 << 40, b"~"),
    "a name that is no text":
        header_of("\udcff\udcfe.jpg", 0) + header_of("\udcff\udcfe.txt", 0),
    "a name that moves the cursor":
        header_of("\x1b[2J.jpg", 0) + header_of("\x1b[2J.txt", 0),
    "an absolute size of nothing":
        header_of("9.jpg", 0, size=b"x" * 12),
}
# fmt: on


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("scheme", ["", "pipe:cat "])
def test_hostile_headers(tmp_path, name, scheme, monkeypatch):
    monkeypatch.setattr("ingest.reader.BACK_OFF", ())
    before = memory()
    good = b"".join(entry_of(*file) for file in sample(1) + sample(2))
    shards = {"first": HOSTILE[name] + good, "later": good + HOSTILE[name]}
    for place, content in shards.items():
        path = tmp_path / f"{place}.tar"
        path.write_bytes(content + bytes(1024))
        result = bounded(f"{scheme}{path}", 2, str(tmp_path / "index.json"), verify=True)
        assert result in ("refused", "read")
    assert memory() - before < 200_000


def test_names_do_not_move_the_cursor(tmp_path, capsys):
    key = "\x1b[2J\udcff"
    path = tmp_path / "x.tar"
    path.write_bytes(header_of(f"{key}.jpg", 0) + header_of(f"{key}.txt", 0) + bytes(1024))
    with pytest.raises(ConfigError, match="1 of 1 samples cannot be used: {'corrupt image': 1}"):
        load_index(str(path), verify=True)
    assert r"x.tar '\x1b[2J\udcff': corrupt image" in capsys.readouterr().out

    path.write_bytes(header_of(f"0.{key}", 0) + header_of("0.txt", 0) + bytes(1024))
    with pytest.raises(ConfigError, match=r"it holds 1 '\\x1b\[2j\\udcff', 1 txt"):
        load_index(str(path), verify=True)


def test_sparse_files_are_passed_over(tmp_path):
    """A header of one block would become up to 64 MB of zeros in memory."""
    content = b"".join(entry_of(*file) for file in sample(1))
    content += header_of("9.jpg", 0, tarfile.GNUTYPE_SPARSE, realsize=b"%011o\0" % 50_000_000)
    content += entry_of("9.txt", b"9")
    (tmp_path / "x.tar").write_bytes(content + bytes(1024))
    assert count_file(tmp_path / "x.tar") == (1, {"txt without image": 1})


REASONS = {
    "corrupt image",
    "no caption",
    "empty caption",
    "missing from shard",
    "too many pixels",
    "file too large",
}


def bounded(url, count, index_path, seconds=20, verify=False):
    """Read a shard by its index, and by one that says `count` -> "read" or "refused".

    Whatever else happens, another exception, another reason or too long a time, is a failure.
    """

    def too_long(*_):
        raise AssertionError(f"{url}: {seconds} s have passed")

    def counted():
        options = dict(path=index_path, count_remote=True, allow_left_out=1, verify=verify)
        return load_index(url, **options)

    def claimed():
        return Index([url], np.array([count]), ("txt",))

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    result = "read"
    try:
        for make_index in (counted, claimed):
            try:
                _, bad = read_all(make_index())
                assert set(bad) <= REASONS
            except (ConfigError, ShardError):
                result = "refused"
            if os.path.exists(index_path):
                os.remove(index_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return result


def add_entry(tar, name, content=b"", **fields):
    """Add a file, or what the fields of its header make of it, to an open TarFile."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


ESCAPING_KEYS = (
    "../../up",
    "/etc/absolute",
    "~/home",
    "a/../../b",
    "$(touch bad)",
    "; touch bad",
)
CODE = "__import__('os').system('touch bad')"


def write_escaping_tar(path, secret):
    """Six samples whose names lead elsewhere, and six images with a link or device as caption."""
    links = [
        (tarfile.SYMTYPE, str(secret)),
        (tarfile.LNKTYPE, "../../up.txt"),
        (tarfile.SYMTYPE, "../../secret.txt"),
        (tarfile.CHRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
        (tarfile.DIRTYPE, ""),
    ]
    with tarfile.open(path, "w") as tar:
        for number, key in enumerate(ESCAPING_KEYS):
            add_entry(tar, f"{key}.jpg", picture(number, "jpg"), mode=0o4777)
            add_entry(tar, f"{key}.txt", CODE.encode())
        for number, (type, target) in enumerate(links):
            add_entry(tar, f"link{number}.jpg", picture(9, "jpg"))
            add_entry(tar, f"link{number}.txt", type=type, linkname=target, devmajor=1, devminor=5)


def files_below(folder):
    found = []
    for parent, _, names in os.walk(folder):
        found += [os.path.join(parent, name) for name in names]
    return sorted(found)


def test_nothing_is_written_and_no_link_followed(tmp_path):
    """Names that lead elsewhere are only names; links, devices and folders are passed over."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    path = str(folder / "x.tar")
    write_escaping_tar(path, secret)

    before = files_below(tmp_path)
    index_path = str(tmp_path / "index.json")
    for url in (path, f"pipe:cat {path}"):
        index = load_index(url, path=index_path, count_remote=True, allow_left_out=0.5)
        assert index.num_samples == 6
        assert read_all(index) == (list(range(6)), {})
        reader = Reader(index)
        for i in range(6):
            assert tar_files.captions(reader.read(i), "") == [CODE]
        _, left_out = count_file(url)
        assert left_out == {"jpg without caption": 6}
    os.remove(index_path)
    assert files_below(tmp_path) == before
    assert not os.path.exists("bad")


def test_nothing_of_the_data_is_run():
    """The modules that read data call nothing that runs or unpickles it, or unpacks a tar."""
    names = ["data.py", "runtime/checkpoint.py", *sorted(glob.glob("ingest/*.py", root_dir=ROOT))]
    for name in names:
        with open(os.path.join(ROOT, name)) as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not modules & {"pickle", "marshal", "shelve", "dill"}, name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                method = called.rpartition(".")[2]
                assert called not in ("eval", "exec", "compile", "os.system"), (name, called)
                assert method not in ("extract", "extractall"), (name, called)
                if called == "torch.load":
                    assert "weights_only=True" in ast.unparse(node)


# ---- bad inputs by the hundred ----


def mutated(content, random, headers=()):
    """Bytes, damaged in one of nine ways.

    headers: where the headers of a tar begin; some are damaged and their checksums made right.
    """
    content = bytearray(content)
    at = random.randrange(len(content))
    length = random.choice((1, 3, 100, 512, 1536))
    kind = random.randrange(9)

    if kind == 0:  # cut off
        return bytes(content[:at])
    if kind == 1:  # a part is missing
        del content[at : at + length]
    elif kind == 2:  # something is inserted, in half of the cases between two blocks
        if random.randrange(2):
            at -= at % 512
        inserted = (bytes(length), random.randbytes(length), content[at : at + length])
        content[at:at] = random.choice(inserted)
    elif kind == 3:  # a part is overwritten
        overwritten = (bytes(length), b"\xff" * length, random.randbytes(length))
        content[at : at + length] = random.choice(overwritten)
    elif kind < 6 or not headers:  # single bytes are changed
        for _ in range(random.choice((1, 2, 20))):
            content[random.randrange(len(content))] = random.randrange(256)
    else:  # a header is changed
        start = random.choice(headers)
        block = mutated_header(content[start : start + 512], random, kind)
        content[start : start + 512] = block
    return bytes(content)


def mutated_header(block, random, kind):
    """A header of a tar with another size (kind 6), type (7) or byte (8), and a right checksum."""
    if kind == 6:
        sizes = (
            b"%011o\0" % random.randrange(1 << 33),
            b"\x80" + random.randbytes(11),
            b"\xff" + random.randbytes(11),
            random.randbytes(12),
        )
        block[124:136] = random.choice(sizes)
    elif kind == 7:
        block[156] = random.choice(b"01234567LKxgXSDMVN\0~")
    else:
        block[random.randrange(512)] = random.randrange(256)
    return with_checksum(block)


def good_tar(path, format):
    """A tar of four samples in one of tarfile's formats -> (bytes, where its headers begin)."""
    folder = "" if format == tarfile.USTAR_FORMAT else "ü" * 60 + "/" + "n" * 90 + "/"
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in sample(1) + sample(2) + sample(3) + sample(4):
            add_entry(tar, folder + name, content)

    content = path.read_bytes()
    starts = range(0, len(content) - 512, 512)
    return content, [at for at in starts if content[at + 257 : at + 262] == b"ustar"]


def test_damaged_shards_at_random(tmp_path, monkeypatch):
    """Each is read, with its bad samples counted, or refused: no other exception, no hang, no
    memory."""
    monkeypatch.setattr("ingest.reader.BACK_OFF", ())
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    monkeypatch.setattr("ingest.counting.tqdm", lambda results, *_, **__: results)
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    originals = [good_tar(tmp_path / "good.tar", format) for format in formats]

    before = memory()
    draw = random.Random(0)
    results = Counter()
    path = tmp_path / "bad.tar"
    for number in range(300):
        content, headers = draw.choice(originals)
        path.write_bytes(mutated(content, draw, headers))
        url = f"pipe:cat {path}" if number % 10 == 0 else str(path)
        results[bounded(url, 4, str(tmp_path / "index.json"))] += 1

    print(results)
    assert set(results) == {"read", "refused"}
    assert sum(results.values()) == 300
    assert min(results.values()) > 30
    assert memory() - before < 300_000


def test_damaged_files_at_random(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    tokenize = data.Tokenizer(77)
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

    def read_text(content):
        assert tokenize(tar_files.captions({"txt": content}, "")).shape == (1, 77)
        assert tokenize(tar_files.captions({"json": content}, "t")).shape[1] == 77

    def read_picture(content):
        generator = np.random.default_rng(0)
        files = {"jpg": content, "txt": b"x"}
        image, _ = data.training_sample(files, generator, 8, (0.9, 1.0), "")
        assert image.shape == (3, 8, 8)

    draw = random.Random(0)
    results = Counter()
    for _ in range(300):
        for content in pictures + texts:
            read = read_text if content in texts else read_picture
            try:
                read(mutated(content, draw))
                results["read"] += 1
            except images.BadSample:
                results["bad"] += 1

    print(results)
    assert set(results) == {"read", "bad"}
    assert sum(results.values()) == 2400
    assert min(results.values()) > 300
