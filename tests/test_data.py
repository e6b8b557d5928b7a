"""data.py: the index, the order of samples, the loader on any number of ranks and workers, bad input, evaluation sets."""

import glob
import io
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from samples import SIZES, N, number_of, picture, sample, write_shards, write_tar

import data
from config import ConfigError
from ingest import evaluation, images, workers
from ingest.index import Index, load_index
from ingest.urls import expand

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchVision are:DeprecationWarning")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache" / "fastclip"))
    monkeypatch.setattr("ingest.reader.BACK_OFF", (0.01, 0.01, 0.01))


def order_of(patterns, batch_size=16, lanes=8, block=5, seed=3, **options):
    return data.Order(load_index(patterns, **options), batch_size, lanes, block, seed)


def load(order, start, end, ranks=1, workers=0, **options):
    """The global batches of steps start..end, joined from all ranks -> images, tokens (padded again), ids; each stacked over steps."""
    steps = []
    loaders = [
        iter(
            data.Loader(
                order,
                24,
                rank=r,
                world_size=ranks,
                workers=workers,
                start_step=start,
                num_steps=end,
                **options,
            )
        )
        for r in range(ranks)
    ]
    for shares in zip(*loaders, strict=True):
        tokens = [torch.nn.functional.pad(s.tokens, (0, 77 - s.tokens.shape[1])) for s in shares]
        steps.append(
            (
                torch.cat([s.images for s in shares]),
                torch.cat(tokens),
                torch.cat([s.ids for s in shares]),
            )
        )
    return [torch.stack(x) for x in zip(*steps)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "batch_size, lanes, block",
    [
        (16, 8, 5),
        (16, 16, 1),
        (16, 1, 1000),
        (12, 4, 7),
        (120, 40, 2),
        (24, "auto", "auto"),
        (7, 7, 3),
    ],
)
def test_every_sample_once_per_epoch(batch_size, lanes, block):
    index = Index([str(i) for i in range(6)], np.array([23, 17, 0, 40, 9, 31]), ("txt",))
    order = data.Order(index, batch_size, lanes, block, seed=1)
    epochs = [
        np.concatenate(
            [
                data.batch_ids(order, e * order.steps_per_epoch + s)
                for s in range(order.steps_per_epoch)
            ]
        )
        for e in range(4)
    ]
    for ids in epochs:
        assert len(set(ids)) == len(ids) == N // batch_size * batch_size > N - batch_size
        assert 0 <= ids.min() and ids.max() < N
    assert all((epochs[0] != ids).any() for ids in epochs[1:])
    left_over = [frozenset(range(N)) - set(ids) for ids in epochs]
    assert (
        N % batch_size == 0 or len(set(left_over)) > 1
    )  # other samples are left over in other epochs
    again, other = (
        data.Order(index, batch_size, lanes, block, seed=1),
        data.Order(index, batch_size, lanes, block, seed=2),
    )
    assert (data.batch_ids(again, 1) == data.batch_ids(order, 1)).all() and (
        data.batch_ids(other, 1) != data.batch_ids(order, 1)
    ).any()


def test_order_is_the_same_tomorrow():
    """Written down: a checkpoint resumes only if this never changes."""
    order = data.Order(Index(["a", "b"], np.array([20, 30]), ("txt",)), 10, 5, 4, seed=2024)
    assert data.batch_ids(order, 7).tolist() == [8, 13, 19, 20, 28, 31, 40, 42, 2, 49]


def test_blocks_begin_at_different_steps():
    order = data.Order(Index(["a"], np.array([64 * 1000]), ("txt",)), 64, 64, 100)
    loads = [
        sum(
            start == first
            for lane in range(64)
            for _, start, _, first, _ in order.parts(step, lane)
        )
        for step in range(1, 300)
    ]
    assert max(loads) <= 2


def test_lanes_and_block():
    assert data.lanes_and_block(1024) == (512, 128)
    assert data.lanes_and_block(5120) == (512, 128)
    assert data.lanes_and_block(96) == (96, 682)
    assert data.lanes_and_block(96, 8, 3) == (8, 3)


