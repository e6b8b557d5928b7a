"""runtime/checkpoint.py: saving beside the training, kills, damage, a full disk, two runs."""

import glob
import itertools
import os
import random
import re
import shutil
import subprocess
import time

import pytest
import torch

import config
from helpers import (
    SHORT_RUN,
    TINY,
    assert_same_run,
    checkpoint_files,
    checkpoint_names,
    equal,
    newest_checkpoint,
    refused,
    run_jobs,
    train,
)
from loss import ContrastiveLoss
from rank_server import run_ranks
from runtime import checkpoint

pytestmark = pytest.mark.usefixtures("no_curves")


class SmallRun:
    """A model, an optimizer and a u-state of which checkpoints can be made in milliseconds."""

    def __init__(self, out_dir, newest=None, **changes):
        c = config.Config(out_dir=str(out_dir), **changes)
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 16))
        self.optimizer = torch.optim.AdamW([dict(name="decay", params=self.model.parameters())])
        self.loss = ContrastiveLoss("fastclip-v2", 100)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.saver = checkpoint.Saver(
            c, self.model, self.optimizer, self.loss, scaler, newest=newest
        )

    def step(self):
        self.model(torch.ones(2, 64)).sum().backward()
        self.optimizer.step()
        self.loss.state.table += 1

    def step_and_save(self, step):
        self.step()
        self.saver.save(step, {})


# ---- saving ----


def test_a_checkpoint_holds_the_moment_of_saving(tmp_path, monkeypatch):
    """Training goes on while the files are written: nothing of it gets into them."""
    plain_write = checkpoint.write_file

    def slow_write(path, content):
        time.sleep(0.5)
        return plain_write(path, content)

    monkeypatch.setattr(checkpoint, "write_file", slow_write)
    run = SmallRun(tmp_path)
    run.step()
    weights = {name: x.clone() for name, x in run.model.state_dict().items()}
    waited = run.saver.save(1, {})
    assert run.saver.writing()
    assert waited < 1.0  # of the 1.5 s that three files take

    run.step()
    assert run.saver.wait()
    assert run.saver.newest.endswith("step-00000001")
    saved = checkpoint_files(run.saver.newest)
    assert equal(saved["model.pt"]["state_dict"], weights)
    assert not equal(run.model.state_dict(), weights)
    # tau of the first sample, 0.03 in the beginning, plus 1 for the first step.
    assert saved["state-00000-of-00001.pt"]["table"][0, 2] == pytest.approx(1.03)

    command = ["sha256sum", "-c", "SHA256SUMS"]
    check = subprocess.run(command, cwd=run.saver.newest, capture_output=True)
    assert check.returncode == 0


def test_saving_in_the_background_or_at_once_is_the_same(tmp_path, sets):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    train(one, sets, **SHORT_RUN)
    train(two, sets, **SHORT_RUN, save_background=False)
    for step in (4, 8, 12):
        assert_same_run(one, two, step)


def test_save_minutes(tmp_path, sets):
    out = str(tmp_path / "run")
    rows = train(out, sets, **{**SHORT_RUN, "save_steps": 100}, save_minutes=1e-6)
    assert len(checkpoint_names(out)) >= 5
    assert "step-00000012" in checkpoint_names(out)
    assert sum(row["save_wait"] for row in rows) > 0


def test_nonfinite_weights_are_not_saved(tmp_path):
    run = SmallRun(tmp_path)
    run.saver.save(1, {})
    run.saver.wait()
    run.model[0].bias.data[3] = float("inf")
    message = (
        "0.bias is not finite after step 2, which is not saved. "
        "The newest good checkpoint is .*step-00000001"
    )
    with pytest.raises(config.BadRun, match=message):
        run.saver.save(2, {})


def die_at_operation(number):
    """From now on this process dies at the n-th file operation of a save."""
    operations = itertools.count(1)

    def dying(function):
        def call(*args, **options):
            if next(operations) == number:
                os._exit(9)
            return function(*args, **options)

        return call

    for name in ("write_file", "write_text", "flush", "flush_folder", "remove"):
        setattr(checkpoint, name, dying(getattr(checkpoint, name)))
    for name in ("rename", "replace", "makedirs", "fsync"):
        setattr(os, name, dying(getattr(os, name)))


