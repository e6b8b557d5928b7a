"""tools/flickr8k.py: the three forms of Flickr8k, on small pictures of noise."""

import csv
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

webdataset = pytest.importorskip("webdataset")

from PIL import Image  # noqa: E402 (after the skip)

from config import ConfigError  # noqa: E402
from helpers import train  # noqa: E402
from tools import flickr8k  # noqa: E402

# 110 pictures: 100 to train on, five and five held out.
NAMES = [f"{number:03d}_{number * number:x}.jpg" for number in range(110)]
CAPTIONS = {name: [f"a dog, number {name}", 'a "dog" on grass .'] for name in NAMES}
SPLITS = {"train": NAMES[:100], "val": NAMES[100:105], "test": NAMES[105:]}


@pytest.fixture
def source(tmp_path):
    """A folder with pictures, and with nothing that says what they are."""
    folder = tmp_path / "source"
    (folder / "Images").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "Images" / name)
    return folder


def write_karpathy(folder):
    entries = []
    for split, names in SPLITS.items():
        for name in names:
            sentences = [{"raw": caption} for caption in CAPTIONS[name]]
            entries.append({"filename": name, "split": split, "sentences": sentences})
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": entries}))


def write_tokens(folder):
    lines = []
    for name, captions in CAPTIONS.items():
        for number, caption in enumerate(captions):
            lines.append(f"{name}#{number}\t{caption}\n")
    (folder / "Flickr8k.token.txt").write_text("".join(lines))


def write_table(folder):
    with open(folder / "captions.txt", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["image", "caption"])
        for name, captions in CAPTIONS.items():
            table.writerows([name, caption] for caption in captions)


def write_lists(folder):
    for split, file in flickr8k.LISTS.items():
        (folder / file).write_text("\n".join(SPLITS[split]) + "\n")


def build(source, out, *more):
    flickr8k.main([str(source), "--out", str(out), "--size", "32", *more])


