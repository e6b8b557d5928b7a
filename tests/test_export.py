"""tools/export.py: other libraries load our checkpoints and compute the same; the model card."""

import dataclasses
import html
import json
import math
import os
import shutil
import stat
import sys
import time

import ftfy
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

import config
import model as models
import shapes
import towers
from config import ConfigError
from conftest import ROOT
from helpers import TINY, TINY_RESNET, checkpoint_folder
from ingest.images import evaluation_image
from ingest.tokenizer import Tokenizer
from runtime import checkpoint
from samples import png
from tools import export, model_card, to_hf, to_open_clip
from tools.model_card import MADE_BY

TINY_TIMM = dict(
    model="timm:test_vit", context_length=16, text_width=64, text_heads=2, text_layers=2
)

# Models of open_clip, by their settings.
OPEN_CLIP = {
    "vit": TINY,
    "a width below that of a head": {**TINY, "vision_width": 48},
    "resnet": {**TINY, **TINY_RESNET},
    "emoji": config.read(os.path.join(ROOT, "configs", "emoji_v3.py")),
    "timm": {**TINY_TIMM, "model": "timm:test_resnet", "image_size": 64},
    "timm, of its own size": TINY_TIMM,
}
HF = {
    "vit": TINY,
    "a width that 64 does not divide": {**TINY, "vision_width": 160},
    "longer captions": {**TINY, "context_length": 33, "text_width": 96, "text_heads": 3},
}

# Of pictures, (height, width): each shorter side is resized, and the centre is cut out.
SIZES = [(90, 60), (50, 120), (200, 160)]

pytestmark = pytest.mark.usefixtures("one_thread")


def made_run(folder, step=4, **settings):
    """A run's folder with one checkpoint, of a model with perturbed weights -> the model."""
    values = {key: config.typed(key, value) for key, value in settings.items()}
    c = config.Config(**{"train_data": ("shards/{00..09}.tar",), **values})
    torch.manual_seed(1)
    model = models.create(c.model, c.tau_init, **c.model_numbers())
    towers.perturb(model).eval()
    with torch.no_grad():
        model.logit_scale.add_(0.5)

    path = checkpoint_folder(folder, step)
    os.makedirs(path)
    contents = {
        "model.pt": {"state_dict": model.state_dict()},
        "train.pt": {"step": step, "config": dataclasses.asdict(c)},
    }
    with open(os.path.join(path, checkpoint.SUMS), "w") as sums:
        for name, content in contents.items():
            sums.write(f"{checkpoint.write_file(os.path.join(path, name), content)}  {name}\n")
    with open(os.path.join(folder, "checkpoints", "latest"), "w") as f:
        f.write(os.path.basename(path))
    return model


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a tiny ViT."""
    folder = str(tmp_path / "a_run")
    made_run(folder, **TINY)
    return folder


def files_under(folder):
    found = []
    for place, _, names in os.walk(folder):
        found += [os.path.join(place, name) for name in names]
    return sorted(found)


def photos(sizes):
    """Coloured blotches with some noise, uint8 (3, h, w) for each of the sizes (h, w)."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for height, width in sizes:
        colours = 255 * torch.rand(1, 3, 5, 5, generator=generator)
        blotches = F.interpolate(colours, size=(height, width), mode="bicubic")
        noise = 60 * torch.randn(3, height, width, generator=generator)
        found.append((blotches[0] + noise).clamp(0, 255).to(torch.uint8))
    return found


def assert_same_features_and_classes(folder, library, model, resized):
    """From pictures of any size and from captions, by the library's code alone.

    resized: how much features of pictures that were resized may differ.
    """
    size = model.image_size
    pictures = photos([(size, size)] * 8 + SIZES)
    ours = [evaluation_image({"png": png(picture)}, size) for picture in pictures]
    texts = [f"a photo of a {name}" for name in shapes.CLASSES]
    texts += ["Café, 2 &  3!", "", "a very long caption " * 20]

    our_images, our_texts = export.features(model, torch.stack(ours), texts)
    images, found_texts = library.encode(folder, pictures, texts)
    assert (found_texts - our_texts).abs().max() < 1e-5
    assert (images[:8] - our_images[:8]).abs().max() < 1e-5
    assert (images[8:] - our_images[8:]).abs().max() < resized

    assert_usage_gives(our_images[0], library, folder, pictures[0])

    classes = len(shapes.CLASSES)
    our_classes = (our_images[:8] @ our_texts[:classes].T).argmax(1)
    assert torch.equal((images[:8] @ found_texts[:classes].T).argmax(1), our_classes)


