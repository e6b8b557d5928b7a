"""The pictures and captions that both sides are measured on: made here, the same every time."""

import math
import os
import shutil
import tarfile
from io import BytesIO
from itertools import cycle, islice

import torch
from torchvision.io import ImageReadMode, decode_image, encode_jpeg
from tqdm import tqdm

import data
import dist
from config import ConfigError
from ingest.class_names import imagenet_ids
from ingest.images import resize

MEDIAN_TOKENS = 17  # of a caption, as in CC3M, with the tokens that begin and end it
MIN_TOKENS = 5
MAX_TOKENS = 77

START_OF_TEXT = 49406
END_OF_TEXT = 49407

WORDS = (
    "a photo of the old red house by sea with two dogs and one man on green grass near big trees"
).split()


# ---- captions ----


def caption_lengths(count, seed=0):
    """The number of tokens of `count` captions: int64 (count,), 5..77.

    They are the quantiles of a log-normal distribution with median MEDIAN_TOKENS, shuffled, so that
    even a small count has the distribution's mean.
    """
    quantiles = (torch.arange(count) + 0.5) / count
    normal = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    lengths = MEDIAN_TOKENS * torch.exp(0.45 * normal)
    lengths = lengths.round().long().clamp(MIN_TOKENS, MAX_TOKENS)

    generator = torch.Generator().manual_seed(seed)
    return lengths[torch.randperm(count, generator=generator)]


def caption_text(number, num_tokens):
    """A caption of about so many tokens: a run of WORDS, one token each, with begin and end."""
    first = number % len(WORDS)
    num_words = num_tokens - 2
    return " ".join(islice(cycle(WORDS), first, first + num_words))


def caption_tokens(lengths, context_length, generator):
    """Random tokens int64 (b, L): start, words, end, zeros. L as data.Loader makes it."""
    b = len(lengths)
    padded = min(context_length, math.ceil(int(lengths.max()) / 8) * 8)
    words = torch.randint(1, START_OF_TEXT, (b, padded), generator=generator)

    before_end = torch.arange(padded) < lengths[:, None] - 1  # (b, L)
    tokens = torch.where(before_end, words, 0)
    tokens[:, 0] = START_OF_TEXT
    tokens[torch.arange(b), lengths - 1] = END_OF_TEXT
    return tokens


# ---- pictures ----


def photo(height, width, generator):
    """A made picture, uint8 (3, height, width), that as a JPEG is about as large as a photograph.

    Noise whose amplitude falls with frequency to the power 1.5, in colours much alike.
    """
    vertical = torch.fft.fftfreq(height)[:, None]
    horizontal = torch.fft.rfftfreq(width)[None]
    frequency = (vertical**2 + horizontal**2).sqrt().clamp(min=1 / max(height, width))

    noise = torch.randn(3, height, width, generator=generator)
    spectrum = torch.fft.rfft2(noise) / frequency**1.5
    x = torch.fft.irfft2(spectrum, s=(height, width))
    x = x / x.std()

    pixels = 128 + 55 * (0.9 * x[:1] + 0.3 * x)
    return pixels.clamp(0, 255).to(torch.uint8)


def photos(folder, shapes, generator):
    """For each (height, width) in shapes a random crop of the next photograph in the folder.

    A crop has at least half of the largest possible height and width; it is reduced to the shape.
    Yields uint8 (3, height, width). Raises ConfigError if the folder has no photographs.
    """
    files = [
        os.path.join(folder, name)
        for name in sorted(os.listdir(folder))
        if name.lower().endswith((".jpg", ".jpeg", ".png"))
    ]
    if not files:
        raise ConfigError(
            f"{folder} has no .jpg or .png: name a folder of photographs, or tar shards"
        )

    images = [decode_image(file, ImageReadMode.RGB) for file in files]
    for image, (height, width) in zip(cycle(images), shapes):
        share = 0.5 + 0.5 * torch.rand((), generator=generator).item()
        scale = share * min(image.shape[1] / height, image.shape[2] / width)
        crop_height = int(scale * height)
        crop_width = int(scale * width)

        top = random_offset(image.shape[1] - crop_height, generator)
        left = random_offset(image.shape[2] - crop_width, generator)
        crop = image[:, top : top + crop_height, left : left + crop_width]
        yield resize(crop, height, width)


def random_offset(largest, generator):
    return int(torch.randint(largest + 1, (), generator=generator))


