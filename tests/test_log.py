"""runtime/log.py: runs that do not learn; a full disk, broken curves, bad samples."""

import glob
import json
import os
import re
import sys
import tarfile
import threading

import pytest
import torch

import config
import dist
import shapes
import train as training
from helpers import SHORT_RUN, TINY, metrics, refused, run_jobs, train, words_of
from rank_server import run_ranks
from runtime import ranks
from runtime.hardware import HostCopy
from runtime.job import Job
from runtime.log import Log, MetricsFile
from samples import write_shards

# ---- runs that do not learn ----


@pytest.mark.usefixtures("no_curves")
def test_a_run_that_learns_is_not_warned(tmp_path, sets, capsys):
    train(str(tmp_path / "run"), sets)
    printed = capsys.readouterr()
    assert "(chance 4.159)" in printed.out  # ln 64
    assert "at chance" not in printed.out + printed.err
    assert "warmup_steps" not in printed.err


@pytest.mark.usefixtures("no_curves")
def test_a_learning_rate_that_is_far_too_high_is_said(tmp_path, sets, capsys):
    """The objective falls, because tau does; the in-batch loss stays at chance."""
    rows = train(str(tmp_path / "run"), sets, lr=1.0)
    assert rows[-1]["objective"] < rows[0]["objective"] - 0.1

    printed = capsys.readouterr()
    assert printed.err.count("is at chance (4.159): the model tells no caption from another") == 1
    last = printed.out.splitlines()[-1]
    assert re.search(r"^done in .* But mbcl 4\.\d+ is at chance .* nothing was learned", last)


