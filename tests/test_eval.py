"""eval.py and ingest/evaluation.py: reading evaluation sets, zero-shot accuracy, retrieval."""

import json
import os
import tarfile

import pytest
import torch
from torchvision.io import encode_png

import config
import eval as evaluation
import model as models
import shapes
from config import ConfigError
from helpers import TINY, refused, run_ranks, train, words_of
from ingest import images
from ingest.evaluation import check, evaluation_sample, read_samples
from ingest.index import load_index
from ingest.tar import captions
from samples import N, number_of, picture, sample, write_shards, write_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchVision are:DeprecationWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def evaluate(pattern, out_dir, **settings):
    """evaluate() of an untrained tiny model, always the same one, on a set -> its results."""
    words = words_of(**{**TINY, "eval_data": pattern, "out_dir": out_dir, **settings})
    c = config.load(words)
    torch.manual_seed(0)
    model = models.create(c.model, c.tau_init, **c.model_numbers())
    return evaluation.evaluate(model, c, torch.device("cpu"), picture=True)


def written(out_dir):
    """The content of eval.json."""
    with open(os.path.join(out_dir, "eval.json")) as f:
        return json.load(f)


def png_of_class(label, generator):
    """A PNG of a coloured shape, bytes."""
    return encode_png(shapes.picture(shapes.CLASSES[label], generator)).numpy().tobytes()


# ---- the measures ----


def test_zero_shot_accuracy_counted_by_hand():
    prompts = torch.eye(7)  # one direction per class
    images = torch.tensor(
        [
            [9, 5, 4, 3, 2, 1, 0],  # class 0: right at once
            [5, 9, 4, 3, 2, 1, 0],  # class 0: the second guess
            [0, 1, 2, 3, 4, 5, 9],  # class 1: the sixth guess
            [0, 9, 0, 0, 0, 0, 0],  # class 1: right at once
            [0, 1, 2, 3, 4, 5, 9],  # class 6: right at once
        ],
        dtype=torch.float32,
    )
    classes = torch.tensor([0, 0, 1, 1, 6])
    results = evaluation.zero_shot(images, prompts, classes)
    assert results["zeroshot_top1"] == pytest.approx(3 / 5)
    assert results["zeroshot_top5"] == pytest.approx(4 / 5)
    assert results["zeroshot_mean_per_class"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)


