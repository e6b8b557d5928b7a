"""Encoded images, bytes from whoever wrote the shard, to cropped uint8 tensors.

An image that declares more than MAX_PIXELS is never decoded. config.decoder chooses what decodes
the JPEGs of training:

  torchvision          Decodes every pixel; the crop is then resized, bicubic and antialiased.
                       Within 0.3/255 of Pillow's result, in less time.
  pillow, simplejpeg   Decode at 1/2, 1/4 or 1/8 of the size where the crop is then still at least
                       as large as the model's input. The finest frequencies are left out instead
                       of averaged away. Faster for large pictures, 1 to 3/255 from Pillow's result.
  nvjpeg               The GPU decodes every pixel (nvJPEG through torchvision). The workers only
                       read the bytes, draw the crop and hand both over (EncodedBatch).

WebP is always decoded by torchvision, PNG by Pillow, and everything in evaluation by these two, so
that results do not depend on a setting.

A picture with transparency is put on white, in training as in evaluation. Its hidden colours are
arbitrary, often black: a black drawing would become a black square.
"""

import io
import math
import re
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import default_collate
from torchvision.io import ImageReadMode, decode_image, decode_jpeg, encode_jpeg

from config import ConfigError

IMAGES = {"jpg", "jpeg", "png", "webp"}

# Images that people have among their data and that are not read.
OTHER_IMAGES = {
    *("svg", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jfif", "jpe", "jp2", "jxl"),
    *("ico", "ppm", "pgm", "pnm", "tga", "psd", "eps"),
}

# A file of kilobytes can declare gigabytes of pixels.
MAX_PIXELS = 100_000_000

# The markers of a JPEG that are followed by a length.
JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"

# torchvision 0.29 announces that its decoders will move to TorchCodec: nothing a run can act on.
warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)


class BadSample(Exception):
    """A sample that cannot be used. Its text is the reason under which it is counted."""


# ---- the header ----


