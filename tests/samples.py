"""Numbered samples in tar shards: pixels tell which sample, and which part of it, they are."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

SIZES = (23, 17, 40, 9, 31)  # samples per shard
N = sum(SIZES)
FORMATS = {
    "jpg": dict(format="JPEG", quality=95, subsampling=0),
    "png": dict(format="PNG"),
    "webp": dict(format="WEBP", lossless=True),
}


def picture(number, extension):
    """Red and green spell the number, blue is noise, so that pixels tell which sample, and which part of it, they are."""
    pixels = np.random.default_rng(number).integers(
        0, 256, (30 + number % 5, 40, 3), dtype=np.uint8
    )
    pixels[..., 0], pixels[..., 1] = number % 16 * 16 + 8, number // 16 * 16 + 8
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **FORMATS[extension])
    return file.getvalue()


def number_of(image):
    """uint8 [3, S, S] -> the number that its red and green spell."""
    red, green = image[:2].float().mean((1, 2)).tolist()
    return int(red // 16 + green // 16 * 16)


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def sample(number, captions=None, **other):
    """-> the files of a sample [(name, bytes)]; `other` replaces or, with None, removes a file of that extension."""
    extension = list(FORMATS)[number % 3]
    files = {
        extension: picture(number, extension),
        "txt": f"sample {number}".encode(),
        "json": json.dumps(
            {"texts": captions or [f"sample {number} {c}" for c in "abcdefgh"]}
        ).encode(),
        **other,
    }
    return [(f"{number:05d}.{e}", content) for e, content in files.items() if content is not None]


def write_shards(folder, sizes=SIZES, **changes):
    """Shards of consecutive samples; changes = {"s7": {...}} changes the files of sample 7."""
    folder.mkdir(exist_ok=True, parents=True)
    numbers = iter(range(sum(sizes)))
    for i, size in enumerate(sizes):
        write_tar(
            folder / f"{i:05d}.tar",
            [
                file
                for _ in range(size)
                for n in [next(numbers)]
                for file in sample(n, **changes.get(f"s{n}", {}))
            ],
        )
    return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"
