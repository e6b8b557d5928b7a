"""ingest.urls, tar and index: what is a sample, the index and its file, statistics, URLs.

The last tests read the same shards with webdataset.
"""

import http.server
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
from functools import partial

import numpy as np
import pytest
import webdataset

import helpers
from config import ConfigError, or_exit
from conftest import ROOT
from ingest import index, urls
from ingest.class_names import find_lists
from ingest.counting import count_samples
from ingest.images import BadSample
from ingest.index import load_index
from ingest.reader import Reader
from ingest.tar import captions, usable_samples
from ingest.urls import expand, is_local, sibling
from samples import picture, sample, write_shards, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def counted(monkeypatch):
    """The names of the shards that are counted, in the order in which that happens."""
    names = []

    def count(url, **options):
        names.append(os.path.basename(url))
        return count_samples(url, **options)

    monkeypatch.setattr("ingest.counting.count_samples", count)
    return names


def refused(pattern, match, **options):
    with pytest.raises(ConfigError, match=match):
        load_index(pattern, **options)


def counts(pattern, *arguments, **options):
    return load_index(pattern, *arguments, **options).counts.tolist()


# ---- what is a sample ----


def test_what_is_a_sample(tmp_path):
    files = [
        ("a/1.JPG", picture(1, "jpg")),
        ("a/1.txt", b"one"),
        ("b/1.jpg", picture(2, "jpg")),
        ("b/1.txt", b"two"),
        ("readme", b""),
        ("._2.jpg", b""),
        ("2.seg.png", b""),
        ("2.jpg", picture(3, "jpg")),
        ("._2.txt", b""),
        ("2.txt", b"three"),
        ("3.jpg", b""),
        ("4.txt", b""),
    ]
    loaded = load_index(write_tar(tmp_path / "x.tar", files), allow_left_out=0.4)
    assert loaded.counts.tolist() == [3]
    assert loaded.left_out == {"jpg without caption": 1, "txt without image": 1}

    samples = usable_samples(loaded.shards[0], ("txt",), range(0))
    assert [key for key, _ in samples] == ["a/1", "b/1", "2"]


TEXT = b" a dog \r\na cat\n\n \t\nwith\x0ba tab"


def test_a_text_is_one_caption_or_one_a_line():
    whole = captions({"txt": TEXT}, "")
    assert whole == [TEXT.decode().strip()]
    # str.splitlines, as CLIP_benchmark does: \x0b ends a line, too.
    assert captions({"txt": TEXT}, "", lines=True) == ["a dog", "a cat", "with", "a tab"]
    assert captions({"txt": b"a dog"}, "", lines=True) == ["a dog"]
    with pytest.raises(BadSample, match="empty caption"):
        captions({"txt": b" \n\r\n\n"}, "", lines=True)


def test_captions_in_json_are_not_split():
    files = {"json": b'{"t": ["a dog\\non a mat", "a cat"], "one": "a\\nb"}'}
    for lines in (False, True):
        assert captions(files, "t", lines=lines) == ["a dog\non a mat", "a cat"]
        assert captions(files, "one", lines=lines) == ["a\nb"]


# ---- the index and its file ----


def test_shards_are_counted_once(tmp_path, counted):
    pattern = write_shards(tmp_path / "a", (3, 4, 5))
    assert counts(pattern) == [3, 4, 5]
    assert len(counted) == 3

    with open(tmp_path / "a" / "index.json") as f:
        stored = json.load(f)["shards"]
    size = os.path.getsize(tmp_path / "a" / "00001.tar")
    assert stored["00001.tar"] == {"size": size, "txt": 4}
    assert len(os.listdir(tmp_path / "a")) == 4

    load_index(f"{tmp_path}/a/*.tar")
    load_index((pattern, pattern))
    assert len(counted) == 3


def test_an_index_moves_with_its_folder(tmp_path, counted):
    load_index(write_shards(tmp_path / "a", (3, 4, 5)))
    (tmp_path / "a").rename(tmp_path / "b")
    assert counts(f"{tmp_path}/b/0000{{0,2}}.tar") == [3, 5]
    assert len(counted) == 3


def test_a_changed_shard_is_counted_again(tmp_path, counted):
    folder = tmp_path / "b"
    load_index(write_shards(folder, (3, 4, 5)))
    assert load_index(f"{folder}/*.tar", "texts").num_samples == 12
    assert len(counted) == 6

    write_tar(folder / "00001.tar", sample(0) + sample(1) + [("padding", bytes(9999))])
    assert counts(f"{folder}/*.tar") == [3, 2, 5]
    assert counted[6:] == ["00001.tar"]
    assert counts(f"{folder}/*.tar", "texts") == [3, 2, 5]
    assert counted[7:] == ["00001.tar"]

    write_tar(folder / "00003.tar", sample(0))
    os.truncate(folder / "00003.tar", 700)
    refused(f"{folder}/*.tar", "00003.tar")


def test_an_index_of_somebody_else_is_refused(tmp_path):
    pattern = write_shards(tmp_path, (3,))
    (tmp_path / "index.json").write_text('{"wids_version": 1}')
    refused(pattern, "index.json is not an index that ingest.index wrote: move it away")


