"""eval.py and ingest/evaluation.py: reading evaluation sets, zero-shot accuracy, retrieval."""

import hashlib
import json
import os
import tarfile
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import encode_png

import config
import dist
import eval as evaluation
import ingest.evaluation
import model as models
import shapes
from config import ConfigError
from helpers import TINY, refused, train, words_of
from ingest import images
from ingest.evaluation import load_sets, read_images, read_samples
from ingest.index import load_index
from ingest.sources import TarReader, TarSamples
from ingest.tar import captions
from rank_server import run_ranks
from runtime import plots, ranks
from runtime.ranks import Interrupted
from samples import N, number_of, picture, sample, write_shards, write_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchVision are:DeprecationWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def evaluate_all(eval_data, out_dir, options=None, **settings):
    """evaluate() of an untrained tiny model, always the same one, on sets -> their results.

    options: more arguments of evaluate(), a dict.
    """
    c = config.load(words_of(**{**TINY, "eval_data": eval_data, "out_dir": out_dir, **settings}))
    torch.manual_seed(0)
    model = models.create(c.model, c.tau_init, **c.model_numbers())
    sets = ranks.from_first_rank(load_sets, c)
    device = torch.device("cpu")
    return evaluation.evaluate(model, sets, c, device, checkpoint_name="made", **(options or {}))


def evaluate(pattern, out_dir, options=None, **settings):
    """The same on a single set -> its result."""
    (result,) = evaluate_all(pattern, out_dir, options, **settings)
    return result


def measures(result):
    return {key: value for key, value in result.items() if isinstance(value, float)}


def written(out_dir):
    """The result of the only set in eval.json."""
    with open(os.path.join(out_dir, "eval.json")) as f:
        (result,) = json.load(f)["sets"]
    return result


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
    reader = TarReader(SimpleNamespace(read=[files].__getitem__), "")
    assert reader.read(0).captions == ["a dog", "two dogs"]
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

    assert measures(of_lines) == measures(of_lists)
    for way in ("image_to_text", "text_to_image"):
        assert of_lines[f"{way}_R@1"] <= of_lines[f"{way}_R@5"] <= of_lines[f"{way}_R@10"]
    assert "zeroshot_top1" not in of_lines
    assert 0 < of_lines["text_to_image_R@10"] < 1
    for out_dir in ("a", "b"):
        content = written(tmp_path / out_dir)
        assert content["images"] == 24
        assert content["captions"] == 5 * 24
        assert os.path.getsize(tmp_path / out_dir / "retrieval.png") > 1000


