"""ingest/images.py: crops, decoders and their distance from Pillow, bad images, device decoding."""

import builtins
import functools
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

import config
import data
from config import ConfigError
from ingest import images, index
from samples import png, write_tar

# Of 255: the mean difference over the pixels of one picture. The mean over pictures is under 2.
MAX_DISTANCE = {"torchvision": 0.5, "pillow": 3, "simplejpeg": 3}

# Width, height, and by what the decoders that scale divide them for a crop of 224 pixels.
SIZES = [(256, 256, 1), (341, 256, 1), (512, 512, 2), (683, 512, 2), (501, 499, 2), (1042, 1037, 4)]


@pytest.fixture(params=MAX_DISTANCE)
def decoder(request):
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg", reason="simplejpeg is optional, and not installed")
    return request.param


@functools.cache
def photo(number, width, height, **options):
    """A JPEG with a photograph's mixture: smooth light, edges of many sizes, texture whose spectrum
    falls as 1/f, grain."""
    random = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(random.standard_normal((3, height, width)))
    texture = np.fft.ifft2(spectrum / frequency).real
    grain = random.normal(0, 2, (3, height, width))
    pixels = 128 + 35 * texture / texture.std() + grain
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))

    draw = ImageDraw.Draw(picture)
    for _ in range(25):
        x = random.integers(width)
        y = random.integers(height)
        radius = random.integers(2, 40)
        draw_shape = getattr(draw, random.choice(["ellipse", "rectangle"]))
        color = tuple(random.integers(0, 256, 3).tolist())
        draw_shape((x, y, x + radius, y + radius), color)

    blurred = picture.filter(ImageFilter.GaussianBlur(0.6))
    return encode(blurred, "JPEG", **{"quality": 92, **options})


def encode(picture, format, **options):
    """A Pillow image -> its file, bytes."""
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def opened(content):
    return Image.open(io.BytesIO(content))


def without_pixels(jpeg):
    """A JPEG whose header is good and whose pixels are missing, so that every decoder fails."""
    return jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9"


def crop_of(content, seed, size=224, decoder="torchvision", scale=(0.9, 1.0)):
    """The random crop that training takes of an image, uint8 (3, size, size)."""
    _, height, width = images.encoded_image({"jpg": content})
    random = np.random.default_rng(seed)
    return images.training_image(content, height, width, random, size, scale, decoder)