def noise(name, generator, size=32):
    """In place of shapes.picture: a picture that has nothing to do with its caption."""
    return torch.randint(0, 255, (3, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.usefixtures("no_curves")
def test_captions_that_belong_to_no_image_are_said(tmp_path, monkeypatch, capsys):
    """At the end of a job that stops before the run does, too."""
    monkeypatch.setattr(shapes, "picture", noise)
    sets = dict(train_data=shapes.write(str(tmp_path / "noise")))
    train(str(tmp_path / "run"), sets, stop_after=24)
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"^stopped after step 24 .* But mbcl 4\.\d+ is at chance", last)


@pytest.mark.usefixtures("no_curves")
def test_a_warm_up_of_most_of_the_run_is_said(tmp_path, sets, capsys):
    train(str(tmp_path / "run"), sets, max_steps=4)
    assert "warmup_steps = 5 of 4 steps is more than a third" in capsys.readouterr().err


# ---- reports ----


class Waits:
    """Notes what a run waits for, and at which step."""

    def __init__(self, monkeypatch):
        self.step = 0
        self.ages = []  # for each copy that was read: how many steps before it was begun
        self.gathers = []  # steps at which objects were gathered from all ranks
        self.saves = []  # steps at which the state of the log was asked for
        self.spy(monkeypatch, Log, "step", self.note_step)
        self.spy(monkeypatch, Log, "state", self.note_save)
        self.spy(monkeypatch, HostCopy, "__init__", self.note_copy)
        self.spy(monkeypatch, HostCopy, "read", self.note_read)
        self.spy(monkeypatch, dist, "all_gather_objects", self.note_gather)

    def spy(self, monkeypatch, owner, name, note):
        plain = getattr(owner, name)

        def noted(*args, **options):
            note(*args)
            return plain(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    def note_step(self, log, step, *_):
        self.step = step

    def note_save(self, log):
        self.saves.append(self.step)

    def note_copy(self, copy, x):
        copy.begun_at = self.step

    def note_read(self, copy):
        if self.step not in self.saves:
            self.ages.append(self.step - copy.begun_at)

    def note_gather(self, x, group=None):
        # Not by the thread that writes a checkpoint, which training does not wait for.
        if threading.current_thread() is threading.main_thread():
            self.gathers.append(self.step)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("log_steps, age", [(1, 2), (3, 3)])
def test_a_report_waits_neither_for_the_device_nor_for_other_ranks(
    tmp_path, sets, monkeypatch, log_steps, age
):
    """What it reads was begun a report ago, or two steps. Nothing is gathered but before saves."""
    waits = Waits(monkeypatch)
    settings = {**SHORT_RUN, "save_steps": 8, "log_steps": log_steps}
    rows = train(str(tmp_path / "run"), sets, **settings)

    assert [row["step"] for row in rows] == list(range(log_steps, 13, log_steps))
    assert set(waits.ages) == {age}
    assert waits.saves == [8, 12]
    assert set(waits.gathers) == {8, 12}


@pytest.mark.usefixtures("no_curves")
def test_bad_samples_are_gathered_when_there_are_new_ones(tmp_path, monkeypatch):
    """And each row has those until its own step."""
    sets = dict(train_data=write_shapes_with_bad_images(tmp_path / "few", 96))
    bad_until = {}  # step: how many bad samples there were until then

    def note_bad(log, step, *_):
        bad_until[step] = sum(log.bad.values())

    waits = Waits(monkeypatch)
    waits.spy(monkeypatch, Job, "save_if_due", lambda job, step: note_bad(job.log, step))
    settings = {**SHORT_RUN, "save_steps": 100, "log_steps": 1}
    rows = train(str(tmp_path / "run"), sets, **settings)

    found = {row["step"]: sum(row["bad"].values()) for row in rows}
    assert found == bad_until
    assert found[12] == 8
    steps_with_bad = {step for step in found if found[step] > found.get(step - 1, 0)}
    expected = {step + 2 for step in steps_with_bad if step + 2 < 12}
    assert set(waits.gathers) - {12} == expected
    assert 0 < len(expected) < 8

    # On two ranks, of which each sees some of them.
    out = str(tmp_path / "two")
    job = ("", {**TINY, **settings, **sets, "out_dir": out})
    assert run_ranks(2, run_jobs, job) == [[None], [None]]
    assert {row["step"]: sum(row["bad"].values()) for row in metrics(out)} == found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_copy_from_a_gpu_does_not_wait():
    x = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = HostCopy(x + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copy.read().tolist() == [2, 2, 2]


# ---- what cannot be written or shown ----


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("resumed_with, kept", [(dict(lr=1e-3), True), (dict(), False)], ids=str)
def test_an_old_config_is_kept_beside_one_that_differs(tmp_path, sets, resumed_with, kept):
    out = tmp_path / "run"
    train(str(out), sets, **SHORT_RUN, stop_after=4)
    old = (out / "config.py").read_text()

    train(str(out), sets, **SHORT_RUN, resume="auto", stop_after=1, **resumed_with)
    assert (out / "config-until-step-4.py").exists() == kept
    if kept:
        assert (out / "config-until-step-4.py").read_text() == old
        assert "lr = 0.001\n" in (out / "config.py").read_text()

        # From the same step with a third config: the run still came to step 4 with the first.
        resume = str(out / "checkpoints" / "step-00000004")
        train(str(out), sets, **{**SHORT_RUN, "lr": 5e-4}, resume=resume, stop_after=1)
        assert (out / "config-until-step-4.py").read_text() == old


def test_a_disk_that_is_full_at_the_start_is_said(tmp_path, sets, monkeypatch):
    def full(config, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.log.write_config", full)
    refused("cannot be written: No space", out_dir=str(tmp_path / "run"), **sets)


@pytest.mark.parametrize("key", ["tensorboard", "wandb"])
def test_a_missing_logger_is_found_before_the_data_are_read(tmp_path, sets, monkeypatch, key):
    def not_yet(*args, **options):
        raise AssertionError("the data are indexed")

    monkeypatch.setitem(sys.modules, key, None)  # importing it raises ImportError
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("runtime.job.load_index", not_yet)
    settings = dict(out_dir=str(tmp_path / "run"), train_data=sets["train_data"])
    value = True if key == "tensorboard" else "project"
    refused(f"pip install {key}", **settings, **{key: value})


@pytest.mark.usefixtures("no_curves")
def test_rows_of_the_metrics_wait_for_a_full_disk(tmp_path, sets, monkeypatch, capsys):
    """The disk is full for three rows. They are written when there is room again."""
    plain_append = MetricsFile.append
    appended = []

    def append(self, row):
        appended.append(row)
        good_file = self.file
        if 3 <= len(appended) < 6:
            self.file = open("/dev/full", "wb", buffering=0)
        plain_append(self, row)
        self.file = good_file

    monkeypatch.setattr(MetricsFile, "append", append)
    rows = train(str(tmp_path / "run"), sets, max_steps=8)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert "bytes wait" in capsys.readouterr().err


def test_curves_that_cannot_be_drawn_do_not_fail_the_run(tmp_path, sets, monkeypatch, capsys):
    def broken_plot(folders, out):
        raise ZeroDivisionError

    monkeypatch.setattr("runtime.log.plot", broken_plot)
    train(str(tmp_path / "run"), sets, max_steps=2)
    assert "the curves could not be drawn: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.usefixtures("no_curves")
def test_a_finished_evaluation_is_not_lost(tmp_path, sets):
    """Killed between the last checkpoint and its evaluation: the next job only evaluates."""
    out = str(tmp_path / "run")
    settings = dict(max_steps=4, save_steps=4, log_steps=2, eval_data=sets["eval_data"])
    rows = train(out, sets, **settings)
    assert "eval/zeroshot_top1" in rows[-1]

    with open(os.path.join(out, "metrics.jsonl"), "w") as f:
        for row in rows[:-1]:
            f.write(json.dumps(row) + "\n")
        f.write('{"step": 4, "eval/zero')  # an incomplete line, as a crash leaves it
    assert train(out, sets, **settings, resume="auto") == rows
    assert train(out, sets, **settings, resume="auto") == rows


# ---- bad samples ----


def write_shapes_with_bad_images(folder, every):
    """Shards of shapes in which one image of `every` is none -> their pattern."""
    pattern = shapes.write(str(folder))
    for path in glob.glob(str(folder / "*.tar")):
        with tarfile.open(path) as tar:
            files = [(member.name, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(path, "w") as tar:
            images = 0
            for name, content in files:
                if name.endswith("png"):
                    if images % every == 0:
                        content = b"no picture"
                    images += 1
                shapes.add(tar, name, content)
    return pattern


@pytest.mark.usefixtures("no_curves")
def test_bad_samples_are_counted_over_all_jobs(tmp_path, capsys):
    """They are replaced, and counted by reason in the metrics and in the log, across jobs."""
    out = str(tmp_path / "run")
    sets = dict(train_data=write_shapes_with_bad_images(tmp_path / "few", 96))
    train(out, sets, **SHORT_RUN, stop_after=6)
    rows = train(out, sets, **SHORT_RUN, resume="auto")

    # 4 in each of 2 epochs, some of them before the last row.
    assert rows[-1]["bad"] == {"corrupt image": 8}
    assert rows[-2]["bad"]["corrupt image"] <= 8
    assert "bad 8: {'corrupt image': 8}" in capsys.readouterr().out


@pytest.mark.usefixtures("no_curves")
def test_samples_of_which_none_is_good_end_the_run_in_one_line(tmp_path):
    empty = {f"s{i}": {"txt": b" "} for i in range(160)}
    pattern = write_shards(tmp_path / "set", (160,), **empty)
    settings = {**TINY, "train_data": pattern, "out_dir": str(tmp_path / "run")}
    with pytest.raises(SystemExit, match="error: .* bad samples in a row.*'empty caption'"):
        config.or_exit(training.main, words_of(**settings))


def test_too_many_bad_samples_stop_the_run(tmp_path, capsys):
    """More than 1 %."""
    sets = dict(train_data=write_shapes_with_bad_images(tmp_path / "many", 4))
    settings = {**TINY, **SHORT_RUN, **sets, "out_dir": str(tmp_path / "run")}
    with pytest.raises(SystemExit) as end:
        ranks.run(training.main, words_of(**settings))

    # One line, with a command that can be copied; exit status 1, and no traceback.
    message = r"error: .* of 192 samples are bad: {'corrupt image': \d+}; more than 1% end a run"
    assert re.match(message, end.value.code)
    assert end.value.code.endswith(f"python -m ingest.index --verify '{sets['train_data']}'")
    assert "error" not in capsys.readouterr().err