def write_each_layout(root):
    """The same 13 pictures in each layout of classes, and two with captions -> {name: place}."""
    generator = torch.Generator().manual_seed(3)
    names = sorted(shapes.CLASSES[:5])
    files = []
    lines = []
    for n in range(13):
        png = png_of_class(n % 5, generator)
        label = shapes.CLASSES[n % 5]
        for path in (root / "folders" / label / f"{n:02d}.png", root / "flat" / f"{n:02d}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
        lines.append(f"{n:02d}.png\t{label}")
        files += [(f"{n:02d}.png", png), (f"{n:02d}.cls", str(names.index(label)).encode())]
    (root / "flat" / "labels.tsv").write_text("\n".join(lines))

    (root / "tars" / "test").mkdir(parents=True)
    write_tar(root / "tars" / "test" / "0.tar", files)
    (root / "tars" / "test" / "nshards.txt").write_text("1")
    (root / "tars" / "classnames.txt").write_text("\n".join(names))

    captioned = []
    for n in range(2):
        sentences = [{"raw": f"{word} {n}"} for word in ("a", "the", "one", "some", "this")]
        captioned.append({"filename": f"{n:02d}.png", "split": "test", "sentences": sentences})
    (root / "flat" / "dataset_made.json").write_text(json.dumps({"images": captioned}))
    return {
        "folders": str(root / "folders"),
        "flat": str(root / "flat" / "labels.tsv"),
        "tars": str(root / "tars"),
        "captions": str(root / "flat" / "dataset_made.json"),
    }


def test_one_two_and_four_ranks_give_the_same_results_on_every_layout(tmp_path):
    """Also with more ranks than images, and captions that do not divide among the ranks."""
    places = write_each_layout(tmp_path / "sets")
    alone = evaluate_all(repr(places), str(tmp_path / "alone"), eval_batch=4)
    folders, flat, tars, captions = alone
    assert folders["images"] == flat["images"] == 13
    assert measures(folders) == measures(flat) == measures(tars)
    assert captions["captions"] == 10

    for world_size in (2, 4):
        out_dir = str(tmp_path / str(world_size))
        found = run_ranks(world_size, evaluate_all, repr(places), out_dir)
        assert found == [alone] * world_size
        with open(os.path.join(out_dir, "eval.json")) as f:
            assert json.load(f)["sets"] == alone


# ---- several sets ----


def write_named_sets(root, number=3):
    """Sets of classes that bear the names of ImageNet and its variants -> {name: pattern}."""
    names = ("imagenet", "sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r")
    sets = {}
    for name in (*names, "objectnet")[:number]:
        sets[name] = write_class_list(root / name)
    return sets


def test_each_named_set_has_its_results(tmp_path, sets, capsys):
    """In metrics.jsonl, in eval.json, in the output, in the curves, as a picture of its own."""
    out = tmp_path / "run"
    named = write_named_sets(tmp_path / "sets", 2)
    named["captions"] = write_retrieval_set(tmp_path / "captions", as_lines=True)
    rows = train(str(out), sets, max_steps=2, context_length=32, eval_data=repr(named))

    with open(out / "eval.json") as f:
        content = json.load(f)
    assert content["imagenet_and_variants"] is None
    assert [result["name"] for result in content["sets"]] == list(named)
    for result in content["sets"]:
        name = result["name"]
        measured = {key: value for key, value in rows[-1].items() if key.startswith(f"eval/{name}")}
        assert measured == {f"eval/{name}/{key}": v for key, v in measures(result).items()}
        assert os.path.getsize(out / f"retrieval-{name}.png") > 1000
    assert "zeroshot_top1" in content["sets"][0]
    assert "text_to_image_R@10" in content["sets"][2]

    printed = capsys.readouterr().out
    assert "step 2  captions: image_to_text_R@1 0" in printed
    curves = plots.evaluation_curves({"run": rows})
    assert [(curve.label, curve.key) for curve in curves] == [
        ("captions", "eval/captions/text_to_image_R@1"),
        ("imagenet", "eval/imagenet/zeroshot_top1"),
        ("sketch", "eval/sketch/zeroshot_top1"),
    ]
    assert plots.evaluation_curves({"a": rows, "b": rows})[0].label == "a, captions"


def test_sets_that_only_bear_a_name_have_no_mean(tmp_path, sets, capsys):
    """The name of a benchmark's set, but another number of images and classes."""
    named = write_named_sets(tmp_path / "sets", 7)
    train(str(tmp_path / "run"), sets, max_steps=1, eval_data=repr(named))
    note = "it has 29 images, and ImageNet-A has 7,500"
    assert f"note on imagenet-a: {note}\n" in capsys.readouterr().out

    with open(tmp_path / "run" / "eval.json") as f:
        content = json.load(f)
    assert content["checkpoint"] == "run/step-00000001"
    assert content["imagenet_and_variants"] is None
    assert content["sets"][3]["notes"] == [
        "1 of its 30 images could not be used",
        note,
        "it has 24 classes, and ImageNet-A has 200",
    ]
    assert not os.path.exists(tmp_path / "run" / "eval_results.jsonl")


def test_classes_that_several_sets_share_are_encoded_once(tmp_path, monkeypatch):
    encoded = []
    encode_texts = evaluation.Encoder.texts

    def counted(self, texts, what="texts"):
        encoded.append(len(texts))
        return encode_texts(self, texts, what)

    monkeypatch.setattr(evaluation.Encoder, "texts", counted)
    number = len(shapes.CLASSES)
    some = [*shapes.CLASSES[:-1], "a bear"]
    one = write_class_list(tmp_path / "one")
    two = write_class_list(tmp_path / "two", some)
    three = write_class_list(tmp_path / "three", templates=["a {c}"])
    alone = evaluate(two, str(tmp_path / "run"))
    named = repr({"one": one, "two": two, "three": three})
    found = evaluate_all(named, str(tmp_path / "run"))
    assert encoded == [number, number, 1, number]
    assert measures(found[1]) == pytest.approx(measures(alone))


@pytest.mark.parametrize(
    "eval_data, message",
    [
        ({"a/b": "x.tar"}, "'a/b' cannot be the name of a set: use letters"),
        ({1: "x.tar"}, "1 cannot be the name of a set"),
        ({"a": ""}, "the set 'a' has no place"),
        ({"a": 7}, "eval_data, a must hold strings"),
    ],
)
def test_names_of_sets_that_cannot_be(eval_data, message):
    with pytest.raises(ConfigError, match=message):
        config.load([f"--eval_data={eval_data!r}"])


def test_a_list_of_names_for_a_set_that_is_not_there():
    words = ["--eval_data={'imagenet': 'x.tar'}", "--eval_names={'imagnet': 'names.txt'}"]
    with pytest.raises(ConfigError, match="eval_names names .*'imagnet'.* mean 'imagenet'"):
        config.load(words)


def test_captions_that_are_the_same_are_queries_of_their_own(tmp_path):
    """Two images have the same five captions: of ten queries, each has one image that is right."""
    generator = torch.Generator().manual_seed(3)
    files = []
    for n in range(2):
        files.append((f"{n}.png", png_of_class(n, generator)))
        files.append((f"{n}.txt", b"a\nb\nc\nd\ne"))
    result = evaluate(write_tar(tmp_path / "0.tar", files), str(tmp_path / "run"))
    assert result["captions"] == 10
    assert result["text_to_image_R@1"] == 0.5  # one of the two is nearer to each text
    assert result["text_to_image_R@5"] == 1.0


# ---- an evaluation that is stopped, and what it shows ----


def stopped_and_whole(pattern, out_dir, requests):
    """Evaluate for each request, and once more -> (interrupted, files, result).

    requests: (rank that is asked to stop, words in its line of progress at which it is asked).
    interrupted: for each request, whether the evaluation ended by Interrupted on this rank.
    files: those of out_dir after the requests.
    """
    interrupted = [is_interrupted(pattern, out_dir, *request) for request in requests]
    files = os.listdir(out_dir) if os.path.exists(out_dir) else []
    return interrupted, files, evaluate(pattern, out_dir, eval_batch=1)


def is_interrupted(pattern, out_dir, rank, words):
    """Whether an evaluation of which `rank` is asked to stop at `words` ends by Interrupted."""
    lines = []

    def stop():
        return dist.rank() == rank and any(words in line for line in lines)

    try:
        evaluate(pattern, out_dir, dict(progress=lines.append, stop=stop), eval_batch=1)
    except Interrupted:
        return True
    return False


def test_all_ranks_leave_an_evaluation_when_one_is_asked_to_stop(tmp_path):
    """Five images on two ranks: one has three batches, the other two, and waits."""
    pattern = write_tar(tmp_path / "0.tar", [file for n in range(5) for file in sample(n)])
    alone = evaluate(pattern, str(tmp_path / "alone"))
    requests = [
        (1, "0 of 5 images"),
        (0, "4 of 5 images"),  # after its last batch
        (1, "2 of 5 texts"),
        (0, "0 of 5 images for the picture"),
    ]
    out_dir = str(tmp_path / "two")
    first, second = run_ranks(2, stopped_and_whole, pattern, out_dir, requests)

    interrupted, files, result = first
    assert interrupted == [True] * len(requests)
    assert files == []
    assert result == alone
    assert second == first


def test_progress_is_shown(tmp_path, monkeypatch, capsys):
    """In lines where there is no terminal, else as a bar."""
    pattern = write_tar(tmp_path / "0.tar", [file for n in range(5) for file in sample(n)])
    evaluate(pattern, str(tmp_path / "a"))
    assert "evaluating" not in capsys.readouterr().out  # it takes less than 10 seconds

    monkeypatch.setattr(evaluation, "PRINT_SECONDS", -1)
    evaluate(pattern, str(tmp_path / "a"), eval_batch=2)
    out, err = capsys.readouterr()
    for line in ("2 of 5 images", "5 of 5 images", "4 of 5 texts", "5 of 5 images for the picture"):
        assert f"evaluating: {line}\n" in out
    assert "evaluating" not in err

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    evaluate(pattern, str(tmp_path / "a"), eval_batch=2)
    out, err = capsys.readouterr()
    assert "evaluating" not in out
    assert "evaluating, images" in err


def read_files(folder):
    return {name: (folder / name).read_bytes() for name in ("eval.json", "retrieval.png")}


def test_files_of_an_evaluation_are_never_half_written(tmp_path, monkeypatch, capsys):
    """On a full disk the old ones stay. Without eval.json the evaluation counts as failed."""

    def full_disk(rows, path):
        with open(path, "w") as f:
            f.write("half")
        raise OSError(28, "No space left on device")

    pattern = write_tar(tmp_path / "0.tar", sample(0) + sample(1))
    results = evaluate(pattern, str(tmp_path / "run"))
    before = read_files(tmp_path / "run")

    monkeypatch.setattr("runtime.plots.draw_found", full_disk)
    assert evaluate(pattern, str(tmp_path / "run")) == results
    assert "retrieval.png could not be drawn: OSError" in capsys.readouterr().out
    assert read_files(tmp_path / "run") == before

    replace = os.replace

    def refuse(source, target):
        if target.endswith("eval.json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(ConfigError, match="eval.json cannot be written: No space left"):
        evaluate(pattern, str(tmp_path / "run"))
    assert read_files(tmp_path / "run") == before


# ---- reading a set ----


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 2), (3, 1)])
def test_each_sample_is_read_once(tmp_path, ranks, workers):
    index = load_index(write_shards(tmp_path / "shards"), "texts", evaluation=True)
    source = TarSamples(index, "texts")
    read = {}
    for rank in range(ranks):
        for batch in read_samples(source, 24, 16, rank, ranks, workers):
            assert batch.images.shape[1:] == (3, 24, 24)
            assert len(batch.images) <= 16
            assert not batch.bad
            samples = zip(batch.positions.tolist(), batch.images, batch.captions, batch.labels)
            for position, image, texts, label in samples:
                assert position % ranks == rank
                assert position not in read
                assert number_of(image) == position
                assert label is None
                assert texts == [f"sample {position} {c}" for c in "abcdefgh"]
                read[position] = image
    assert len(read) == N

    files = {"png": picture(1, "png")}
    assert torch.equal(read[1], images.evaluation_image(files, 24))
    assert images.decode(files).shape == (3, 31, 40)  # larger than what is read