def assert_usage_gives(image_feature, library, folder, picture):
    """The code in the model card runs as it is. image_feature: (d,) of the picture."""
    variables = {"picture": to_pil_image(picture)}
    exec(library.USAGE.replace("FOLDER", folder), variables)
    assert (variables["image_features"][0] - image_feature).abs().max() < 1e-5
    assert variables["text_features"].shape == (1, len(image_feature))


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_open_clip_computes_our_features(kind, tmp_path, capsys):
    pytest.importorskip("open_clip")
    folder = str(tmp_path / "run")
    model = made_run(folder, **OPEN_CLIP[kind])

    export.main([folder, "--to", "open_clip"])
    out = os.path.join(folder, "exports", "open_clip")
    # It resizes by Pillow, and some bytes differ from ours by 1.
    assert_same_features_and_classes(out, to_open_clip, model, resized=2e-3)
    printed = capsys.readouterr().out
    assert f'name = "local-dir:{out}"' in printed
    assert "features of length 1 differ by" in printed
    assert checkpoint.verify(out, sorted(checkpoint.read_sums(out))) is None


def test_open_clip_loads_it_from_the_hub(run, monkeypatch):
    """The names of the files, the temperature, and a tokenizer without files of its own."""
    open_clip = pytest.importorskip("open_clip")
    export.main([run, "--to", "open_clip"])

    def downloaded(model_id, filename=None, **_):
        # Weights have several names, which are tried in this order.
        name = filename or "open_clip_model.safetensors"
        return os.path.join(run, "exports", "open_clip", name)

    monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", downloaded)
    model, _, _ = open_clip.create_model_and_transforms("hf-hub:somebody/something")
    saved = checkpoint.read(os.path.join(checkpoint_folder(run, 4), "model.pt"))["state_dict"]
    assert torch.equal(model.logit_scale, saved["logit_scale"])

    tokenizer = open_clip.get_tokenizer("hf-hub:somebody/something")
    texts = ["two dogs", "a long one " * 20]
    assert torch.equal(tokenizer(texts), Tokenizer(TINY["context_length"])(texts))