def test_killed_at_every_point_of_a_save(tmp_path):
    """A process dies at the n-th file operation of a save, for every n.

    There is always a complete checkpoint, and the next run clears away what is left.
    """
    kills = 0
    for number in range(1, 100):
        out = tmp_path / str(number)
        run = SmallRun(out, keep=1, save_background=False)
        run.step_and_save(1)
        run.step()

        child = os.fork()
        if child == 0:
            die_at_operation(number)
            run.saver.save(2, {})
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)

        found = newest_checkpoint(str(out))
        if status == 0:
            assert found == "step-00000002"
        else:
            assert found in ("step-00000001", "step-00000002")

        run.saver.close()
        next_run = SmallRun(out, newest=str(out / "checkpoints" / found))
        assert not glob.glob(str(out / "checkpoints" / "*.partial"))
        next_run.saver.close()
        if status == 0:
            break
        kills += 1

    assert status == 0
    assert kills > 15
    print(f"{kills} places")


# ---- damage ----


def damaged_versions(content, draw):
    """With one bit flipped at random (12 times), truncated, longer, empty, removed (None)."""
    for _ in range(12):
        i = draw.randrange(len(content) - 1)
        flipped = content[i] ^ 1 << draw.randrange(8)
        yield bytes([*content[:i], flipped, *content[i + 1 :]])
    yield content[:-2]
    yield content[: len(content) // 2]
    yield content + b"x"
    yield b""
    yield None


def write_or_remove(path, content):
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.fixture
def three_checkpoints(tmp_path):
    """A run with checkpoints of steps 1, 2 and 3 -> its folder, a Path."""
    out = tmp_path / "run"
    run = SmallRun(out, keep=3, save_background=False)
    for step in (1, 2, 3):
        run.step_and_save(step)
    run.saver.close()
    return out


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(three_checkpoints, capsys):
    """For every file of the newest checkpoint, damaged in every way."""
    draw = random.Random(0)
    tried = 0
    folder = three_checkpoints / "checkpoints" / "step-00000003"
    for name in os.listdir(folder):
        path = folder / name
        good = path.read_bytes()
        for bad in damaged_versions(good, draw):
            write_or_remove(path, bad)
            assert newest_checkpoint(str(three_checkpoints)) == "step-00000002", (name, bad)
            printed = capsys.readouterr().err
            assert "step-00000003 is damaged: " in printed
            assert "using step-00000002, the newest" in printed
            path.write_bytes(good)
            tried += 1

    # 4 files in 17 ways; with `latest`, below, 72.
    assert tried == 68


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "step-00000003"),
        (b"\xff\x00garbage", "step-00000003"),
        (b"step-00000002", "step-00000002"),
        (None, "step-00000003"),
    ],
    ids=["empty", "garbage", "older", "removed"],
)
def test_latest_may_be_damaged(three_checkpoints, content, expected, capsys):
    """A newer checkpoint than `latest` names is not used: its save had not ended. This is said."""
    write_or_remove(three_checkpoints / "checkpoints" / "latest", content)
    assert newest_checkpoint(str(three_checkpoints)) == expected
    printed = capsys.readouterr().err
    if content == b"step-00000002":
        assert "step-00000003 is not used: it is later than step-00000002" in printed
    else:
        assert "latest names no checkpoint" in printed


def test_damage_to_all_checkpoints_or_to_the_one_asked_for_is_refused(three_checkpoints):
    root = three_checkpoints / "checkpoints"
    for step in (1, 2, 3):
        os.truncate(root / f"step-{step:08d}" / "model.pt", 10)

    message = "all checkpoints in .* are damaged .*step-00000001: model.pt"
    with pytest.raises(config.ConfigError, match=message):
        newest_checkpoint(str(three_checkpoints))
    message = "step-00000002 cannot be used: model.pt"
    with pytest.raises(config.ConfigError, match=message):
        checkpoint.find(config.Config(resume=str(root / "step-00000002")))


def test_resume_may_end_in_a_slash(three_checkpoints):
    """The Saver compares the names of folders."""
    folder = str(three_checkpoints / "checkpoints" / "step-00000002")
    c = config.Config(out_dir=str(three_checkpoints), resume=folder + "/")
    assert checkpoint.find(c) == folder


