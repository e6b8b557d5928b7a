"""data.py: the order of samples, samples, the loader on any number of ranks and workers, bad data.

Also worker processes (ingest/workers.py).
"""

import contextlib
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

import data
import dist
from config import ConfigError
from helpers import equal
from ingest import images, workers
from ingest.index import Index, load_index
from ingest.reader import ShardError
from ingest.urls import expand
from rank_server import run_ranks
from samples import SIZES, N, load, number_of, order_of, picture, sample, write_shards, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def expected(shards):
    """An order and its first 10 global batches, as one rank without workers loads them."""
    order = order_of(shards)
    return order, load(order, 0, 10)


def made_index(*counts):
    """An Index of shards that do not exist: enough for an Order."""
    names = [str(number) for number in range(len(counts))]
    return Index(names, np.array(counts), ("txt",))


# ---- the order ----


def test_the_example_at_the_top_of_data_py():
    order = data.Order(made_index(3, 5, 6), batch_size=4, lanes=2, block=3, seed=32)
    line = order.line(0)
    assert line.shards.tolist() == [0, 2, 1]
    assert line.offset == 4

    everything = [9, 10, 11, 12, 13, 3, 4, 5, 6, 7, 0, 1, 2, 8]
    assert order.line_ids(0, 0, 0, 14).tolist() == everything
    assert order.line_ids(0, 1, 0, 6).tolist() == everything[6:12]
    assert order.block_ids(0, 0, 2, 5).tolist() == [11, 13, 12]
    assert order.block_ids(0, 1, 0, 3).tolist() == [6, 5, 4]

    batches = [data.batch_ids(order, step).tolist() for step in range(3)]
    assert batches == [[10, 9, 6, 5], [11, 13, 4, 1], [12, 3, 7, 0]]
    for batch in batches:
        assert " ".join(f"{number:2}" for number in batch) in data.__doc__


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
    index = made_index(23, 17, 0, 40, 9, 31)
    order = data.Order(index, batch_size, lanes, block, seed=1)
    steps = order.steps_per_epoch
    epochs = []
    for epoch in range(4):
        batches = [data.batch_ids(order, epoch * steps + step) for step in range(steps)]
        epochs.append(np.concatenate(batches))

    for ids in epochs:
        assert len(set(ids)) == len(ids) == N // batch_size * batch_size > N - batch_size
        assert 0 <= ids.min() and ids.max() < N
    for ids in epochs[1:]:
        assert (epochs[0] != ids).any()

    # Other samples are left over in other epochs.
    left_over = {frozenset(range(N)) - set(ids) for ids in epochs}
    assert N % batch_size == 0 or len(left_over) > 1

    again = data.Order(index, batch_size, lanes, block, seed=1)
    assert (data.batch_ids(again, 1) == data.batch_ids(order, 1)).all()
    other = data.Order(index, batch_size, lanes, block, seed=2)
    assert (data.batch_ids(other, 1) != data.batch_ids(order, 1)).any()


def test_order_is_the_same_tomorrow():
    """Written down: a checkpoint resumes only if this never changes."""
    order = data.Order(made_index(20, 30), 10, 5, 4, seed=2024)
    assert data.batch_ids(order, 7).tolist() == [8, 13, 19, 20, 28, 31, 40, 42, 2, 49]


def test_blocks_begin_at_different_steps():
    order = data.Order(made_index(64 * 1000), 64, 64, 100)
    for step in range(1, 300):
        blocks = 0
        for lane in range(64):
            for part in order.parts(step, lane):
                blocks += part.start == part.block_start
        assert blocks <= 2


def test_lanes_and_block():
    assert data.lanes_and_block(1024) == (512, 128)
    assert data.lanes_and_block(5120) == (512, 128)
    assert data.lanes_and_block(96) == (96, 682)
    assert data.lanes_and_block(96, 8, 3) == (8, 3)


# ---- samples in batches ----


def test_batches_follow_the_order(expected):
    order, (images, tokens, ids) = expected
    tokenizer = data.Tokenizer(77)
    assert order.steps_per_epoch == 7
    assert images.dtype == torch.uint8
    assert images.shape == (10, 16, 3, 24, 24)

    for step in range(10):
        numbers = ids[step].tolist()
        assert numbers == data.batch_ids(order, step).tolist()
        assert numbers == [number_of(image) for image in images[step]]
        assert torch.equal(tokens[step], tokenizer([f"sample {i}" for i in numbers]))


def test_another_epoch_has_other_crops(expected):
    _, (images, _, ids) = expected

    def images_by_id(steps):
        return dict(zip(ids[steps].flatten().tolist(), images[steps].flatten(0, 1)))

    first = images_by_id(slice(0, 7))
    second = images_by_id(slice(7, 10))
    both = first.keys() & second.keys()
    different = [i for i in both if not torch.equal(first[i], second[i])]
    assert len(different) > 0.8 * len(both)