@pytest.mark.parametrize("kind", HF)
def test_transformers_computes_our_features(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = str(tmp_path / "run")
    model = made_run(folder, **HF[kind])

    export.main([folder, "--to", "hf", "--out", str(tmp_path / "out")])
    assert not os.path.exists(os.path.join(folder, "exports"))
    # It resizes as we do, with the same bytes.
    assert_same_features_and_classes(str(tmp_path / "out"), to_hf, model, resized=1e-5)

    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    assert theirs.logit_scale.item() == model.logit_scale.item()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == model.context_length
    for text in (
        "Tom &amp; Jerry",
        "<b> R&amp;amp;D",
        "“l’été”",
        "mojibake cafÃ©",
        "ﬁne ｆｕｌｌ ① 日本語 🐱",
        "don't I'LL",
    ):
        cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
        ours = Tokenizer(77).encode(text)
        assert tokenizer(cleaned).input_ids[1:-1] == ours, text

    # The exception, of which the model card tells.
    for text in ("<|startoftext|>", "<|endoftext|>"):
        assert tokenizer(text).input_ids[1:-1] != Tokenizer(77).encode(text)
        assert text in to_hf.USAGE


# ---- refusals ----


def refused(command, reason):
    with pytest.raises(ConfigError, match=reason):
        export.main(command)


@pytest.mark.parametrize(
    "to, settings, reason",
    [
        ("open_clip", {**TINY, **TINY_RESNET, "vision_norm": "group"}, "have BatchNorm only"),
        ("open_clip", {**TINY_TIMM, "image_size": 64}, "its own size, 160, only"),
        ("open_clip", {**TINY_TIMM, "model": "timm:mobilenetv3_small_050"}, "expects 288 features"),
        ("hf", {**TINY, **TINY_RESNET}, "transformers has CLIP with a ViT only"),
        ("hf", TINY_TIMM, "transformers has CLIP with a ViT only"),
        ("onnx", TINY, "--to onnx: write --to open_clip, or --to hf"),
    ],
)
def test_what_the_library_does_not_have_is_refused(to, settings, reason, tmp_path):
    made_run(str(tmp_path), **settings)
    before = files_under(tmp_path)
    refused([str(tmp_path), "--to", to], reason)
    assert files_under(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]


@pytest.mark.parametrize("wrong, reason", [(2e-4, "differ by 2.0e-04"), (math.nan, "by inf")])
def test_an_export_with_other_features_is_not_kept(wrong, reason, run, monkeypatch):
    pytest.importorskip("open_clip")
    encode = to_open_clip.encode

    def other_features(folder, pictures, texts):
        images, texts = encode(folder, pictures, texts)
        return images, texts + wrong

    monkeypatch.setattr(to_open_clip, "encode", other_features)
    refused([run, "--to", "open_clip"], f"computes other features .* {reason}")
    assert os.listdir(run) == ["checkpoints"]


def test_an_export_that_cannot_be_loaded_is_not_kept(run, monkeypatch):
    pytest.importorskip("open_clip")

    def write_half(folder, *_):
        with open(os.path.join(folder, "open_clip_config.json"), "w") as f:
            f.write("{")

    monkeypatch.setattr(to_open_clip, "write", write_half)
    refused([run, "--to", "open_clip"], "cannot load the export, which is not kept")
    assert os.listdir(run) == ["checkpoints"]


def test_without_the_other_library(run, monkeypatch, capsys):
    """open_clip is needed to compare only, transformers to write."""
    monkeypatch.setitem(sys.modules, "open_clip", None)
    export.main([run, "--to", "open_clip"])
    assert "It was not compared with open_clip, which is not installed" in capsys.readouterr().out
    assert os.path.exists(os.path.join(run, "exports", "open_clip", "open_clip_model.safetensors"))

    monkeypatch.setitem(sys.modules, "transformers", None)
    refused([run, "--to", "hf"], "pip install transformers")
    assert os.listdir(os.path.join(run, "exports")) == ["open_clip"]


def test_only_an_untouched_export_is_replaced(run, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "check_written", lambda *_: "checked")
    out = os.path.join(run, "exports", "open_clip")
    command = [run, "--to", "open_clip"]
    export.main(command)
    export.main(command)
    assert sorted(os.listdir(run)) == ["checkpoints", "exports"]

    # A file beside those of the export.
    with open(os.path.join(out, "notes.txt"), "w"):
        pass
    refused(command, "it also holds notes.txt")
    os.remove(os.path.join(out, "notes.txt"))

    # Without one of its files.
    config_json = os.path.join(out, "open_clip_config.json")
    os.rename(config_json, os.path.join(run, "aside"))
    refused(command, "open_clip_config.json was removed since the export")
    os.rename(os.path.join(run, "aside"), config_json)

    # A model card to which somebody has added.
    with open(os.path.join(out, "README.md"), "a") as f:
        f.write("licence: mine")
    refused(command, "README.md was changed since the export")

    # A disk that cannot be read, here because a link leads to itself.
    os.rename(os.path.join(out, checkpoint.SUMS), os.path.join(run, "sums"))
    os.symlink(checkpoint.SUMS, os.path.join(out, checkpoint.SUMS))
    refused(command, "SHA256SUMS cannot be read .Too many levels")

    # Somebody's own folder, with sums of all its files.
    os.remove(os.path.join(out, checkpoint.SUMS))
    with open(os.path.join(out, "README.md"), "w") as f:
        f.write("my models")
    export.write_sums(out)
    refused(command, "something else than an export")
    refused([*command, "--out", checkpoint_folder(run, 4)], "something else than an export")
    refused([*command, "--out", str(tmp_path)], "something else than an export")
    refused([*command, "--out", os.path.join(out, "README.md")], "is a file")
    refused([*command, "--out", "/proc/nothing/x"], "out = '/proc/nothing/x' cannot be written")

    full = shutil.disk_usage(run)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    refused([*command, "--out", str(tmp_path / "new")], "has no room")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640)])
