"""Numbered samples in tar shards: pixels tell which sample, and which part of it, they are."""

import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image

import data
from ingest.index import load_index

SIZES = (23, 17, 40, 9, 31)  # samples per shard
N = sum(SIZES)
FORMATS = {
    "jpg": dict(format="JPEG", quality=95, subsampling=0),
    "png": dict(format="PNG"),
    "webp": dict(format="WEBP", lossless=True),
}


def picture(number, extension):
    """A picture whose red and green spell the number; blue is noise, so that a crop shows."""
    size = (30 + number % 5, 40, 3)
    pixels = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
    pixels[..., 0] = number % 16 * 16 + 8
    pixels[..., 1] = number // 16 * 16 + 8
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **FORMATS[extension])
    return file.getvalue()


def number_of(image):
    """uint8 (3, S, S) -> the number that its red and green spell."""
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
    """-> the files of a sample, [(name, bytes)].

    `other` replaces or, with None, removes the file of that extension.
    """
    extension = list(FORMATS)[number % 3]
    texts = captions or [f"sample {number} {letter}" for letter in "abcdefgh"]
    files = {
        extension: picture(number, extension),
        "txt": f"sample {number}".encode(),
        "json": json.dumps({"texts": texts}).encode(),
        **other,
    }
    return [(f"{number:05d}.{e}", content) for e, content in files.items() if content is not None]


def write_shards(folder, sizes=SIZES, **changes):
    """Shards of consecutive samples -> their pattern. changes = {"s7": {...}} changes the files of
    sample 7."""
    folder.mkdir(exist_ok=True, parents=True)
    number = 0
    for shard, size in enumerate(sizes):
        files = []
        for _ in range(size):
            files += sample(number, **changes.get(f"s{number}", {}))
            number += 1
        write_tar(folder / f"{shard:05d}.tar", files)
    return f"{folder}/{{00000..{len(sizes) - 1:05d}}}.tar"


def png(image):
    """uint8 (3, H, W) -> a PNG, bytes."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def order_of(patterns, batch_size=16, lanes=8, block=5, seed=3, **options):
    """Patterns of shards -> data.Order; `options` are those of load_index."""
    return data.Order(load_index(patterns, **options), batch_size, lanes, block, seed)


def load(order, start, end, ranks=1, workers=0, **options):
    """The global batches of steps start..end, joined from all ranks.

    -> [images, tokens padded to 77, ids], each stacked over steps.
    """
    loaders = []
    for rank in range(ranks):
        loader = data.Loader(
            order,
            24,
            rank=rank,
            world_size=ranks,
            workers=workers,
            start_step=start,
            num_steps=end,
            **options,
        )
        loaders.append(iter(loader))

    steps = []
    for shares in zip(*loaders, strict=True):
        images = torch.cat([share.images for share in shares])
        tokens = torch.cat([padded_to_77(share.tokens) for share in shares])
        ids = torch.cat([share.ids for share in shares])
        steps.append((images, tokens, ids))
    return [torch.stack(parts) for parts in zip(*steps)]


def padded_to_77(tokens):
    return torch.nn.functional.pad(tokens, (0, 77 - tokens.shape[1]))