def test_retrieval_recall_counted_by_loops(monkeypatch):
    """Images with 0 to 3 texts, texts that belong to several images, more queries than at once."""
    monkeypatch.setattr(evaluation, "QUERIES_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(20, 6, generator=generator)
    texts = torch.randn(31, 6, generator=generator)
    relevant = []
    for image in range(20):
        relevant.append([(3 * image + 7 * n) % 31 for n in range(image % 4)])

    results = evaluation.retrieval(images, texts, relevant)

    similarity = images @ texts.T  # (20, 31)
    for k in (1, 5, 10):
        image_hits = 0
        for image in range(20):
            first = similarity[image].argsort(descending=True)[:k].tolist()
            if any(text in relevant[image] for text in first):
                image_hits += 1
        text_hits = 0
        for text in range(31):
            first = similarity[:, text].argsort(descending=True)[:k].tolist()
            if any(text in relevant[image] for image in first):
                text_hits += 1
        assert results[f"image_to_text_R@{k}"] == image_hits / 20
        assert results[f"text_to_image_R@{k}"] == text_hits / 31


# ---- captions, one per line ----


def test_each_line_of_a_text_is_a_caption_in_evaluation_only():
    files = {"png": picture(1, "png"), "txt": b"\na dog\r\n \n  two dogs \n"}
    _, texts, _ = evaluation_sample(files, 24, "")
    assert texts == ["a dog", "two dogs"]
    assert captions(files, "") == ["a dog\r\n \n  two dogs"]  # in training the text stays whole


def captions_of(n):
    """Five captions of image n, which no other image has."""
    name = shapes.CLASSES[n % len(shapes.CLASSES)]
    return [f"view {view} of a {name}, number {n}" for view in range(5)]


def write_retrieval_set(root, as_lines):
    """Two shards of 12 images with five captions each, in CLIP_benchmark's layout -> the pattern.

    as_lines: in KEY.txt, one per line, as CLIP_benchmark writes them; else as a list in KEY.json.
    """
    generator = torch.Generator().manual_seed(7)
    (root / "test").mkdir(parents=True)
    (root / "dataset_type.txt").write_text("retrieval")
    (root / "test" / "nshards.txt").write_text("2")
    for shard in range(2):
        files = []
        for n in range(12 * shard, 12 * shard + 12):
            files.append((f"s{n:07d}.png", png_of_class(n, generator)))
            if as_lines:
                files.append((f"s{n:07d}.txt", "\n".join(captions_of(n)).encode()))
            else:
                content = json.dumps({"captions": captions_of(n)})
                files.append((f"s{n:07d}.json", content.encode()))
        write_tar(root / "test" / f"{shard}.tar", files)
    return str(root / "test" / "{0..1}.tar")


def test_five_captions_as_lines_and_as_json_give_the_same_retrieval(tmp_path):
    lines = write_retrieval_set(tmp_path / "lines", as_lines=True)
    lists = write_retrieval_set(tmp_path / "lists", as_lines=False)

    of_lines = evaluate(lines, str(tmp_path / "a"), context_length=32)
    of_lists = evaluate(lists, str(tmp_path / "b"), context_length=32, caption_key="captions")

    assert of_lines == of_lists
    assert set(of_lines) == {
        f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    }
    assert 0 < of_lines["text_to_image_R@10"] < 1
    for out_dir in ("a", "b"):
        content = written(tmp_path / out_dir)
        assert content["images"] == 24
        assert content["texts"] == 5 * 24
        assert os.path.getsize(tmp_path / out_dir / "retrieval.png") > 1000


def test_more_ranks_than_samples_give_the_same_retrieval(tmp_path):
    generator = torch.Generator().manual_seed(3)
    files = []
    for n, text in ((0, b"a red square\na square"), (1, b"a red bar")):
        files.append((f"{n}.png", png_of_class(n, generator)))
        files.append((f"{n}.txt", text))
    pattern = write_tar(tmp_path / "0.tar", files)

    alone = evaluate(pattern, str(tmp_path / "alone"))
    assert alone["image_to_text_R@5"] == alone["text_to_image_R@5"] == 1.0
    assert run_ranks(4, evaluate, pattern, str(tmp_path / "four")) == [alone] * 4
    assert written(tmp_path / "four") == written(tmp_path / "alone")


# ---- reading a set ----


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 2), (3, 1)])
def test_each_sample_is_read_once(tmp_path, ranks, workers):
    index = load_index(write_shards(tmp_path / "shards"), "texts", evaluation=True)
    read = {}
    for rank in range(ranks):
        for batch in read_samples(index, 24, "texts", 16, rank, ranks, workers):
            assert batch.images.shape[1:] == (3, 24, 24)
            assert len(batch.images) <= 16
            assert not batch.bad
            samples = zip(batch.positions.tolist(), batch.images, batch.captions, batch.classes)
            for position, image, texts, label in samples:
                assert position % ranks == rank
                assert position not in read
                assert number_of(image) == position
                assert label is None
                assert texts == [f"sample {position} {c}" for c in "abcdefgh"]
                read[position] = image
    assert len(read) == N

    files = {"png": picture(1, "png")}
    image, _, _ = evaluation_sample(files, 24, "")
    assert torch.equal(read[1], image)
    assert images.decode(files).shape == (3, 31, 40)  # larger than what is read