def test_read_only_folder(tmp_path, own_cache, monkeypatch):
    pattern = write_shards(tmp_path / "a", (3,))
    os.chmod(tmp_path / "a", 0o555)
    try:
        assert counts(pattern) == [3]
        assert os.listdir(tmp_path / "a") == ["00000.tar"]
        assert len(list(own_cache.glob("*.json"))) == 1

        (tmp_path / "file").write_text("")
        monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "file"))
        with pytest.warns(UserWarning, match="the index cannot be written"):
            assert counts(pattern) == [3]
    finally:
        os.chmod(tmp_path / "a", 0o755)


def test_the_index_of_an_evaluation_set_goes_to_the_cache(tmp_path, own_cache, counted):
    pattern = write_shards(tmp_path / "a", (3, 4))
    assert counts(pattern, evaluation=True) == [3, 4]
    assert counts(pattern, evaluation=True) == [3, 4]
    assert sorted(os.listdir(tmp_path / "a")) == ["00000.tar", "00001.tar"]
    assert len(list(own_cache.glob("*.json"))) == 1
    assert len(counted) == 2


def test_an_evaluation_set_only_reads_our_index_beside_its_shards(tmp_path, own_cache, counted):
    pattern = write_shards(tmp_path / "a", (3, 4))
    file = tmp_path / "a" / "index.json"
    load_index(pattern, evaluation=True, path=str(file))
    assert counts(pattern, evaluation=True) == [3, 4]
    assert len(counted) == 2
    assert not own_cache.exists()

    # Counts that it lacks, here those of an index for training, go into the cache.
    file.unlink()
    load_index(pattern)
    content = file.read_bytes()
    for _ in range(2):
        assert counts(pattern, evaluation=True) == [3, 4]
    assert len(counted) == 6
    assert file.read_bytes() == content
    assert len(list(own_cache.glob("*.json"))) == 1


@pytest.mark.parametrize("content", ['{"wids_version": 1}', '{"shards": {}}', "[", "\0"])
def test_an_evaluation_set_leaves_the_index_of_somebody_else_alone(tmp_path, own_cache, content):
    pattern = write_shards(tmp_path / "a", (3,))
    (tmp_path / "a" / "index.json").write_text(content)
    assert counts(pattern, evaluation=True) == [3]
    assert (tmp_path / "a" / "index.json").read_text() == content
    assert len(list(own_cache.glob("*.json"))) == 1


def test_where_the_cache_is(tmp_path, monkeypatch):
    """$FASTCLIP_CACHE, or a folder of the user's cache."""
    monkeypatch.setenv("FASTCLIP_CACHE", "/shared/cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/user")
    assert os.path.dirname(index.cache_file("/a/b")) == "/shared/cache"
    assert os.path.basename(index.cache_file("/a/b")).startswith("-a-b-")
    monkeypatch.delenv("FASTCLIP_CACHE")
    assert os.path.dirname(index.cache_file("/a/b")) == "/xdg/fastclip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert os.path.dirname(index.cache_file("/a/b")) == "/home/user/.cache/fastclip"


def test_folders_with_similar_names_have_their_own_files_in_the_cache(tmp_path, own_cache):
    long = "é" * 60
    folders = [tmp_path / name for name in ("a-b", "a_b", "a b", "a/b", f"{long}/x", f"{long}é/x")]
    for size, folder in enumerate(folders, 1):
        assert counts(write_shards(folder, (size,)), evaluation=True) == [size]
    for size, folder in enumerate(folders, 1):
        assert counts(f"{folder}/*.tar", evaluation=True) == [size]
    assert len(list(own_cache.glob("*.json"))) == len(folders)


# ---- refusals ----


def test_all_patterns_are_looked_at_before_one_is_counted(tmp_path, counted):
    good = write_shards(tmp_path / "a", (3,))
    refused((good, f"{tmp_path}/none.tar"), "there is no file or folder .*none.tar")
    assert counted == []
    assert os.listdir(tmp_path / "a") == ["00000.tar"]


def test_missing_files(tmp_path):
    pattern = write_shards(tmp_path / "a", (3, 3, 3))
    refused(str(tmp_path / "none*.tar"), "matches no file")
    refused(
        pattern.replace("00002", "00006"),
        r"00003.tar does not exist, 4 of 7 shards are missing: fetch them",
    )
    refused("a{0..3.tar", "a{0..3.tar")


def test_the_name_spelt_most_alike(tmp_path):
    write_shards(tmp_path / "shards", (1,))
    refused(f"{tmp_path}/shard/*.tar", "correct the pattern; did you mean 'shards'[?]")
    refused(f"{tmp_path}/shard/x/0.tar", "did you mean 'shards'[?]")
    refused(f"{tmp_path}/shards/0000.tar", "did you mean '00000.tar'[?]")
    refused(f"{tmp_path}/shards/*.tgz", "correct the pattern$")


@pytest.mark.parametrize("program", ["gzip", "bzip2", "xz"])
def test_a_compressed_shard(tmp_path, program):
    if not shutil.which(program):
        pytest.skip(f"needs {program}")
    (path,) = expand(write_shards(tmp_path, (2,)))
    subprocess.run([program, path], check=True)
    refused(f"{tmp_path}/0*", rf"it is compressed \({program}\), .* plain tar: unpack it")