def test_several_sources_and_pipes(shards, tmp_path, own_cache, expected):
    other = write_shards(tmp_path / "other", (30, 12))
    index = load_index((shards, other))
    assert index.num_samples == N + 42
    assert index.counts.tolist() == [*SIZES, 30, 12]

    images, _, ids = load(data.Order(index, 18, 6, 11), 0, 18)
    assert len(set(ids[:9].flatten().tolist())) == N + 42
    assert ids.max() > N
    for image, i in zip(images.flatten(0, 1), ids.flatten().tolist()):
        assert number_of(image) == (i if i < N else i - N)

    assert equal(
        load(order_of("pipe:cat " + shards, count_remote=True), 0, 10, workers=2), expected[1]
    )
    assert len(list(own_cache.glob("pipe-*.json"))) == 1


def test_a_command_cut_off_is_tried_again(shards, tmp_path, expected):
    script = tmp_path / "flaky.sh"
    script.write_text(
        'if mkdir "$0.$(basename $1)" 2>/dev/null; then head -c 9999 "$1"; exit 1; fi; cat "$1"'
    )
    index = load_index(shards)._replace(shards=expand(f"pipe:sh {script} {shards}"))
    assert equal(load(data.Order(index, 16, 8, 5, 3), 0, 10), expected[1])


def test_captions_from_json(shards):
    """Sample 117 has the captions "sample 117 a" to "sample 117 h"; each epoch draws one."""
    order = order_of(shards, caption_key="texts")
    decode = data.Tokenizer(77).decode
    letters = []  # of two epochs, {id: the letter that was drawn}
    for start in (0, 7):
        _, tokens, ids = load(order, start, start + 7, caption_key="texts")
        drawn = {}
        for i, row in zip(ids.flatten().tolist(), tokens.flatten(0, 1)):
            _, *digits, letter = decode(row).split()  # sample 1 1 7 d
            assert "".join(digits) == str(i)
            drawn[i] = letter
        assert len(set(drawn.values())) == 8
        letters.append(drawn)

    both = letters[0].keys() & letters[1].keys()
    assert sum(letters[0][i] != letters[1][i] for i in both) > 60

    two_ranks = load(order, 3, 5, ranks=2, workers=2, caption_key="texts")
    assert equal(two_ranks, load(order, 3, 5, caption_key="texts"))


def test_captions_from_lines(tmp_path):
    """A text stays whole; with caption_lines, each epoch draws one of its lines."""
    text = {"txt": b"first line\n\n second line \n"}
    order = order_of(write_shards(tmp_path, (8,), **{f"s{n}": text for n in range(8)}), 8)
    decode = data.Tokenizer(77).decode

    def drawn(workers=0, **options):
        _, tokens, _ = load(order, 0, 4, workers=workers, **options)
        return [decode(row) for row in tokens.flatten(0, 1)]

    assert set(drawn()) == {"first line second line"}
    lines = drawn(caption_lines=True)
    assert set(lines) == {"first line", "second line"}
    assert drawn(caption_lines=True, workers=2) == lines


def test_tokens_are_trimmed(tmp_path):
    texts = {0: b"a dog", 1: b"a cat", 2: b"wow " * 8 + b"!^ " * 6, 3: b"word " * 200}

    def tokens(*numbers, context_length=77):
        files = []
        for number in numbers:
            files += sample(number, txt=texts[number])
        index = load_index(write_tar(tmp_path / "pick.tar", files))
        order = data.Order(index, len(numbers))
        (batch,) = data.Loader(order, 8, context_length, num_steps=1, workers=0)
        return batch.tokens

    assert tokens(0, 1).shape == (2, 8)
    assert tokens(1, 2).shape == (2, 24)
    assert tokens(2, 3).shape == (2, 77)
    assert tokens(0, 3, context_length=20).shape == (2, 20)

    # "!" is token 0, and still no padding.
    untrimmed = data.Tokenizer(77)(["a cat", "wow " * 8 + "!^ " * 6])
    assert sorted(tokens(1, 2).tolist()) == sorted(untrimmed[:, :24].tolist())


# ---- ranks, workers, resuming ----


@pytest.mark.parametrize(
    "ranks, workers", [(1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 3), (4, 0), (4, 2)]
)
def test_same_batches_on_any_ranks_and_workers(expected, ranks, workers, capsys):
    order, batches = expected
    assert equal(load(order, 0, 10, ranks, workers), batches)

    lanes = 8 // ranks
    possible = [w for w in range(1, workers + 1) if lanes % w == 0]
    lowered = max(possible, default=0)
    message = f"workers = {lowered}, not {workers}"
    assert capsys.readouterr().err.count(message) == (1 if lowered != workers else 0)