@pytest.fixture(scope="module")
def expected(shards):
    order = order_of(shards)
    return order, load(order, 0, 10)


def test_batches_are_the_order_and_what_they_claim(expected):
    order, (images, tokens, ids) = expected
    tokenizer = data.Tokenizer(77)
    assert (
        order.steps_per_epoch == 7
        and images.dtype == torch.uint8
        and images.shape == (10, 16, 3, 24, 24)
    )
    for step in range(10):
        assert ids[step].tolist() == data.batch_ids(order, step).tolist()
        assert [number_of(image) for image in images[step]] == ids[step].tolist()
        assert torch.equal(tokens[step], tokenizer([f"sample {i}" for i in ids[step].tolist()]))
    first, second = (
        {i: image for i, image in zip(ids[s].flatten().tolist(), images[s].flatten(0, 1))}
        for s in (slice(7), slice(7, 10))
    )
    both = first.keys() & second.keys()  # another epoch, another crop
    assert sum(not torch.equal(first[i], second[i]) for i in both) > 0.8 * len(both)


@pytest.mark.parametrize(
    "ranks, workers", [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 3), (4, 0), (4, 2)]
)
def test_same_batches_on_any_ranks_and_workers(expected, ranks, workers, capsys):
    order, batches = expected
    assert same(load(order, 0, 10, ranks, workers), batches)
    lowered = max(w for w in range(workers + 1) if w == 0 or 8 // ranks % w == 0)
    message = f"workers = {lowered}, not {workers}"
    assert capsys.readouterr().err.count(message) == (lowered != workers)


@pytest.mark.parametrize("start, workers", [(1, 0), (6, 0), (7, 2), (9, 0)])
def test_resume_equals_the_uninterrupted_run(expected, start, workers):
    order, batches = expected
    assert same(load(order, start, 10, workers=workers), [x[start:] for x in batches])


def test_resume_decodes_nothing_before(expected, monkeypatch):
    decoded, pixels = [], images.pixels
    monkeypatch.setattr(images, "pixels", lambda *image: decoded.append(1) or pixels(*image))
    load(expected[0], 9, 10)
    assert len(decoded) == 16


def test_several_sources_and_pipes(shards, tmp_path, expected):
    other = write_shards(tmp_path / "other", (30, 12))
    index = load_index((shards, other))
    assert index.num_samples == N + 42 and index.counts.tolist() == [*SIZES, 30, 12]
    order = data.Order(index, 18, 6, 11)
    images, _, ids = load(order, 0, 18)
    assert len(set(ids[:9].flatten().tolist())) == 162 and ids.max() > N  # 162 = all of them
    assert [number_of(x) for x in images.flatten(0, 1)] == [
        i if i < N else i - N for i in ids.flatten().tolist()
    ]
    assert same(
        load(order_of("pipe:cat " + shards, count_remote=True), 0, 10, workers=2), expected[1]
    )
    assert len(glob.glob(str(tmp_path / "cache" / "fastclip" / "pipe-*.json"))) == 1


def test_a_command_cut_off_is_tried_again(shards, tmp_path, expected):
    (tmp_path / "flaky.sh").write_text(
        'if mkdir "$0.$(basename $1)" 2>/dev/null; then head -c 9999 "$1"; exit 1; fi; cat "$1"'
    )
    index = load_index(shards)._replace(shards=expand(f"pipe:sh {tmp_path}/flaky.sh {shards}"))
    assert same(load(data.Order(index, 16, 8, 5, 3), 0, 10), expected[1])


def test_captions_from_json(shards):
    order = order_of(shards, caption_key="texts")
    texts, decode = [], data.Tokenizer(77).decode
    for start in (0, 7):
        _, tokens, ids = load(order, start, start + 7, caption_key="texts")
        captions = [decode(t).split() for t in tokens.flatten(0, 1)]  # sample 1 1 7 d
        assert all("".join(c[1:-1]) == str(i) for c, i in zip(captions, ids.flatten().tolist()))
        texts.append({i: c[-1] for i, c in zip(ids.flatten().tolist(), captions)})
    assert {len(set(letters.values())) for letters in texts} == {8}  # all eight are drawn
    assert sum(texts[0][i] != texts[1][i] for i in texts[0].keys() & texts[1].keys()) > 60
    assert same(
        load(order, 3, 5, ranks=2, workers=2, caption_key="texts"),
        load(order, 3, 5, caption_key="texts"),
    )


def test_tokens_are_trimmed(tmp_path):
    texts = {0: b"a dog", 1: b"a cat", 2: b"wow " * 8 + b"!^ " * 6, 3: b"word " * 200}

    def tokens(*numbers, context_length=77):
        index = load_index(
            write_tar(
                tmp_path / "pick.tar", [file for n in numbers for file in sample(n, txt=texts[n])]
            )
        )
        return next(
            iter(
                data.Loader(
                    data.Order(index, len(numbers)), 8, context_length, num_steps=1, workers=0
                )
            )
        ).tokens

    assert tokens(0, 1).shape == (2, 8) and tokens(1, 2).shape == (2, 24)
    assert tokens(2, 3).shape == (2, 77) and tokens(0, 3, context_length=20).shape == (2, 20)
    expected = data.Tokenizer(77)(["a cat", "wow " * 8 + "!^ " * 6])[
        :, :24
    ]  # "!" is token 0, and no padding
    assert sorted(tokens(1, 2).tolist()) == sorted(expected.tolist())


def test_length_epochs_and_default_workers(expected, monkeypatch):
    order, _ = expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(13))
    assert (
        workers.default_workers() == 8
        and data.Loader(order, 8).workers == 8
        and data.Loader(order, 8, rank=1, world_size=2).workers == 4
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.default_workers() == 3 and data.Loader(order, 8).workers == 2
    loader = data.Loader(order, 8, start_step=5, num_steps=16, workers=0)
    assert len(loader) == 11 and len(list(loader)) == 11 and len(list(loader)) == 11


def test_signals_do_not_end_workers(expected):
    order, batches = expected
    batches = iter(data.Loader(order, 8, workers=2, num_steps=60))
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for pid in [multiprocessing.forkserver._forkserver._forkserver_pid] + [
        worker.pid for worker in workers
    ]:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)
    assert sum(1 for _ in batches) == 59
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_workers_end_with_a_killed_trainer(shards, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""import multiprocessing, os, data
from ingest.index import load_index
if __name__ == "__main__":
    batches = iter(data.Loader(data.Order(load_index({shards!r}), 16), 8, workers=2, num_steps=60))
    next(batches)
    print(*[worker.pid for worker in multiprocessing.active_children()], multiprocessing.forkserver._forkserver._forkserver_pid, flush=True)
    os.kill(os.getpid(), 9)
""")
    process = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": os.path.dirname(data.__file__)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=60,
        text=True,
    )
    assert process.returncode == -9
    pids = process.stdout.split()
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            break
        time.sleep(0.1)
    assert len(pids) == 3 and not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_crop_and_resize_are_torchvisions():
    from torchvision.transforms.v2 import functional as F

    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    reference = F.resized_crop(
        image,
        3,
        5,
        40,
        41,
        [24, 24],
        F.InterpolationMode.BICUBIC if hasattr(F, "InterpolationMode") else 3,
        antialias=True,
    )
    assert (images.resize(image[:, 3:43, 5:46], 24, 24).int() - reference.int()).abs().max() <= 1
    reference = F.center_crop(F.resize(image, 24, 3, antialias=True), 24)
    ours, texts, label = evaluation.evaluation_sample({"png": png(image), "cls": b"7\n"}, 24, "")
    assert (ours.int() - reference.int()).abs().max() <= 1 and texts == [] and label == 7


def png(image):
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "height, width", [(100, 100), (60, 200), (200, 60), (1, 1), (1, 500), (37, 41)]
)
def test_random_crop(height, width):
    random, crops = np.random.default_rng(0), []
    for _ in range(500):
        top, left, h, w = images.random_crop(height, width, (0.3, 1.0), random)
        assert (
            0 <= top and 0 <= left and 1 <= h and 1 <= w and top + h <= height and left + w <= width
        )
        crops.append((h * w / height / width, w / h))
    if min(height, width) > 30:
        area, ratio = np.array(crops).T
        assert 0.7 < ratio.min() < ratio.max() < 1.4 and area.max() <= 1.01 and area.min() > 0.2


def test_kinds_of_images():
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for image in (
        Image.fromarray(rgb),
        Image.fromarray(rgb[..., 0]),
        Image.fromarray(rgb).convert("RGBA"),
        Image.fromarray(rgb).convert("P"),
        Image.fromarray(rgb[..., 0].astype(np.uint16) * 257),
    ):
        file = io.BytesIO()
        image.save(file, "PNG")
        decoded = images.decode({"txt": b"", "png": file.getvalue()})
        assert decoded.shape == (3, 20, 30) and decoded.dtype == torch.uint8
        if image.mode.startswith("I;16"):
            assert torch.equal(decoded[0], torch.from_numpy(rgb[..., 0].copy()))
    file = io.BytesIO()
    Image.fromarray(rgb).convert("CMYK").save(file, "JPEG")
    assert images.decode({"jpg": file.getvalue()}).shape == (3, 20, 30)


def test_bad_samples_are_replaced_and_counted(tmp_path):
    half = picture(33, "jpg")
    bad = {
        "s3": {"jpg": b"not an image"},
        "s4": {"png": b""},
        "s33": {"jpg": half[: len(half) // 2]},
        "s50": {"txt": b"  \n"},
    }
    order = order_of(write_shards(tmp_path, (30, 30), **bad), 12, 4, 6)
    numbers, counts = [], {}
    for batch in data.Loader(order, 24, workers=0, num_steps=5):
        assert [number_of(x) for x in batch.images] == batch.ids.tolist()
        numbers += batch.ids.tolist()
        for reason, count in batch.bad.items():
            counts[reason] = counts.get(reason, 0) + count
    assert counts == {"corrupt image": 3, "empty caption": 1}
    assert len(numbers) == 60 and set(numbers) == set(range(60)) - {3, 4, 33, 50}
    planned = np.concatenate([data.batch_ids(order, step) for step in range(5)])
    assert [p for p, n in zip(planned, numbers) if p != n] == [
        p for p in planned if p in (3, 4, 33, 50)
    ]
    assert same(load(order, 0, 10), load(order, 0, 10, 2, 2)) and same(
        load(order, 4, 6), [x[4:6] for x in load(order, 0, 6)]
    )


def test_json_without_the_key(tmp_path):
    pattern = write_shards(
        tmp_path,
        (20,),
        s3={"json": b"{"},
        s4={"json": b"{}"},
        s5={"json": b'{"texts": []}'},
        s6={"json": b'{"texts": ["", null]}'},
    )
    batch = next(
        iter(
            data.Loader(
                order_of(pattern, 20, 2, caption_key="texts"),
                8,
                caption_key="texts",
                workers=0,
                num_steps=1,
            )
        )
    )
    assert batch.bad == {"no caption": 2, "empty caption": 2} and not {3, 4, 5, 6} & set(
        batch.ids.tolist()
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_that_got_shorter(tmp_path, workers):
    pattern = write_shards(tmp_path, (20, 20))
    order = order_of(pattern, 8, 4, 3)
    path = expand(pattern)[1]
    with tarfile.open(path) as tar:
        cut = tar.getmember("00032.txt").offset_data
    os.truncate(path, cut)
    counts, numbers = {}, []
    for batch in data.Loader(order, 24, workers=workers, num_steps=5):
        numbers += batch.ids.tolist()
        assert [number_of(x) for x in batch.images] == batch.ids.tolist()
        counts = {
            reason: counts.get(reason, 0) + batch.bad.get(reason, 0)
            for reason in {*counts, *batch.bad}
        }
    assert counts == {"missing from shard": 8} and set(numbers) == set(range(32))


def test_unreadable_shard_is_named(tmp_path):
    order = order_of(write_shards(tmp_path, (20, 20)), 8, 4, 3)
    os.remove(tmp_path / "00001.tar")
    with pytest.raises(
        workers.ShardError, match=r"00001.tar cannot be read \(4 attempts\): FileNotFoundError"
    ):
        load(order, 0, 5)


def test_error_in_a_worker_arrives(tmp_path):
    order = order_of(
        write_shards(tmp_path, (10,), **{f"s{n}": {"txt": b" "} for n in range(10)}), 4, 2
    )
    with pytest.raises(workers.ShardError, match=r"1\d bad samples in a row.*empty caption"):
        load(order, 0, 2, workers=1)


def test_errors_of_order_and_loader(shards):
    index = load_index(shards)
    with pytest.raises(
        ConfigError,
        match=r"120 samples in 5 shards do not fill one global batch: 120 // batch_size = 128 is 0 steps",
    ):
        data.Order(index, 128)
    with pytest.raises(ConfigError, match="lanes = 5 does not divide batch_size = 16"):
        data.Order(index, 16, 5)
    with pytest.raises(
        ConfigError,
        match=r"lanes = 8 cannot be dealt to 3 ranks, 8 / 3 leaves 2: lanes = 24 would work",
    ):
        data.Loader(data.Order(index, 24, 8), 8, world_size=3)
    with pytest.raises(ConfigError, match="make batch_size = 16 a multiple of 3"):
        data.Loader(data.Order(index, 16, 8), 8, world_size=3)


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 2), (3, 1)])
def test_evaluation_set_once(shards, ranks, workers):
    read = {}
    for rank in range(ranks):
        for batch in evaluation.read_samples((shards,), 24, "texts", 16, rank, ranks, workers):
            assert (
                batch.images.shape[1:] == (3, 24, 24) and len(batch.images) <= 16 and not batch.bad
            )
            for position, image, texts, label in zip(
                batch.positions.tolist(), batch.images, batch.captions, batch.classes
            ):
                assert (
                    position % ranks == rank
                    and position not in read
                    and number_of(image) == position
                    and label is None
                )
                assert texts == [f"sample {position} {c}" for c in "abcdefgh"]
                read[position] = image
    assert len(read) == N
    whole = images.decode({"png": picture(1, "png")})
    assert torch.equal(
        read[1], evaluation.evaluation_sample({"png": picture(1, "png")}, 24, "")[0]
    ) and whole.shape == (3, 31, 40)


def test_evaluation_set_with_classes(tmp_path):
    pattern = write_shards(
        tmp_path,
        (4, 3),
        **{f"s{n}": {"txt": None, "json": None, "cls": str(n * 2).encode()} for n in range(7)},
    )
    write_tar(
        tmp_path / "00002.tar",
        sample(7, txt=None, cls=b"x")
        + sample(8, txt=None, png=b"", cls=b"1", webp=b"")
        + sample(9, cls=b"3"),
    )
    pattern = pattern.replace("00001}", "00002}")
    with pytest.raises(ConfigError, match="has no usable sample"):
        load_index(pattern.replace("00002}", "00001}"))
    assert load_index(pattern, evaluation=True).counts.tolist() == [4, 3, 3]
    (batch,) = evaluation.read_samples(pattern, 24, batch_size=100, workers=0)
    assert (
        batch.positions.tolist() == [*range(7), 9]
        and batch.classes == [0, 2, 4, 6, 8, 10, 12, 3]
        and batch.captions == [[]] * 7 + [["sample 9"]]
    )
    assert batch.bad == {"class is not a number": 1, "corrupt image": 1}