def test_files_that_are_no_tar(tmp_path):
    (tmp_path / "zero.tar").touch()
    (tmp_path / "noise.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "folder.tar").mkdir()

    after_none = "is unreadable or damaged after 0 samples"
    refused(
        str(tmp_path / "zero.tar"),
        rf"zero.tar \(0 bytes\) {after_none}.*empty header.*fetch it again",
    )
    refused(str(tmp_path / "noise.tar"), rf"noise.tar \(5000 bytes\) {after_none}: not a tar")
    refused(str(tmp_path / "folder.tar"), "folder.tar is an empty folder: give tar shards")
    refused(
        "pipe:false {1..2}.tar",
        f"pipe:false 1.tar {after_none}: the command failed, exit status 1",
        count_remote=True,
    )


@pytest.mark.parametrize("damage", ["payload", "boundary", "no_marker", "broken"])
def test_a_shard_that_breaks_off(tmp_path, damage):
    (path,) = expand(write_shards(tmp_path / "a", (3,)))
    with open(path, "rb") as f:
        content = f.read()
    with tarfile.open(path) as tar:
        image = "00002.png" if "00002.png" in tar.getnames() else "00002.webp"
        header = tar.getmember(image).offset
        marker = tar.getmembers()[-1].offset_data + 512

    damaged = {
        "payload": content[: header + 700],
        "boundary": content[:header],
        "no_marker": content[:marker],
        "broken": content[:header] + b"x" * 512 + content[header + 512 :],
    }
    path = tmp_path / f"{damage}.tar"
    path.write_bytes(damaged[damage])
    refused(str(path), f"{damage}.tar .*unreadable or damaged after [12] samples")
    refused(
        f"pipe:cat {path}",
        f"{damage}.tar is unreadable or damaged after [12] samples",
        count_remote=True,
    )


def test_shards_without_usable_samples(tmp_path):
    images = [(f"{number}.jpg", b"") for number in range(4)]
    refused(
        write_tar(tmp_path / "plain.tar", images + [("x.json", b"")]),
        "plain.tar has no usable sample: .*image.*KEY.txt; it holds 4 jpg, 1 json; "
        "4 jpg without caption: .* or, with caption_key, in KEY.json",
    )
    dotted = [("1 v1.2.jpg", b""), ("1 v1.2.txt", b""), ("2 v1.2.jpg", b""), ("2 v1.2.txt", b"")]
    refused(
        write_tar(tmp_path / "dotted.tar", dotted),
        "it holds 2 jpg, 2 txt; 2 jpg with a dot in the name: .* rename the files",
    )
    refused(
        write_tar(tmp_path / "classes.tar", images),
        "KEY.jpg .* and KEY.cls or KEY.json; it holds 4 jpg",
        caption_key="texts",
        evaluation=True,
    )
    refused(write_tar(tmp_path / "nothing.tar", []), "no usable sample in these shards")


# ---- the command line ----


def test_command_line(tmp_path, capsys):
    pattern = write_shards(tmp_path / "a", (4, 4))
    out = tmp_path / "out.json"
    result = subprocess.run(
        [sys.executable, "-m", "ingest.index", pattern, "--verify", f"--out={out}"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert "8 samples in 2 shards" in result.stdout
    assert "00001.tar: 4 samples, left out: 0, bad: none" in result.stdout
    assert "indexing" in result.stderr
    assert result.stderr.count("index written: ") == 1

    assert out.exists()
    assert not (tmp_path / "a" / "index.json").exists()
    assert load_index(pattern, path=str(out)).num_samples == 8

    index.main([pattern, pattern, "--caption_key", "texts"])
    assert "16 samples in 4 shards" in capsys.readouterr().out
    assert (tmp_path / "a" / "index.json").exists()
    with pytest.raises(SystemExit, match="error: there is no file or folder .*b.tar"):
        or_exit(index.main, [str(tmp_path / "b.tar")])


def test_shards_that_are_trained_on_twice_are_noted(tmp_path, capsys):
    pattern = write_shards(tmp_path / "a", (4, 4))
    index.warn_of_repeated_shards(load_index(pattern))
    assert "warning" not in capsys.readouterr().err
    index.warn_of_repeated_shards(load_index((pattern, f"{tmp_path}/a/00001.tar")))
    assert "1 shards are in train_data more than once" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pairs.csv", "PAIRS.TSV", "0000.parquet", "pairs.jsonl"])
def test_a_table_in_place_of_shards(tmp_path, name):
    path = tmp_path / name
    path.write_text("url,caption\n" * 100)
    with pytest.raises(ConfigError, match="it is a table: img2dataset makes shards"):
        load_index(str(path))


def test_a_built_in_set_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.py").touch()
    with pytest.raises(ConfigError, match="tools.prepare emoji") as error:
        load_index("data/emoji/train/*.tar")
    assert "data.py" not in str(error.value)


def test_verify_fails_if_samples_are_bad(tmp_path, capsys):
    bad = {"s2": {"webp": b"?"}, "s6": {"jpg": b"?"}, "s7": {"txt": b""}}
    pattern = write_shards(tmp_path / "a", (4, 4), **bad)
    out = tmp_path / "out.json"
    with pytest.raises(ConfigError, match="3 of 8 samples cannot be used: .*'corrupt image': 2"):
        index.main([pattern, "--verify", f"--out={out}"])

    printed = capsys.readouterr().out
    assert "00000.tar 00002: corrupt image" in printed
    line = "00001.tar: 4 samples, left out: 0, bad: {'corrupt image': 1, 'empty caption': 1}"
    assert line in printed
    assert not out.exists()


def test_verify_repeats_no_bar_in_a_file(tmp_path, capsys):
    bad = {f"s{number}": {"txt": b""} for number in range(20)}
    pattern = write_shards(tmp_path / "a", (20,), **bad)
    with pytest.raises(ConfigError, match="20 of 20 samples cannot be used"):
        load_index(pattern, verify=True)
    printed = capsys.readouterr()
    assert printed.out.count("empty caption\n") == 20
    assert printed.err.count("indexing") <= 2


def test_verify_tells_what_is_left_out(tmp_path, capsys):
    without_text = {"txt": None, "json": None}
    load_index(
        write_shards(tmp_path, (4,), s1=without_text, s2=without_text),
        verify=True,
        allow_left_out=0.5,
    )
    assert "00000.tar: 2 samples, left out: 2, bad: none" in capsys.readouterr().out


# ---- a caption_key that cannot be meant ----


@pytest.mark.parametrize("options", [[], ["--verify"]], ids=str)
def test_a_mistyped_caption_key_is_named_at_indexing(tmp_path, options):
    pattern = write_shards(tmp_path / "a", (4, 4))
    with pytest.raises(SystemExit) as error:  # with a text, so that the exit status is 1
        or_exit(index.main, [pattern, "--caption_key", "text", *options])
    message = error.value.code
    assert "none of the first 4 samples has the caption_key 'text'" in message
    assert "they have texts; did you mean 'texts'?" in message
    assert not (tmp_path / "a" / "index.json").exists()


def test_a_mistyped_caption_key_is_named_although_the_index_is_known(tmp_path):
    pattern = write_shards(tmp_path, (4,))
    load_index(pattern, "texts")
    refused(pattern, "has the caption_key 'caption' .* they have texts", caption_key="caption")
    refused("pipe:cat " + pattern, "has the caption_key 'caption'", caption_key="caption")


@pytest.mark.parametrize("first", [b'{"texts": null}', b"[", b"[1]", b"7"])
def test_a_caption_key_may_be_missing_from_some_samples(tmp_path, first):
    pattern = write_shards(tmp_path, (3,), s0={"json": first}, s1={"json": b'{"other": 1}'})
    assert counts(pattern, "texts") == [3]


@pytest.mark.parametrize("value", [None, {"a": 1}, 7, ["a"]], ids=str)
def test_a_mistyped_caption_key_beside_entries_of_any_kind(tmp_path, value):
    content = json.dumps({"texts": ["a"], "other": value}).encode()
    changes = {f"s{number}": {"json": content} for number in range(3)}
    pattern = write_shards(tmp_path, (3,), **changes)
    refused(pattern, "has the caption_key 'x' .* they have texts, other", caption_key="x")


@pytest.mark.parametrize("value", [{"en": "a"}, 7, [1, 2], False], ids=str)
@pytest.mark.parametrize("verify", [False, True])
def test_a_caption_key_that_holds_no_text(tmp_path, value, verify):
    content = json.dumps({"texts": ["a"], "lang": value, "empty": None}).encode()
    changes = {f"s{number}": {"json": content} for number in range(3)}
    pattern = write_shards(tmp_path, (3,), **changes)
    with pytest.raises(ConfigError) as error:
        load_index(pattern, "lang", verify=verify)
    assert f"'lang' of KEY.json, the caption_key, is no text but {value}; " in str(error.value)
    assert str(error.value).endswith("entries with text: texts")


def test_an_evaluation_set_without_the_caption_key_is_named(tmp_path):
    pattern = write_shards(tmp_path, (3,))
    match = "^eval_data, .*00000.tar: none of the first 3 samples has the caption_key 'caption'"
    refused(pattern, match, caption_key="caption", evaluation=True)


def test_an_evaluation_set_with_classes_needs_no_caption_key(tmp_path):
    changes = {f"s{number}": {"cls": b"1"} for number in range(3)}
    pattern = write_shards(tmp_path, (3,), **changes)
    assert counts(pattern, "nothing", evaluation=True) == [3]


# ---- what is given in place of shards ----


def test_several_names_in_one_string(tmp_path, monkeypatch):
    write_shards(tmp_path, (1, 1))
    monkeypatch.chdir(tmp_path)
    for joined in ("00000.tar 00001.tar", "00000.tar,00001.tar", "[00000.tar, 00001.tar]"):
        refused(joined, "give several as a list, .*'00000.tar', '00001.tar'.* '00000.tar::00001.")
    assert counts("00000.tar::00001.tar") == [1, 1]

    os.rename("00000.tar", "a b.tar")
    assert counts("a b.tar") == [1]
    refused("some words", "there is no file or folder some words")


def write_files(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.mark.parametrize(
    "names, expected",
    [
        (["0.tar", "1.tar", "0_stats.json"], "a folder: give its shards, '{folder}/*.tar'"),
        (["x/y/0.tar", "x/z/1.tar", "readme"], "give its shards, '{folder}/*/*/*.tar'"),
        (
            ["0.jpg", "0.txt", "x/1.png"],
            "pack it, `tar --sort=name -cf set.tar -C {folder} .`, and",
        ),
        (
            ["n01/0.JPEG", "n02/1.JPEG"],
            "if the 2 folders are classes: eval_data takes such a folder as it is",
        ),
        (["0.jpg"], "write a caption KEY.txt beside each KEY.jpg"),
        (["0.jpg", "0.caption"], "rename the captions to KEY.txt, then pack it, `tar"),
        (["0.jpg", "all.csv"], "docs/data.md has the lines of Python that pack images listed in"),
        (["a.parquet"], "holds no tar, but 1 parquet: give tar shards"),
        ([], "is an empty folder"),
    ],
    ids=str,
)
def test_a_folder_in_place_of_shards(tmp_path, names, expected):
    folder = tmp_path / "set"
    folder.mkdir()
    write_files(folder, *names)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError) as error:
        load_index(str(folder))
    assert expected.format(folder=folder) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_large_folder_is_not_counted_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("ingest.folders.MAX_FILES", 3)
    write_files(tmp_path, "0.jpg", "1.jpg", "2.jpg", "3.jpg")
    refused(str(tmp_path), "3 jpg among the first 3 files: ")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_a_picture_in_place_of_a_shard(tmp_path, kind):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "0").write_bytes(picture(0, kind))
    command = f"`tar --sort=name -cf photos.tar -C {folder} .`"
    refused(str(folder / "0"), f"it is a picture: pack its folder, {command}, and give photos.tar")


def test_the_command_that_packs_a_folder_makes_a_shard(tmp_path, monkeypatch):
    """Tried as it is printed, where the folder's parent may not be written."""
    folder = tmp_path / "their sets" / "my set"
    folder.mkdir(parents=True)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, content in sample(0) + sample(1):
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_index(str(folder))
    command = str(error.value).split("`")[1]
    subprocess.run(command, shell=True, check=True)
    assert counts("my set.tar") == [2]
    assert os.listdir(folder.parent) == ["my set"]


# ---- the lines of Python in docs/data.md ----


def python_in_docs(word):
    """-> the block of Python in docs/data.md in which the word occurs."""
    with open(os.path.join(ROOT, "docs", "data.md"), encoding="utf-8") as f:
        blocks = re.findall(r"```python\n(.*?)```", f.read(), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    return block


def test_shards_of_a_folder_of_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        folder = tmp_path / "imagenet" / "val" / f"n{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.with.dots.JPG").write_bytes(picture(3 * number, "jpg"))

    exec(python_in_docs("classnames.txt"), {})
    lists = find_lists(str(tmp_path / "data" / "val"))
    assert lists.names == ["n0", "n1"]
    loaded = load_index("data/val/*.tar", evaluation=True)
    reader = Reader(loaded)
    labels = [reader.read(i)["cls"] for i in range(loaded.num_samples)]
    assert labels == [b"0"] * 3 + [b"1"] * 3
    assert not loaded.left_out


def test_shards_of_a_table_of_file_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.b.PNG").write_bytes(picture(1, "png"))
    (tmp_path / "images" / "c.jpg").write_bytes(picture(3, "jpg"))
    table = 'file,caption\na.b.PNG,"a, ü"\nc.jpg,c\n'
    (tmp_path / "images" / "captions.csv").write_text(table, encoding="utf-8")

    exec(python_in_docs("csv"), {})
    loaded = load_index("data/mine/*.tar")
    reader = Reader(loaded)
    assert [captions(reader.read(i), "") for i in range(2)] == [["a, ü"], ["c"]]
    assert loaded.num_samples == 2
    assert not loaded.left_out


# ---- several captions in a text ----


def test_captions_of_many_lines_are_noted(tmp_path, capsys):
    many = {f"s{number}": {"txt": b"one\ntwo\nthree\n"} for number in range(4)}
    few = {f"s{number}": {"txt": b"one\ntwo"} for number in range(4)}
    index.note_caption_lines(load_index(write_shards(tmp_path / "few", (5,), **few)))
    assert "caption_lines" not in capsys.readouterr().err
    index.note_caption_lines(load_index(write_shards(tmp_path / "many", (5,), **many)))
    assert "captions have about 3 lines: caption_lines = True draws" in capsys.readouterr().err


def test_a_run_notes_captions_of_many_lines(tmp_path, capsys):
    many = {f"s{number}": {"txt": b"one\ntwo\nthree\n"} for number in range(8)}
    settings = dict(train_data=write_shards(tmp_path / "many", (8,), **many))
    settings.update(out_dir=str(tmp_path / "run"), batch_size=64)
    helpers.refused("do not fill one global batch", **settings, caption_lines=True)
    assert "captions have about" not in capsys.readouterr().err
    helpers.refused("do not fill one global batch", **settings)
    assert "captions have about 3 lines" in capsys.readouterr().err


# ---- the same shard to train on and to evaluate ----


def test_a_shard_that_is_trained_on_and_evaluated_is_noted(tmp_path, capsys):
    pattern = write_shards(tmp_path / "a", (2, 2, 2))
    (tmp_path / "link.tar").symlink_to(tmp_path / "a" / "00001.tar")
    own = write_shards(tmp_path / "b", (2,))
    train = load_index(pattern)

    index.warn_of_shared_shards(train, expand(own))
    assert "warning" not in capsys.readouterr().err
    index.warn_of_shared_shards(train, [*expand(own), f"{tmp_path}/link.tar"])
    expected = f"1 of the 2 shards in eval_data are in train_data, too, for example {tmp_path}/link"
    assert expected in capsys.readouterr().err

    settings = dict(train_data=pattern, eval_data=pattern, out_dir=str(tmp_path / "run"))
    helpers.refused("batch_size", **settings)
    assert capsys.readouterr().err.count("warning: 3 of the 3 shards in eval_data") == 1


# ---- statistics beside the shards ----


def test_img2dataset_statistics(tmp_path):
    pattern = write_shards(tmp_path, (6, 6))
    (tmp_path / "00000_stats.json").write_text('{"count": 9, "successes": 5}')
    (tmp_path / "00001_stats.json").write_text('{"count": 9, "successes": 5}')
    with open(tmp_path / "00001.tar", "ab") as f:
        f.write(b"x" * 1024)  # the shard does not look complete, so it is counted
    assert counts(pattern) == [5, 6]
    assert counts("pipe:cat " + pattern) == [5, 5]
    assert counts(pattern, verify=True) == [6, 6]


def write_sizes(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "sizes.json").write_text(text)


def test_sizes_of_webdataset(tmp_path):
    pattern = write_shards(tmp_path, (6, 6, 6))
    write_sizes(tmp_path, {"00000.tar": 5, "00001.tar": 5})
    with open(tmp_path / "00001.tar", "ab") as f:
        f.write(b"x" * 1024)  # the shard does not look complete, so it is counted
    assert counts(pattern) == [5, 6, 6]
    assert counts("pipe:cat " + pattern, count_remote=True) == [5, 5, 6]
    assert counts(pattern, verify=True) == [6, 6, 6]


@pytest.mark.parametrize("scheme", ["", "pipe:cat "])
@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "{",
        "\0",
        "[" * 100_000,
        {"00000.tar": "3"},
        {"00000.tar": -3},
        {"00000.tar": 0},
        {"00000.tar": 1e3},
        {"00000.tar": True},
        {"00000.tar": None},
        {"00000.tar": 1 << 40},
        {"other.tar": 3},
        {"shards": {"00000.tar": 3}},
    ],
    ids=range(14),
)
def test_sizes_that_cannot_be_true(tmp_path, scheme, content):
    pattern = write_shards(tmp_path, (2,))
    write_sizes(tmp_path, content)
    assert counts(scheme + pattern, count_remote=True) == [2]