@pytest.mark.parametrize("start, workers", [(1, 0), (6, 0), (7, 2), (9, 0)])
def test_resume_equals_the_uninterrupted_run(expected, start, workers):
    order, batches = expected
    assert equal(load(order, start, 10, workers=workers), [x[start:] for x in batches])


def test_resume_decodes_nothing_before(expected, monkeypatch):
    decoded = []
    pixels = images.pixels

    def counting(*image):
        decoded.append(image)
        return pixels(*image)

    monkeypatch.setattr(images, "pixels", counting)
    load(expected[0], 9, 10)
    assert len(decoded) == 16


def test_default_workers_share_the_cpus(expected, monkeypatch):
    order, _ = expected
    by_cpus = {1: 1, 2: 2, 8: 8, 10: 8, 11: 9, 26: 24, 34: 32, 224: 32}
    for cpus, expected_workers in by_cpus.items():
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: range(cpus))
        assert workers.default_workers() == expected_workers

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(13))
    assert workers.default_workers() == 11
    assert data.Loader(order, 8).workers == 8
    assert data.Loader(order, 8, rank=1, world_size=2).workers == 4

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.default_workers() == 3
    assert data.Loader(order, 8).workers == 2


def test_a_loader_can_be_iterated_again(expected):
    order, _ = expected
    loader = data.Loader(order, 8, start_step=5, num_steps=16, workers=0)
    assert len(loader) == 11
    assert len(list(loader)) == 11
    assert len(list(loader)) == 11


# ---- ahead of the step ----


def test_a_thread_works_one_item_ahead():
    begun = []

    def items():
        for number in range(3):
            begun.append((number, threading.current_thread()))
            yield number
        raise ShardError("no more")

    found = workers.in_a_thread(items())
    assert next(found) == 0
    assert next(found) == 1  # so item 1 was complete, and item 2 is asked for
    assert next(found) == 2
    with pytest.raises(ShardError, match="no more"):
        next(found)
    assert [number for number, _ in begun] == [0, 1, 2]
    (thread,) = {thread for _, thread in begun}
    assert thread is not threading.current_thread()

    begun.clear()
    found = workers.in_a_thread(items())
    next(found)
    found.close()
    assert [number for number, _ in begun] == [0, 1]


class StandInStream:
    """In place of torch.cuda.Stream: notes what is asked of it."""

    def __init__(self, device=None):
        self.device = device
        self.calls = []

    def record_event(self):
        self.calls.append("record")
        return len(self.calls)

    def wait_event(self, event):
        self.calls.append(event)


def test_on_a_gpu_batches_come_from_a_thread_and_a_stream(expected, monkeypatch):
    """Without a GPU: the same batches; the step waits for each, the thread uses this rank's GPU."""
    order, _ = expected
    loader = data.Loader(order, 8, num_steps=3, workers=0)
    step_stream = StandInStream()
    used = []
    threads = []

    def set_device(device):
        assert device is loader.device
        threads.append(threading.current_thread())

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "Stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step_stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: used.append(x))

    found = list(loader.batches_on_gpu())
    for batch, usual in zip(found, loader.batches(), strict=True):
        assert torch.equal(batch.images, usual.images)
        assert torch.equal(batch.tokens, usual.tokens)
    assert step_stream.calls == [1, 2, 3]
    assert len(used) == 6  # images and tokens of each batch
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def gather_ids_of_batches(order, steps):
    """-> [(global ids, gathers begun when the batch was yielded)]"""
    loader = data.Loader(
        order, 8, rank=dist.rank(), world_size=dist.world_size(), workers=0, num_steps=steps
    )
    found = []
    for batch in data.with_global_ids(loader):
        found.append((batch.global_ids, dist.calls["ids"]))
    return found


def test_ids_are_gathered_a_batch_ahead(expected):
    order, (_, _, ids) = expected
    for found in run_ranks(2, gather_ids_of_batches, order, 3):
        for step, (global_ids, _) in enumerate(found):
            assert torch.equal(global_ids, ids[step])
        assert [gathers for _, gathers in found] == [2, 3, 3]


def test_signals_do_not_end_workers(expected):
    order, _ = expected
    batches = iter(data.Loader(order, 8, workers=2, num_steps=60))
    next(batches)

    processes = [worker.pid for worker in multiprocessing.active_children()]
    assert len(processes) == 2
    processes.append(multiprocessing.forkserver._forkserver._forkserver_pid)
    for pid in processes:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)

    assert sum(1 for _ in batches) == 59
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_workers_end_with_a_killed_trainer(shards, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing, os, data
from ingest.index import load_index

if __name__ == "__main__":
    batches = iter(data.Loader(data.Order(load_index({shards!r}), 16), 8, workers=2, num_steps=60))
    next(batches)
    workers = [worker.pid for worker in multiprocessing.active_children()]
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    print(*workers, server, flush=True)
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
    assert len(pids) == 3

    def running():
        return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]

    for _ in range(100):
        if not running():
            break
        time.sleep(0.1)
    assert running() == []


