"""eval.py finds what CLIP_benchmark finds: the same shards, the same weights, exported.

It needs CLIP_benchmark 1.6.2, which breaks with numpy 2.4. In an environment beside this one:

    pip install clip-benchmark==1.6.2 'numpy<2.4'
    python -m pytest tests/test_clip_benchmark.py
"""

import json
import os

import pytest
import torch
from test_eval import png_of_class

import eval as evaluation
import shapes
from helpers import train
from samples import write_tar
from tools import export

cli = pytest.importorskip("clip_benchmark.cli", reason="CLIP_benchmark is not installed")

MEASURES = {
    "acc1": "zeroshot_top1",
    "acc5": "zeroshot_top5",
    "mean_per_class_recall": "zeroshot_mean_per_class",
}
for k in (1, 5, 10):
    MEASURES[f"image_retrieval_recall@{k}"] = f"text_to_image_R@{k}"
    MEASURES[f"text_retrieval_recall@{k}"] = f"image_to_text_R@{k}"


@pytest.fixture(scope="module")
def run(sets, tmp_path_factory):
    """A run that has learned something, and its export for open_clip."""
    folder = str(tmp_path_factory.mktemp("runs") / "run")
    train(folder, {"train_data": sets["train_data"]}, max_steps=40, batch_size=32)
    export.main([folder, "--to", "open_clip"])
    return folder


def write_set(root, captions=None):
    """Two shards of 48 pictures in CLIP_benchmark's layout; with classes, unless with captions."""
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("2")
    generator = torch.Generator().manual_seed(7)
    for shard in range(2):
        files = []
        for n in range(48 * shard, 48 * shard + 48):
            label = n % len(shapes.CLASSES)
            files.append((f"s{n:07d}.png", png_of_class(label, generator)))
            if captions:
                files.append((f"s{n:07d}.txt", "\n".join(captions(n)).encode()))
            else:
                files.append((f"s{n:07d}.cls", str(label).encode()))
        write_tar(root / "test" / f"{shard}.tar", files)

    if captions:
        (root / "dataset_type.txt").write_text("retrieval")
    else:
        (root / "classnames.txt").write_text("\n".join(shapes.CLASSES))
        templates = "zeroshot_classification_templates.txt"
        (root / templates).write_text("a photo of a {c}\na drawing of a {c}.")


def five_captions(n):
    """Captions of which several images have the same."""
    name = shapes.CLASSES[n % len(shapes.CLASSES)]
    colour, shape = name.split()
    return [f"a {name}", f"view {n} of a {name}", f"something {colour}", f"a {shape}", "a shape"]


def judged(run, root, task, monkeypatch, tmp_path):
    """The metrics that CLIP_benchmark finds."""
    out = tmp_path / "theirs.json"
    words = f"""eval --model local-dir:{run}/exports/open_clip --pretrained none
        --dataset wds/made --dataset_root {root} --task {task} --no_amp --recall_k 1 5 10
        --num_workers 0 --output {out}"""
    monkeypatch.setattr("sys.argv", ["clip_benchmark", *words.split()])
    cli.main()
    return json.loads(out.read_text())["metrics"]


@pytest.mark.parametrize(
    "task, captions", [("zeroshot_classification", None), ("zeroshot_retrieval", five_captions)]
)
def test_the_results_are_those_of_clip_benchmark(run, task, captions, monkeypatch, tmp_path):
    root = tmp_path / "made"
    write_set(root, captions)
    theirs = judged(run, root, task, monkeypatch, tmp_path)

    evaluation.main([run, f"--eval_data={root}", f"--out_dir={tmp_path}/ours", "--device=cpu"])
    with open(tmp_path / "ours" / "eval.json") as f:
        (ours,) = json.load(f)["sets"]
    assert ours["images"] == 96

    # Counts of samples, so that no difference is lost in rounding.
    compared = 0
    for name, value in theirs.items():
        number = ours["captions"] if "image_retrieval" in name else ours["images"]
        if name == "mean_per_class_recall":
            assert ours[MEASURES[name]] == pytest.approx(value, abs=1e-6)
        else:
            assert round(ours[MEASURES[name]] * number) == round(value * number), name
        compared += 1
    assert compared == (6 if captions else 3)

    (path,) = os.listdir(tmp_path / "ours" / "clip_benchmark")
    with open(tmp_path / "ours" / "clip_benchmark" / path) as f:
        assert set(json.load(f)["metrics"]) == set(theirs)
