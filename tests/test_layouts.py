"""Evaluation sets in every layout: what is found, what is refused; nothing is written there."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

import config
from config import Config, ConfigError, named_sets
from ingest import layouts
from ingest.class_names import imagenet_ids
from ingest.evaluation import read_samples
from ingest.layouts import find_set
from samples import number_of, picture, write_tar

IDS = ["n01440764", "n01443537", "n02123045", "n07745940"]  # tench, goldfish, tabby, strawberry
NUM_IMAGES = 12


def find(place, name="", **options):
    """Find the set at one place -> EvaluationSet; nothing that lies beside it may change."""
    root = os.path.dirname(str(place))
    before = contents(root)
    c = Config(eval_data=(str(place),), **options)
    try:
        return find_set(name, named_sets(c)[""], c)
    finally:
        assert contents(root) == before


def contents(root):
    """-> what is in a folder, and when something was last added to or removed from each part."""
    return [(place, names, os.stat(place).st_mtime_ns) for place, _, names in os.walk(root)]


def refused(place, *expected, **options):
    """Check that find raises ConfigError with all of `expected` in its message."""
    with pytest.raises(ConfigError) as error:
        find(place, **options)
    for text in expected:
        assert text in str(error.value)


def write(folder, *names, content=b""):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_list(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def label_names(found):
    """-> {file name of an image: the name of its class}."""
    source = found.source
    names = [os.path.basename(path) for path in source.paths]
    return dict(zip(names, [found.names[label] for label in source.labels]))


# ---- the same pictures in every layout ----


def pictures():
    """-> [(file name, bytes, WordNet id)], in the order of the names."""
    rows = []
    for number in range(NUM_IMAGES):
        rows.append((f"ILSVRC2012_val_{number:08}.JPEG", picture(number, "jpg"), IDS[number % 4]))
    return rows


def read_all(found, workers=0):
    """-> {number that a picture spells: (name of its class, pixels)}."""
    samples = {}
    for batch in read_samples(found.source, 24, 5, workers=workers):
        assert not batch.bad
        for image, label in zip(batch.images, batch.labels):
            samples[number_of(image)] = (found.names[label], image)
    return samples


@pytest.fixture(scope="module")
def as_folders(tmp_path_factory):
    """The pictures in a folder per class."""
    folder = tmp_path_factory.mktemp("sets") / "imagenet" / "val"
    for name, content, wordnet_id in pictures():
        write(folder / wordnet_id, name, content=content)
    return folder


def flat(folder):
    for name, content, _ in pictures():
        write(folder, name, content=content)
    return folder


def assert_same(found, other):
    samples = read_all(found)
    expected = read_all(other)
    assert samples.keys() == expected.keys() == set(range(NUM_IMAGES))
    for number, (name, image) in samples.items():
        assert name == expected[number][0]
        assert torch.equal(image, expected[number][1])


def test_a_folder_per_class_read_by_workers(as_folders, capfd):
    found = find(as_folders)
    assert found.name == "imagenet"
    assert found.names == ["tench", "goldfish", "tabby cat", "strawberry"]
    assert len(found.templates) == 80 and found.templates[0] == "a bad photo of a {c}."
    assert capfd.readouterr().out == (
        "imagenet: folder per class (WordNet ids), 12 images, 4 classes (open_clip), "
        "80 templates (open_clip)\n"
    )

    here = read_all(found)
    by_workers = read_all(found, workers=2)
    assert here.keys() == by_workers.keys() == set(range(NUM_IMAGES))
    for number, (name, image) in here.items():
        assert name == found.names[number % 4]
        assert torch.equal(image, by_workers[number][1])


def test_the_same_pictures_in_a_flat_folder(as_folders, tmp_path):
    """Every form of a label file, in the folder, above it, or given itself."""
    folder = flat(tmp_path / "set" / "val")
    rows = [(name, wordnet_id) for name, _, wordnet_id in pictures()]
    stems = [(name.partition(".")[0], wordnet_id) for name, wordnet_id in rows]
    kaggle = [f"{stem},{wordnet_id} 85 1 499 272" for stem, wordnet_id in stems]
    forms = {
        "LOC_val_solution.csv": ["ImageId,PredictionString", *reversed(kaggle)],
        "labels.tsv": [f"{name}\t{wordnet_id}" for name, wordnet_id in rows],
        "val.txt": [f"val/{name} {wordnet_id}" for name, wordnet_id in rows],
        "imagenet_2012_validation_synset_labels.txt": [wordnet_id for _, wordnet_id in rows],
        "jpg.csv": [f"{stem}.jpg;{wordnet_id};0" for stem, wordnet_id in stems],
    }
    expected = find(as_folders)
    for name, lines in forms.items():
        for place in (folder, folder.parent):
            path = write_list(place / name, lines)
            assert label_names(find(folder)) == label_names(expected), name
            assert label_names(find(path)) == label_names(expected), name
            path.unlink()

    write_list(folder / "val.txt", forms["val.txt"])
    assert_same(find(folder), expected)


def test_the_same_pictures_as_shards(as_folders, tmp_path):
    files = []
    for number, (_, content, wordnet_id) in enumerate(pictures()):
        label = str(IDS.index(wordnet_id)).encode()
        files += [(f"{number}.jpg", content), (f"{number}.cls", label)]

    root = tmp_path / "wds_mine_test"
    write_list(root / "classnames.txt", ["tench", "goldfish", "tabby cat", "strawberry"])
    write(root, "test/x")
    write_tar(root / "test" / "0.tar", files[:10])
    write_tar(root / "test" / "1.tar", files[10:])
    expected = find(as_folders)
    assert_same(find(root / "test"), expected)
    assert_same(find(root / "test" / "*.tar"), expected)

    # As CLIP_benchmark has it.
    write_list(root / "test" / "nshards.txt", ["2"])
    found = find(root)
    assert found.name == "wds_mine_test"
    assert_same(found, expected)
    assert_same(find(root / "test"), expected)


def test_numbers_and_names_in_a_flat_folder(tmp_path):
    folder = write(tmp_path / "set", "a.jpg", "b.png", "c.jpg")
    numbers = write_list(tmp_path / "set" / "val.txt", ["a.jpg 0", "b.png 2", "c.jpg 2"])
    refused(folder, "its classes (2) are numbers up to 2", "--eval_names=FILE")

    names = write_list(tmp_path / "names", ["dog", "cat", "sea lion"])
    expected = {"a.jpg": "dog", "b.png": "sea lion", "c.jpg": "sea lion"}
    assert label_names(find(folder, eval_names=str(names))) == expected
    write_list(numbers, ["a.jpg 0", "b.png 2", "c.jpg 3"])
    refused(folder, "has a class 3, but", "has 3 lines", eval_names=str(names))

    numbers.unlink()
    write_list(tmp_path / "set" / "my.csv", ["file,label", "a,dog", "b,sea lion", "c,sea lion"])
    found = find(folder)
    assert found.names == ["dog", "sea lion"]
    assert label_names(found) == expected
    found = find(folder, eval_names=str(names))
    assert found.names == ["dog", "cat", "sea lion"]
    assert label_names(found) == expected


def test_the_titles_of_a_table_say_which_columns_are_meant(tmp_path):
    folder = write(tmp_path / "set", "a.jpg", "b.jpg")
    tables = [
        ["Filename,split,label", "a.jpg,val,cat", "b.jpg,val,dog"],
        ["id\tClass\tImage_ID", "1\tcat\ta", "2\tdog\tb"],
    ]
    for lines in tables:
        write_list(folder / "val.csv", lines)
        assert label_names(find(folder)) == {"a.jpg": "cat", "b.jpg": "dog"}

    write_list(folder / "val.csv", ["a.jpg,val,cat", "b.jpg,val,dog"])
    refused(folder, "only one class, 'val' (the labels in val.csv)", "filename,split,label")
    write_list(folder / "val.csv", ["split,wnid,path", "val,cat"])
    refused(folder, "its line 2 is not FILE LABEL: 'val cat'")


def test_numbers_that_may_be_counted_from_1(tmp_path, capfd):
    folder = write(tmp_path / "set", "a.jpg", "b.jpg")
    names = write_list(tmp_path / "names", ["ape", "bee", "cat", "dog"])
    write_list(folder / "val.txt", ["a.jpg 1", "b.jpg 2"])
    found = find(folder, eval_names=str(names))
    assert label_names(found) == {"a.jpg": "bee", "b.jpg": "cat"}
    assert "has class 0: classes are counted from 0" in capfd.readouterr().err

    write_list(folder / "val.txt", ["a.jpg 0", "b.jpg 2"])
    find(folder, eval_names=str(names))
    assert not capfd.readouterr().err


def test_kaggles_imagenet_as_it_is_unpacked(tmp_path):
    root = tmp_path / "kaggle"
    images = write(root / "ILSVRC" / "Data" / "CLS-LOC" / "val", "a.JPEG", "b.JPEG")
    table = ["ImageId,PredictionString", f"a,{IDS[0]} 1 2 3 4", f"b,{IDS[1]} 1 2 3 4"]
    path = write_list(root / "LOC_val_solution.csv", table)
    assert label_names(find(path)) == {"a.JPEG": "tench", "b.JPEG": "goldfish"}

    refused(images, "2 images and no folder per class", "put or link the list beside the folder")
    refused(root, "1 folder, 1 csv", "FILE LABEL per line, put or linked beside their folder")
    os.symlink(path, images.parent / "val.csv")
    assert label_names(find(images)) == {"a.JPEG": "tench", "b.JPEG": "goldfish"}


def test_the_devkits_numbers_need_its_meta_mat(as_folders, tmp_path):
    """Their order is not ImageNet's: here it is the reverse."""
    scipy_io = pytest.importorskip("scipy.io")
    folder = flat(tmp_path / "set" / "val")
    numbers = [str(4 - IDS.index(wordnet_id)) for _, _, wordnet_id in pictures()]
    path = write_list(folder / "ILSVRC2012_validation_ground_truth.txt", numbers)
    refused(folder, "whose order is not ImageNet's usual one", "meta.mat")

    synsets = np.zeros((4, 1), [("ILSVRC2012_ID", object), ("WNID", object)])
    for number, wordnet_id in enumerate(reversed(IDS), 1):
        synsets[number - 1, 0] = (number, wordnet_id)
    for place in (folder, folder.parent, folder.parent / "data"):
        place.mkdir(exist_ok=True)
        scipy_io.savemat(place / "meta.mat", {"synsets": synsets})
        assert label_names(find(folder)) == label_names(find(as_folders))
        (place / "meta.mat").unlink()

    # The same numbers under another name would be taken for numbers from 0.
    path.rename(folder / "labels.txt")
    refused(folder, "numbers without a 0", "likely to be the devkit's")


