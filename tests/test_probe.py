"""tools/probe.py: the linear probe and k-NN on made features, a whole probe, what is refused."""

import json
import math
import os
import sys

import pytest
import torch

import eval as evaluation
import shapes
from config import ConfigError
from helpers import train
from ingest.layouts import EvaluationSet
from ingest.sources import ImageFiles
from tools import probe
from tools.probe import Split


@pytest.fixture(scope="module")
def run(tmp_path_factory, sets):
    """A run of one step."""
    folder = str(tmp_path_factory.mktemp("runs") / "tiny")
    train(folder, sets, max_steps=1)
    return folder


def directions(*degrees):
    """Features float32 (n, 2): unit vectors at these angles."""
    angles = torch.tensor(degrees, dtype=torch.float32).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


# ---- made features ----


def test_a_linear_probe_computed_by_hand():
    """Each class has a direction of its own, so the guess is the largest entry."""
    splits = {
        "train": Split(torch.eye(6).repeat(3, 1), torch.arange(6).repeat(3)),
        "test": Split(
            torch.tensor(
                [
                    [9, 5, 4, 3, 2, 1],  # class 0: right at once
                    [9, 5, 4, 3, 2, 1],  # class 1: the second guess
                    [9, 5, 4, 3, 2, 1],  # class 5: the sixth guess
                    [0, 0, 0, 0, 0, 9],  # class 5: right at once
                ],
                dtype=torch.float32,
            ),
            torch.tensor([0, 1, 5, 5]),
        ),
    }
    found = probe.linear_probe(splits, C=1.0)
    assert found["acc1"] == 2 / 4
    assert found["acc5"] == 3 / 4
    assert found["mean_per_class_recall"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert (found["C"], found["chosen_on"], found["search"]) == (1.0, "--C", [])


def test_a_linear_probe_of_two_classes_parts_them_in_the_middle():
    splits = {
        "train": Split(directions(10, 20, 50, 60), torch.tensor([0, 0, 1, 1])),
        "test": Split(directions(0, 34, 36, 90), torch.tensor([0, 0, 1, 0])),
    }
    found = probe.linear_probe(splits, C=100.0)
    assert found["acc1"] == 3 / 4
    assert found["acc5"] is None  # there are not so many classes
    assert found["mean_per_class_recall"] == pytest.approx((2 / 3 + 1) / 2)


def test_the_validation_set_chooses_C_and_is_fitted_in_the_end():
    """A class that lies on both sides of the other one is found only by those of val."""
    train_set = Split(directions(0, 1, 80, 81), torch.tensor([0, 0, 1, 1]))
    val = Split(directions(40, 41, 42, 43), torch.tensor([0, 0, 0, 0]))
    test = Split(directions(50, 79), torch.tensor([0, 1]))

    alone = probe.linear_probe({"train": train_set, "test": test}, C=1000.0)
    assert alone["acc1"] == 1 / 2

    found = probe.linear_probe({"train": train_set, "val": val, "test": test}, C=None)
    accuracy = {row["C"]: row["acc1"] for row in found["search"]}
    assert found["chosen_on"] == "val"
    assert accuracy[found["C"]] == max(accuracy.values())
    assert found["C"] == min(C for C in accuracy if accuracy[C] == accuracy[found["C"]])

    both = probe.linear_probe({"train": train_set, "val": val, "test": test}, C=1000.0)
    assert both["acc1"] == 1.0


def test_features_that_are_nearly_alike_are_fitted_to_the_end(one_thread):
    """Classes differ in small entries, beside a large one in common and some that say nothing."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(5).repeat(60)
    common = torch.ones(300, 1)
    nothing = 0.01 * torch.randn(300, 10, generator=generator)
    telling = torch.eye(5)[labels] + 0.2 * torch.randn(300, 5, generator=generator)
    features = torch.cat([common, nothing, 0.0003 * telling], dim=1)
    features = torch.nn.functional.normalize(features, dim=1)

    train_set = Split(features[:200], labels[:200])
    test = Split(features[200:], labels[200:])
    found = probe.linear_probe({"train": train_set, "test": test}, C=1e6)
    assert found["acc1"] > 0.85


@pytest.mark.parametrize("peak, tried", [(3, 15), (-19, 15), (48, 11)])
def test_the_search_for_C_ends_at_the_best_eighth_of_a_decade(monkeypatch, peak, tried):
    """Of accuracies with one peak. At the edge of the range it has only one side to go to."""

    def made(C, train_set, held_out):
        return {"C": C, "acc1": -abs(math.log10(C) - peak / 8)}

    monkeypatch.setattr(probe, "try_C", made)
    rows = probe.search_C(None, None)
    assert max(rows, key=lambda row: row["acc1"])["C"] == pytest.approx(10 ** (peak / 8))
    assert len(rows) == tried
    assert rows == sorted(rows, key=lambda row: row["C"])
    assert rows[0]["C"] == pytest.approx(1e-6)
    assert rows[-1]["C"] == pytest.approx(1e6)


def test_a_fifth_is_held_out_class_by_class():
    labels = torch.arange(4).repeat(10)
    rest, held_out = probe.hold_out(Split(torch.arange(40.0)[:, None], labels))
    assert held_out.labels.bincount().tolist() == [2, 2, 2, 2]
    assert rest.labels.bincount().tolist() == [8, 8, 8, 8]
    for split in (rest, held_out):
        assert torch.equal(split.labels, labels[split.features[:, 0].long()])


def test_votes_of_neighbours_counted_by_hand(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "QUERIES_AT_ONCE", 2)
    train_set = Split(directions(0, 30, 35, 40, 90), torch.tensor([1, 0, 0, 0, 1]))
    test = Split(directions(2, 15.5, 90), torch.tensor([1, 0, 1]))
    rows = probe.nearest_neighbours(train_set, test, [1, 2, 3, 9])
    acc1 = {(row["vote"], row["k"]): row["acc1"] for row in rows}

    # 2 degrees: the nearest is right; of two, votes are level, and class 0 has the smaller number;
    # of three, the two others have the majority, but the nearest weighs more. 15.5: right at once.
    # 90: the nearest is right, the next two are not.
    assert acc1 == {
        ("majority", 1): 1.0,
        ("majority", 2): 1 / 3,
        ("majority", 3): 1 / 3,
        ("weighted", 1): 1.0,
        ("weighted", 2): 1.0,
        ("weighted", 3): 1.0,
    }
    out, err = capsys.readouterr()
    assert "no k-NN for k in [9]: train has 5 images" in out
    assert "1 of 3 test images have the features of a training image" in err


# ---- a whole probe ----


def read_json(*parts):
    with open(os.path.join(*parts)) as f:
        return json.load(f)


def test_a_run_is_probed_from_its_shards_to_the_picture(tmp_path, run, sets, capsys, monkeypatch):
    out = str(tmp_path / "out")
    place = sets["eval_data"]
    held = shapes.write(str(tmp_path / "val"), 1, 48, seed=2, classes=True)
    words = [run, f"--train={place}", f"--test={place}", f"--val={held}", "--out", out]
    words += ["--k", "1", "5", "--workers=0"]
    probe.main(words)

    content = read_json(out, "probe.json")
    assert content["classes"] == 24
    assert content["sets"]["train"]["images"] == content["sets"]["test"]["images"] == 96
    assert content["sets"]["val"]["images"] == 48
    first, fifth = content["knn"][:2]
    assert (first["k"], first["vote"], first["acc1"]) == (1, "majority", 1.0)  # it finds itself
    assert fifth["acc1"] < 1
    assert content["linear_probe"]["acc1"] > 2 * content["zero_shot"]["acc1"]
    assert content["linear_probe"]["chosen_on"] == "val"
    assert len(content["linear_probe"]["search"]) >= 11
    assert os.path.getsize(os.path.join(out, "probe.png")) > 10_000

    (name,) = os.listdir(os.path.join(out, "clip_benchmark"))
    record = read_json(out, "clip_benchmark", name)
    assert record["task"] == "linear_probe"
    assert record["metrics"]["lp_acc1"] == content["linear_probe"]["acc1"]

    # Beside it, zero-shot accuracy is what eval.py measures.
    evaluation.main([run, f"--eval_data={place}", f"--out_dir={tmp_path / 'eval'}", "--workers=0"])
    (result,) = read_json(str(tmp_path / "eval"), "eval.json")["sets"]
    assert content["zero_shot"]["acc1"] == result["zeroshot_top1"]

    printed, errors = capsys.readouterr()
    assert "warning: train and test are the same set" in errors
    assert "warning: 96 of 96 test images" in errors
    assert "  1-NN, majority       100.0" in printed
    assert "% held out, " in printed

    # Which classes shards have is known only after they are read.
    without_val = [word for word in words if not word.startswith("--val")]
    with pytest.raises(ConfigError, match="is 20 images, too few for 24 classes"):
        probe.main(without_val)

    # A probe that is interrupted changes nothing.
    def interrupt(split, C):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        probe.main([*words, "--C=7"])
    assert read_json(out, "probe.json") == content


# ---- what is refused ----


def made_set(where, labels, names=()):
    paths = [f"{n}.png" for n in range(len(labels))]
    source = ImageFiles("made", paths, "images", labels=labels)
    return EvaluationSet(where, where, source, list(names), ["{c}"], is_named=False)


@pytest.mark.parametrize(
    "train_labels, test_labels, message",
    [
        ([0, 0, 1, None], [0], "TRAIN: 1 of the 4 images looked at have no class"),
        ([0, 1] * 5, [0, None], "TEST: 1 of the 2 images looked at have no class"),
        ([0, 9] * 5, [0], "class 9 in TRAIN, but the class list"),
        ([1] * 10, [1], "TRAIN: all images are of one class"),
        ([0, 1] * 5, [0, 2, 3, 3], "TEST has 2 classes of which TRAIN has no image, class 2"),
        ([0] * 9 + [1], [0], "TRAIN has one image of class 1, .* give a validation set by --val"),
        ([0, 1, 2, 3] * 3, [0], "a fifth of TRAIN is 3 images, too few for 4 classes"),
    ],
)
def test_sets_that_cannot_be_probed(train_labels, test_labels, message):
    sets = {
        "train": made_set("TRAIN", train_labels, "abcd"),
        "test": made_set("TEST", test_labels),
    }
    labels = {role: data.source.labels for role, data in sets.items()}
    with pytest.raises(ConfigError, match=message):
        probe.check_labels(sets, labels, holds_out=True)


def test_class_lists_that_differ():
    train_set = made_set("TRAIN", [0, 1], ["cat", "dog"])
    for names, message in (
        (["cat", "cow"], "class 1 is 'cow' and 'dog'"),
        (["cat", "dog", "cow"], "with 3 and 2 classes"),
    ):
        with pytest.raises(
            ConfigError, match=f"TEST has another class list than TRAIN, .*{message}"
        ):
            probe.check_class_names({"train": train_set, "test": made_set("TEST", [0], names)})
    probe.check_class_names({"train": train_set, "test": made_set("TEST", [0])})


def test_refusals_before_any_image_is_encoded(run, sets, tmp_path, monkeypatch):
    def encode(*_):
        raise AssertionError("images are encoded")

    monkeypatch.setattr(evaluation.Encoder, "images", encode)
    place = sets["eval_data"]

    def refused(message, *words, train_place=place, test_place=place):
        with pytest.raises(ConfigError, match=message):
            probe.main([run, f"--train={train_place}", f"--test={test_place}", *words])

    no_classes = sets["train_data"]
    for which in ("train_place", "test_place"):
        refused("100 of the 100 images looked at have no class", **{which: no_classes})
    refused("names 2 sets: give one", train_place={"a": place, "b": place})
    refused("--C=0.0 must be positive", "--C=0")
    refused("--k 0 must be 1 or more", "--k", "0")
    refused("unknown key 'wokers'; did you mean 'workers'", "--wokers=0")
    refused("cannot be written", f"--out={place.partition('{')[0]}00000.tar/out")

    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("runs in one process, but torchrun has started 2")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    refused("pip install scikit-learn")