def declared_size(data):
    """The size that the header of an encoded image (bytes) declares: (height, width) in pixels.

    (0, 0) if the image is not a JPEG, PNG or WebP, or if its header is broken.
    """
    if data[:3] == b"\xff\xd8\xff":
        return jpeg_size(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        width = int.from_bytes(data[16:20], "big")
        height = int.from_bytes(data[20:24], "big")
        return height, width
    if data[:4] == b"RIFF":
        return webp_size(data)
    return 0, 0


def jpeg_size(data):
    """As declared_size, for a JPEG: walk over its segments to the first frame header."""
    position = 2
    for _ in range(1000):
        marker = JPEG_MARKER.search(data, position)
        if marker is None:
            break
        position = marker.start()
        kind = data[position + 1]

        # 0xC0 to 0xCF begin a frame, except for three that hold tables.
        if kind >> 4 == 0xC and kind not in b"\xc4\xc8\xcc":
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            return height, width

        segment_length = int.from_bytes(data[position + 2 : position + 4], "big")
        position += 2 + segment_length
    return 0, 0


def webp_size(data):
    """As declared_size, for a WebP: lossy (VP8), lossless (VP8L) or extended (VP8X)."""
    kind = data[8:16]
    if kind == b"WEBPVP8 ":
        width = int.from_bytes(data[26:28], "little") & 0x3FFF
        height = int.from_bytes(data[28:30], "little") & 0x3FFF
        return height, width
    if kind == b"WEBPVP8L":
        width = int.from_bytes(data[21:23], "little") & 0x3FFF
        height = int.from_bytes(data[22:25], "little") >> 6 & 0x3FFF
        return height + 1, width + 1
    if kind == b"WEBPVP8X":
        width = int.from_bytes(data[24:27], "little")
        height = int.from_bytes(data[27:30], "little")
        return height + 1, width + 1
    return 0, 0


def webp_has_alpha(data):
    """Whether the header of a WebP (bytes) announces transparency."""
    if data[12:16] == b"VP8X":
        return bool(data[20] & 0x10)
    return data[12:16] == b"VP8L" and bool(data[24] & 0x10)


def encoded_image(files):
    """The image among the files of a sample, {extension: bytes} -> (bytes, height, width).

    Height and width are those that its header declares. Raises BadSample if there are no files, if
    a file was too large to be read, or if the header is broken or declares too many pixels.
    """
    if not files:
        raise BadSample("missing from shard")
    if None in files.values():
        raise BadSample("file too large")

    data = next(files[extension] for extension in files if extension in IMAGES)
    height, width = declared_size(data)
    if height * width > MAX_PIXELS:
        raise BadSample("too many pixels")
    if height * width == 0:
        # Without this check the decoders would accept more formats: films, for example.
        raise BadSample("corrupt image")
    return data, height, width


# ---- decoding on the CPU ----


def decode(files):
    """The image among the files of a sample, {extension: bytes} -> uint8 (3, h, w).

    Raises BadSample if it is corrupt or too large, or if there are no files.
    """
    data, height, width = encoded_image(files)
    return pixels(data, height, width)


def pixels(data, height, width):
    """An encoded image (bytes) of a declared size -> uint8 (3, height, width).

    In memory the channels come last: [height, width, 3]. Raises BadSample if the image is corrupt.
    """
    try:
        if data[:4] == b"\x89PNG":
            image = decode_png(data)
        else:
            image = decode_jpeg_or_webp(data)
        if image.shape != (3, height, width):
            raise ValueError("its header declares another size")
        return image
    except Exception as error:
        raise BadSample("corrupt image") from error


def decode_jpeg_or_webp(data):
    """A JPEG or WebP (bytes) -> uint8 (3, h, w). Any exception if it is broken."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if data[:4] != b"RIFF" or not webp_has_alpha(data):
        return decode_image(encoded, ImageReadMode.RGB)

    rgba = decode_image(encoded, ImageReadMode.RGB_ALPHA).permute(1, 2, 0)  # (h, w, 4)
    picture = on_white(Image.fromarray(rgba.numpy()))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def decode_png(data):
    """A PNG (bytes) -> uint8 (3, h, w). Any exception if it is broken.

    By Pillow, although that is a quarter slower: one wrong bit in the compressed pixels, and
    torchvision's decoder (0.29) ends the whole process with a segmentation fault.
    """
    picture = Image.open(io.BytesIO(data), formats=["PNG"])
    if picture.mode.startswith("I"):
        picture = grey_of_8_bits(picture)

    if picture.has_transparency_data:
        picture = on_white(picture)
    else:
        picture = picture.convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def grey_of_8_bits(picture):
    """A Pillow image of 16-bit grey -> L or, if one of its greys is transparent, LA.

    It takes the upper 8 bits. With colours, Pillow itself does so.
    """
    grey = np.asarray(picture)  # uint16 (h, w)
    upper = (grey >> 8).astype(np.uint8)
    result = Image.fromarray(upper)

    transparent = picture.info.get("transparency")
    if transparent is not None:
        alpha = np.where(grey == transparent, 0, 255).astype(np.uint8)
        result = Image.merge("LA", [result, Image.fromarray(alpha)])
    return result


def on_white(picture):
    """A Pillow image with transparency, of any mode -> the same on white, RGB."""
    picture = picture.convert("RGBA")
    smallest_alpha, _ = picture.getchannel("A").getextrema()
    if smallest_alpha == 255:
        return picture.convert("RGB")

    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def scaled_pixels(data, height, width, decoder, factor):
    """A JPEG (bytes) of a declared size, decoded at 1 / factor of it (1, 2, 4 or 8).

    -> uint8 (3, height / factor, width / factor), rounded up. Any exception if it is corrupt or of
    a rare kind that the decoder does not know.
    """
    h = math.ceil(height / factor)
    w = math.ceil(width / factor)

    if decoder == "pillow":
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        image.draft("RGB", (width // factor, height // factor))
        if image.mode != "RGB":  # otherwise convert would only copy
            image = image.convert("RGB")
        image = np.array(image)
    else:
        import simplejpeg

        image = simplejpeg.decode_jpeg(data, min_height=h, min_width=w, min_factor=1)

    if image.shape != (h, w, 3):
        raise ValueError("its header declares another size")
    return torch.from_numpy(image).permute(2, 0, 1)


def check_decoder(decoder, device):
    """Raise ConfigError if something that a decoder needs is missing.

    Called in the trainer, before any data worker would fail because of it.
    """
    if decoder == "simplejpeg":
        try:
            import simplejpeg  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"decoder = 'simplejpeg' needs a package ({error}): pip install simplejpeg, or set "
                "decoder = 'pillow', which makes nearly the same pixels, or 'torchvision', the "
                "default"
            ) from error

    if decoder == "nvjpeg":
        try:
            if device.type != "cuda":
                raise RuntimeError(f"this run is on {device.type}")
            black = torch.zeros(3, 8, 8, dtype=torch.uint8)
            decode_jpeg([encode_jpeg(black)], ImageReadMode.RGB, device=device)
        except RuntimeError as error:
            raise ConfigError(
                "decoder = 'nvjpeg' needs a GPU and a torchvision built with nvJPEG "
                f"({error}): set decoder = 'torchvision', the default, or 'simplejpeg'"
            ) from error


# ---- crops ----


def resize(image, height, width):
    """uint8 (3, h, w) -> uint8 (3, height, width), bicubic and antialiased."""
    # As image[None], but with strides that torch recognises as channels_last. That is up to a
    # third faster.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    return F.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)[0]


def random_crop(height, width, scale, random):
    """Draw the crop of an image -> (top, left, height, width) in pixels.

    Its share of the area is uniform in `scale` = (smallest, largest), its aspect ratio is
    log-uniform in 3/4..4/3. If ten draws do not fit into the image: the largest part at its centre
    with an aspect ratio in that range. random: anything with a method random(), uniform in [0, 1).
    """
    smallest, largest = scale
    for _ in range(10):
        share = smallest + (largest - smallest) * random.random()
        ratio = (3 / 4) ** (1 - 2 * random.random())
        area = height * width * share
        h = round(math.sqrt(area / ratio))
        w = round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            top = int(random.random() * (height - h + 1))
            left = int(random.random() * (width - w + 1))
            return top, left, h, w

    ratio = min(max(width / height, 3 / 4), 4 / 3)
    h = max(1, min(height, round(width / ratio)))
    w = max(1, min(width, round(height * ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def training_image(data, height, width, random, size, crop_scale, decoder="torchvision"):
    """A random crop of an encoded image (bytes) of a declared size -> uint8 (3, size, size).

    The draws from `random` are the same whatever the decoder. A picture that is decoded at
    1 / factor of its size has the crop's edges rounded down to multiples of the factor.
    Raises BadSample if the image is corrupt.
    """
    top, left, h, w = random_crop(height, width, crop_scale, random)

    factor = 1
    image = None
    if decoder != "torchvision" and data[:2] == JPEG_START:
        factor = reduction(h, w, size)
        try:
            image = scaled_pixels(data, height, width, decoder, factor)
        except Exception:
            # Leave the decision whether it is corrupt to torchvision, below.
            factor = 1
    if image is None:
        image = pixels(data, height, width)

    top //= factor
    left //= factor
    h //= factor
    w //= factor
    return resize(image[:, top : top + h, left : left + w], size, size)


def reduction(height, width, size):
    """By which of 1, 2, 4, 8 a crop can be reduced and still not have to be enlarged to `size`."""
    shorter = min(height, width)
    for factor in (8, 4, 2):
        if shorter // factor >= size:
            return factor
    return 1


def evaluation_image(files, size, border=0):
    """The image among {extension: bytes} -> uint8 (3, size, size), without any randomness.

    First `border` pixels are cut from each side. The shorter side is resized to `size`, then the
    centre is cut out. Raises BadSample with the reason if the image cannot be used.
    """
    image = decode(files)
    if border:
        image = image[:, border:-border, border:-border]
        if image.numel() == 0:
            raise BadSample("smaller than its border")
    height, width = image.shape[1:]
    shorter = min(height, width)
    h = size * height // shorter
    w = size * width // shorter
    if h * w > MAX_PIXELS:
        # Only an extremely long and narrow image can grow this much.
        raise BadSample("too many pixels")

    top = round((h - size) / 2)
    left = round((w - size) / 2)
    return resize(image, h, w)[:, top : top + size, left : left + size]


def stack_crops(crops):
    """What training_image or encoded_crop made of b images -> one batch.

    Of tensors [3, S, S]: uint8 (b, 3, S, S), in channels_last as the crops are. Of encoded crops:
    an EncodedBatch. In a data worker the batch lies in memory that it shares with the trainer.
    """
    if isinstance(crops[0], EncodedCrop):
        return EncodedBatch(
            data=torch.cat([crop.data for crop in crops]),
            sizes=torch.tensor([len(crop.data) for crop in crops]),
            boxes=torch.tensor([crop.box for crop in crops]),
        )
    # default_collate is torch.stack and, in a worker, puts the result into shared memory.
    batch = default_collate([crop.permute(1, 2, 0) for crop in crops])  # (b, S, S, 3)
    return batch.permute(0, 3, 1, 2)


# ---- decoding on the GPU ----


class Box(NamedTuple):
    """Where a crop lies in its image, and the size that the image declares. All in pixels."""

    top: int
    left: int
    height: int
    width: int
    image_height: int
    image_width: int


# The box of an image whose crop was already made by the worker.
ALREADY_CROPPED = Box(0, 0, 0, 0, 0, 0)


class EncodedCrop(NamedTuple):
    """One image for the GPU, and which crop of it to take."""

    data: torch.Tensor  # uint8 (n,), a JPEG; if ALREADY_CROPPED, the pixels of the crop, (S, S, 3)
    box: Box


class EncodedBatch(NamedTuple):
    """b images for the GPU."""

    data: torch.Tensor  # uint8 (n,), the data of all images, one after the other
    sizes: torch.Tensor  # int64 (b,), the number of bytes of each
    boxes: torch.Tensor  # int64 (b, 6), the Box of each


def encoded_crop(data, height, width, random, size, crop_scale):
    """As training_image, but leaves a JPEG to the GPU -> EncodedCrop.

    A JPEG that breaks off is decoded here, as nvJPEG does not report where one ended.
    """
    if data[:2] == JPEG_START and JPEG_END in data[-64:]:
        top, left, h, w = random_crop(height, width, crop_scale, random)
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return EncodedCrop(encoded, Box(top, left, h, w, height, width))
    crop = training_image(data, height, width, random, size, crop_scale)  # (3, S, S)
    return EncodedCrop(crop.permute(1, 2, 0).flatten(), ALREADY_CROPPED)


def on_device(parts, device):
    """One tensor from each worker -> all of them as one tensor on the device.

    They are copied one by one: each lies in pinned memory, their concatenation would not.
    """
    parts = [part.to(device, non_blocking=True) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode_on_device(parts, size, device):
    """One EncodedBatch from each worker -> (crops, source), b images in all.

    crops: uint8 (b, 3, size, size) on the device. source: int64 (b,) on the CPU: which image the
    pixels are of, its own or, if that is corrupt, the next good one. Raises BadSample if all
    images are corrupt.
    """
    data = []  # uint8 (n,) each
    boxes = []
    for part in parts:
        data += part.data.split(part.sizes.tolist())
        boxes += [Box(*box) for box in part.boxes.tolist()]

    crops = torch.zeros(len(data), size, size, 3, dtype=torch.uint8, device=device)
    good = set()
    jpegs = []
    for i, box in enumerate(boxes):
        if box == ALREADY_CROPPED:
            crops[i].copy_(data[i].view(size, size, 3), non_blocking=True)
            good.add(i)
        else:
            jpegs.append(i)

    for group in groups_to_decode(jpegs, boxes):
        # No name is given to the list of decoded images, so it is freed before the next group.
        for i, image in zip(group, decode_jpegs([data[i] for i in group], device)):
            box = boxes[i]
            if image is not None and image.shape == (3, box.image_height, box.image_width):
                crops[i].copy_(crop_on_device(image, box, size).permute(1, 2, 0))
                good.add(i)

    if not good:
        raise BadSample(f"none of the {len(boxes)} images of a batch can be decoded")
    source = torch.tensor(good_in_place_of_bad(good, len(data)))
    if len(good) < len(data):
        crops = crops[source.to(device)]
    return crops.permute(0, 3, 1, 2), source


def groups_to_decode(jpegs, boxes):
    """Divide the images `jpegs` (numbers) into lists that are decoded together.

    A group ends when it has MAX_PIXELS: all pixels of a whole batch would be gigabytes.
    """
    group = []
    num_pixels = 0
    for i in reversed(jpegs):
        group.append(i)
        num_pixels += boxes[i].image_height * boxes[i].image_width
        if num_pixels >= MAX_PIXELS:
            yield group
            group = []
            num_pixels = 0
    if group:
        yield group


def crop_on_device(image, box, size):
    """A decoded image uint8 (3, h, w) -> its crop, float (3, size, size), integers 0..255."""
    bottom = box.top + box.height
    right = box.left + box.width
    crop = image[None, :, box.top : bottom, box.left : right].float()  # CUDA resizes only floats

    # CUDA's kernel cannot reduce to a fiftieth: if the crop is much too large, average it first.
    shorter = min(box.height, box.width)
    if shorter >= 32 * size:
        crop = F.avg_pool2d(crop, shorter // (16 * size))

    crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]
    return crop.round_().clamp_(0, 255)


def good_in_place_of_bad(good, count):
    """For each of `count` images: itself if it is in `good`, else the next one that is, cyclically.

    -> list of `count` numbers.
    """
    source = [0] * count
    next_good = min(good)
    for i in reversed(range(count)):
        if i in good:
            next_good = i
        source[i] = next_good
    return source


def decode_jpegs(parts, device):
    """JPEGs, uint8 (n,) each -> list of uint8 (3, h, w) each on the device, None for a corrupt one.

    nvJPEG fails for a list as a whole and does not say at which image, so a list that fails is
    decoded by halves.
    """
    if device.type == "cuda":
        # nvJPEG writes on a stream of its own into memory that work queued on the current stream
        # may still use.
        torch.cuda.current_stream(device).synchronize()
    try:
        return decode_jpeg(parts, ImageReadMode.RGB, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if len(parts) > 1:
            middle = len(parts) // 2
            return decode_jpegs(parts[:middle], device) + decode_jpegs(parts[middle:], device)

    # nvJPEG does not know some rarer kinds, CMYK for example, that the CPU's decoder knows.
    try:
        image = decode_image(parts[0], ImageReadMode.RGB)
    except RuntimeError:
        return [None]
    return [image.to(device)]  # an error here is the device's and is not caught