def test_only_the_images_of_the_picture_are_read_again(tmp_path, monkeypatch):
    decode = ingest.evaluation.evaluation_image
    decoded = []

    def counted(files, size, border):
        decoded.append(files)
        return decode(files, size, border)

    monkeypatch.setattr(ingest.evaluation, "evaluation_image", counted)
    index = load_index(write_shards(tmp_path / "shards"), evaluation=True)
    found = dict(read_images(TarSamples(index, ""), 24, [0, 7, 8, 30, N - 1]))
    assert {position: number_of(image) for position, image in found.items()} == {
        position: position for position in (0, 7, 8, 30, N - 1)
    }
    assert len(decoded) == 5


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

    (batch,) = read_samples(TarSamples(index, ""), 24, batch_size=100, workers=0)
    assert batch.positions.tolist() == [*range(7), 9]
    assert batch.labels == [0, 2, 4, 6, 8, 10, 12, 3]
    assert batch.captions == [[]] * 7 + [["sample 9"]]
    assert batch.bad == {"class is not a number": 1, "corrupt image": 1}


def test_bad_samples_count_even_if_they_fill_a_batch(tmp_path):
    files = sample(0, jpg=b"x", cls=b"0") + sample(1, png=b"x", cls=b"0") + sample(2, cls=b"0")
    pattern = write_tar(tmp_path / "0.tar", files)
    index = load_index(pattern, evaluation=True)
    batches = list(read_samples(TarSamples(index, ""), 24, batch_size=2, workers=0))
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
    assert not os.path.exists(out_dir)