def crop_by_pillow(content, seed, size=224, factor=1, scale=(0.9, 1.0)):
    """The same crop, its edges at multiples of `factor`, as torchvision.transforms and open_clip
    make it with Pillow."""
    image = opened(content).convert("RGB")
    crop = images.random_crop(image.height, image.width, scale, np.random.default_rng(seed))
    top, left, h, w = (n // factor * factor for n in crop)
    image = image.crop((left, top, left + w, top + h))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def distance(a, b):
    """The mean difference of two images, of 255."""
    return (a.int() - b.int()).abs().float().mean().item()


# ---- crops ----


def test_crop_and_resize_are_torchvisions():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    bicubic = dict(interpolation=InterpolationMode.BICUBIC, antialias=True)

    reference = transforms.resized_crop(image, 3, 5, 40, 41, [24, 24], **bicubic)
    crop = images.resize(image[:, 3:43, 5:46], 24, 24)
    assert (crop.int() - reference.int()).abs().max() <= 1

    reference = transforms.center_crop(transforms.resize(image, 24, **bicubic), 24)
    crop = images.evaluation_image({"png": png(image)}, 24)
    assert (crop.int() - reference.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "height, width", [(100, 100), (60, 200), (200, 60), (1, 1), (1, 500), (37, 41)]
)
def test_random_crop(height, width):
    random = np.random.default_rng(0)
    shares = []
    ratios = []
    for _ in range(500):
        top, left, h, w = images.random_crop(height, width, (0.3, 1.0), random)
        assert 0 <= top and 0 <= left
        assert 1 <= h and 1 <= w
        assert top + h <= height and left + w <= width
        shares.append(h * w / height / width)
        ratios.append(w / h)

    if min(height, width) > 30:
        assert 0.7 < min(ratios) < max(ratios) < 1.4
        assert 0.2 < min(shares) and max(shares) <= 1.01


def test_layout_does_not_change_pixels():
    image = torch.randint(0, 256, (3, 61, 83), dtype=torch.uint8)
    channels_last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    resized = images.resize(image[:, 3:50, 5:70], 24, 24)
    assert torch.equal(resized, images.resize(channels_last[:, 3:50, 5:70], 24, 24))


# ---- kinds of images ----


def test_kinds_of_images():
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(rgb)
    grey = rgb[..., 0]
    grey16 = Image.fromarray(grey.astype(np.uint16) * 257)
    kinds = [
        picture,
        Image.fromarray(grey),
        picture.convert("RGBA"),
        picture.convert("P"),
        grey16,
    ]
    for kind in kinds:
        decoded = images.decode({"txt": b"", "png": encode(kind, "PNG")})
        assert decoded.shape == (3, 20, 30)
        assert decoded.dtype == torch.uint8

    assert grey16.mode.startswith("I;16")
    decoded = images.decode({"png": encode(grey16, "PNG")})
    assert torch.equal(decoded[0], torch.from_numpy(grey.copy()))

    cmyk = encode(picture.convert("CMYK"), "JPEG")
    assert images.decode({"jpg": cmyk}).shape == (3, 20, 30)


# ---- transparency ----


def half_transparent(mode):
    """A picture in red, whose left half is transparent and hides black -> Pillow image."""
    colours = np.zeros((40, 60, 4), dtype=np.uint8)
    colours[:, 30:] = (200, 30, 40, 255)
    colours[:10, 30:, 3] = 128
    return Image.fromarray(colours).convert(mode)


def with_transparent_value(dtype, value):
    """Grey pixels, among them `value`, which is transparent -> a PNG, bytes."""
    grey = np.full((40, 60), 77, dtype=dtype)
    grey[:, :30] = value
    return encode(Image.fromarray(grey), "PNG", transparency=value)


def transparent_pictures():
    """-> {name: file, bytes} of every kind of transparency that Pillow can write."""
    red = half_transparent("RGBA").convert("RGB")
    red_palette = red.quantize(4, dither=Image.Dither.NONE)
    palette_of_rgba = half_transparent("RGBA").quantize(4, method=Image.Quantize.FASTOCTREE)
    return {
        "RGBA": encode(half_transparent("RGBA"), "PNG"),
        "LA": encode(half_transparent("LA"), "PNG"),
        "palette, one index": encode(red_palette, "PNG", transparency=red_palette.getpixel((0, 0))),
        "palette, bytes": encode(red_palette, "PNG", transparency=bytes([0, 160, 255, 10])),
        "palette of RGBA": encode(palette_of_rgba, "PNG"),
        "RGB, one colour": encode(red, "PNG", transparency=(0, 0, 0)),
        "L, one grey": with_transparent_value(np.uint8, 7),
        "1, one of two": encode(red.convert("1"), "PNG", transparency=0),
        "WebP": encode(half_transparent("RGBA"), "WEBP", exact=True),
        "WebP, lossless": encode(half_transparent("RGBA"), "WEBP", lossless=True, exact=True),
    }


def preprocessed_by_open_clip(picture, size):
    """open_clip's own preprocessing of a Pillow image, without its last step -> (3, size, size)."""
    open_clip = pytest.importorskip("open_clip")
    preprocess = open_clip.image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    return (preprocess(picture) * 255).round().byte()


@pytest.mark.parametrize("name", transparent_pictures())
def test_a_transparent_picture_is_put_on_white(name, recwarn):
    """In evaluation and training alike, and without Pillow's warning about palettes."""
    content = transparent_pictures()[name]
    rgba = opened(content).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    composite = Image.alpha_composite(white, rgba).convert("RGB")
    assert np.array(composite).max() == 255  # so that the reference has white in it

    ours = images.evaluation_image({"png": content}, 32)
    assert distance(ours, preprocessed_by_open_clip(composite, 32)) < 0.5

    expected = crop_by_pillow(encode(composite, "PNG"), 0, 32)
    assert distance(crop_of(content, 0, 32), expected) < 0.5
    assert [str(w.message) for w in recwarn if "transparency" in str(w.message).lower()] == []


def test_a_transparent_grey_of_16_bits_is_put_on_white():
    """Pillow does not convert these to RGBA."""
    decoded = images.decode({"png": with_transparent_value(np.uint16, 7 * 257)})
    assert (decoded[:, :, :30] == 255).all()
    assert (decoded[:, :, 30:] == 0).all()  # 77 of 65,535


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
def test_an_opaque_picture_is_as_open_clip_has_it(mode):
    """open_clip is given RGB: it would resize a palette's indices, and only then see colours."""
    picture = opened(photo(2, 90, 70)).convert(mode)
    ours = images.evaluation_image({"png": encode(picture, "PNG")}, 32)
    assert distance(ours, preprocessed_by_open_clip(picture.convert("RGB"), 32)) < 0.5


@pytest.mark.parametrize(
    "mode, options",
    [
        ("RGB", dict()),
        ("RGB", dict(progressive=True)),
        ("RGB", dict(subsampling=0)),
        ("RGB", dict(subsampling=1)),
        ("L", dict()),
        ("CMYK", dict()),
        ("CMYK", dict(subsampling=1)),
    ],
    ids=str,
)
def test_kinds_of_jpeg(decoder, mode, options):
    """Against the same crop of the fully decoded picture, at every scale, with odd sides.

    simplejpeg refuses the last kind, so that torchvision decodes it, at full size.
    """
    content = encode(opened(photo(3, 150, 131)).convert(mode), "JPEG", quality=95, **options)
    decoded = images.decode({"jpg": content})
    box = images.random_crop(131, 150, (0.9, 1.0), np.random.default_rng(0))

    for size, reduction in ((100, 1), (48, 2), (20, 4), (10, 8)):
        factors = {1} if decoder == "torchvision" else {1, reduction}
        distances = []
        for factor in factors:
            top, left, h, w = (n // factor * factor for n in box)
            reference = images.resize(decoded[:, top : top + h, left : left + w], size, size)
            distances.append(distance(crop_of(content, 0, size, decoder), reference))
        assert min(distances) < 2 * MAX_DISTANCE[decoder], size


# ---- decoders ----


def test_crops_are_pillows(decoder):
    distances = []
    for number, (width, height, factor) in enumerate(SIZES):
        if decoder == "torchvision":
            factor = 1
        content = photo(number, width, height)
        for seed in range(2):
            crop = crop_of(content, seed, decoder=decoder)
            assert crop.shape == (3, 224, 224)
            assert crop.dtype == torch.uint8
            distances.append(distance(crop, crop_by_pillow(content, seed, factor=factor)))
            assert distances[-1] < MAX_DISTANCE[decoder], (width, height, seed)
    print(decoder, [round(d, 2) for d in distances])
    assert sum(distances) / len(distances) < 2


def test_a_crop_is_never_enlarged(decoder, monkeypatch):
    """The scaled picture is smaller than the input only where the picture itself is."""
    resized = []
    resize = images.resize

    def recorded(image, *size):
        resized.append(image.shape[1:])
        return resize(image, *size)

    monkeypatch.setattr(images, "resize", recorded)
    for seed in range(8):
        for width, height in ((512, 512), (449, 447), (900, 500), (2000, 230)):
            crop_of(photo(1, width, height), seed, decoder=decoder, scale=(0.3, 1.0))
            _, _, h, w = images.random_crop(height, width, (0.3, 1.0), np.random.default_rng(seed))
            assert min(resized[-1]) >= min(224, h, w)


def test_decoders_that_scale_agree():
    pytest.importorskip("simplejpeg", reason="simplejpeg is optional, and not installed")
    for width, height, _ in SIZES:
        content = photo(7, width, height)
        by_pillow = crop_of(content, 1, decoder="pillow")
        by_simplejpeg = crop_of(content, 1, decoder="simplejpeg")
        assert distance(by_pillow, by_simplejpeg) < 0.3


def test_broken_ones_are_bad_with_any_decoder(decoder):
    good = photo(2, 512, 512)
    broken = [
        good[: len(good) // 2],
        good[:700],
        good[:300] + bytes(200) + good[300:],
        b"\xff\xd8\xff",
    ]
    for content in broken:
        try:
            crop_of(content, 0)
        except images.BadSample as error:
            with pytest.raises(images.BadSample, match=f"^{error}$"):
                crop_of(content, 0, decoder=decoder)
        else:
            assert crop_of(content, 0, decoder=decoder).shape == (3, 224, 224)


def test_a_png_is_the_same_with_any_decoder(decoder):
    content = encode(opened(photo(4, 300, 300)), "PNG")
    crop = crop_of(content, 0, 32)
    assert torch.equal(crop_of(content, 0, 32, decoder), crop)
    assert distance(crop, crop_by_pillow(content, 0, 32)) < 0.5


def test_a_decoder_that_is_not_installed(monkeypatch):
    real_import = builtins.__import__

    def import_without_simplejpeg(name, *args, **options):
        if name == "simplejpeg":
            raise ModuleNotFoundError("No module named 'simplejpeg'")
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", import_without_simplejpeg)
    order = data.Order(index.Index(["a"], np.array([8]), ("txt",)), 4)
    message = (
        "decoder = 'simplejpeg' needs a package .*pip install simplejpeg, or set decoder = 'pillow'"
    )
    with pytest.raises(ConfigError, match=message):
        data.Loader(order, 224, decoder="simplejpeg")
    assert data.Loader(order, 224, decoder="pillow", num_steps=2, workers=0)


def test_the_name_of_a_decoder_is_checked():
    assert config.load([]).decoder == "torchvision"
    with pytest.raises(ConfigError, match="decoder = 'simplejpg' .*did you mean 'simplejpeg'"):
        config.load(["--decoder=simplejpg"])


# ---- decoding on the device ----
# torchvision's decode_jpeg takes a list on either device: on a GPU nvJPEG decodes it, on a CPU
# libjpeg-turbo. What goes in and what comes out is the same, so most of this is tested on CPUs.

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
SCALE = (0.5, 1.0)


def encoded_crop_of(content, seed, size, scale=SCALE):
    """As crop_of, but left to the device."""
    _, height, width = images.encoded_image({"jpg": content})
    random = np.random.default_rng(seed)
    return images.encoded_crop(content, height, width, random, size, scale)


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_device_decodes(device):
    """Images 1 and 4 are corrupt, 2 is a PNG, which the worker decodes."""
    device = torch.device(device)
    contents = [photo(i, 200 + 20 * i, 230) for i in range(5)]
    contents[1] = without_pixels(contents[1])
    contents[2] = encode(opened(photo(7, 300, 260)), "PNG")
    contents[4] = without_pixels(contents[4])

    encoded = [encoded_crop_of(content, i, 64) for i, content in enumerate(contents)]
    parts = [images.stack_crops(encoded[:2]), images.stack_crops(encoded[2:])]
    assert all(isinstance(part, images.EncodedBatch) for part in parts)

    crops, source = images.decode_on_device(parts, 64, device)
    assert crops.shape == (5, 3, 64, 64)
    assert crops.dtype == torch.uint8
    assert crops.device.type == device.type
    assert source.tolist() == [0, 2, 2, 3, 0]

    crops = crops.cpu()
    for i in (0, 2, 3):
        assert distance(crops[i], crop_of(contents[i], i, 64, scale=SCALE)) < 0.5, i
    assert torch.equal(crops[1], crops[2])
    assert torch.equal(crops[4], crops[0])

    with pytest.raises(images.BadSample, match="none of the 1 images"):
        images.decode_on_device([images.stack_crops(encoded[1:2])], 64, device)


def test_a_jpeg_that_breaks_off_is_bad_before_a_device_sees_it():
    with pytest.raises(images.BadSample):
        encoded_crop_of(photo(3, 260, 230)[:-500], 0, 64)


@pytest.mark.parametrize("device", DEVICES)
def test_the_device_reduces_to_a_fiftieth(device):
    """By way of an average of 3 x 3 pixels."""
    large = photo(3, 900, 800)
    encoded = images.stack_crops([encoded_crop_of(large, 3, 16, scale=(0.9, 1.0))])
    crops, _ = images.decode_on_device([encoded], 16, torch.device(device))
    assert distance(crops[0].cpu(), crop_of(large, 3, 16, scale=(0.9, 1.0))) < 1.5


@pytest.mark.parametrize(
    "sizes, groups",
    [
        ([], []),
        ([40], [[0]]),
        ([40, 40, 40, 40, 40], [[4, 3, 2], [1, 0]]),
        ([40, 300, 40], [[2, 1], [0]]),
    ],
    ids=str,
)
def test_groups_that_are_decoded_together(monkeypatch, sizes, groups):
    """A group ends with the image that brings it to MAX_PIXELS."""
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    boxes = [images.Box(0, 0, 1, 1, size, 1) for size in sizes]
    assert list(images.groups_to_decode(list(range(len(sizes))), boxes)) == groups


def test_a_loader_that_leaves_decoding_to_the_device(tmp_path, monkeypatch):
    """The same samples, crops and captions as always; a corrupt one is replaced by all of its
    neighbour."""
    files = []
    for i in range(16):
        content = photo(i, 120 + i, 100)
        if i == 5:
            content = without_pixels(content)
        files += [(f"{i}.jpg", content), (f"{i}.txt", f"picture {i}".encode())]
    order = data.Order(index.load_index(write_tar(tmp_path / "0.tar", files)), 8)

    device = "cuda"
    if not torch.cuda.is_available():
        device = "cpu"
        message = "decoder = 'nvjpeg' needs a GPU .*this run is on cpu"
        with pytest.raises(ConfigError, match=message):
            data.Loader(order, 32, decoder="nvjpeg")
        monkeypatch.setattr(data, "check_decoder", lambda *_: None)

    for workers in (0, 2):
        options = dict(workers=workers, num_steps=2)
        usual = list(data.Loader(order, 32, **options))
        found = list(data.Loader(order, 32, **options, decoder="nvjpeg", device=device))
        assert sum(batch.bad.get("corrupt image", 0) for batch in found) == 1

        for step, (a, b) in enumerate(zip(usual, found)):
            pixels = b.images.cpu()
            tokens = b.tokens.cpu()
            for i, number in enumerate(data.batch_ids(order, step)):
                if number == 5:
                    neighbour = (i + 1) % 8
                    assert b.ids[i] == b.ids[neighbour] != 5
                    assert torch.equal(tokens[i], tokens[neighbour])
                    assert torch.equal(pixels[i], pixels[neighbour])
                else:
                    assert b.ids[i] == a.ids[i] == number
                    assert b.lengths[i] == a.lengths[i]
                    assert torch.equal(tokens[i], a.tokens[i])
                    assert distance(pixels[i], a.images[i]) < 0.5
