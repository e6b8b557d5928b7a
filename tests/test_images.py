"""images.py: how far each decoder is from Pillow's bicubic, which crops it takes, and what it does with what it does not know."""

import builtins
import functools
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

import config
import data
from config import ConfigError
from ingest import images, index

WORST = {
    "torchvision": 0.5,
    "pillow": 3,
    "simplejpeg": 3,
}  # of 255, mean over the pixels of one picture; on average all are under 2


@pytest.fixture(params=WORST)
def decoder(request):
    if request.param not in ("torchvision", "pillow"):
        pytest.importorskip(request.param, reason=f"{request.param} is optional, and not installed")
    return request.param


@functools.cache
def photo(number, width, height, **options):
    """A JPEG with a photograph's mixture: smooth light, edges of many sizes, texture whose spectrum falls as 1/f, grain."""
    random = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(random.standard_normal((3, height, width))) / frequency).real
    noise = 128 + 35 * noise / noise.std() + random.normal(0, 2, (3, height, width))
    picture = Image.fromarray(noise.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    draw = ImageDraw.Draw(picture)
    for _ in range(25):
        x, y, r = random.integers(width), random.integers(height), random.integers(2, 40)
        getattr(draw, random.choice(["ellipse", "rectangle"]))(
            (x, y, x + r, y + r), tuple(random.integers(0, 256, 3).tolist())
        )
    file = io.BytesIO()
    picture.filter(ImageFilter.GaussianBlur(0.6)).save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def crop_of(content, seed, size=224, decoder="torchvision", scale=(0.9, 1.0)):
    _, height, width = images.encoded_image({"jpg": content})
    return images.training_image(
        content, height, width, np.random.default_rng(seed), size, scale, decoder
    )


def pillows(content, seed, size=224, by=1, scale=(0.9, 1.0)):
    """The same crop, its edges at multiples of `by`, as torchvision.transforms and open_clip make it with Pillow."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    top, left, h, w = (
        n // by * by
        for n in images.random_crop(image.height, image.width, scale, np.random.default_rng(seed))
    )
    return torch.from_numpy(
        np.array(
            image.crop((left, top, left + w, top + h)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
        )
    ).permute(2, 0, 1)


def distance(a, b):
    return (a.int() - b.int()).abs().float().mean().item()


SIZES = [(256, 256, 1), (341, 256, 1), (512, 512, 2), (683, 512, 2), (501, 499, 2), (1042, 1037, 4)]


def test_crops_are_pillows(decoder):
    distances = []
    for number, (width, height, by) in enumerate(SIZES):
        for seed in range(2):
            content = photo(number, width, height)
            ours = crop_of(content, seed, decoder=decoder)
            assert ours.shape == (3, 224, 224) and ours.dtype == torch.uint8
            distances.append(
                distance(ours, pillows(content, seed, by=1 if decoder == "torchvision" else by))
            )
            assert distances[-1] < WORST[decoder], (width, height, seed)
    print(decoder, [round(d, 2) for d in distances])
    assert sum(distances) / len(distances) < 2


def test_a_crop_is_never_enlarged(decoder, monkeypatch):
    """The scaled picture is smaller than the input only where the picture itself is."""
    seen, resize = [], images.resize
    monkeypatch.setattr(
        images, "resize", lambda image, *size: seen.append(image.shape[1:]) or resize(image, *size)
    )
    for seed in range(8):
        for width, height in ((512, 512), (449, 447), (900, 500), (2000, 230)):
            crop_of(photo(1, width, height), seed, decoder=decoder, scale=(0.3, 1.0))
            _, _, h, w = images.random_crop(height, width, (0.3, 1.0), np.random.default_rng(seed))
            assert min(seen[-1]) >= min(224, h, w)


def test_decoders_that_scale_agree():
    pytest.importorskip("simplejpeg", reason="simplejpeg is optional, and not installed")
    for width, height, _ in SIZES:
        content = photo(7, width, height)
        assert (
            distance(
                crop_of(content, 1, decoder="pillow"), crop_of(content, 1, decoder="simplejpeg")
            )
            < 0.3
        )


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
    """Against the same crop out of the whole picture, at every scale, and of odd sides. simplejpeg refuses the last kind."""
    file = io.BytesIO()
    Image.open(io.BytesIO(photo(3, 150, 131))).convert(mode).save(
        file, "JPEG", quality=95, **options
    )
    whole = images.decode({"jpg": file.getvalue()})
    box = images.random_crop(131, 150, (0.9, 1.0), np.random.default_rng(0))
    for size, by in ((100, 1), (48, 2), (20, 4), (10, 8)):
        crops = []
        for by in {1, by if decoder != "torchvision" else 1}:
            top, left, h, w = (n // by * by for n in box)
            crops.append(images.resize(whole[:, top : top + h, left : left + w], size, size))
        assert (
            min(distance(crop_of(file.getvalue(), 0, size, decoder), crop) for crop in crops)
            < WORST[decoder] * 2
        ), size


def test_broken_ones_are_bad_with_any_decoder(decoder):
    whole = photo(2, 512, 512)
    for content in (
        whole[: len(whole) // 2],
        whole[:700],
        whole[:300] + bytes(200) + whole[300:],
        b"\xff\xd8\xff",
    ):
        try:
            crop_of(content, 0)
        except images.BadSample as error:
            with pytest.raises(images.BadSample, match=f"^{error}$"):
                crop_of(content, 0, decoder=decoder)
        else:
            assert crop_of(content, 0, decoder=decoder).shape == (3, 224, 224)


def test_pngs_and_evaluation_do_not_depend_on_it(decoder):
    file = io.BytesIO()
    Image.open(io.BytesIO(photo(4, 300, 300))).save(file, "PNG")
    assert torch.equal(crop_of(file.getvalue(), 0, 32, decoder), crop_of(file.getvalue(), 0, 32))
    assert distance(crop_of(file.getvalue(), 0, 32), pillows(file.getvalue(), 0, 32)) < 0.5


def test_a_decoder_that_is_not_installed(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "simplejpeg":
            raise ModuleNotFoundError("No module named 'simplejpeg'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    order = data.Order(index.Index(["a"], np.array([8]), ("txt",)), 4)
    with pytest.raises(
        ConfigError,
        match=r"decoder = 'simplejpeg' needs a package .*pip install simplejpeg, or set decoder = 'pillow'",
    ):
        data.Loader(order, 224, decoder="simplejpeg")
    assert (
        data.Loader(order, 224, decoder="pillow", num_steps=2, workers=0)
        and config.load([]).decoder == "torchvision"
    )
    with pytest.raises(ConfigError, match="decoder = 'simplejpg' .*did you mean 'simplejpeg'"):
        config.load(["--decoder=simplejpg"])


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_device_decodes(device):
    """torchvision's decode_jpeg takes a list on either device: nvJPEG decodes it on a GPU, libjpeg-turbo here. Both sides of what is handed over are the same."""
    contents = [photo(i, 200 + 20 * i, 230) for i in range(5)]
    for i in (1, 4):  # its pixels are missing
        contents[i] = contents[i][: contents[i].index(b"\xff\xda")] + b"\xff\xd9"
    file = io.BytesIO()
    Image.open(io.BytesIO(photo(7, 300, 260))).save(file, "PNG")
    contents[2] = file.getvalue()
    sizes = [(230, 200 + 20 * i) if i != 2 else (260, 300) for i in range(5)]
    cut = [
        images.encoded_crop(content, *size, np.random.default_rng(i), 64, (0.5, 1.0))
        for i, (content, size) in enumerate(zip(contents, sizes))
    ]
    parts = [images.stack_crops(cut[:2]), images.stack_crops(cut[2:])]
    assert all(isinstance(part, images.Encoded) for part in parts)
    crops, source = images.decode_on_device(parts, 64, torch.device(device))
    assert (
        crops.shape == (5, 3, 64, 64)
        and crops.dtype == torch.uint8
        and crops.device.type == device
        and source.tolist() == [0, 2, 2, 3, 0]
    )
    crops = crops.cpu()
    for i in (0, 2, 3):
        assert distance(crops[i], crop_of(contents[i], i, 64, scale=(0.5, 1.0))) < 0.5, i
    assert torch.equal(crops[1], crops[2]) and torch.equal(crops[4], crops[0])
    with pytest.raises(images.BadSample):
        images.encoded_crop(
            contents[3][:-500], *sizes[3], np.random.default_rng(0), 64, (0.5, 1.0)
        )  # broken off: seen before a GPU sees it
    large = photo(3, 900, 800)  # to a fiftieth: by way of an average of 3 x 3 pixels
    crop = images.stack_crops(
        [images.encoded_crop(large, 800, 900, np.random.default_rng(3), 16, (0.9, 1.0))]
    )
    assert (
        distance(
            images.decode_on_device([crop], 16, torch.device(device))[0][0].cpu(),
            crop_of(large, 3, 16, scale=(0.9, 1.0)),
        )
        < 1.5
    )
    with pytest.raises(images.BadSample, match="none of the 1 images"):
        images.decode_on_device([images.stack_crops(cut[1:2])], 64, torch.device(device))


def test_a_loader_that_leaves_decoding_to_the_device(tmp_path, monkeypatch):
    """The same samples, crops and captions as always, and a corrupt one has its neighbour's everything. Refused where there is no GPU."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in range(16):
            content = photo(i, 120 + i, 100)
            for name, part in (
                (
                    f"{i}.jpg",
                    content if i != 5 else content[: content.index(b"\xff\xda")] + b"\xff\xd9",
                ),
                (f"{i}.txt", b"picture %d" % i),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    order = data.Order(index.load_index(str(tmp_path / "0.tar")), 8)
    if not torch.cuda.is_available():
        with pytest.raises(
            ConfigError, match="decoder = 'nvjpeg' needs a GPU .*this run is on cpu"
        ):
            data.Loader(order, 32, decoder="nvjpeg")
        monkeypatch.setattr(data, "check_decoder", lambda *_: None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for workers in (0, 2):
        usual = list(data.Loader(order, 32, workers=workers, num_steps=2))
        found = list(
            data.Loader(order, 32, workers=workers, num_steps=2, decoder="nvjpeg", device=device)
        )
        assert sum(batch.bad.get("corrupt image", 0) for batch in found) == 1
        for step, (a, b) in enumerate(zip(usual, found)):
            pixels, tokens = b.images.cpu(), b.tokens.cpu()
            for i, number in enumerate(data.batch_ids(order, step)):
                if number == 5:
                    assert b.ids[i] == b.ids[(i + 1) % 8] != 5 and torch.equal(
                        tokens[i], tokens[(i + 1) % 8]
                    )
                else:
                    assert (
                        b.ids[i] == a.ids[i] == number
                        and torch.equal(tokens[i], a.tokens[i])
                        and b.lengths[i] == a.lengths[i]
                    )
                    assert distance(pixels[i], a.images[i]) < 0.5


def test_layout_does_not_change_pixels():
    image = torch.randint(0, 256, (3, 61, 83), dtype=torch.uint8)
    rows = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(
        images.resize(image[:, 3:50, 5:70], 24, 24), images.resize(rows[:, 3:50, 5:70], 24, 24)
    )