def test_what_the_index_leaves_out_is_counted_too(tmp_path):
    files = sample(0) + sample(1) + sample(2, txt=None) + sample(3, jpg=b"?")
    path = write_tar(tmp_path / "0.tar", files)
    with pytest.raises(ConfigError, match="1 of 4 samples .* would be left out"):
        evaluate(path, str(tmp_path / "run"))
    evaluate(path, str(tmp_path / "run"), allow_left_out=0.25)
    left_out = written(tmp_path / "run")["left_out"]
    assert left_out == {"webp with KEY.json but without KEY.txt": 1, "corrupt image": 1}


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
    message = "class 23 .* class list .classnames.txt. has 20 lines"
    with pytest.raises(ConfigError, match=message):
        check_set(path)
    with pytest.raises(ConfigError, match=message):
        evaluate(path, str(tmp_path / "run"))


def test_a_set_without_a_usable_sample_is_refused_with_the_reasons(tmp_path):
    files = sample(0, jpg=b"x") + sample(1, png=b"x")
    pattern = write_tar(tmp_path / "0.tar", files)
    with pytest.raises(ConfigError, match=r"can be used: \{'corrupt image': 2\}"):
        evaluate(pattern, str(tmp_path / "run"))


def check_set(*patterns):
    load_sets(config.load(["--eval_data=" + repr(patterns)]))


