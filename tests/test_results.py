"""runtime/results.py: which set is which, their mean, the printed table, files for benchmarks."""

import csv
import json
import os

import pytest

from config import ConfigError
from runtime import results


def classified(name, top1, images=None, classes=None):
    """The result of a set with classes, by default of the size of the known set of this name."""
    task = results.find_task(name)
    result = dict(
        name=name,
        images=images or (task.images if task else 1000),
        captions=0,
        classes=classes or (task.classes if task else 1000),
        templates=80,
        left_out={},
        notes=[],
        zeroshot_top1=top1,
        zeroshot_mean_per_class=0.25,
    )
    if result["classes"] >= 5:
        result["zeroshot_top5"] = 0.9
    return result


def retrieved(name):
    """The result of a set with captions, each recall another number."""
    task = results.find_task(name)
    images = task.images if task else 1000
    result = dict(name=name, images=images, captions=5 * images, classes=0, templates=0)
    result.update(left_out={}, notes=[])
    for k in (1, 5, 10):
        result[f"image_to_text_R@{k}"] = 0.5 + k / 100
        result[f"text_to_image_R@{k}"] = 0.3 + k / 100
    return result


def seven(**changes):
    """The results of ImageNet and its six variants, under names that people give them."""
    top1 = {
        "wds_imagenet1k_test": 0.7,
        "imagenet-sketch": 0.6,
        "ImageNetV2": 0.5,
        "in-a": 0.4,
        "imagenet_o": 0.3,
        "wds/imagenet-r": 0.2,
        "objectnet-1.0": 0.1,
    }
    return [classified(name, share) for name, share in {**top1, **changes}.items()]


def lines_of(folder):
    """{key: line} of eval_results.jsonl."""
    with open(os.path.join(folder, "eval_results.jsonl")) as f:
        lines = [json.loads(text) for text in f]
    by_key = {line["key"]: line for line in lines}
    assert len(by_key) == len(lines)
    return by_key


