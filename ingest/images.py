"""An encoded image, bytes from whoever wrote the shard, to a cropped uint8 tensor.

Nothing is decoded that declares more than MAX_PIXELS. JPEGs of training are decoded by config.decoder:

  torchvision          every pixel, then the crop is resized, bicubic and antialiased: within 0.3/255 of Pillow's, in less time
  pillow, simplejpeg   at 1/2, 1/4 or 1/8 of the size where the crop is still at least as large as the model's input: the finest
                       frequencies are left out instead of averaged away. Faster for large pictures, and 1 to 3/255 from Pillow's
  nvjpeg               every pixel, by the GPU (torchvision's nvJPEG): workers only read, draw the crop, and hand over bytes (`Encoded`)

WebP is always torchvision's, PNG Pillow's, and evaluation is always torchvision's, so that results do not depend on a setting.
"""

import io
import math
import re
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, encode_jpeg

from config import ConfigError

IMAGES = {"jpg", "jpeg", "png", "webp"}
MAX_PIXELS = 100_000_000  # an image that declares more is not decoded: a file of kilobytes can declare gigabytes
MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # of a JPEG: all that have a length
# torchvision 0.29 announces that its decoders will move to TorchCodec some day; nothing is to be done about it in a run.
warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)


class BadSample(Exception):
    """A sample that cannot be used. Its text is the reason under which it is counted."""


# ---- decoding ----


def declared_size(data):
    """An encoded image, bytes -> (height, width) as its header declares them; (0, 0) if it is no JPEG, PNG or WebP, or is broken."""

    def number(start, end, order="big"):
        return int.from_bytes(data[start:end], order)

    if data[:3] == b"\xff\xd8\xff":
        at = 2
        for _ in range(1000):
            if not (marker := MARKER.search(data, at)):
                break
            at = marker.start()
            if (
                data[at + 1] >> 4 == 0xC and data[at + 1] not in b"\xc4\xc8\xcc"
            ):  # a frame, not tables
                return number(at + 5, at + 7), number(at + 7, at + 9)
            at += 2 + number(at + 2, at + 4)
    elif data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return number(20, 24), number(16, 20)
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 ":
        return number(28, 30, "little") & 0x3FFF, number(26, 28, "little") & 0x3FFF
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8L":
        return (number(22, 25, "little") >> 6 & 0x3FFF) + 1, (number(21, 23, "little") & 0x3FFF) + 1
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
        return number(27, 30, "little") + 1, number(24, 27, "little") + 1
    return 0, 0


def encoded(files):
    """The image among {extension: bytes} -> (bytes, declared height, width). BadSample if it is none or too large, or if there are no
    files."""
    if not files:
        raise BadSample("missing from shard")
    if None in files.values():
        raise BadSample("file too large")
    data = next(files[extension] for extension in files if extension in IMAGES)
    height, width = declared_size(data)
    if height * width > MAX_PIXELS:
        raise BadSample("too many pixels")
    if not height * width:  # the decoders know more formats: films, for example
        raise BadSample("corrupt image")
    return data, height, width


def decode(files):
    """The image among {extension: bytes} -> uint8 [3, h, w]. BadSample if it is corrupt or too large, or if there are no files."""
    return pixels(*encoded(files))


def pixels(data, height, width):
    """An encoded image of a declared size -> uint8 [3, height, width], in memory [height, width, 3]. BadSample if it is corrupt."""
    try:
        if data[:4] == b"\x89PNG":
            image = decode_png(data)
        else:
            image = decode_image(
                torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
            )
        if image.shape != (3, height, width):
            raise ValueError("its header says otherwise")
        return image
    except Exception as error:
        raise BadSample("corrupt image") from error


