"""A tiny data set with something to learn: coloured shapes on noise, in WebDataset shards, made in a second."""

import io
import json
import os
import tarfile

import torch
from torchvision.io import encode_png

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 220, 40),
    "purple": (160, 50, 200),
    "black": (10, 10, 10),
}
SHAPES = ("square", "bar", "column", "cross")
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def picture(name, generator, size=32):
    """uint8 [3, size, size] of a class at a random place."""
    colour, shape = name.split()
    image = torch.randint(180, 255, (3, size, size), generator=generator, dtype=torch.uint8)
    y, x = (int(torch.randint(9, size - 9, (1,), generator=generator)) for _ in range(2))
    pixels = torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None]
    if shape in ("square", "bar", "cross"):
        h = 7 if shape == "square" else 2
        image[:, y - h : y + h, x - 8 : x + 8] = pixels
    if shape in ("column", "cross"):
        image[:, y - 8 : y + 8, x - 2 : x + 2] = pixels
    return image


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write(folder, shards=4, per_shard=96, seed=0, classes=False):
    """Write shards 00000.tar, ... of class pictures -> their pattern. With `classes` also .cls and the class list."""
    os.makedirs(folder, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    n = 0
    for shard in range(shards):
        with tarfile.open(os.path.join(folder, f"{shard:05d}.tar"), "w") as tar:
            for _ in range(per_shard):
                label = n % len(CLASSES)
                add(
                    tar,
                    f"{n:09d}.png",
                    encode_png(picture(CLASSES[label], generator)).numpy().tobytes(),
                )
                add(tar, f"{n:09d}.txt", CLASSES[label].encode())
                add(
                    tar,
                    f"{n:09d}.json",
                    json.dumps({"captions": [CLASSES[label], "a " + CLASSES[label]]}).encode(),
                )
                if classes:
                    add(tar, f"{n:09d}.cls", str(label).encode())
                n += 1
    if classes:
        with open(os.path.join(folder, "classnames.txt"), "w") as f:
            f.write("\n".join(CLASSES) + "\n")
        with open(os.path.join(folder, "zeroshot_classification_templates.txt"), "w") as f:
            f.write("{c}\na {c}\n")
    return os.path.join(folder, "{%05d..%05d}.tar" % (0, shards - 1))