@pytest.mark.parametrize("scheme", ["", "pipe:cat "])
def test_sizes_of_shards_without_such_captions(tmp_path, scheme):
    """The counts may be of images alone, so the shards must have what is asked for."""
    pattern = write_shards(tmp_path, (4,), s0={"txt": None}, s1={"txt": None}, s2={"txt": None})
    write_sizes(tmp_path, {"00000.tar": 4})
    assert counts(scheme + pattern, "texts") == [4]

    without_txt = write_shards(tmp_path / "b", (2,), s0={"txt": None}, s1={"txt": None})
    write_sizes(tmp_path / "b", {"00000.tar": 2})
    refused(scheme + without_txt, "has no usable sample", count_remote=True)


# ---- remote sets ----


def test_a_remote_set_without_statistics_is_not_read_through_unasked(tmp_path, own_cache, counted):
    pattern = "pipe:cat " + write_shards(tmp_path, (2, 3))
    with pytest.raises(ConfigError) as error:
        load_index(pattern, "texts")
    message = str(error.value)
    assert f"{tmp_path}/sizes.json" in message
    assert f"{tmp_path}/00000_stats.json" in message
    assert f"`python -m ingest.index '{pattern}' --caption_key texts`" in message
    assert "index_remote = True" in message
    assert "train_samples cannot replace the counts" in message
    assert not own_cache.exists()

    assert counts(pattern, "texts", count_remote=True) == [2, 3]