def test_checkpoints_that_were_given_up_are_put_aside(tmp_path):
    """Neither a damaged checkpoint nor one of an abandoned course counts among those to keep."""

    def job(start, *saves):
        newest = str(tmp_path / "checkpoints" / f"step-{start:08d}") if start else None
        run = SmallRun(tmp_path, newest=newest, keep=2, save_background=False)
        for step in saves:
            run.step_and_save(step)
        run.saver.close()

    job(None, 4, 8)
    os.truncate(tmp_path / "checkpoints" / "step-00000008" / "model.pt", 10)
    assert newest_checkpoint(str(tmp_path)) == "step-00000004"

    job(4, 11)
    assert checkpoint_names(tmp_path) == [
        "step-00000004",
        "step-00000008.abandoned",
        "step-00000011",
    ]

    job(4, 6)  # as --resume=.../step-00000004 does
    assert checkpoint_names(tmp_path) == [
        "step-00000004",
        "step-00000006",
        "step-00000008.abandoned",
        "step-00000011.abandoned",
    ]
    os.truncate(tmp_path / "checkpoints" / "step-00000006" / "model.pt", 10)
    assert newest_checkpoint(str(tmp_path)) == "step-00000004"


def test_killed_while_checkpoints_are_put_aside(tmp_path, capsys):
    """A run that goes back to step 4 never returns to what it gave up."""
    run = SmallRun(tmp_path, keep=3, save_background=False)
    for step in (4, 8, 12):
        run.step_and_save(step)
    run.saver.close()
    newest = str(tmp_path / "checkpoints" / "step-00000004")
    plain_rename = os.rename

    def rename_and_die(old, new):
        plain_rename(old, new)
        os._exit(9)

    child = os.fork()
    if child == 0:
        os.rename = rename_and_die
        SmallRun(tmp_path, newest=newest)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert checkpoint_names(tmp_path) == [
        "step-00000004",
        "step-00000008",
        "step-00000012.abandoned",
    ]
    assert newest_checkpoint(str(tmp_path)) == "step-00000004"

    SmallRun(tmp_path, newest=newest).saver.close()
    assert "step-00000008.abandoned" in checkpoint_names(tmp_path)
    assert "put aside as .abandoned" in capsys.readouterr().err