@pytest.mark.parametrize("to", ["open_clip", "hf"])
def test_the_umask_decides_who_can_read_it(to, umask, mode, run, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(export, "check_written", lambda *_: "checked")
    before = os.umask(umask)
    try:
        export.main([run, "--to", to])
    finally:
        os.umask(before)

    out = os.path.join(run, "exports", to)
    for path in files_under(out):
        assert stat.S_IMODE(os.stat(path).st_mode) == mode, path
    assert stat.S_IMODE(os.stat(out).st_mode) == 0o777 & ~umask


def test_what_a_killed_export_left_is_removed(run, monkeypatch):
    """But not that of one that may still be at work, and nobody else's files."""
    monkeypatch.setattr(export, "check_written", lambda *_: "checked")
    long_ago = time.time() - 2 * export.STALE
    for name in ("old", "new"):
        os.makedirs(os.path.join(run, export.TEMPORARY + name, "export"))
    os.mkdir(os.path.join(run, ".other"))
    for name in (".other", export.TEMPORARY + "old"):
        os.utime(os.path.join(run, name), (long_ago, long_ago))

    export.main([run, "--to", "open_clip"])
    left = [".other", export.TEMPORARY + "new", "checkpoints", "exports"]
    assert sorted(os.listdir(run)) == sorted(left)


# ---- the model card ----

RESULTS = {
    "checkpoint": "a_run/step-00000004",
    "sets": [
        {
            "name": "imagenet",
            "eval_data": "imagenet/val",
            "names_from": "classnames.txt",
            "templates_from": "",
            "notes": ["has 49,000 images, not the benchmark's result"],
            "images": 49_990,
            "classes": 1000,
            "templates": 80,
            "left_out": {"cannot be decoded": 10},
            "zeroshot_top1": 0.6449,
        },
        {
            "name": "flickr30k",
            "eval_data": "f30k",
            "images": 1000,
            "left_out": {},
            "text_to_image_R@1": 0.25,
        },
        {"name": "one", "eval_data": "one", "images": 1, "classes": 1, "templates": 1},
    ],
    "imagenet_and_variants": 0.5012,
}


def card_of(run, monkeypatch):
    """The text of the model card of an export."""
    monkeypatch.setattr(export, "check_written", lambda *_: "It was checked.")
    export.main([run, "--to", "open_clip"])
    with open(os.path.join(run, "exports", "open_clip", "README.md")) as f:
        return f.read()


def write_results(folder, results):
    with open(os.path.join(folder, "eval.json"), "w") as f:
        json.dump(results, f)


def test_the_model_card(run, monkeypatch):
    write_results(run, RESULTS)
    card = card_of(run, monkeypatch)
    for text in (
        "---\nlibrary_name: open_clip\n",
        f"# a_run\n\n{MADE_BY}\n",
        "Images are 32 x 32 pixels",
        "Captions have at most 16 tokens",
        "A CLIP model (ViT-B-32 with image_size = 32, patch_size = 8, embed_dim = 32,",
        "text_layers = 1): an image tower of 0.1 M parameters and",
        "in the place of FOLDER.",
        'name = "local-dir:FOLDER"',
        "It was checked.",
        "`algorithm = fastclip-v3` (loss RGCL-g, `equations = paper`), for 4 steps of 64 pairs: "
        "256 samples seen. The temperature, learned, is tau = 0.04246;",
        "* `shards/{00..09}.tar`",
        "Of the checkpoint `a_run/step-00000004`",
        "imagenet, in `imagenet/val`: 49,990 images, 1,000 classes (from `classnames.txt`), "
        "80 templates, left out: 10.\n\n* has 49,000 images, not the benchmark's result\n\n| meas",
        "| zeroshot_top1 | 64.49 |",
        "flickr30k, in `f30k`: 1,000 images.\n\n| measure",
        "| text_to_image_R@1 | 25.00 |",
        "one, in `one`: 1 image, 1 class, 1 template.",
        "mean top-1 of the seven sets: 50.12 %",
        "| rho | `4.0` |",
        "## Licence\n\nNot stated.",
        "2407.01445",
    ):
        assert text in card, text
    for key in ("beta1", "image_size", "workers", "log_steps", "device", "eval_data"):
        assert f"| {key} |" not in card, key  # a default, or said elsewhere, or not of the method
    assert {*model_card.IN_SENTENCES, *model_card.NOT_OF_THE_METHOD} < set(config.HINTS)
    assert str(run) not in card


def test_the_card_has_no_results_of_another_checkpoint(run, monkeypatch, capsys):
    """Nor of another form; and temperatures of samples are not the model's."""
    write_results(run, {"zeroshot_top1": 0.5})
    assert "None are known" in card_of(run, monkeypatch)
    assert "has not the form that eval.py writes" in capsys.readouterr().out

    write_results(run, RESULTS)
    made_run(run, step=8, **TINY, algorithm="fastclip-v2")
    older = checkpoint_folder(run, 4)
    assert export.results_of(older) == (RESULTS, "")
    write_results(older, {**RESULTS, "checkpoint": "a_run/step-00000008"})
    assert export.results_of(older)[0] is None

    assert "None are known" in card_of(run, monkeypatch)
    assert "eval.json is of another checkpoint, a_run/step-00000004" in capsys.readouterr().out
    card = card_of(run, monkeypatch)
    assert "for 8 steps" in card
    assert "logit_scale holds the initial one, tau = 0.07" in card