def test_classes_and_captions_are_read_and_bad_samples_counted(tmp_path):
    only_classes = {}
    for n in range(7):
        only_classes[f"s{n}"] = {"txt": None, "json": None, "cls": str(n * 2).encode()}
    pattern = write_shards(tmp_path, (4, 3), **only_classes)
    with pytest.raises(ConfigError, match="has no usable sample"):
        load_index(pattern)  # to train on

    no_number = sample(7, txt=None, cls=b"x")
    no_image = sample(8, txt=None, png=b"", cls=b"1", webp=b"")
    good = sample(9, cls=b"3")
    write_tar(tmp_path / "00002.tar", no_number + no_image + good)
    pattern = pattern.replace("00001}", "00002}")
    index = load_index(pattern, evaluation=True)
    assert index.counts.tolist() == [4, 3, 3]

    (batch,) = read_samples(index, 24, batch_size=100, workers=0)
    assert batch.positions.tolist() == [*range(7), 9]
    assert batch.classes == [0, 2, 4, 6, 8, 10, 12, 3]
    assert batch.captions == [[]] * 7 + [["sample 9"]]
    assert batch.bad == {"class is not a number": 1, "corrupt image": 1}


def test_bad_samples_count_even_if_they_fill_a_batch(tmp_path):
    files = sample(0, jpg=b"x", cls=b"0") + sample(1, png=b"x", cls=b"0") + sample(2, cls=b"0")
    pattern = write_tar(tmp_path / "0.tar", files)
    index = load_index(pattern, evaluation=True)
    batches = list(read_samples(index, 24, batch_size=2, workers=0))
    assert [len(batch.images) for batch in batches] == [0, 1]
    assert [batch.bad for batch in batches] == [{"corrupt image": 2}, {}]
    evaluate(pattern, str(tmp_path / "run"), eval_batch=2)
    assert written(tmp_path / "run")["left_out"] == {"corrupt image": 2}


# ---- sets that cannot be evaluated, and what is left out ----


def write_classes(folder):
    """30 pictures with classes, number 3 corrupt, without a class list -> the shard's path."""
    os.makedirs(folder)
    generator = torch.Generator().manual_seed(5)
    path = os.path.join(folder, "0.tar")
    with tarfile.open(path, "w") as tar:
        for n in range(30):
            png = png_of_class(n % 24, generator)
            shapes.add(tar, f"{n:03d}.png", b"no picture" if n == 3 else png)
            shapes.add(tar, f"{n:03d}.cls", str(n % 24).encode())
    return path


def test_classes_without_a_class_list_are_refused_before_training(tmp_path, sets):
    path = write_classes(tmp_path / "test")
    out_dir = str(tmp_path / "run")
    refused("no classnames.txt", out_dir=out_dir, train_data=sets["train_data"], eval_data=path)
    with pytest.raises(ConfigError, match="neither classes .* nor captions"):
        evaluate(path, out_dir)
    assert not os.path.exists(out_dir)


def test_bad_samples_are_left_out_and_counted(tmp_path, sets):
    path = write_classes(tmp_path / "test")
    (tmp_path / "classnames.txt").write_text("\n".join(shapes.CLASSES) + "\n")  # the folder above
    rows = train(str(tmp_path / "run"), sets, max_steps=2, eval_data=path)
    assert "eval/zeroshot_top1" in rows[-1]
    results = written(tmp_path / "run")
    assert results["left_out"] == {"corrupt image": 1}
    assert results["images"] == 29
    assert os.path.getsize(tmp_path / "run" / "retrieval.png") > 1000


def test_the_class_list_of_another_set_is_refused(tmp_path):
    path = write_classes(tmp_path / "test")
    (tmp_path / "test" / "classnames.txt").write_text("\n".join(shapes.CLASSES[:20]) + "\n")
    check(config.load(words_of(eval_data=path)))
    with pytest.raises(ConfigError, match="class 23 .* classnames.txt has 20 lines"):
        evaluate(path, str(tmp_path / "run"))


def test_a_set_without_a_usable_sample_is_refused_with_the_reasons(tmp_path):
    files = sample(0, jpg=b"x") + sample(1, png=b"x")
    pattern = write_tar(tmp_path / "0.tar", files)
    with pytest.raises(ConfigError, match=r"can be used: \{'corrupt image': 2\}"):
        evaluate(pattern, str(tmp_path / "run"))