def test_a_remote_set_indexed_by_the_command_line_can_be_trained_on(tmp_path, own_cache, counted):
    pattern = "pipe:cat " + write_shards(tmp_path, (2, 3))
    index.main([pattern])
    assert len(list(own_cache.glob("pipe-cat-*.json"))) == 1
    counted.clear()
    assert counts(pattern) == [2, 3]
    assert counted == []


def test_training_and_plan_ask_before_they_read_a_remote_set(tmp_path):
    settings = {
        "train_data": "pipe:cat " + write_shards(tmp_path / "a", (2, 3)),
        "out_dir": str(tmp_path / "run"),
    }
    helpers.refused("index_remote = True", **settings)
    helpers.refused("index_remote = True", plan=True, **settings)


def test_a_remote_set_whose_urls_name_no_shard(tmp_path):
    refused("pipe:echo {1..2}", "no file name in it ends with .tar")


def test_a_remote_evaluation_set_is_counted(tmp_path):
    assert counts("pipe:cat " + write_shards(tmp_path, (2, 3)), evaluation=True) == [2, 3]


def test_remote_sizes_take_one_read_and_a_look_at_the_first_shard(tmp_path):
    pattern = write_shards(tmp_path, (2, 3, 4))
    write_sizes(tmp_path, {"00000.tar": 2, "00001.tar": 3, "00002.tar": 4})
    log = tmp_path / "log"
    assert counts(f"pipe:echo >>{log}; cat {pattern}") == [2, 3, 4]
    assert log.read_text() == "\n\n"