# ---- bad samples and shards ----


def test_bad_samples_are_replaced_and_counted(tmp_path):
    half = picture(33, "jpg")
    bad = {
        "s3": {"jpg": b"not an image"},
        "s4": {"png": b""},
        "s33": {"jpg": half[: len(half) // 2]},
        "s50": {"txt": b"  \n"},
    }
    order = order_of(write_shards(tmp_path, (30, 30), **bad), 12, 4, 6)
    numbers = []
    counts = Counter()
    for batch in data.Loader(order, 24, workers=0, num_steps=5):
        assert [number_of(image) for image in batch.images] == batch.ids.tolist()
        numbers += batch.ids.tolist()
        counts.update(batch.bad)

    assert counts == {"corrupt image": 3, "empty caption": 1}
    assert len(numbers) == 60
    assert set(numbers) == set(range(60)) - {3, 4, 33, 50}

    # Only the bad ones are replaced.
    planned = np.concatenate([data.batch_ids(order, step) for step in range(5)]).tolist()
    replaced = [plan for plan, number in zip(planned, numbers) if plan != number]
    assert replaced == [plan for plan in planned if plan in (3, 4, 33, 50)]

    # By the same ones on any number of ranks, and after a resumption.
    batches = load(order, 0, 10)
    assert equal(batches, load(order, 0, 10, 2, 2))
    assert equal(load(order, 4, 6), [x[4:6] for x in batches])


def test_json_without_the_key(tmp_path):
    pattern = write_shards(
        tmp_path,
        (20,),
        s3={"json": b"{"},
        s4={"json": b"{}"},
        s5={"json": b'{"texts": []}'},
        s6={"json": b'{"texts": ["", null]}'},
    )
    order = order_of(pattern, 20, 2, caption_key="texts")
    (batch,) = data.Loader(order, 8, caption_key="texts", workers=0, num_steps=1)
    assert batch.bad == {"no caption": 2, "empty caption": 2}
    assert not {3, 4, 5, 6} & set(batch.ids.tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_that_got_shorter(tmp_path, workers):
    pattern = write_shards(tmp_path, (20, 20))
    order = order_of(pattern, 8, 4, 3)
    path = expand(pattern)[1]
    with tarfile.open(path) as tar:
        end = tar.getmember("00032.txt").offset_data
    os.truncate(path, end)

    counts = Counter()
    numbers = set()
    for batch in data.Loader(order, 24, workers=workers, num_steps=5):
        assert [number_of(image) for image in batch.images] == batch.ids.tolist()
        numbers.update(batch.ids.tolist())
        counts.update(batch.bad)
    assert counts == {"missing from shard": 8}
    assert numbers == set(range(32))


def test_unreadable_shard_is_named(tmp_path):
    order = order_of(write_shards(tmp_path, (20, 20)), 8, 4, 3)
    os.remove(tmp_path / "00001.tar")
    message = r"00001.tar cannot be read \(4 attempts\): FileNotFoundError"
    with pytest.raises(ShardError, match=message):
        load(order, 0, 5)


def test_error_in_a_worker_arrives(tmp_path):
    empty = {f"s{n}": {"txt": b" "} for n in range(10)}
    order = order_of(write_shards(tmp_path, (10,), **empty), 4, 2)
    with pytest.raises(ShardError, match=r"1\d bad samples in a row.*empty caption.*--verify"):
        load(order, 0, 2, workers=1)


# ---- what is refused ----


def test_too_few_samples_are_refused(shards):
    message = (
        "120 samples in 5 shards do not fill one global batch: "
        "120 // batch_size = 128 is 0 steps an epoch"
    )
    with pytest.raises(ConfigError, match=message):
        data.Order(load_index(shards), 128)


def test_lanes_that_do_not_divide_the_batch_are_refused(shards):
    with pytest.raises(ConfigError, match="lanes = 5 does not divide batch_size = 16"):
        data.Order(load_index(shards), 16, 5)


@pytest.mark.parametrize(
    "batch_size, message",
    [
        (24, "lanes = 8 cannot be dealt to 3 ranks, 8 / 3 leaves 2: lanes = 24 would work"),
        (16, "8 / 3 leaves 2: make batch_size = 16 a multiple of 3"),
    ],
)
def test_lanes_that_cannot_be_dealt_to_the_ranks_are_refused(shards, batch_size, message):
    order = data.Order(load_index(shards), batch_size, 8)
    with pytest.raises(ConfigError, match=message):
        data.Loader(order, 8, world_size=3)
