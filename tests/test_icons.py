"""tools/icons.py without a network: a fake npm has one package of tiny icon sets."""

import collections
import json

import pytest

pytest.importorskip("resvg_py")
webdataset = pytest.importorskip("webdataset")

from packages import hashes, install_npm, square, write_package  # noqa: E402 (after the skip)

from tools import icons, prepare  # noqa: E402
from tools.icon_captions import captions_of  # noqa: E402

SHARED = (
    "bell",
    "book",
    "car",
    "dog",
    "key",
    "sun",
    "wave-skin-tone",
)  # what both training sets draw


def icon_set(prefix, names, color="#000", license="MIT", **info):
    """An iconify set that draws each name as a square of its own."""
    icons = {}
    for number, name in enumerate(names):
        icons[name] = square(color, number / 2)
    about = {
        "name": prefix.title(),
        "author": {"name": f"The makers of {prefix}", "url": "https://example.org"},
        "license": {"spdx": license, "url": "https://example.org/license"},
        **info,
    }
    return {"prefix": prefix, "info": about, "icons": icons, "width": 16}


SETS = [
    icon_set("reds", [f"{name}-fill" for name in SHARED] + ["only-red"], "#f00"),
    icon_set("greens", [*SHARED, "green-2", "green-3"], "#0f0", "CC-BY-4.0"),
    icon_set("held", ["sun-outline", "sun", "dog", "only-held", "bell", "wave-skin-tone"]),
    icon_set("tuned", ["car", "key", "book"], "#00f"),
    icon_set("edition", SHARED, "#700"),
    icon_set("copyleft", SHARED, "#070", "GPL-3.0"),
    icon_set("withdrawn", SHARED, "#007", hidden=True),
]
# One picture of a training set is the held-out set's "sun".
SETS[1]["icons"]["dog"] = SETS[2]["icons"]["sun"]


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A fake npm that has the package. Returns its log: the packages asked for, one a line."""
    store, log = install_npm(tmp_path, monkeypatch)
    files = {f"json/{icon_set['prefix']}": icon_set for icon_set in SETS}
    write_package(store / "iconify-json-1.0.0.tgz", files)
    monkeypatch.setattr(icons, "VERSION", "1.0.0")
    monkeypatch.setattr(icons, "TEST", ("held",))
    monkeypatch.setattr(icons, "VAL", ("tuned",))
    monkeypatch.setattr(icons, "RELATIVES", {"edition": "held"})
    monkeypatch.setattr(icons, "PER_SHARD", 4)
    return log


def build(out, workers=1, *more):
    prepare.main(["icons", "--out", str(out), "--workers", str(workers), *more])


def read(*patterns):
    shards = [str(shard) for shard in patterns]
    return list(webdataset.WebDataset(shards, shardshuffle=False))


# ---- captions ----


@pytest.mark.parametrize(
    "prefix, name, caption",
    [
        ("bi", "arrow-circle-fill", "arrow circle"),
        ("bi", "bold", "bold"),
        ("fluent", "bell-24-filled", "bell"),  # declared by the set
        ("ic", "two-tone-bell", "bell"),
        ("bi", "chart-line", "chart line"),  # a thing here, a style there
        ("majesticons", "chart-line", "chart"),
        ("bi", "bell-2", "bell"),
        ("bi", "bell-alt", "bell"),
        ("bi", "uv-index-2", "uv index 2"),  # there is no uv-index
        ("hugeicons", "castle-01", "castle"),
        ("icon-park-solid", "bell-two", "bell"),
        ("bi", "bell-two", "bell two"),
        ("reicon", "bell3", "bell"),
        ("devicon", "css3", "css3"),
        ("tabler", "brand-css3", "css3"),
        ("vscode-icons", "file-type-css", "css"),
    ],
)
def test_a_caption_is_the_name_without_its_style(prefix, name, caption):
    declared = {
        "fluent": {"suffixes": {"24-filled": "24 Filled"}},
        "ic": {"prefixes": {"two-tone": "Two-Tone"}},
    }
    icon_set = {"prefix": prefix, "info": {}, **declared.get(prefix, {})}
    assert captions_of(icon_set, ["bell", "css", name])[name] == caption


def test_numbers_belong_to_names_of_brands_and_emoji():
    names = ["playstation", "playstation-2"]
    for category, caption in (("Logos", "playstation 2"), ("UI 24px", "playstation")):
        icon_set = {"prefix": "any", "info": {"category": category}}
        assert captions_of(icon_set, names)["playstation-2"] == caption


# ---- the set ----


def test_the_training_set_has_nothing_that_is_held_out(npm, tmp_path):
    build(tmp_path / "icons")
    shards = sorted((tmp_path / "icons" / "train").glob("*.tar"))
    train = read(*shards)
    assert len(shards) == 5
    assert [sample["__key__"] for sample in read(shards[1])][0] == "000000004"

    captions = collections.Counter(sample["txt"].decode() for sample in train)
    # Of the greens, "dog" is the held-out "sun".
    doubled = {name.replace("-", " "): 2 for name in SHARED}
    assert captions == {**doubled, "dog": 1, "only red": 1, "green 2": 1, "green 3": 1}
    about = [json.loads(sample["json"]) for sample in train]
    licenses = {(meta["source"], meta["license"]) for meta in about}
    assert licenses == {("reds", "MIT"), ("greens", "CC-BY-4.0")}
    held_out = {sample["png"] for sample in read(tmp_path / "icons/test/held/00000.tar")}
    assert not held_out & {sample["png"] for sample in train}


def test_a_class_is_named_by_several_training_sets_and_shown_once(npm, tmp_path, monkeypatch):
    build(tmp_path / "icons")
    folder = tmp_path / "icons" / "test" / "held"
    test = read(folder / "00000.tar")
    assert (folder / "classnames.txt").read_text().split() == ["bell", "dog", "sun"]
    names = {int(sample["cls"]): json.loads(sample["json"])["name"] for sample in test}
    assert names == {0: "bell", 1: "dog", 2: "sun"}  # not "sun-outline"
    assert (tmp_path / "icons/val/tuned/classnames.txt").read_text().split() == [
        "book",
        "car",
        "key",
    ]

    monkeypatch.setattr(icons, "NUM_CLASSES", 2)
    build(tmp_path / "few")
    few = (tmp_path / "few/test/held/classnames.txt").read_text().split()
    assert len(few) == 2
    assert set(few) < {"bell", "dog", "sun"}


def test_the_readme_names_sets_counts_and_licences(npm, tmp_path):
    build(tmp_path / "icons")
    text = (tmp_path / "icons" / "README.md").read_text()
    assert "16 training pairs with 10 distinct captions" in text
    assert "| test/held | 3 | 3 |" in text
    assert "| train | greens | 8 | [CC-BY-4.0](https://example.org/license) |" in text
    assert "The makers of greens" in text
    assert "- 1 icons: same pixels as an earlier one" in text
    assert "- copyleft: its licence, GPL-3.0, is not permissive" in text
    assert "- edition: related to held, which is held out" in text
    assert "- withdrawn: withdrawn by iconify" in text


def test_a_run_that_was_stopped_goes_on_and_makes_the_same_bytes(npm, tmp_path, monkeypatch):
    """It is stopped when a part is written and its record is not yet. Complete parts stay."""
    build(tmp_path / "whole")
    whole = hashes(tmp_path / "whole")
    assert len(whole) == 19

    drawn = []
    draw_part = icons.draw_part
    write_record = icons.write_record

    def note_and_draw(part, *more):
        drawn.append(part.record(tmp_path).stem)
        return draw_part(part, *more)

    def stop_once(record, file):
        if drawn.count(file.stem) == 1 and file.stem in ("test-held", "00001"):
            raise KeyboardInterrupt
        write_record(record, file)

    monkeypatch.setattr(icons, "draw_part", note_and_draw)
    monkeypatch.setattr(icons, "write_record", stop_once)
    out = tmp_path / "icons"
    for workers in (1, 2):
        with pytest.raises(SystemExit, match="what was drawn is kept"):
            build(out, workers)
        assert not out.exists()
    build(out, 2)

    assert hashes(out) == whole
    twice = ["test-held", "test-held", "val-tuned", "00000", "00001", "00001"]
    assert drawn == [*twice, "00002", "00003", "00004"]
    assert npm.read_text().splitlines() == ["@iconify/json@1.0.0"] * 2


def test_a_run_with_another_plan_starts_anew(npm, tmp_path, monkeypatch):
    out = tmp_path / "icons"
    monkeypatch.setattr(icons, "readme", interrupt)
    with pytest.raises(SystemExit, match="what was drawn is kept"):
        build(out)
    (tmp_path / "icons.tmp" / "train" / "00009.tar").write_bytes(b"of the earlier plan")

    monkeypatch.undo()
    monkeypatch.setattr(icons, "VERSION", "1.0.0")
    monkeypatch.setattr(icons, "TEST", ("tuned",))
    build(out)
    assert not (out / "train" / "00009.tar").exists()
    assert (out / "test" / "tuned").exists()


def interrupt(*_):
    raise KeyboardInterrupt


def test_only_emoji_are_divided_for_tuning(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["icons", "--tune"])
    assert "--tune is for emoji" in capsys.readouterr().err