def test_several_sets_at_once_are_refused(tmp_path, sets):
    one = write_shards(tmp_path / "one", (2, 2))
    two = write_shards(tmp_path / "two", (2, 2))
    for patterns in ((one, two), (one + "::" + two,)):
        with pytest.raises(ConfigError, match="several sets, one in .*one and another in .*two"):
            check_set(*patterns)
    refused("several sets", out_dir=str(tmp_path / "run"), **{**sets, "eval_data": (one, two)})
    with pytest.raises(ConfigError, match="give each a name, --eval_data="):
        evaluate((one, two), str(tmp_path / "run"))

    check_set(f"{tmp_path}/{{one,two}}/{{00000..00001}}.tar")
    check_set(f"{tmp_path}/one/00000.tar", f"{tmp_path}/one/00001.tar")
    check_set(f"{tmp_path}/one/*.tar")


# ---- class names and templates ----


def write_class_list(folder, names=shapes.CLASSES, templates=()):
    """The set of write_classes, with a class list and maybe with templates -> its pattern."""
    pattern = write_classes(folder)
    files = {"classnames.txt": names, "zeroshot_classification_templates.txt": templates}
    for name, lines in files.items():
        if lines:
            text = "\n".join(lines) + "\n"
            (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return pattern


def test_templates_of_either_spelling_are_the_same_and_counted(tmp_path):
    results = []
    for folder, templates in (("a", ["a {c}", "the {c}."]), ("b", ["a {}", "", "the {}."])):
        pattern = write_class_list(tmp_path / folder, templates=templates)
        results.append(evaluate(pattern, str(tmp_path / "runs" / folder)))
        content = written(tmp_path / "runs" / folder)
        assert (content["classes"], content["templates"]) == (len(shapes.CLASSES), 2)
    assert measures(results[0]) == measures(results[1])


@pytest.mark.parametrize(
    "names, templates, message",
    [
        (shapes.CLASSES, ["a {c}", "a photo"], "templates.txt, line 2: 'a photo' has no place"),
        (["red", "", "blue"], [], "classnames.txt, line 2 is empty"),
        (["gr\udcfcn"], [], "classnames.txt cannot be read as UTF-8 text"),
    ],
)
def test_a_class_list_that_cannot_be_used_is_refused(tmp_path, names, templates, message):
    pattern = write_class_list(tmp_path / "test", names, templates)
    with pytest.raises(ConfigError, match=message):
        check_set(pattern)


@pytest.mark.parametrize(
    "label, message",
    [
        (b"2", "class 2 in .*classnames.txt. has 2 lines"),
        (b"cat", "class is not a number: KEY.cls"),
    ],
)
def test_classes_without_a_name_are_refused_before_the_run(tmp_path, label, message):
    pattern = write_shards(tmp_path / "a", (3,), s0={"cls": b"0"}, s2={"cls": label})
    (tmp_path / "a" / "classnames.txt").write_text("red\nblue\n")
    with pytest.raises(ConfigError, match=message):
        check_set(pattern)


def test_class_names_that_occur_twice_are_named(tmp_path, capsys):
    names = ["a crane", "a dog", *shapes.CLASSES[2:-1], "a crane"]
    check_set(write_class_list(tmp_path / "test", names))
    assert "classnames.txt has names that occur twice: 'a crane'" in capsys.readouterr().err


def test_why_there_is_no_zero_shot_classification_is_said(tmp_path, capsys):
    with_class = write_shards(tmp_path / "a", (3,), s0={"cls": b"0"}, s1={"cls": b"0"})

    results = evaluate(with_class, str(tmp_path / "run"))
    assert "zeroshot_top1" not in results
    assert "no zero-shot classification on" in capsys.readouterr().out

    (tmp_path / "a" / "zeroshot_classification_templates.txt").write_text("a {c}")
    evaluate(with_class, str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "templates.txt is not used: there are no class names" in out
    assert "no classnames.txt beside the shards" in out

    (tmp_path / "a" / "classnames.txt").write_text("red\nblue")
    evaluate(with_class, str(tmp_path / "run"))
    assert "1 of 3 images have no class (KEY.cls)" in capsys.readouterr().out
    assert written(tmp_path / "run")["templates"] == 0


# ---- the command ----


def write_checkpoint(folder):
    """A folder that passes for a checkpoint until its files are loaded."""
    folder.mkdir(parents=True)
    sums = ""
    for name in ("model.pt", "train.pt"):
        (folder / name).write_bytes(b"weights")
        sums += f"{hashlib.sha256(b'weights').hexdigest()}  {name}\n"
    (folder / "SHA256SUMS").write_text(sums)


@pytest.mark.parametrize(
    "given, message",
    [
        ("emoji_v4", "no folder '.*emoji_v4'; did you mean '.*/emoji_v3'"),
        ("no such run", "no folder '.*no such run'; did you mean '.*/emoji_v3'"),
        ("empty", "the run .*empty has no checkpoint yet; did you mean '.*/emoji_v3'"),
        ("plain", "'.*plain' is neither a run .* nor a checkpoint .*mean '.*/emoji_v3'"),
        ("", "'.*/' is neither a run .* nor a checkpoint .*mean '.*/emoji_v3'"),
        ("emoji_v3/checkpoints", "is neither a run .*mean '.*/step-00000004'"),
        ("emoji_v3/checkpoints/step-00000004/model.pt", "is a file.*mean '.*/step-00000004'"),
        ("elsewhere/run", "no folder '.*elsewhere/run'$"),
    ],
)
def test_what_cannot_be_evaluated_is_answered_with_the_nearest_run(tmp_path, given, message):
    write_checkpoint(tmp_path / "emoji_v3" / "checkpoints" / "step-00000004")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigError, match=message) as error:
        evaluation.main([f"{tmp_path}/{given}"])
    assert "resume" not in str(error.value)


def test_a_damaged_checkpoint_is_not_evaluated(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    write_checkpoint(root / "step-00000004")
    write_checkpoint(root / "step-00000008")
    (root / "step-00000008" / "model.pt").write_bytes(b"weigh")
    (root / "latest").write_text("step-00000008")
    with pytest.raises(ConfigError, match="step-00000008 cannot be used: model.pt is not what"):
        evaluation.find_checkpoint(str(root / "step-00000008"))
    assert evaluation.find_checkpoint(str(tmp_path / "run")) == str(root / "step-00000004")


@pytest.mark.usefixtures("no_curves")
def test_wrong_words_and_folders_are_refused_before_the_evaluation(tmp_path, sets, monkeypatch):
    run = str(tmp_path / "run")
    train(run, sets, max_steps=1)
    monkeypatch.setattr(evaluation, "evaluate", lambda *args, **options: pytest.fail("evaluated"))

    with pytest.raises(ConfigError, match="unexpected word '0.tar': a folder comes first"):
        evaluation.main([run, "0.tar"])

    (tmp_path / "file").write_text("")
    words = words_of(run, device="cpu", eval_data=sets["eval_data"])
    for folder, reason in ((tmp_path / "file", "Not a directory"), ("/proc/none", "No such file")):
        with pytest.raises(ConfigError, match=f"cannot be written: {reason}"):
            evaluation.main([*words, f"--out_dir={folder}"])