def test_scipy_is_asked_for(tmp_path, monkeypatch):
    folder = write(tmp_path / "set", "a.jpg", "meta.mat")
    write_list(folder / "ILSVRC2012_validation_ground_truth.txt", ["1"])
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refused(folder, "pip install scipy")
    monkeypatch.undo()
    pytest.importorskip("scipy.io")
    refused(folder, "is not the devkit's meta.mat")


# ---- the sets of the paper, with their real class folders ----


def write_classes(folder, classes):
    """A folder with one image, which is not decoded, per class."""
    for name in classes:
        os.makedirs(folder / name)
        (folder / name / "x.JPEG").touch()
    return folder


def subset(name):
    timm_data = pytest.importorskip("timm.data")
    path = os.path.join(os.path.dirname(timm_data.__file__), "_info", f"{name}_synsets.txt")
    with open(path) as f:
        return f.read().split()


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r", "imagenet_o"])
def test_subsets_have_200_classes(tmp_path, name):
    ids = imagenet_ids()[::5] if name == "imagenet_o" else subset(name)
    found = find(write_classes(tmp_path / name, ids))
    open_clip = pytest.importorskip("open_clip")
    numbers = {wordnet_id: number for number, wordnet_id in enumerate(imagenet_ids())}
    expected = [open_clip.IMAGENET_CLASSNAMES[numbers[wordnet_id]] for wordnet_id in sorted(ids)]
    assert len(found.names) == 200
    assert found.names == expected
    assert found.source.paths == [f"{wordnet_id}/x.JPEG" for wordnet_id in sorted(ids)]
    assert found.source.labels == list(range(200))
    assert found.name == name