def hashes(folder):
    """{relative path: SHA-256} of all files in the folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def samples_of(folder):
    """{name of a picture: (its captions, the picture)} of the shards in a folder."""
    found = {}
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        about = json.loads(sample["json"])
        found[about["file"]] = about["captions"], Image.open(io.BytesIO(sample["jpg"]))
    return found


def test_all_three_forms_give_the_same_shards(source, tmp_path, capsys):
    before = hashes(source)
    write_karpathy(source)
    build(source, tmp_path / "karpathy")
    printed = capsys.readouterr().out
    assert "- train: 100 pictures with 200 captions\n- val: 5 pictures" in printed
    assert "Split: dataset_flickr8k.json\n" in printed

    for split, names in SPLITS.items():
        samples = samples_of(tmp_path / "karpathy" / split)
        assert sorted(samples) == names
        assert list(samples) != names, "they must be mixed"
        for name, (captions, image) in samples.items():
            assert captions == CAPTIONS[name]
            assert image.format == "JPEG"
            assert image.size == (48, 32)

    (source / "dataset_flickr8k.json").unlink()
    texts = source / "Flickr8k_text"
    texts.mkdir()
    write_lists(texts)
    write_table(texts)
    build(source, tmp_path / "table")
    write_tokens(texts)
    build(source, tmp_path / "tokens")
    assert "Captions: Flickr8k.token.txt\n" in capsys.readouterr().out

    shards = {}
    for name in ("karpathy", "table", "tokens"):
        shards[name] = hashes(tmp_path / name)
        shards[name].pop("README.md")
    assert shards["karpathy"] == shards["table"] == shards["tokens"]
    with tarfile.open(tmp_path / "table" / "train" / "00000.tar") as tar:
        assert all(member.mtime == 0 for member in tar)

    after = hashes(source)
    assert {name: after[name] for name in before} == before


def test_a_run_trains_on_the_shards_and_is_judged_by_recall(
    source, tmp_path, no_curves, monkeypatch
):
    monkeypatch.setattr(flickr8k, "PER_SHARD", 25)
    write_karpathy(source)
    build(source, tmp_path / "set")
    assert len(list((tmp_path / "set" / "train").glob("*.tar"))) == 4

    rows = train(
        str(tmp_path / "run"),
        dict(train_data=f"{tmp_path}/set/train/*.tar"),
        eval_data=f"{tmp_path}/set/test/*.tar",
        caption_key="captions",
        batch_size=16,
        max_steps=2,
    )
    assert rows[-1]["eval/text_to_image_R@10"] == 1  # of five pictures


def test_names_decide_only_where_that_is_asked_for(source, tmp_path, monkeypatch):
    monkeypatch.setattr(flickr8k, "HELD_OUT", 5)
    write_table(source)
    with pytest.raises(ConfigError, match="for lack of Flickr_8k.trainImages.txt.*split_by_name"):
        build(source, tmp_path / "set")
    (source / flickr8k.LISTS["test"]).write_text("\n".join(SPLITS["test"]))
    with pytest.raises(ConfigError, match="lack of Flickr_8k.trainImages.txt, .*devImages.txt:"):
        build(source, tmp_path / "set")

    build(source, tmp_path / "set", "--split_by_name")
    text = (tmp_path / "set" / "README.md").read_text()
    assert "Split: our own, by the hash of the names, not the authors'" in text
    parts = [samples_of(tmp_path / "set" / split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [100, 5, 5]
    assert set().union(*parts) == set(NAMES)
    assert sorted(parts[2]) != NAMES[:5], "the first names may be of one kind"

    # A picture more or less moves one other at most.
    splits = flickr8k.splits_by_name(NAMES[1:])
    assert len(set(splits["test"]) - set(parts[2])) <= 1


def test_what_is_left_out_is_counted_and_named(source, tmp_path, capsys):
    write_tokens(source)
    write_lists(source)
    images = source / "Images"
    (images / NAMES[4]).unlink()
    build(source, tmp_path / "one")
    assert f"- left out: 1 not on the disk ({NAMES[4]})\n" in capsys.readouterr().out
    assert NAMES[4] not in samples_of(tmp_path / "one" / "train")

    # Two of 110 are more than 1 %, whatever is wrong with them.
    (images / NAMES[7]).write_bytes(b"no picture")
    message = f"2 of 110 pictures would be left out, .*{NAMES[4]}.*; 1 cannot be read .{NAMES[7]}"
    with pytest.raises(ConfigError, match=message):
        build(source, tmp_path / "two")
    assert not (tmp_path / "two").exists()

    tokens = source / "Flickr8k.token.txt"
    lines = tokens.read_text().splitlines(keepends=True)
    tokens.write_text("".join(line for line in lines if not line.startswith(NAMES[7])))
    with pytest.raises(ConfigError, match=f"1 without a caption .{NAMES[7]}"):
        build(source, tmp_path / "two")

    (source / "Images").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"110 of 110 .*disk \(000_0.jpg, .*, \.\.\.\)"):
        build(source, tmp_path / "two")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("other.txt", b"", "has no captions of Flickr8k"),
        ("dataset_flickr8k.json", b"{}", "is not Karpathy's file of Flickr8k.*KeyError"),
        ("Flickr8k.token.txt", b"a.jpg#0 a dog", "line 1: 'a.jpg#0 a dog' is not NAME.jpg"),
        ("captions.txt", b"image,caption\na.jpg,a dog, wet\n", "line 2: 3 columns in place of 2"),
        ("captions.txt", b"name,text\n", "the columns must be image,caption"),
        ("captions.txt", b"\xff\xff", "cannot read .*captions.txt"),
    ],
)
def test_a_damaged_source_is_refused(tmp_path, file, content, message):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        build(tmp_path / "source", tmp_path / "set")


def test_a_picture_in_two_parts_of_the_split_is_refused(source, tmp_path):
    write_tokens(source)
    write_lists(source)
    (source / flickr8k.LISTS["val"]).write_text(NAMES[0])
    with pytest.raises(ConfigError, match=f"{NAMES[0]} is 2 times in Flickr_8k"):
        build(source, tmp_path / "set")


def test_a_set_is_whole_or_not_there(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    write_karpathy(source)
    write_shards = flickr8k.write_shards

    def stop_at_test(samples, folder, *options, **more):
        if folder.name == "test":
            raise KeyboardInterrupt
        write_shards(samples, folder, *options, **more)

    monkeypatch.setattr(flickr8k, "write_shards", stop_at_test)
    with pytest.raises(KeyboardInterrupt):
        build(source, out)
    assert not out.exists()
    assert (tmp_path / "set.tmp" / "train").exists()

    monkeypatch.setattr(flickr8k, "write_shards", write_shards)
    build(source, out)
    first = hashes(out)
    build(source, out)
    assert "finished already" in capsys.readouterr().out
    (out / "val" / "00000.tar").unlink()
    build(source, out, "--force")
    assert hashes(out) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source"]


def test_nothing_of_the_users_is_written_over(source, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="is not a finished set"):
        build(source, tmp_path / "mine", "--force")
    with pytest.raises(ConfigError, match="nothing is to be written"):
        build(source, source / "set")
    with pytest.raises(ConfigError, match="there is no folder"):
        build(tmp_path / "no", tmp_path / "set")
    write_karpathy(source)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        build(source, tmp_path / "file" / "set")