def decode_png(data):
    """A PNG, bytes -> uint8 [3, h, w]; any exception if it is broken. By Pillow, a quarter slower: one wrong bit in the compressed
    pixels, and torchvision's decoder (0.29) ends the whole process with a segmentation fault."""
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    if image.mode.startswith("I"):  # grey of 16 bits; Pillow itself takes the upper 8 of a colour
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def scaled_pixels(data, height, width, decoder, by):
    """A JPEG of a declared size, at 1, 1/2, 1/4 or 1/8 of it -> uint8 [3, height / by, width / by], rounded up. Any exception if it is
    corrupt, or of a rare kind that the decoder does not know."""
    h, w = -(-height // by), -(-width // by)
    if decoder == "pillow":
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        image.draft("RGB", (width // by, height // by))
        image = np.array(
            image if image.mode == "RGB" else image.convert("RGB")
        )  # convert would copy
    else:
        import simplejpeg

        image = simplejpeg.decode_jpeg(data, min_height=h, min_width=w, min_factor=1)
    if image.shape != (h, w, 3):
        raise ValueError("its header says otherwise")
    return torch.from_numpy(image).permute(2, 0, 1)


def check_decoder(decoder, device):
    """ConfigError if what a decoder needs is missing: here, in the trainer, and not in a worker later on."""
    if decoder == "simplejpeg":
        try:
            import simplejpeg  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"decoder = 'simplejpeg' needs a package ({error}): pip install simplejpeg, or set decoder = 'pillow', which "
                "makes nearly the same pixels, or 'torchvision', the default"
            ) from error
    if decoder == "nvjpeg":
        try:
            if device.type != "cuda":
                raise RuntimeError(f"this run is on {device.type}")
            decode_jpeg(
                [encode_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8))],
                ImageReadMode.RGB,
                device=device,
            )
        except RuntimeError as error:
            raise ConfigError(
                f"decoder = 'nvjpeg' needs a GPU and a torchvision built with nvJPEG ({error}): set decoder = 'torchvision', the "
                "default, or 'simplejpeg'"
            ) from error


# ---- crops ----


def resize(image, height, width):
    """uint8 [3, h, w] -> uint8 [3, height, width], bicubic and antialiased."""
    image = image.permute(1, 2, 0)[None].permute(
        0, 3, 1, 2
    )  # image[None], in strides by which torch sees channels_last: up to a third faster
    return torch.nn.functional.interpolate(
        image, size=(height, width), mode="bicubic", antialias=True
    )[0]