# ---- a full disk ----


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch, capsys):
    """It is known before the first step how much a save takes, at least."""

    def disk(free):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        return lambda path: usage

    size = 2 * 4 * (64 * 16 + 16) + 4 * 100 * 9  # weights, moments, and nine numbers per sample
    usage_of = {free: disk(free) for free in (size - 1, size, 4 * size)}
    monkeypatch.setattr(shutil, "disk_usage", usage_of[size - 1])
    with pytest.raises(config.ConfigError, match="checkpoints has no room: a checkpoint takes"):
        SmallRun(tmp_path / "a")

    monkeypatch.setattr(shutil, "disk_usage", usage_of[size])
    SmallRun(tmp_path / "b", keep=2)
    assert "keep = 2 needs room for 3 more" in capsys.readouterr().err

    monkeypatch.setattr(shutil, "disk_usage", usage_of[4 * size])
    SmallRun(tmp_path / "c", keep=2)
    assert "room" not in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A folder, and whether it is a file system of 200 MB. That needs the right to mount one."""
    folder = str(tmp_path / "run")
    os.makedirs(folder)
    mounted = False
    if os.geteuid() == 0:
        command = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", folder]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    yield folder, mounted
    if mounted:
        subprocess.run(["umount", folder])


class FullDisk:
    """Its write_file takes the place of checkpoint.write_file. One save meets a full disk."""

    def __init__(self, folder, mounted):
        self.ballast = os.path.join(folder, "ballast")
        self.mounted = mounted
        self.plain_write = checkpoint.write_file

    def fail_at_save(self, number):
        """The disk is full when train.pt of this save, counted from now on, is to be written."""
        self.failing_save = number
        self.saves = 0

    def write_file(self, path, content):
        if os.path.exists(self.ballast):
            os.remove(self.ballast)
        if path.endswith("train.pt"):
            self.saves += 1
            if self.saves == self.failing_save:
                self.fill(path)
        return self.plain_write(path, content)

    def fill(self, path):
        """Fill the small disk; where there is none, raise the error that it would give."""
        if not self.mounted:
            raise OSError(28, "No space left on device", path)
        with open(self.ballast, "wb", buffering=0) as f:
            try:
                while f.write(bytes(1 << 20)):
                    pass
            except OSError:
                pass


def test_a_full_disk_costs_one_checkpoint(small_disk, sets, monkeypatch, capsys):
    """The checkpoint before it stays, training goes on, and the next save succeeds again."""
    out, mounted = small_disk
    settings = {**SHORT_RUN, "keep": 2}
    disk = FullDisk(out, mounted)
    monkeypatch.setattr(checkpoint, "write_file", disk.write_file)
    disk.fail_at_save(2)
    rows = train(out, sets, **settings)

    printed = capsys.readouterr().err
    for words in (
        "step-00000008 could not be saved: rank 0 on",
        "No space left on device",
        "GB free",
        "newest good checkpoint is",
        "step-00000004",
    ):
        assert words in printed
    assert rows[-1]["step"] == 12
    assert newest_checkpoint(out) == "step-00000012"
    assert checkpoint_names(out) == ["step-00000004", "step-00000012"]

    # If the last save of a run fails, the run fails.
    disk.fail_at_save(1)
    settings.update(max_steps=16, save_steps=20)
    with pytest.raises(config.BadRun, match="the last checkpoint could not be saved"):
        train(out, sets, **settings, resume="auto")
    assert newest_checkpoint(out) == "step-00000012"


def test_weights_that_differ_between_ranks_are_not_saved(tmp_path, sets):
    out = str(tmp_path / "run")
    settings = {**TINY, **SHORT_RUN, **sets, "out_dir": out}
    for [error] in run_ranks(2, run_jobs, ("drift@6:1", settings)):
        assert "have drifted apart" in error
        assert "on ranks [1]" in error
    assert checkpoint_names(out) == ["step-00000004"]


def run_jobs_with_a_full_disk_on_rank_1(*jobs):
    plain_write = checkpoint.write_file

    def write(path, content):
        if path.endswith("state-00001-of-00002.pt") and "step-00000008" in path:
            raise OSError(28, "No space left on device", path)
        return plain_write(path, content)

    checkpoint.write_file = write
    return run_jobs(*jobs)


def test_a_full_disk_and_nan_with_two_ranks(tmp_path, sets, capfd):
    """A save that fails on one rank is none, which is said.

    A NaN while a checkpoint is still being written leaves that checkpoint complete.
    """
    full, nan = str(tmp_path / "full"), str(tmp_path / "nan")
    settings = {**TINY, **SHORT_RUN, "train_data": sets["train_data"]}
    errors = run_ranks(
        2,
        run_jobs_with_a_full_disk_on_rank_1,
        ("", {**settings, "out_dir": full}),
        ("feature@5:1", {**settings, "out_dir": nan, "log_steps": 1}),
    )

    message = "BadRun: step 5: the objective is not finite: on rank 1, sample ids "
    for of_full, of_nan in errors:
        assert of_full is None
        assert of_nan.startswith(message)
    message = "step-00000008 could not be saved: rank 1 on .*No space left"
    assert re.search(message, capfd.readouterr().err)
    assert checkpoint_names(full) == ["step-00000004", "step-00000012"]
    assert newest_checkpoint(nan) == "step-00000004"


# ---- an out_dir that cannot be used, and two runs ----


@pytest.mark.parametrize("name", ["file", "file/run", "/proc/run"])
def test_an_out_dir_that_cannot_be_made_is_refused_with_the_reason(tmp_path, sets, name):
    """/proc stands for what cannot be written: it takes no file of root's, either."""
    (tmp_path / "file").write_text("")
    out = str(tmp_path / name)
    reason = "No such file" if name.startswith("/proc") else "Not a directory"
    refused(f"out_dir = {out!r} cannot be written: {reason}", out_dir=out, **sets)


def test_two_runs_cannot_write_to_one_folder(tmp_path, sets):
    out = str(tmp_path / "run")
    first = SmallRun(out)
    refused("another run is writing to", "--out_dir", out_dir=out, train_data=sets["train_data"])

    first.saver.close()
    second = SmallRun(out)
    second.saver.close()