def make_jpegs(size, count, photo_folder="", quality=90):
    """A list of `count` different JPEGs, bytes, made from noise or from the photographs given.

    Five of eight are 4:3 and the others 3:4, with a shorter side of `size` pixels.
    """
    generator = torch.Generator().manual_seed(0)
    landscape = (size, size * 4 // 3)
    portrait = (size * 4 // 3, size)
    shapes = [landscape if i % 8 < 5 else portrait for i in range(count)]

    if photo_folder:
        pictures = photos(photo_folder, shapes, generator)
    else:
        pictures = (photo(height, width, generator) for height, width in shapes)
    jpegs = []
    for picture in tqdm(pictures, "making JPEGs", len(shapes), leave=False):
        jpegs.append(encode_jpeg(picture, quality).numpy().tobytes())
    return jpegs


# ---- shards ----


def shards_of(args, folder, count):
    """The shards to read, and what they are made from: (pattern, "given" or "noise 256 px", say).

    They are those named on the command line, or are made in `folder`: from the photographs in the
    folder named there ("photos 256 px"), or from noise.
    """
    if args.shards and not os.path.isdir(args.shards):
        return args.shards, "given"
    kind = "photos" if args.shards else "noise"
    pattern = make_shards(folder, args.size, count, args.shards)
    return pattern, f"{kind} {args.size} px"


def make_shards(folder, size, count, photo_folder="", shards=16):
    """Write `count` samples as tar shards; returns their pattern.

    The JPEGs of make_jpegs, of quality 90. After 512 they repeat, under other names.
    """
    jpegs = make_jpegs(size, min(count, 512), photo_folder)
    lengths = caption_lengths(count).tolist()
    for shard in range(shards):
        with tarfile.open(os.path.join(folder, f"{shard:05d}.tar"), "w") as tar:
            for number in range(shard, count, shards):
                caption = caption_text(number, lengths[number])
                add_member(tar, f"{number:06d}.jpg", jpegs[number % len(jpegs)])
                add_member(tar, f"{number:06d}.txt", caption.encode())
    return os.path.join(folder, f"{{00000..{shards - 1:05d}}}.tar")


def add_member(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))


# ---- a folder per class ----


def make_class_folders(folder, size, count, classes):
    """Write `count` JPEGs into FOLDER/WORDNET_ID/, of the first `classes` of ImageNet's classes.

    The JPEGs of make_jpegs. After 512 they repeat, as hard links: a set of ImageNet's size takes
    some 50 MB of the disk, not gigabytes. So they are read from the page cache, as a set is that
    fits in memory, from its second evaluation on. The folder is there once it is complete.

    Of quality 97, at a shorter side of 375 pixels, they have 100 kB, about as much as ImageNet's.
    """
    partial = os.path.abspath(folder) + ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    ids = imagenet_ids()[:classes]
    for wordnet_id in ids:
        os.makedirs(os.path.join(partial, wordnet_id))

    jpegs = make_jpegs(size, min(count, 512), quality=97)
    paths = []
    for number in range(count):
        name = f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        path = os.path.join(partial, ids[number % classes], name)
        if number < len(jpegs):
            with open(path, "wb") as f:
                f.write(jpegs[number])
        else:
            os.link(paths[number % len(jpegs)], path)
        paths.append(path)
    os.rename(partial, folder)


# ---- batches from memory ----


def make_batches(image_size, context_length, batch_size, count=4):
    """A list of data.Batch for this rank, from memory: what data.Loader would yield.

    images uint8 (b, 3, S, S) in channels_last; tokens int64 (b, L); lengths and ids int64 (b,).
    """
    generator = torch.Generator().manual_seed(dist.rank())
    lengths = caption_lengths(count * batch_size).clamp(max=context_length)
    batches = []
    for of_batch in lengths.split(batch_size):
        tokens = caption_tokens(of_batch, context_length, generator)
        pictures = [photo(image_size, image_size, generator) for _ in range(batch_size)]
        images = torch.stack(pictures).contiguous(memory_format=torch.channels_last)
        ids = torch.randint(4096, (batch_size,), generator=generator)
        batches.append(data.Batch(images, tokens, of_batch, ids, {}))
    return batches


def pinned(batches, device):
    """The batches (data.Batch or tuples), for a GPU in page-locked memory.

    From there it can copy them while it computes.
    """
    if device.type != "cuda":
        return batches

    result = []
    for batch in batches:
        fields = [x.pin_memory() if isinstance(x, torch.Tensor) else x for x in batch]
        result.append(data.Batch(*fields) if isinstance(batch, data.Batch) else tuple(fields))
    return result


def on_device(batches, device):
    """The batches (data.Batch or tuples) with images and tokens in the device's memory."""
    result = []
    for batch in batches:
        images, tokens = batch[0].to(device), batch[1].to(device)
        if isinstance(batch, data.Batch):
            result.append(batch._replace(images=images, tokens=tokens))
        else:
            result.append((images, tokens, *batch[2:]))
    return result
