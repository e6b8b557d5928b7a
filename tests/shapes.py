"""A tiny data set with something to learn, in WebDataset shards: coloured shapes on noise."""

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
    """A picture of the class `name`, at a random position -> uint8 (3, size, size)."""
    colour, shape = name.split()
    image = torch.randint(180, 255, (3, size, size), generator=generator, dtype=torch.uint8)
    y = int(torch.randint(9, size - 9, (1,), generator=generator))
    x = int(torch.randint(9, size - 9, (1,), generator=generator))

    pixels = torch.tensor(COLOURS[colour], dtype=torch.uint8)[:, None, None]
    if shape in ("square", "bar", "cross"):
        h = 7 if shape == "square" else 2
        image[:, y - h : y + h, x - 8 : x + 8] = pixels
    if shape in ("column", "cross"):
        image[:, y - 8 : y + 8, x - 2 : x + 2] = pixels
    return image


def add(tar, name, content):
    """Add a file to an open tar. content: bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write(folder, shards=4, per_shard=96, seed=0, classes=False):
    """Write shards 00000.tar, ... -> their pattern. The classes follow each other in turn.

    classes: make an evaluation set, with a .cls per sample, class names and prompt templates.
    """
    os.makedirs(folder, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for shard in range(shards):
        with tarfile.open(os.path.join(folder, f"{shard:05d}.tar"), "w") as tar:
            for n in range(shard * per_shard, (shard + 1) * per_shard):
                add_sample(tar, n, generator, classes)

    if classes:
        with open(os.path.join(folder, "classnames.txt"), "w") as f:
            f.write("\n".join(CLASSES) + "\n")
        with open(os.path.join(folder, "zeroshot_classification_templates.txt"), "w") as f:
            f.write("{c}\na {c}\n")
    return os.path.join(folder, f"{{00000..{shards - 1:05d}}}.tar")


def add_sample(tar, n, generator, classes):
    """Add sample n to an open tar: a picture, a caption, several captions, and a class if asked."""
    key = f"{n:09d}"
    label = n % len(CLASSES)
    name = CLASSES[label]

    png = encode_png(picture(name, generator)).numpy().tobytes()
    captions = {"captions": [name, "a " + name]}
    add(tar, key + ".png", png)
    add(tar, key + ".txt", name.encode())
    add(tar, key + ".json", json.dumps(captions).encode())
    if classes:
        add(tar, key + ".cls", str(label).encode())