def read_all(folder):
    """{path: bytes} of all files in the folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- which set is it ----


@pytest.mark.parametrize(
    "dataset, names",
    [
        ("ImageNet 1k", "imagenet imagenet1k imagenet-1k IN1k imagenet_val wds/imagenet1k"),
        ("ImageNet Sketch", "imagenet_sketch wds_imagenet_sketch_test ImageNet-Sketch"),
        ("ImageNet v2", "imagenetv2 imagenet_v2 imagenetv2-matched-frequency-format-val"),
        ("ImageNet-A", "imagenet-a imagenet_a ImageNetA in-a"),
        ("Caltech-101", "vtab/caltech101 wds_vtab-caltech101_test vtab-caltech101 Caltech_101"),
        ("Flickr", "flickr30k wds_flickr30k_test retrieval/flickr_1k_test_image_text_retrieval"),
        ("MSCOCO", "mscoco_captions coco mscoco_2014_5k_test_image_text_retrieval"),
        ("Camelyon17", "wilds/camelyon17 wds_wilds-camelyon17_test"),
        (
            None,
            "imagenet-100 imagenet_train imagenetv2-threshold0.7 voc2007_multilabel 画",
        ),
    ],
)
def test_a_set_is_known_by_its_name_in_any_spelling(dataset, names):
    for name in names.split():
        task = results.find_task(name)
        assert (task.dataset if task else None) == dataset, name


def test_no_name_belongs_to_two_tasks():
    owners = {}
    for task in results.TASKS:
        for name in (task.key, task.dataset, *task.names):
            assert owners.setdefault(results.plain(name), task) is task, name
    assert "" not in owners
    assert set(results.IN_AND_VARIANTS) <= {task.dataset for task in results.TASKS}


def test_a_part_of_a_known_set_is_not_taken_for_it():
    whole = classified("imagenet-o", 0.5, images=1_985)
    assert results.notes_on(whole) == []
    assert results.notes_on(classified("mine", 0.5)) == []

    damaged = classified("imagenet-o", 0.5, images=1_600)
    damaged["left_out"] = {"corrupt image": 400}
    assert results.notes_on(damaged) == [
        "400 of its 2,000 images could not be used",
        "it has 1,600 images, and ImageNet-O has 2,000",
    ]
    without_a_class = classified("imagenet", 0.5, images=49_950, classes=999)
    (note,) = results.notes_on(without_a_class)
    assert note == "it has 999 classes, and ImageNet 1k has 1,000"

    for part in (damaged, without_a_class):
        assert results.datacomp_lines([part], "one") == {}
        mean, missing = results.imagenet_and_variants([*seven(), part])
        assert mean == pytest.approx(0.4)  # that of the seven that are whole
        assert not missing


# ---- the mean of the seven ----


def test_the_mean_needs_all_seven_sets():
    mean, missing = results.imagenet_and_variants([classified("mine", 1.0), *seven()])
    assert mean == pytest.approx(0.4)
    assert missing == []

    without_captions = [retrieved("imagenet"), *seven()[1:-1]]
    mean, missing = results.imagenet_and_variants(without_captions)
    assert mean is None
    assert missing == ["ImageNet 1k", "ObjectNet"]


def test_the_mean_or_what_is_missing_is_printed():
    assert results.table(seven())[-1] == "  IN & Variants: 40.0 %, the mean top-1 of 7 sets"
    last = results.table(seven()[:5])[-1]
    assert last == "  IN & Variants: not known without ImageNet-R, ObjectNet"
    two = [seven()[0], retrieved("coco")]
    assert "Variants" not in "\n".join(results.table(two))


# ---- the printed table ----


def test_a_table_has_a_row_per_set_and_the_columns_that_any_set_has():
    long_name = "retrieval/flickr_1k_test_image_text_retrieval"
    both = {**retrieved("both"), **classified("both", 0.125), "notes": ["it is odd"]}
    lines = results.table([classified("mine", 1.0), retrieved(long_name), both])
    assert max(len(line) for line in lines) <= 100
    assert lines[1].split() == "top-1 top-5 mean R@1 R@5 R@10 R@1 R@5 R@10".split()
    assert lines[2].split() == ["mine", "100.0", "90.0", "25.0"]
    assert lines[3].split()[1:] == ["51.0", "55.0", "60.0", "31.0", "35.0", "40.0"]
    assert lines[4].split()[:4] == ["both", "12.5", "90.0", "25.0"]
    assert lines[3].index("51.0") == lines[4].index("51.0")  # in the same column
    assert lines[5] == "  note on both: it is odd"

    only_classes = results.table([classified("a", 0.5), classified("b", 0.5)])
    assert "R@1" not in "".join(only_classes)


def test_one_set_has_a_line_per_number():
    lines = results.table([classified("mine", 0.125)])
    assert lines[0] == "  zeroshot_top1               12.5 %"
    assert len(lines) == 3


# ---- CLIP_benchmark ----


def test_clip_benchmark_has_a_file_per_set_and_task(tmp_path):
    both = {**retrieved("a/b c"), **classified("a/b c", 0.5, classes=4)}
    results.write_clip_benchmark(str(tmp_path), [both], "ViT-B-32", "runs/x/step-00000001")

    start = tmp_path / "clip_benchmark" / "a_b_c_runs_x_step-00000001_ViT-B-32_en_"
    with open(f"{start}zeroshot_classification.json") as f:
        record = json.load(f)
    assert record == {
        "dataset": "a/b c",
        "model": "ViT-B-32",
        "pretrained": "runs/x/step-00000001",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.25},
        "language": "en",
    }
    with open(f"{start}zeroshot_retrieval.json") as f:
        metrics = json.load(f)["metrics"]
    assert len(metrics) == 6
    assert metrics["image_retrieval_recall@5"] == both["text_to_image_R@5"]
    assert metrics["text_retrieval_recall@10"] == both["image_to_text_R@10"]

    record.update(dataset="d" * 300, pretrained="/data/" * 99 + "step-00000001")
    name = results.file_name(record)
    assert len(name) < 255
    assert name.endswith("_step-00000001_ViT-B-32_en_zeroshot_classification.json")

    # Five classes have a top-5 accuracy.
    assert results.classification_metrics(classified("five", 0.5, classes=5))["acc5"] == 0.9


def test_a_checkpoint_has_one_name_however_its_path_is_spelt(tmp_path, monkeypatch):
    folder = tmp_path / "a_run" / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a_run")
    monkeypatch.chdir(tmp_path)
    for path in (folder, "a_run/checkpoints/step-00000004/", "./link/checkpoints/step-00000004"):
        assert results.checkpoint_name(path) == "a_run/step-00000004"
    (tmp_path / "kept").mkdir()
    assert results.checkpoint_name("kept") == f"{tmp_path.name}/kept"


def test_clip_benchmark_builds_its_table_from_our_files(tmp_path, monkeypatch):
    cli = pytest.importorskip("clip_benchmark.cli", reason="CLIP_benchmark is not installed")
    sets = [classified("imagenet", 0.5), classified("two", 0.25, classes=2), retrieved("coco")]
    results.write(str(tmp_path), sets, "ViT-B-32", "step-00000001")

    output = tmp_path / "table.csv"
    command = ["clip_benchmark", "build", str(tmp_path / "clip_benchmark"), f"--output={output}"]
    monkeypatch.setattr("sys.argv", command)
    cli.main()

    with open(output) as f:
        rows = {row["dataset"]: row for row in csv.DictReader(f)}
    assert rows.keys() == {"imagenet", "two", "coco"}
    assert (rows["imagenet"]["acc1"], rows["imagenet"]["acc5"]) == ("0.5", "0.9")
    assert rows["imagenet"]["model_fullname"] == "ViT-B-32 step-00000001"
    assert rows["two"]["acc5"] == ""
    assert float(rows["coco"]["text_retrieval_recall@1"]) == 0.51


# ---- DataComp ----


def test_datacomp_has_a_line_per_set_that_it_scores(tmp_path):
    sets = [
        classified("imagenet", 0.5),
        classified("vtab/pets", 0.5),
        classified("mine", 0.5),
        classified("wds_vtab-kitti_closest_vehicle_distance_test", 0.5, classes=4),
        classified("coco", 0.5),  # without captions it is not the one that DataComp scores
        retrieved("flickr30k"),
    ]
    results.write_datacomp(str(tmp_path), sets, "one")
    lines = lines_of(tmp_path)
    assert [line["dataset"] for line in lines.values()] == [
        "ImageNet 1k",
        "Oxford-IIIT Pet",
        "KITTI Vehicle Distance",
        "Flickr",
    ]
    assert lines["imagenet1k"]["metrics"] == {
        "acc1": 0.5,
        "acc5": 0.9,
        "mean_per_class_recall": 0.25,
        "main_metric": 0.5,
    }
    assert lines["vtab/pets"]["metrics"]["main_metric"] == 0.25
    assert lines["vtab/kitti_closest_vehicle_distance"]["metrics"]["acc5"] is None

    recalls = lines["retrieval/flickr_1k_test_image_text_retrieval"]["metrics"]
    assert recalls["mean_recall@1"] == recalls["main_metric"] == pytest.approx((0.51 + 0.31) / 2)

    results.write_datacomp(str(tmp_path / "none"), [classified("mine", 0.5)], "one")
    assert not os.path.exists(tmp_path / "none")


def test_a_datacomp_file_is_completed_piece_by_piece(tmp_path, capsys):
    theirs = {"key": "misc/winogavil", "dataset": "WinoGAViL", "metrics": {"main_metric": 0.4}}
    (tmp_path / "eval_results.jsonl").write_text(json.dumps(theirs) + "\n")
    results.write_datacomp(str(tmp_path), [classified("imagenet", 0.5)], "one")
    results.write_datacomp(str(tmp_path), [classified("mnist", 0.6)], "one")
    results.write_datacomp(str(tmp_path), [classified("in1k", 0.7)], "one")

    lines = lines_of(tmp_path)
    assert lines.keys() == {"misc/winogavil", "imagenet1k", "mnist"}
    assert lines["misc/winogavil"] == theirs
    assert lines["imagenet1k"]["metrics"]["acc1"] == 0.7
    assert capsys.readouterr().out == ""

    # What is of another checkpoint is put aside.
    results.write_datacomp(str(tmp_path), [classified("mnist", 0.8)], "a/two")
    assert lines_of(tmp_path).keys() == {"mnist"}
    assert "is of another checkpoint: it is" in capsys.readouterr().out
    with open(tmp_path / "eval_results-one.jsonl") as f:
        assert [json.loads(line) for line in f] == list(lines.values())


@pytest.mark.parametrize("text", ['{"key": "mnist"}\n{"key', '{"dataset": "MNIST"}\n', "3\n", "\n"])
def test_a_file_that_is_not_datacomps_is_left_alone(tmp_path, text):
    path = tmp_path / "eval_results.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="line [12]: .* is no result of DataComp"):
        results.write(str(tmp_path), seven(), "ViT-B-32", "one")
    assert path.read_text() == text
    assert (tmp_path / "eval.json").exists()  # the results are not lost


# ---- all files ----


def test_eval_json_has_all_sets_and_the_mean(tmp_path):
    results.write(str(tmp_path / "new"), seven(), "ViT-B-32", "one")
    with open(tmp_path / "new" / "eval.json") as f:
        content = json.load(f)
    assert content["checkpoint"] == "one"
    assert content["sets"] == seven()
    assert content["imagenet_and_variants"] == pytest.approx(0.4)
    assert len(os.listdir(tmp_path / "new" / "clip_benchmark")) == 7
    assert len(lines_of(tmp_path / "new")) == 7
    assert not [path for path in read_all(tmp_path) if path.suffix == ".partial"]


def test_eval_json_is_completed_piece_by_piece(tmp_path):
    def write(sets, checkpoint):
        results.write_eval_json(str(tmp_path), sets, checkpoint)
        with open(tmp_path / "eval.json") as f:
            return json.load(f)

    assert write(seven()[1:], "one")["imagenet_and_variants"] is None
    assert write([seven()[0]], "one")["imagenet_and_variants"] == pytest.approx(0.4)
    again = write([classified("in-a", 0.8)], "one")
    assert [result["name"] for result in again["sets"]].count("in-a") == 1
    assert again["imagenet_and_variants"] == pytest.approx(0.4 + 0.4 / 7)

    assert len(write([classified("mine", 0.8)], "two")["sets"]) == 1
    (tmp_path / "eval.json").write_text("{")
    assert len(write([classified("mine", 0.8)], "two")["sets"]) == 1


@pytest.mark.parametrize("name", ["eval.json", "_zeroshot_classification.json", "results.jsonl"])
def test_on_a_full_disk_the_old_files_stay_whole(tmp_path, monkeypatch, name):
    results.write(str(tmp_path), seven(), "ViT-B-32", "one")
    before = read_all(tmp_path)

    def open_on_full_disk(path, *args, **options):
        file = open(path, *args, **options)
        if path.endswith(name + ".partial"):
            file.write("half")
            file.close()
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(results, "open", open_on_full_disk, raising=False)
    with pytest.raises(ConfigError, match=f"{name} cannot be written: No space left"):
        results.write(str(tmp_path), seven(**{"in-a": 0.9}), "ViT-B-32", "one")

    after = read_all(tmp_path)
    assert [path for path in before if path.name.endswith(name)]
    for path, content in before.items():
        if path.name.endswith(name):
            assert after[path] == content