# ---- URLs ----


def test_patterns(tmp_path, monkeypatch):
    write_shards(tmp_path, (1, 1, 1))
    paths = [f"{tmp_path}/0000{number}.tar" for number in range(3)]
    monkeypatch.setenv("WDS_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))

    assert expand(f"{tmp_path}/{{00000..00002}}.tar") == paths
    assert expand("${DATA}/*.tar") == paths
    assert expand("~/0000{0,1,2}.tar") == paths
    assert expand(f"{paths[0]}::~/0000[12].tar") == paths
    assert expand((paths[0], f"{tmp_path}/0000{{1..2}}.tar")) == paths
    assert expand(f"file:{paths[0]}::file://{paths[1]}") == paths[:2]
    assert expand("pipe:cat {1..2}.tar | cat $f") == [
        "pipe:cat 1.tar | cat $f",
        "pipe:cat 2.tar | cat $f",
    ]


@pytest.mark.parametrize(
    "pattern, match",
    [
        (
            "ais://bucket/{0..9}.tar",
            "cannot be read from ais:, only from a path, file:, pipe:, s3:",
        ),
        ("sftp://host/0.tar", "any command .* will do as pipe:COMMAND"),
        ("s3://bucket/*.tar", "a remote folder is not listed: name the shards as"),
        ("${NOWHERE}/0.tar", "the environment variable WDS_NOWHERE is not set"),
        ("pipe:f={0..1}.tar; cat ${f}", r"a variable of the shell in pipe: is written \$NAME"),
        ("{s3://bucket,/data}/0.tar", "mixes schemes"),
        ("hf://datasets/owner/0.tar", "is not hf://"),
    ],
)
def test_patterns_that_are_refused(pattern, match):
    refused(pattern, match)


def test_is_local():
    for path in ("a.tar", "/a/b.tar", "a:b/0.tar", "C:/0.tar", "", "-", "pipes/0.tar"):
        assert is_local(path)
    for url in ("pipe:cat a", "s3://a/0.tar", "hf://a/b/0.tar", "http://h/0.tar", "x+y://a"):
        assert not is_local(url)


@pytest.mark.parametrize(
    "url, expected",
    [
        ("/a/b/00000.tar", "/a/b/sizes.json"),
        ("00000.tar", "sizes.json"),
        ("s3://b/c/00000.tar", "s3://b/c/sizes.json"),
        ("https://h/c/00000.tar?key=1/2", "https://h/c/sizes.json?key=1/2"),
        ("pipe:aws s3 cp s3://b/00000.tar -", "pipe:aws s3 cp s3://b/sizes.json -"),
        ("pipe:cat '/a b/00000.tar' | cat", "pipe:cat '/a b/sizes.json' | cat"),
        ("pipe:cat x", ""),
        ("x.zip", ""),
    ],
)
def test_files_beside_a_shard(url, expected):
    assert sibling(url, "sizes.json") == expected
    assert sibling(url, "{stem}_stats.json") == expected.replace("sizes", "00000_stats")


def install(folder, **scripts):
    """Write these scripts as programs into bin/ of a folder. In PATH alone, it hides all others."""
    (folder / "bin").mkdir()
    for name, script in scripts.items():
        path = folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


COPY = '/bin/cat "$BUCKET/${{{}#*://bucket/}}"'
PROGRAMS = {
    "aws": '[ "$1 $2 $4 $#" = "s3 cp - 4" ] || exit 9; ' + COPY.format(3),
    "gcloud": '[ "$1 $2 $#" = "storage cat 3" ] || exit 9; ' + COPY.format(3),
    "gsutil": '[ "$1 $#" = "cat 2" ] || exit 9; ' + COPY.format(2),
}


@pytest.mark.parametrize("scheme, program", [("s3", "aws"), ("gs", "gcloud"), ("gs", "gsutil")])
@pytest.mark.parametrize("folder", ["a", "a'; touch bad; '", "$(touch bad)", "a b"])
def test_cloud_storage(tmp_path, monkeypatch, scheme, program, folder):
    """Whatever is in a URL, the shell takes it for a name."""
    monkeypatch.chdir(tmp_path)
    install(tmp_path, **{program: PROGRAMS[program]})
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("BUCKET", str(tmp_path / "bucket"))
    write_shards(tmp_path / "bucket" / folder, (2, 3))
    write_sizes(tmp_path / "bucket" / folder, {"00000.tar": 2, "00001.tar": 3})

    loaded = load_index(f"{scheme}://bucket/{folder}/{{00000..00001}}.tar")
    assert loaded.counts.tolist() == [2, 3]
    assert Reader(loaded).read(4)["txt"] == b"sample 4"
    assert not (tmp_path / "bad").exists()


def test_remote_sets_of_one_folder_share_their_index(tmp_path, monkeypatch, counted):
    install(tmp_path, aws=PROGRAMS["aws"])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("BUCKET", str(tmp_path))
    write_shards(tmp_path / "a", (2, 3))
    assert counts("s3://bucket/a/{00000..00001}.tar", count_remote=True) == [2, 3]
    assert len(counted) == 2
    assert counts("s3://bucket/a/00001.tar") == [3]
    assert len(counted) == 2
    assert sorted(os.listdir(tmp_path / "a")) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize(
    "url, match",
    [
        ("s3://bucket/0.tar", "aws is not installed: install .*pip install awscli"),
        ("gs://bucket/0.tar", "gcloud or gsutil is not installed: install .*Google Cloud"),
        ("https://host/0.tar", "curl is not installed: install curl"),
    ],
)
def test_programs_that_are_missing(tmp_path, monkeypatch, url, match):
    install(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    refused(url, match)
    with pytest.raises(OSError, match=match):
        urls.open_url(url)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; what lies in hub/ only to those with the token."""

    def do_GET(self):
        if self.path.startswith("/hub") and self.headers["Authorization"] != "Bearer secret":
            self.send_error(401)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server of the folder tmp_path -> its address."""
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    monkeypatch.setenv("no_proxy", "*")
    handler = partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_http(tmp_path, server, capfd):
    write_shards(tmp_path / "a", (2, 3))
    pattern = f"{server}/a/{{00000..00001}}.tar"
    refused(pattern, f"{server}/a/00000.tar is remote and has no statistics")
    assert capfd.readouterr().err.count("404") == 0  # what may be missing is looked for quietly
    refused(f"{server}/a/00007.tar", "the command failed, exit status 22", count_remote=True)
    assert "404" in capfd.readouterr().err

    write_sizes(tmp_path / "a", {"00000.tar": 2, "00001.tar": 3})
    loaded = load_index(pattern)
    assert loaded.counts.tolist() == [2, 3]
    assert [Reader(loaded).read(i)["txt"] for i in (1, 4)] == [b"sample 1", b"sample 4"]


def test_hugging_face_hub(tmp_path, server, monkeypatch):
    import huggingface_hub

    asked = []

    def url_of(repo, path, repo_type, revision):
        asked.append((repo, repo_type, revision))
        return f"{server}/hub/{path}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_url", url_of)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    write_shards(tmp_path / "hub" / "x", (2,))
    url = "hf://datasets/owner/name@main/x/00000.tar"
    loaded = load_index(url, count_remote=True)
    assert Reader(loaded).read(1)["txt"] == b"sample 1"
    assert set(asked) == {("owner/name", "dataset", "main")}
    assert "secret" not in urls.command_of(url)[0]

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused("hf://owner/name/x/00000.tar", "exit status 22", count_remote=True)
    assert asked[-1] == ("owner/name", "model", None)


# ---- webdataset reads the same ----


def same_as_webdataset(pattern, kinds):
    """Read shards in both ways, compare the samples -> how many there are."""
    theirs = {}
    for entry in webdataset.WebDataset(expand(pattern), shardshuffle=False):
        names = {"jpg", "png", "webp", *kinds} & entry.keys()
        theirs[entry["__key__"]] = {name: entry[name] for name in names}

    ours = {}
    for url in expand(pattern):
        ours.update(usable_samples(url, kinds, range(sys.maxsize)))
    assert ours == theirs
    assert list(ours) == list(theirs)
    return len(ours)


def test_samples_of_webdatasets_writer(tmp_path):
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for number in range(5):
                files = {
                    "__key__": f"folder.{shard}/{number}",
                    "png": picture(number, "png"),
                    "txt": f"caption {number}",
                    "json": {"texts": ["one", "two"]},
                    "seg.png": b"something else",
                }
                writer.write(files)
    pattern = f"{tmp_path}/{{0..1}}.tar"
    assert same_as_webdataset(pattern, ("txt", "json")) == 10
    assert counts(pattern) == [5, 5]


def test_samples_of_img2dataset(tmp_path):
    """NNNNN.tar with NNNNNMMMM.jpg, .txt and .json, and NNNNN_stats.json beside it."""
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as writer:
            for number in range(4):
                key = f"{shard:05d}{number:04d}"
                caption = f"line {number}\nand another"
                facts = {"key": key, "caption": caption, "status": "success", "width": 40}
                files = {
                    "jpg": picture(number, "jpg"),
                    "txt": caption,
                    "json": json.dumps(facts, indent=4),
                }
                writer.write({"__key__": key, **files})
        statistics = {"count": 6, "successes": 4, "failed_to_download": 2}
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps(statistics))

    pattern = f"{tmp_path}/{{00000..00001}}.tar"
    assert same_as_webdataset(pattern, ("txt", "json")) == 8
    loaded = load_index("pipe:cat " + pattern)  # by its statistics
    assert loaded.counts.tolist() == [4, 4]
    files = Reader(loaded).read(5)
    assert captions(files, "") == ["line 1\nand another"]