def test_sketch_and_v2_have_1000_classes(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    sketch = find(write_classes(tmp_path / "sketch", imagenet_ids()))
    assert sketch.names == list(open_clip.IMAGENET_CLASSNAMES)
    assert sketch.source.labels == list(range(1000))

    name = "imagenetv2-matched-frequency-format-val"
    v2 = find(write_classes(tmp_path / name, map(str, range(1000))))
    assert v2.names == list(open_clip.IMAGENET_CLASSNAMES)
    assert [path.partition("/")[0] for path in v2.source.paths[:3]] == ["0", "1", "10"]
    assert v2.source.labels[:3] == [0, 1, 10]
    assert len(v2.templates) == 80

    # A part of it would be without names.
    os.rename(tmp_path / name / "999", tmp_path / "999")
    refused(tmp_path / name, "its classes (999) are numbers up to 998", "all of 0 to 999")


def test_objectnet_has_113_classes(tmp_path):
    root = tmp_path / "objectnet-1.0"
    labels = {f"folder_{number:03}": f"Thing {number}" for number in range(313)}
    shared = [f"Thing {number}" for number in range(0, 226, 2)]
    write_classes(root / "images", labels)
    mappings = root / "mappings"
    write_list(mappings / "folder_to_objectnet_label.json", [json.dumps(labels)])
    to_imagenet = json.dumps(dict.fromkeys(shared, "tench; goldfish"))
    write_list(mappings / "objectnet_to_imagenet_1k.json", [to_imagenet])

    for place in (root, root / "images"):
        found = find(place)
        assert len(found.names) == 113
        assert found.names[:2] == ["thing 0", "thing 2"]
        assert found.source.paths[1] == "folder_002/x.JPEG"
        assert found.source.labels == list(range(113))
        assert found.source.border == 2
        assert not found.source.left_out
        assert len(found.templates) == 80
        assert found.name == "objectnet-1.0"

    os.rename(mappings, tmp_path / "mappings")
    for place in (root, root / "images"):
        refused(place, "has ObjectNet's name", "put ObjectNet's folder mappings")
    os.rename(tmp_path / "mappings", mappings)

    names = write_list(tmp_path / "names.txt", shared[:100])
    refused(root, "names.txt has 100 lines, but ObjectNet shares 113", eval_names=str(names))
    shutil.rmtree(root / "images" / "folder_004")
    refused(root, "1 of the 113 folders", "folder_004", "unpack all parts")
    write_list(mappings / "objectnet_to_imagenet_1k.json", ["["])
    refused(root, "objectnet_to_imagenet_1k.json cannot be read as JSON")


# ---- folders of names ----


def test_folders_of_names_and_a_list_for_them(tmp_path):
    root = write_classes(tmp_path / "pets", ["sea_lion", "Überzug", "cat"])
    os.symlink(root / "cat", root / "dog")
    found = find(root)
    assert found.names == ["cat", "dog", "sea lion", "Überzug"]
    assert found.templates == ["a photo of a {c}"]

    # Other names in the order of the folders; or their own names, in any order.
    names = write_list(root / "classnames.txt", ["a cat", "a dog", "a seal", "a coat"])
    assert find(root).names == ["a cat", "a dog", "a seal", "a coat"]
    write_list(names, ["überzug", "horse", "dog", "cat", "Sea Lion"])
    assert find(root).source.labels == [3, 2, 4, 0]

    # A list in another order would give wrong numbers without a word.
    write_list(names, ["dog", "cat", "a seal", "a coat"])
    refused(root, "is in another order", "'cat'")
    write_list(names, ["a", "b", "c"])
    refused(root, "has 3 lines, but", "has 4 classes", "'cat'")


def test_names_and_templates_by_hand_come_first(as_folders, tmp_path):
    write_list(tmp_path / "four.txt", ["a", "b", "c", "d"])
    write_list(tmp_path / "thousand.txt", [f"class {number}" for number in range(1000)])
    write_list(tmp_path / "many.txt", ["x"] * 999)
    write_list(tmp_path / "prompts.txt", ["a {}", "the {c}"])
    hand = dict(eval_templates=str(tmp_path / "prompts.txt"))

    found = find(as_folders, eval_names=str(tmp_path / "four.txt"), **hand)
    assert found.names == ["a", "b", "c", "d"]
    assert found.templates == ["a {c}", "the {c}"]
    found = find(as_folders, eval_names=str(tmp_path / "thousand.txt"))
    assert found.names == ["class 0", "class 1", "class 281", "class 949"]
    refused(
        as_folders,
        "many.txt has 999 lines",
        "has 4 classes of ImageNet's 1,000",
        eval_names=str(tmp_path / "many.txt"),
    )

    # By the name of the set.
    place = str(as_folders)
    names = {"one": str(tmp_path / "four.txt")}
    c = Config(eval_data={"one": place, "two": place}, eval_names=names)
    assert find_set("one", (place,), c).names == ["a", "b", "c", "d"]
    assert find_set("two", (place,), c).names[0] == "tench"


def test_where_names_and_templates_come_from_is_said(tmp_path, capfd):
    root = write_classes(tmp_path / "up" / "pets", ["cat", "dog"])
    found = find(root)
    assert (found.names_from, found.templates_from) == ("the folders' names", "")
    assert "2 images, 2 classes (the folders' names), 1 template\n" in capfd.readouterr().out

    # The names belong to some other set.
    write_list(root.parent / "classnames.txt", ["red", "green"])
    write_list(root / "zeroshot_classification_templates.txt", ["a {}", "the {}"])
    found = find(root)
    assert found.names_from == "classnames.txt in the folder above"
    printed = capfd.readouterr()
    assert (
        "2 classes (classnames.txt in the folder above), "
        "2 templates (zeroshot_classification_templates.txt)\n"
    ) in printed.out
    assert "has none of the names on the disk" in printed.err
    assert "has cat, dog, the list red, green;" in printed.err

    # Nobody is warned of a list that was given, or that fits.
    names = write_list(tmp_path / "hand.txt", [" red ", "green"])
    found = find(root, eval_names=str(names))
    assert (found.names, found.names_from) == (["red", "green"], str(names))
    write_list(root / "classnames.txt", ["a cat", "dog"])
    assert find(root).names_from == "classnames.txt"
    assert "warning" not in capfd.readouterr().err


def test_a_place_is_the_same_however_it_is_spelt(tmp_path, monkeypatch):
    root = write_classes(tmp_path / "up" / "pets", ["cat", "dog"])
    write_list(tmp_path / "up" / "classnames.txt", ["a cat", "a dog"])
    monkeypatch.chdir(root)
    for place in (root, f"{root}/", ".", "./", "../pets", "../../up//pets/"):
        found = find(place)
        assert found.names == ["a cat", "a dog"], place
        assert found.name == "pets"


def test_lists_that_hold_something_else_are_refused(tmp_path):
    root = write_classes(tmp_path / "set", IDS[:2])
    kaggle = ["n01440764 tench, Tinca tinca", "n01443537 goldfish, Carassius auratus"]
    names = write_list(tmp_path / "LOC_synset_mapping.txt", kaggle)
    refused(root, "lists WordNet ids, 'n01440764 tench", "leave it out", eval_names=str(names))
    refused(root, "there is no file", "did you mean 'LOC_syn", eval_names=f"{names}x")
    refused(root, f"{root} cannot be read: Is a directory", eval_names=str(root))

    prompts = tmp_path / "prompts.txt"
    for line in ('    lambda c: f"a photo of a {c}.",', "'a photo of a {}',", 'f"a {c}"'):
        write_list(prompts, [line])
        refused(root, "line 1", "is Python: write the prompt alone", eval_templates=str(prompts))
    write_list(prompts, ["lambda {c}", '"{c}" in a photo'])
    assert find(root, eval_templates=str(prompts)).templates == ["lambda {c}", '"{c}" in a photo']


def test_without_open_clip_names_are_asked_for(as_folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refused(as_folders, "pip install open_clip_torch", "--eval_names=FILE")
    names = write_list(tmp_path / "names.txt", ["a", "b", "c", "d"])
    assert find(as_folders, eval_names=str(names)).templates == ["a photo of a {c}"]


def test_what_a_folder_per_class_may_not_be(tmp_path):
    refused(
        write_classes(tmp_path / "imagenet", ["train/n01440764", "val/n01440764"]),
        "images lie two folders deep, as train/n01440764/x.JPEG",
        f"give {tmp_path}/imagenet/val",
    )
    refused(write_classes(tmp_path / "21k", [*IDS, "n00000001", "more"]), "n00000001", "more")

    root = write_classes(tmp_path / "empty", ["cat", "dog"])
    write(root, "eel/x.gif", "fox/readme.txt", ".git/x", "cat/.DS_Store", "cat/._x.jpg")
    refused(root, "2 of its 4 class folders hold no image that can be read: eel, fox")


def test_images_that_are_left_out_are_counted(tmp_path, capfd):
    root = write_classes(tmp_path / "pets", ["cat", "dog"])
    write(root, "cat/a.GIF", "preview.jpg", "readme.md")
    refused(
        root,
        "2 of 4 samples (50.0%) would be left out",
        "1 gif of a kind that is not read: convert them",
        "1 jpg outside of the class folders",
        "--allow_left_out=0.5",
    )
    found = find(root, allow_left_out=0.5)
    assert found.source.left_out.total() == 2
    assert "1 gif of a kind that is not read" in capfd.readouterr().err

    folder = write(tmp_path / "flat", "a.jpg", "b.jpg", "c.tif")
    write_list(folder / "val.csv", ["file,label", "a.jpg,cat", "c,dog", "gone.png,dog"])
    refused(folder, "3 of 4 samples", "1 jpg without a label", "1 png not on the disk", "1 tif of")
    found = find(folder, allow_left_out=0.8)
    assert label_names(found) == {"a.jpg": "cat"}
    assert found.names == ["cat", "dog"]


# ---- lists of labels that do not fit ----


def test_lists_that_do_not_fit_say_why(tmp_path):
    folder = write(tmp_path / "set" / "val", "a.jpg", "b.jpg")
    refused(folder, "2 images", "there is no .csv, .tsv or .txt")

    write_list(folder / "other.txt", ["c.jpg 0", "d.jpg 1"])
    write_list(folder / "three.txt", IDS[:3])
    write_list(folder / "words.txt", ["Please read this.", "Thanks"])
    write(folder, "empty.csv")
    write(folder, "binary.txt", content=b"\xff\xfe\xfa")
    write_list(folder.parent / "train.csv", ["train/a.jpg,0"])
    write_list(folder / "long.csv", ["a.jpg,cat", "b.jpg," + "x" * 200_000])
    write(folder, "notes/draft/c.jpg")
    refused(
        folder,
        "other.txt, for the images in",
        "names none of the images; its first line has 'c.jpg'",
        "it has 3 lines of one label, for 2 images",
        "its line 2 is not FILE LABEL: 'Thanks'",
        "it is empty",
        "it is no text in UTF-8",
        "it is no table: field larger than",
        "train.csv",
    )
    refused(folder / "three.txt", "is given as a list of labels", "it has 3 lines of one label")

    write_list(folder.parent / "good.csv", ["a.jpg,cat", "b.jpg,dog"])
    assert label_names(find(folder)) == {"a.jpg": "cat", "b.jpg": "dog"}
    write_list(folder.parent / "same.csv", ["a.jpg,cat", "b.jpg,dog"])
    refused(folder, "several files hold labels", "good.csv", "same.csv")
    assert find(folder.parent / "good.csv").names == ["cat", "dog"]

    write_list(folder.parent / "good.csv", ["a.jpg,cat", "b.jpg,dog", "a.jpg,dog"])
    refused(folder.parent / "good.csv", "a.jpg has two labels in it, 'cat' and 'dog'")


def test_lists_that_would_give_wrong_labels_do_not_fit(tmp_path):
    folder = write(tmp_path / "two", "a.jpg", "a.png")
    write_list(folder / "val.txt", ["a.png dog", "a cat"])
    refused(folder, "2 of 3 samples", "1 jpg without a label", "1 image not on the disk")

    # One label per line, in the order of the images? It is a list of classes.
    folder = write(tmp_path / "set", *[f"{number:04}.jpg" for number in range(1000)])
    write_list(folder / "synsets.txt", imagenet_ids())
    refused(folder, "it is the list of ImageNet's classes")


def test_one_folder_of_images_beside_its_list(tmp_path):
    """TinyImageNet's val; and a list for two folders, which names them."""
    root = write(tmp_path / "val", "images/val_0.JPEG", "images/val_1.JPEG")
    rows = [f"val_{number}.JPEG\t{IDS[number]}\t0\t32\t44\t62" for number in range(2)]
    write_list(root / "val_annotations.txt", rows)
    assert label_names(find(root)) == {"val_0.JPEG": "tench", "val_1.JPEG": "goldfish"}

    root = write(tmp_path / "two", "train/0.png", "test/0.png", "test/1.png")
    lines = ["file,label", "train/0.png,cat", "test/0.png,dog", "test/1.png,eel"]
    path = write_list(root / "metadata.csv", lines)
    refused(path, "the images of several folders", "two/test", "two/train")
    found = find(root / "test")
    assert label_names(found) == {"0.png": "dog", "1.png": "eel"}


# ---- captions ----


def karpathy(path, rows):
    """rows: (file name, folder or None, split, captions) -> the path of the JSON file."""
    images = []
    for name, folder, split, captions in rows:
        entry = {
            "filename": name,
            "split": split,
            "sentences": [{"raw": text} for text in captions],
        }
        if folder:
            entry["filepath"] = folder
        images.append(entry)
    return write_list(path, [json.dumps({"images": images, "dataset": "x"})])


@pytest.mark.parametrize("place", ["", "flickr30k-images", "../images"])
def test_flickr30k(tmp_path, place, capfd):
    root = tmp_path / "flickr30k"
    rows = [
        ("2.jpg", None, "test", [" A dog. ", "Zwei Hünde"]),
        ("1.jpg", None, "test", ["A cat"]),
        ("0.jpg", None, "train", ["A cow"]),
    ]
    path = karpathy(root / "dataset_flickr30k.json", rows)
    write(root / place, "1.jpg", content=picture(1, "jpg"))
    write(root / place, "2.jpg", content=picture(2, "jpg"))
    for given in (root, path):
        found = find(given)
        (batch,) = read_samples(found.source, 24, workers=0)
        numbers = [number_of(image) for image in batch.images]
        assert dict(zip(numbers, batch.captions)) == {1: ["A cat"], 2: ["A dog.", "Zwei Hünde"]}
        assert batch.labels == [None, None]
        assert found.names == []
    assert "flickr30k: Karpathy's split, dataset_flickr30k.json, 2 images, 3 captions\n" in (
        capfd.readouterr().out
    )

    os.remove(root / place / "1.jpg")
    refused(
        given,
        f"1.jpg is neither in {root} nor in a folder in it or beside it",
        "1 of 2 samples",
        "1 jpg not on the disk",
    )
    assert find(given, allow_left_out=0.5).source.num_samples == 1


def test_coco_has_two_folders_of_images(tmp_path):
    """Files of the same name in both are told apart by "filepath"."""
    rows = [
        ("1.jpg", "train2014", "test", ["train"]),
        ("1.jpg", "val2014", "test", ["val"]),
        ("2.jpg", "val2014", "test", ["moved"]),
    ]
    karpathy(tmp_path / "coco" / "dataset_coco.json", rows)
    write(tmp_path / "coco", "images/val2014/1.jpg", "images/train2014/1.jpg", "extra/2.jpg")
    source = find(tmp_path / "coco").source
    texts = {os.path.normpath(path): text for path, text in zip(source.paths, source.texts)}
    assert texts == {
        "images/train2014/1.jpg": ["train"],
        "images/val2014/1.jpg": ["val"],
        "extra/2.jpg": ["moved"],
    }

    os.remove(tmp_path / "coco" / "images" / "val2014" / "1.jpg")
    refused(tmp_path / "coco", "1.jpg is neither in", "1 of 3 samples")


def test_the_folder_above_is_looked_into_only_for_what_is_missing(tmp_path, monkeypatch):
    """It may be large, or not to be listed, as those of many users are."""
    looked_into = []
    listed = os.scandir

    def scandir(path):
        looked_into.append(str(path))
        if str(path) == str(tmp_path):
            raise PermissionError("no")
        return listed(path)

    monkeypatch.setattr("ingest.folders.os.scandir", scandir)
    path = karpathy(tmp_path / "a" / "x.json", [("1.jpg", None, "test", ["A cow"])])
    image = write(tmp_path / "a" / "images", "1.jpg") / "1.jpg"
    for place in (path, path.parent):
        found = find_set("", (str(place),), Config())
        assert found.source.paths == ["images/1.jpg"]
    assert str(tmp_path) not in looked_into

    os.remove(image)
    with pytest.raises(ConfigError, match="1.jpg is neither in"):
        find_set("", (str(path),), Config())
    assert str(tmp_path) in looked_into

    flat = write(tmp_path / "flat", "1.jpg")
    with pytest.raises(ConfigError, match="no file has their labels"):
        find_set("", (str(flat),), Config())


def test_captions_that_cannot_be_used(tmp_path):
    path = karpathy(tmp_path / "a" / "x.json", [("1.jpg", None, "train", ["A cow"])])
    refused(path, "no image of the split 'test', but 1 train")
    karpathy(tmp_path / "a" / "y.json", [("1.jpg", None, "test", ["A cow"])])
    refused(tmp_path / "a", "holds several sets", "x.json", "y.json")
    refused(write_list(path, ['{"images": 1}']), "not a file of Karpathy's splits")
    coco = write_list(path, ['{"images": [{"file_name": "1.jpg"}], "annotations": []}'])
    refused(coco, "is COCO's own file", "take his dataset_coco.json")
    write(tmp_path / "a", "1.jpg")
    karpathy(path, [("1.jpg", None, "test", [" "])])
    refused(path, "1 jpg without a sentence: add sentences to their entries in the JSON file")
    karpathy(path, [("../1.jpg", None, "test", ["A cow"])])
    refused(path, "'../1.jpg' is no file name")


# ---- folders of CLIP_benchmark ----


def test_folders_of_clip_benchmark(tmp_path):
    root = tmp_path / "wds_x_test"
    captions = [("0.jpg", picture(0, "jpg")), ("0.txt", b"A cat\nOne cat\n")]
    write_list(root / "test" / "nshards.txt", ["2"])
    write_tar(root / "test" / "0.tar", captions)
    refused(root, "nshards.txt says 2 shards, but 1 of them cannot be found, 1.tar")

    write_list(root / "test" / "nshards.txt", ["1"])
    refused(root, "no classnames.txt", "--eval_names=FILE")
    write_list(root / "dataset_type.txt", ["retrieval"])
    found = find(root)
    assert found.source.reader().read(0).captions == ["A cat", "One cat"]
    assert found.names == []

    write_list(root / "dataset_type.txt", ["multilabel"])
    refused(root, "says multilabel", "several classes per image")
    refused(root / "test" / "{0..0}.tar", "says multilabel")
    write_list(root / "test" / "nshards.txt", ["many"])
    refused(root, "must hold the number of shards, and holds 'many'")


def test_several_sets_are_not_merged_into_one(tmp_path):
    root = tmp_path / "sets"
    for name in ("ant", "bee"):
        write_list(root / name / "classnames.txt", [f"small {name}", f"large {name}"])
        write_list(root / name / "test" / "nshards.txt", ["1"])
        files = [("0.jpg", picture(0, "jpg")), ("0.cls", b"0")]
        write_tar(root / name / "test" / "0.tar", files)
    sets = {name: f"{root}/{name}" for name in ("ant", "bee")}
    refused(root, "holds several sets", f'--eval_data="{sets}"')
    refused(f"{root}/ant {root}/bee", f'give each a name, --eval_data="{sets}"')
    with pytest.raises(ConfigError, match="give each a name"):
        find_set("", tuple(sets.values()), Config())

    # One pattern is one set, unless its folders say otherwise.
    pattern = f"{root}/*/test/*.tar"
    shards = {name: f"{root}/{name}/test/*.tar" for name in ("ant", "bee")}
    refused(pattern, "several sets", "merged into one result", f'--eval_data="{shards}"')
    names = shutil.copy(root / "ant" / "classnames.txt", root / "bee" / "classnames.txt")
    refused(pattern, "merged into one result")
    os.remove(root / "bee" / "test" / "nshards.txt")
    assert find(pattern).source.num_samples == 2
    write_list(names, ["small bee", "large bee"])
    refused(pattern, "merged into one result")
    refused(root, f"holds a set in a folder: give {root}/ant")


def test_several_classes_per_image_without_a_word_beside(tmp_path):
    files = [("0.jpg", picture(0, "jpg")), ("0.npy", b"x")]
    files += [("1.jpg", picture(1, "jpg")), ("1.cls", b"0")]
    tar = write_tar(tmp_path / "0.tar", files)
    refused(tar, "1 jpg with KEY.npy but without KEY.cls: several classes of one image")


# ---- other places ----


def test_places_that_hold_no_set(tmp_path):
    write(tmp_path / "code", "a.py", "b.py", "c/d.txt", "e")
    refused(
        tmp_path / "code",
        "holds no evaluation set, but 1 folder, 2 py, 1 other file",
        "CLASS/IMAGE: a folder per class",
        "dataset_coco.json",
    )
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is an empty folder")
    refused(tmp_path / "code" / "a.py", "a.py is no evaluation set: expected is a folder, a .tar")
    refused(tmp_path / "codes", "there is no file or folder", "did you mean 'code'?")
    write(tmp_path / "packed", "val.zip")
    refused(tmp_path / "packed", "but 1 zip; unpack val.zip; expected is")
    refused(tmp_path / "packed" / "val.zip", "val.zip is an archive: unpack it")
    os.symlink(tmp_path / "gone", tmp_path / "link")
    refused(tmp_path / "link", "link is a link to", "gone, where nothing is")
    write(tmp_path / "shards", "x/0.tar", "y/0.tar")
    refused(tmp_path / "shards", "is a folder: give its shards", "shards/*/*.tar")


def test_a_folder_where_nothing_may_be_written(as_folders):
    """The set is found and read, as root, too: `find` compares what is there before and after."""
    for place, _, names in os.walk(as_folders):
        for name in names:
            os.chmod(os.path.join(place, name), 0o444)
        os.chmod(place, 0o555)
    try:
        assert len(read_all(find(as_folders))) == NUM_IMAGES
    finally:
        for place, _, _ in os.walk(as_folders):
            os.chmod(place, 0o755)


@pytest.mark.parametrize(
    "place, name",
    [
        ("data/emoji/test/*.tar", "emoji"),
        ("sets/wds_imagenet_sketch_test/test/{0..5}.tar", "wds_imagenet_sketch_test"),
        ("/x/imagenet/val", "imagenet"),
        ("/x/my pets/images/00001.tar", "my_pets"),
        ("/x/pets.tar", "pets"),
        ("pipe:aws s3 cp s3://bucket/cars/test/{0..9}.tar -", "cars"),
        ("/val", "set"),
    ],
)
def test_names_of_sets_come_from_their_paths(place, name):
    assert layouts.name_of((place,)) == name


def test_the_command_shows_what_is_there(as_folders, tmp_path, capfd):
    layouts.main([str(as_folders)])
    lines = capfd.readouterr().out.splitlines()
    assert lines[1:] == [
        "  class 0: tench, 3 images",
        "  class 1: goldfish, 3 images",
        "  class 2: tabby cat, 3 images",
        "  class 3: strawberry, 3 images",
        "  prompt: a bad photo of a tench.",
    ]
    names = write_list(tmp_path / "names.txt", ["a", "b", "c", "d"])
    layouts.main([str(as_folders), f"--eval_names={names}"])
    assert "class 3: d, 3 images" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="error: there is no file or folder"):
        config.or_exit(layouts.main, [str(tmp_path / "nothing")])


def test_files_that_change_after_they_were_found(tmp_path):
    """A file that is gone, one that became a pipe, one that is cut off: left out and counted."""
    folder = tmp_path / "set"
    for number in range(6):
        write(folder / "ab"[number % 2], f"{number}.jpg", content=picture(number, "jpg"))
    found = find(folder)
    os.remove(folder / "a" / "0.jpg")
    os.remove(folder / "a" / "2.jpg")
    os.mkfifo(folder / "a" / "2.jpg")
    (folder / "b" / "1.jpg").write_bytes(picture(1, "jpg")[:100])

    (batch,) = read_samples(found.source, 24, workers=0)
    assert batch.bad == {"no such file": 2, "corrupt image": 1}
    assert [number_of(image) for image in batch.images] == [4, 3, 5]
    assert batch.labels == [0, 1, 1]