def random_crop(height, width, scale, random):
    """-> (top, left, height, width) in pixels: a share of the area drawn from `scale`, an aspect ratio drawn log-uniformly from
    3/4..4/3; when ten draws do not fit into the image, the largest part at its centre with such a ratio. random: has random()."""
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * random.random())
        ratio = (3 / 4) ** (1 - 2 * random.random())
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return (
                int(random.random() * (height - h + 1)),
                int(random.random() * (width - w + 1)),
                h,
                w,
            )
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    h, w = max(1, min(height, round(width / ratio))), max(1, min(width, round(height * ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def training_image(data, height, width, random, size, crop_scale, decoder="torchvision"):
    """An encoded image of a declared size, a generator -> a random crop of it, uint8 [3, size, size]. BadSample if it is corrupt.
    The generator draws the same whatever the decoder; at 1/n of the size the crop's edges are rounded down to multiples of n."""
    top, left, h, w = random_crop(height, width, crop_scale, random)
    by, image = 1, None
    if decoder != "torchvision" and data[:2] == b"\xff\xd8":
        by = max(n for n in (1, 2, 4, 8) if n == 1 or min(h, w) // n >= size)
        try:
            image = scaled_pixels(data, height, width, decoder, by)
        except Exception:
            by = 1  # torchvision decides whether it is corrupt
    if image is None:
        image = pixels(data, height, width)
    top, left, h, w = top // by, left // by, h // by, w // by
    return resize(image[:, top : top + h, left : left + w], size, size)


# ---- decoded by the GPU ----


class Encoded(NamedTuple):
    """b images to be decoded on the device. data: uint8 [n], one after the other; sizes: int64 [b], bytes of each; boxes: int64 [b, 6], the
    crop (top, left, height, width) and the declared height and width; where they are 0, the bytes are the pixels of a crop already."""

    data: torch.Tensor
    sizes: torch.Tensor
    boxes: torch.Tensor


def encoded_crop(data, height, width, random, size, crop_scale):
    """As training_image, but what is a JPEG, and whole, stays one -> (uint8 [n], box [6]). nvJPEG does not say where one broke off."""
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" in data[-64:]:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8), torch.tensor(
            [*random_crop(height, width, crop_scale, random), height, width]
        )
    return training_image(data, height, width, random, size, crop_scale).permute(
        1, 2, 0
    ).flatten(), torch.zeros(6, dtype=torch.int64)


def batched(crops):
    """What training_image, or encoded_crop, made of b images -> uint8 [b, 3, S, S] in channels_last as the crops are, or an Encoded."""
    if isinstance(crops[0], tuple):
        parts, boxes = zip(*crops)
        return Encoded(
            torch.cat(parts), torch.tensor([len(part) for part in parts]), torch.stack(boxes)
        )
    return default_collate([crop.permute(1, 2, 0) for crop in crops]).permute(
        0, 3, 1, 2
    )  # torch.stack; a worker's, into shared memory


def on_device(parts, device):
    """Tensors of several workers -> one, on the device. Each travels by itself: it is pinned, what they are together would not be."""
    parts = [part.to(device, non_blocking=True) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decoded_on_device(parts, size, device):
    """Encodeds of several workers -> (uint8 [b, 3, size, size] on the device, int64 [b] whose pixels they are: each one's own or, of a corrupt
    one, the next good one's). BadSample if all are corrupt."""
    data = [image for part in parts for image in part.data.split(part.sizes.tolist())]
    boxes = [box for part in parts for box in part.boxes.tolist()]
    crops = torch.zeros(len(data), size, size, 3, dtype=torch.uint8, device=device)
    jpegs, good = (
        [i for i, box in enumerate(boxes) if box[5]],
        [i for i, box in enumerate(boxes) if not box[5]],
    )
    for i in good:
        crops[i].copy_(data[i].view(size, size, 3), non_blocking=True)
    while jpegs:  # a part at a time: all of them whole would be gigabytes
        some = [jpegs.pop()]
        while jpegs and sum(boxes[i][4] * boxes[i][5] for i in some) < MAX_PIXELS:
            some.append(jpegs.pop())
        for i, image in zip(some, decode_jpegs([data[i] for i in some], device)):
            top, left, h, w, *declared = boxes[i]
            if image is not None and list(image.shape[1:]) == declared:
                crop = image[
                    None, :, top : top + h, left : left + w
                ].float()  # CUDA resizes floats only, and not to a fiftieth
                if min(h, w) >= 32 * size:
                    crop = torch.nn.functional.avg_pool2d(crop, min(h, w) // (16 * size))
                crop = torch.nn.functional.interpolate(
                    crop, size=(size, size), mode="bicubic", antialias=True
                )[0]
                crops[i].copy_(crop.round_().clamp_(0, 255).permute(1, 2, 0))
                good.append(i)
    if not good:
        raise BadSample(f"none of the {len(boxes)} images of a batch can be decoded")
    good.sort()
    known = set(good)
    source = torch.tensor(
        [i if i in known else next((j for j in good if j > i), good[0]) for i in range(len(data))]
    )
    if len(good) < len(data):
        crops = crops[source.to(device)]
    return crops.permute(0, 3, 1, 2), source


def decode_jpegs(parts, device):
    """uint8 [n] each -> uint8 [3, h, w] each, None for what is corrupt. nvJPEG fails as a whole and does not say at which, so by halves."""
    if (
        device.type == "cuda"
    ):  # it writes, on a stream of its own, into memory that what is queued on this one may still use
        torch.cuda.current_stream(device).synchronize()
    try:
        return decode_jpeg(parts, ImageReadMode.RGB, device=device) if parts else []
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if len(parts) > 1:
            return decode_jpegs(parts[: len(parts) // 2], device) + decode_jpegs(
                parts[len(parts) // 2 :], device
            )
    try:  # of the rarer kinds, CMYK for one, nvJPEG knows fewer
        image = decode_image(parts[0], ImageReadMode.RGB)
    except RuntimeError:
        return [None]
    return [image.to(device)]  # which fails if it is the device that is broken


def evaluation_image(files, size):
    """The image among {extension: bytes} -> uint8 [3, size, size]: the shorter side resized, then the centre. BadSample says why not."""
    image = decode(files)
    h, w = (size * side // min(image.shape[1:]) for side in image.shape[1:])
    top, left = round((h - size) / 2), round((w - size) / 2)
    if h * w > MAX_PIXELS:  # of a line of pixels; nothing else grows that much
        raise BadSample("too many pixels")
    return resize(image, h, w)[:, top : top + size, left : left + size]
