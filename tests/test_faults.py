"""Every fault that a run can meet, made to happen: what it says, what it leaves, and that the run goes on as if nothing had been."""

import glob
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tarfile
import time

import pytest
import torch

import config
import faults
import shapes
import train as training
from conftest import ROOT
from helpers import (
    RUN,
    TINY,
    assert_same_run,
    ends,
    files_of,
    measured,
    newest,
    refused,
    run_ranks,
    same,
    start,
    train,
    weights,
    words_of,
)
from loss import ContrastiveLoss
from runtime import checkpoint

AT_ONCE = dict(
    save_background=False
)  # where a test must know which checkpoint is there at which moment
ALL = ["openclip", "sogclr", "isogclr", "fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sets):
    """An uninterrupted run of two ranks."""
    out = str(tmp_path_factory.mktemp("whole") / "run")
    for status, shown in ends(start("train.py", [], out, sets, 2)):
        assert status == 0, shown
    return out


@pytest.mark.parametrize(
    "kind, status, words",
    [
        (
            "kill",
            -9,
            r"cannot go on at step 6: rank 1 no longer answers, it was last heard of at (step \d|start-up)",
        ),
        ("hang", 1, r"rank 1 hangs at step 6: it has begun \d+ collectives, others \d+"),
        ("raise", 1, r"rank 1 failed at step 6: ValueError: boom"),
    ],
)
def test_a_rank_that_fails_ends_the_others(tmp_path, sets, uninterrupted, kind, status, words):
    """Within the time-out the other rank says which one it was, and where; the run then goes on as if nothing had been."""
    out = str(tmp_path / "run")
    timeout = 25 if kind == "hang" else 60
    began = time.monotonic()
    (status0, shown0), (status1, shown1) = ends(
        start("tests/faults.py", [f"{kind}@6:1"], out, sets, 2, timeout=timeout, **AT_ONCE)
    )
    assert status0 == 1 and status1 == status, shown0 + shown1
    assert re.search(words, shown0) and "rank 0" in shown0, shown0
    assert time.monotonic() - began < 170  # most of which is starting
    if kind == "raise":
        assert "error: rank 1, step 6: ValueError: boom" in shown1
    if kind == "hang":
        assert "in step_with_faults" in shown1, shown1  # where it hung
    assert newest(out) == "step-00000004"
    if kind == "kill":
        for status, shown in ends(start("train.py", [], out, sets, 2, resume="auto")):
            assert status == 0, shown
        assert_same_run(uninterrupted, out)


def test_a_first_rank_that_is_killed_takes_the_store_with_it(tmp_path, sets):
    """Without torchrun's agent the ranks' key-value store lives in rank 0: then there is nobody left to ask, which is said."""
    (_, _), (status, shown) = ends(
        start("tests/faults.py", ["kill@3:0"], str(tmp_path / "run"), sets, 2)
    )
    assert status == 1 and "rank 1" in shown and "step 3" in shown and "first host" in shown, shown


def test_ranks_end_with_their_torchrun(tmp_path):
    """Also while they still look for each other, where no watchdog is: a parent that is killed, and its child that waits for ever."""
    child = "from runtime import watchdog; import time; watchdog.end_with_torchrun(); print('up', flush=True); time.sleep(600)"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
        ],
        text=True,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "x", "RANK": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert parent.stdout.readline() == "up\n"
    parent.kill()
    assert (
        parent.stdout.read() == "error: rank 3 ends, because its torchrun has died\n"
    )  # the child's end closes the pipe


@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_a_signal_saves_and_leaves(tmp_path, sets, fault, capsys, name):
    """And the run that is continued equals one that was never asked, rows of the metrics included (one in three steps)."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    train(one, sets, **RUN)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    fault(f"{name}@5:0")
    train(two, sets, **RUN)
    assert (
        newest(two) == "step-00000006"
        and f"stopped after step 6 of 12 (SIG{name})" in capsys.readouterr().out
    )
    assert handlers == [
        signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    ]
    train(two, sets, **RUN, resume="auto")
    assert_same_run(one, two)


def test_a_signal_to_one_rank_stops_all_under_torchrun(tmp_path, sets, uninterrupted):
    """One rank of two gets SIGUSR1, later torchrun gets SIGTERM: both times both ranks save the same step and end in good order."""
    out = str(tmp_path / "run")
    settings = {**TINY, **RUN, "train_data": sets["train_data"], "out_dir": out, "resume": "auto"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        torchrun + [os.path.join(ROOT, "tests", "faults.py"), "USR1@3:1", *words_of(**settings)],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0 and "stopped after step 4 of 12" in run.stdout, (
        run.stdout + run.stderr
    )
    assert newest(out) == "step-00000004"
    agent = subprocess.Popen(
        torchrun
        + [os.path.join(ROOT, "train.py"), *words_of(**{**settings, "epochs": 50, "max_steps": 0})],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in agent.stdout:
        if line.startswith("step "):
            break
    agent.send_signal(signal.SIGTERM)
    shown = agent.communicate(timeout=60)[0]
    assert re.search(r"stopped after step \d+ of 300 \(SIGTERM\)", shown), shown
    step = int(re.search(r"stopped after step (\d+)", shown)[1])
    assert newest(out) == f"step-{step:08d}" and step > 5


@pytest.mark.parametrize("stop_after", [5, "0.05s"])
def test_a_chain_of_jobs_equals_one(tmp_path, sets, capsys, stop_after):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {**RUN, "max_steps": 7}
    train(one, sets, **settings)
    jobs = 0
    while jobs == 0 or newest(two) != "step-00000007":
        train(two, sets, **settings, resume="auto", stop_after=stop_after)
        jobs += 1
        assert jobs < 12
    assert jobs == 2 if stop_after == 5 else jobs > 2
    train(
        two, sets, **settings, resume="auto", stop_after=stop_after
    )  # a link too many does no harm
    assert "done in" in capsys.readouterr().out.splitlines()[-1]
    assert_same_run(one, two, 7)


def test_a_finished_evaluation_is_not_lost(tmp_path, sets):
    """Killed between the last checkpoint and its evaluation, a run started again does the evaluation, and only that."""
    out = str(tmp_path / "run")
    settings = dict(max_steps=4, save_steps=4, log_steps=2, eval_data=sets["eval_data"])
    rows = train(out, sets, **settings)
    assert "eval/zeroshot_top1" in rows[-1]
    with open(os.path.join(out, "metrics.jsonl"), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows[:-1])
        f.write('{"step": 4, "eval/zero')  # torn by a crash
    assert train(out, sets, **settings, resume="auto") == rows
    assert train(out, sets, **settings, resume="auto") == rows


@pytest.mark.parametrize(
    "kind, words",
    [
        ("feature", "the objective is not finite: on rank 0, sample ids"),
        ("gradient", "the gradient is not finite: on rank 0, sample ids"),
    ],
)
def test_not_finite_stops_with_step_and_ids(tmp_path, sets, fault, kind, words):
    """It stops before anything is saved of it, although a save is due at that step; the checkpoint before is good."""
    out = str(tmp_path / "run")
    fault(f"{kind}@8:0")
    with pytest.raises(RuntimeError, match=f"step 8: {words}"):
        train(out, sets, **RUN)
    assert newest(out) == "step-00000004"
    train(out, sets, **RUN, resume="auto")
    assert newest(out) == "step-00000012"


def test_not_finite_on_one_of_two_ranks_names_it(tmp_path, sets):
    for status, shown in ends(
        start("tests/faults.py", ["gradient@3:1"], str(tmp_path / "run"), sets, 2, log_steps=1)
    ):
        assert status == 1 and re.search(
            r"step 3: the gradient is not finite: on rank 1, sample ids \d+, ", shown
        ), shown


@pytest.mark.parametrize(
    "model", [{}, dict(model="RN50", patch_size=None, vision_layers="(1,1,1,1)", vision_width=8)]
)
def test_steps_that_are_not_finite_can_be_skipped(tmp_path, sets, fault, capsys, model):
    out = str(tmp_path / "run")
    fault("feature@5:0,gradient@7:0")
    rows = train(out, sets, **{**RUN, **model}, skip_nonfinite=True)
    assert rows[-1]["skipped"] == 2 and all(
        torch.isfinite(torch.tensor([row["objective"], row["grad_norm"]])).all() for row in rows
    )
    assert (
        "skipped step 5: the objective" in (shown := capsys.readouterr().out)
        and "skipped step 7: the gradient" in shown
    )
    for content in files_of(os.path.join(out, "checkpoints", "step-00000012")).values():
        for tensor in [
            *content.get("state_dict", {}).values(),
            *([content["table"][:, 2:]] if "table" in content else []),
        ]:
            assert torch.isfinite(tensor.float()).all()


def test_too_many_skipped_steps_stop(tmp_path, sets, fault):
    fault(",".join(f"feature@{step}:0" for step in range(2, 20)))
    with pytest.raises(RuntimeError, match="11 of 12 steps were not finite"):
        train(
            str(tmp_path / "run"),
            sets,
            **{**RUN, "max_steps": 24, "log_steps": 1},
            skip_nonfinite=True,
        )


def spoiled(folder, every):
    """The set of shapes, of which every so-manieth picture is no picture."""
    pattern = shapes.write(str(folder))
    for path in glob.glob(str(folder / "*.tar")):
        with tarfile.open(path) as tar:
            files = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
        with tarfile.open(path, "w") as tar:
            for n, (name, content) in enumerate(files):
                shapes.add(
                    tar,
                    name,
                    b"no picture" if name.endswith("png") and n // 3 % every == 0 else content,
                )
    return pattern


def test_bad_samples_are_counted_over_all_jobs_and_many_stop_the_run(tmp_path, capsys):
    """A few are replaced, and counted by reason in the metrics and in the log, on through a continued run; more than 1 % end it."""
    out = str(tmp_path / "run")
    few, many = (
        dict(train_data=spoiled(tmp_path / "few", 96)),
        dict(train_data=spoiled(tmp_path / "many", 4)),
    )
    train(out, few, **RUN, stop_after=6)
    rows = train(out, few, **RUN, resume="auto")
    assert [row["bad"].get("corrupt image", 0) for row in rows][-2:] == [
        rows[-2]["bad"]["corrupt image"],
        8,
    ]  # 4 in each of 2 epochs
    assert "bad 8: {'corrupt image': 8}" in capsys.readouterr().out
    with pytest.raises(
        RuntimeError, match=r"of 192 samples are bad: {'corrupt image': \d+}; look at the data"
    ):
        train(str(tmp_path / "many run"), many, **RUN)


class Little:
    """A model, an optimizer and a state, with which checkpoints can be made in a millisecond."""

    def __init__(self, out_dir, newest=None, **changes):
        self.c = config.Config(out_dir=str(out_dir), **changes)
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 16))
        self.optimizer = torch.optim.AdamW([dict(name="decay", params=self.model.parameters())])
        self.loss = ContrastiveLoss("fastclip-v2", 100)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.saver = checkpoint.Saver(
            self.c, self.model, self.optimizer, self.loss, self.scaler, newest=newest
        )

    def step(self):
        self.model(torch.ones(2, 64)).sum().backward()
        self.optimizer.step()
        self.loss.state.table += 1


def test_what_is_saved_is_the_moment_of_saving(tmp_path, monkeypatch):
    """Training goes on while the file is written: none of it gets into the checkpoint."""
    little, slow = Little(tmp_path), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: (time.sleep(0.5), slow(*args))[1])
    little.step()
    before = {k: v.clone() for k, v in little.model.state_dict().items()}
    waited = little.saver.save(1, {})
    assert little.saver.writing() and waited < 1.0  # of 1.5 s that the three files take
    little.step()
    assert little.saver.commit() and little.saver.newest.endswith("step-00000001")
    saved = files_of(little.saver.newest)
    assert same(saved["model.pt"]["state_dict"], before) and not same(
        little.model.state_dict(), before
    )
    assert saved["state-00000-of-00001.pt"]["table"][0, 2] == pytest.approx(1.03)
    assert (
        subprocess.run(
            ["sha256sum", "-c", "SHA256SUMS"], cwd=little.saver.newest, capture_output=True
        ).returncode
        == 0
    )


def test_killed_at_every_point_of_a_save(tmp_path, monkeypatch):
    """A process that dies at the n-th file operation of saving, for every n: there is always a whole checkpoint to go on from."""
    kills = 0
    for n in range(1, 100):
        out = tmp_path / str(n)
        little = Little(out, keep=1, save_background=False)
        little.step()
        little.saver.save(1, {})
        little.step()
        child = os.fork()
        if child == 0:
            left = [n]

            def dies(function):
                def call(*args, **options):
                    left[0] -= 1
                    if left[0] == 0:
                        os._exit(9)
                    return function(*args, **options)

                return call

            for module, names in (
                (checkpoint, ("write", "flush", "flush_folder", "remove")),
                (checkpoint.os, ("rename", "replace", "makedirs", "fsync")),
            ):
                for name in names:
                    setattr(module, name, dies(getattr(module, name)))
            little.saver.save(2, {})
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        found = newest(str(out))
        assert (
            found == "step-00000002" if status == 0 else found in ("step-00000001", "step-00000002")
        )
        little.saver.close()
        again = Little(
            out, newest=str(out / "checkpoints" / found)
        )  # the next run clears away what is left
        assert not glob.glob(str(out / "checkpoints" / "*.partial"))
        again.saver.close()
        if status == 0:
            break
        kills += 1
    assert kills > 15 and status == 0
    print(f"{kills} places")


def test_a_damaged_checkpoint_is_found_out_and_the_one_before_is_used(tmp_path, capsys):
    """Every file of the newest checkpoint truncated, flipped in one bit at a random place, emptied, removed; `latest` too."""
    little = Little(tmp_path / "run", keep=3, save_background=False)
    for step in (1, 2, 3):
        little.step()
        little.saver.save(step, {})
    little.saver.close()
    draw, tried = random.Random(0), 0
    root = tmp_path / "run" / "checkpoints"
    for name in os.listdir(root / "step-00000003"):
        path = root / "step-00000003" / name
        good = path.read_bytes()
        flips = [
            bytes([*good[:i], good[i] ^ 1 << draw.randrange(8), *good[i + 1 :]])
            for i in (draw.randrange(len(good) - 1) for _ in range(12))
        ]
        for bad in (*flips, good[:-2], good[: len(good) // 2], good + b"x", b"", None):
            path.unlink() if bad is None else path.write_bytes(bad)
            assert newest(str(tmp_path / "run")) == "step-00000002", (name, bad)
            shown = capsys.readouterr().err
            assert (
                "step-00000003 is damaged: " in shown and "continuing from step-00000002" in shown
            )
            path.write_bytes(good)
            tried += 1
    for latest, expected in (
        (b"", "step-00000003"),
        (b"\xff\x00garbage", None),
        (b"step-00000002", "step-00000002"),
        (None, "step-00000003"),
    ):
        (root / "latest").unlink() if latest is None else (root / "latest").write_bytes(latest)
        assert newest(str(tmp_path / "run")) == (expected or "step-00000003")
        tried += 1
        (root / "latest").write_bytes(b"step-00000003")
    for step in (1, 2, 3):
        os.truncate(root / f"step-{step:08d}" / "model.pt", 10)
    with pytest.raises(
        config.ConfigError, match="all checkpoints in .* are damaged .*step-00000001: model.pt"
    ):
        newest(str(tmp_path / "run"))
    with pytest.raises(config.ConfigError, match="step-00000002 cannot be used: model.pt"):
        checkpoint.find(config.Config(resume=str(root / "step-00000002")))
    print(f"{tried} damages")


def test_a_full_disk_leaves_the_checkpoint_before_and_the_training(
    tmp_path, sets, monkeypatch, capsys
):
    """A small file system that fills up, where one may be mounted; else the error that it gives. The save after it succeeds again."""
    out, real = str(tmp_path / "run"), checkpoint.write
    settings = {**RUN, "max_steps": 12, "save_steps": 4, "keep": 2}
    mounted = (
        hasattr(os, "geteuid")
        and os.geteuid() == 0
        and os.makedirs(out) is None
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", out], capture_output=True
        ).returncode
        == 0
    )
    ballast, calls = os.path.join(out, "ballast"), []

    def write(path, content):
        if path.endswith("train.pt"):
            calls.append(path)
        if path.endswith("train.pt") and len(calls) == 2:  # the second checkpoint
            if not mounted:
                raise OSError(28, "No space left on device", path)
            with open(ballast, "wb", buffering=0) as f:
                try:
                    while f.write(bytes(1 << 20)):
                        pass
                except OSError:
                    pass
        elif os.path.exists(ballast):
            os.remove(ballast)
        return real(path, content)

    monkeypatch.setattr(checkpoint, "write", write)
    try:
        rows = train(out, sets, **settings)
        shown = capsys.readouterr().err
        assert (
            "step-00000008 could not be saved: rank 0 on" in shown
            and "No space left on device" in shown
        )
        assert (
            "GB free" in shown and "newest good checkpoint is" in shown and "step-00000004" in shown
        )
        assert rows[-1]["step"] == 12 and newest(out) == "step-00000012"
        assert sorted(os.listdir(os.path.join(out, "checkpoints"))) == [
            "latest",
            "step-00000004",
            "step-00000012",
        ]
        calls.clear()
        calls.append("so that the last save is the one that fails")
        with pytest.raises(RuntimeError, match="the last checkpoint could not be saved"):
            train(out, sets, **{**settings, "max_steps": 16, "save_steps": 20}, resume="auto")
        assert newest(out) == "step-00000012"
    finally:
        if mounted:
            subprocess.run(["umount", out])


def test_rows_of_the_metrics_wait_for_a_full_disk(tmp_path, sets, monkeypatch, capsys):
    out = str(tmp_path / "run")
    steps = []

    def full_for_a_while(*args):
        log = [frame.f_locals["log"] for frame in frames() if "log" in frame.f_locals][0]
        steps.append(log.file)
        log.file = open("/dev/full", "wb", buffering=0) if 3 <= len(steps) < 6 else steps[0]
        return faults.plain_step(*args)

    def frames():
        frame = sys._getframe()
        while frame:
            yield frame
            frame = frame.f_back

    monkeypatch.setattr(training, "train_step", full_for_a_while)
    rows = train(out, sets, max_steps=8)
    assert [row["step"] for row in rows] == list(
        range(1, 9)
    ) and "bytes wait" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    little = Little(tmp_path)
    little.saver.save(1, {})
    little.saver.commit()
    little.model[0].bias.data[3] = float("inf")
    with pytest.raises(
        RuntimeError,
        match="0.bias is not finite after step 2, which is not saved. The newest good checkpoint is .*step-00000001",
    ):
        little.saver.save(2, {})


def test_what_was_given_up_is_put_aside(tmp_path):
    """Neither a damaged checkpoint nor one of a course that was left counts among those to keep, or as the one before."""

    def names():
        return sorted(name for name in os.listdir(tmp_path / "checkpoints") if name != "latest")

    def job(start, *saves, keep=2):
        little = Little(
            tmp_path,
            newest=start and str(tmp_path / "checkpoints" / f"step-{start:08d}"),
            keep=keep,
            save_background=False,
        )
        for step in saves:
            little.step()
            little.saver.save(step, {})
        little.saver.close()

    job(None, 4, 8)
    os.truncate(tmp_path / "checkpoints" / "step-00000008" / "model.pt", 10)
    assert newest(str(tmp_path)) == "step-00000004"
    job(4, 11)
    assert names() == ["step-00000004", "step-00000008.abandoned", "step-00000011"]
    job(4, 6)  # as --resume=.../step-00000004 does
    assert names() == [
        "step-00000004",
        "step-00000006",
        "step-00000008.abandoned",
        "step-00000011.abandoned",
    ]
    os.truncate(tmp_path / "checkpoints" / "step-00000006" / "model.pt", 10)
    assert newest(str(tmp_path)) == "step-00000004"


def in_jobs(*jobs):
    """Several trainings one after another in a process of a group, each a (fault, settings) -> None, or what they raised."""
    raised = []
    for text, settings in jobs:
        faults.install(faults.parse(text))
        try:
            training.main(words_of(**settings))
            raised.append(None)
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")
    return raised


def test_two_ranks_with_batchnorm_resume_bit_for_bit(tmp_path, sets):
    """Each rank goes on with the statistics of its own samples, whenever the run was saved; what is saved to evaluate is their mean."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {
        **TINY,
        **RUN,
        "train_data": sets["train_data"],
        "model": "RN50",
        "patch_size": None,
        "vision_layers": "(1,1,1,1)",
        "vision_width": 8,
        "max_steps": 6,
        "eval_data": sets["eval_data"],
        "eval_steps": 2,
    }
    jobs = [
        ("", {**settings, "out_dir": one}),
        ("", {**settings, "out_dir": two, "stop_after": 3}),
        ("", {**settings, "out_dir": two, "resume": "auto"}),
    ]
    assert run_ranks(2, in_jobs, *jobs) == [[None] * 3] * 2
    assert_same_run(one, two, 6)
    model, states = (
        files_of(os.path.join(one, "checkpoints", "step-00000006"))["model.pt"]["state_dict"],
        [],
    )
    for rank in range(2):
        states.append(
            files_of(os.path.join(one, "checkpoints", "step-00000006"))[
                f"state-{rank:05d}-of-00002.pt"
            ]["batchnorm"][0]
        )
    assert not torch.equal(*states)
    torch.testing.assert_close(model["visual.bn1.running_mean"], sum(states) / 2)


def full_disk_on_the_second_rank(*jobs):
    real = checkpoint.write

    def write(path, content):
        if path.endswith("state-00001-of-00002.pt") and "step-00000008" in path:
            raise OSError(28, "No space left on device", path)
        return real(path, content)

    checkpoint.write = write
    return in_jobs(*jobs)


def test_a_full_disk_and_nan_with_two_ranks(tmp_path, sets, capfd):
    """A save that fails on one rank is none, and said; NaN while a checkpoint is still being written leaves that one whole."""
    out, nan = str(tmp_path / "run"), str(tmp_path / "nan")
    settings = {**TINY, **RUN, "train_data": sets["train_data"]}
    raised = run_ranks(
        2,
        full_disk_on_the_second_rank,
        ("", {**settings, "out_dir": out}),
        ("feature@5:1", {**settings, "out_dir": nan, "log_steps": 1}),
    )
    for first, second in raised:
        assert first is None and re.match(
            "BadRun: step 5: the objective is not finite: on rank 1, sample ids ", second
        )
    assert re.search(
        "step-00000008 could not be saved: rank 1 on .*No space left", capfd.readouterr().err
    )
    assert sorted(os.listdir(os.path.join(out, "checkpoints"))) == [
        "latest",
        "step-00000004",
        "step-00000012",
    ]
    assert newest(nan) == "step-00000004"


def test_a_scaler_that_finds_its_scale(tmp_path, sets, fault, monkeypatch):
    """What float16 does on a GPU: steps whose scaled gradient overflows are skipped, and the scale falls until none does."""
    scalers, real = [], torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled: scalers.append(real(device, init_scale=2.0**127)) or scalers[-1],
    )
    rows = train(str(tmp_path / "run"), sets, **RUN, skip_nonfinite=True)
    assert 0 < rows[-1]["skipped"] < 10 and scalers[0].get_scale() < 2.0**127
    assert [row["objective"] is None for row in rows] == [True, False, False, False] and rows[-1][
        "objective"
    ] < 10


def test_a_slow_start_is_no_hang(tmp_path, sets):
    """Indexing that takes longer than the time-out, but goes on, on the first of two ranks; and one that does not go on."""
    folder = os.path.dirname(sets["train_data"])
    slow = f"pipe:f={folder}/{{00000..00003}}.tar; n=$(basename $f .tar); [ -e $f.seen ] || sleep $((3 * (1 + $n))); touch $f.seen; cat $f"
    ok = ends(
        start(
            "train.py",
            [],
            str(tmp_path / "a"),
            {"train_data": slow},
            2,
            index_remote=True,
            timeout=8,
            max_steps=1,
            epochs=1,
        )
    )
    assert [status for status, _ in ok] == [0, 0], ok
    hung = ends(
        start(
            "train.py",
            [],
            str(tmp_path / "b"),
            {"train_data": f"pipe:sleep 20; cat {folder}/00000.tar"},
            2,
            index_remote=True,
            timeout=8,
            max_steps=1,
            epochs=1,
        )
    )
    assert [status for status, _ in hung] == [1, 1] and "start-up" in hung[0][1], hung


def test_a_picture_that_fails_does_not_fail_the_run(tmp_path, sets, monkeypatch, capsys):
    monkeypatch.setattr("runtime.log.plot", lambda folders, out: 1 / 0)
    train(str(tmp_path / "run"), sets, max_steps=2)
    assert "the curves could not be drawn: ZeroDivisionError" in capsys.readouterr().out


def test_every_m_minutes(tmp_path, sets):
    out = str(tmp_path / "run")
    train(out, sets, **{**RUN, "save_steps": 100}, save_minutes=1e-6)
    saved = [
        name for name in os.listdir(os.path.join(out, "checkpoints")) if name.startswith("step")
    ]
    assert len(saved) >= 5 and "step-00000012" in saved
    with open(os.path.join(out, "metrics.jsonl")) as f:
        assert sum(json.loads(line)["save_wait"] for line in f) > 0


def test_written_beside_or_at_once_is_the_same(tmp_path, sets):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    train(one, sets, **RUN)
    train(two, sets, **RUN, save_background=False)
    for step in (4, 8, 12):
        assert_same_run(one, two, step)


@pytest.mark.parametrize("algorithm", ALL)
def test_resume_is_bit_for_bit(tmp_path, sets, algorithm):
    """Stopped at step 5, inside an epoch of 6 and between two rows of the metrics, and continued with other workers."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {**RUN, "algorithm": algorithm}
    train(one, sets, **settings)
    train(two, sets, **settings, stop_after=5)
    assert newest(two) == "step-00000005"
    train(two, sets, **settings, resume="auto", workers=2 if algorithm == "fastclip-v3" else 0)
    assert_same_run(one, two)


@pytest.mark.parametrize(
    "changes",
    [
        dict(
            model="RN50", patch_size=None, vision_layers="(1,1,1,1)", vision_width=8, micro_batch=16
        ),
        dict(optimizer="lamb"),
        dict(optimizer="lion"),
        dict(optimizer="sgdm"),
    ],
)
def test_resume_is_bit_for_bit_with_batchnorm_micro_batches_and_any_optimizer(
    tmp_path, sets, changes
):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {**RUN, "algorithm": "fastclip-v3", "max_steps": 7, **changes}
    train(one, sets, **settings)
    train(two, sets, **settings, stop_after=3)
    train(two, sets, **settings, resume="auto")
    assert_same_run(one, two, 7)


def test_four_two_eight_and_one_ranks_in_one_epoch(tmp_path, sets, monkeypatch):
    """The world changes in the middle of an epoch of 6 steps: each sample is seen exactly once, and it all equals one rank's run."""
    one, out, ids = str(tmp_path / "one"), str(tmp_path / "run"), tmp_path / "ids"
    settings = dict(algorithm="fastclip-v2", epochs=1, save_steps=100, log_steps=1)
    train(one, sets, **settings)
    monkeypatch.setenv("FASTCLIP_IDS", str(ids))
    for ranks, steps in ((4, 2), (2, 1), (8, 1)):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            os.path.join(ROOT, "tests", "faults.py"),
            "",
            *words_of(
                **{
                    **TINY,
                    **settings,
                    "train_data": sets["train_data"],
                    "out_dir": out,
                    "resume": "auto",
                    "stop_after": steps,
                }
            ),
        ]
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert run.returncode == 0, run.stderr
    assert newest(out) == "step-00000004"
    faults.install({})
    try:
        train(out, sets, **settings, resume="auto")
    finally:
        training.train_step = faults.plain_step
    seen = [int(i) for i in ids.read_text().split()]
    assert sorted(seen) == list(range(384))
    for a, b in zip(measured(one), measured(out)):
        assert {k: v for k, v in a.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in b.items() if isinstance(v, float)}, rel=2e-4
        )
    (model, train_pt, state), (model2, train_pt2, state2) = weights(one), weights(out)
    for name in model:
        torch.testing.assert_close(model2[name], model[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state2, state, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_continued_is_refused(tmp_path, sets):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    train(one, sets, max_steps=2)
    train(two, sets, max_steps=2)
    base = dict(train_data=sets["train_data"], out_dir=one)
    refused("already holds a run", **base, resume=two + "/checkpoints/step-00000002")
    refused("is at step 2, this run ends at step 1", **base, resume="auto", max_steps=1)
    other = shapes.write(
        str(tmp_path / "set"), shards=3, per_shard=128
    )  # as many samples, in other shards
    refused("another data set", **{**base, "train_data": other}, resume="auto")


def test_two_runs_cannot_write_to_one_folder(tmp_path, sets):
    first = Little(tmp_path / "run")
    refused(
        "another run is writing to",
        "--out_dir",
        out_dir=str(tmp_path / "run"),
        train_data=sets["train_data"],
    )
    first.saver.close()
    Little(tmp_path / "run").saver.close()


def test_nothing_is_writable_by_everybody(tmp_path, sets):
    before = os.umask(0)
    try:
        train(str(tmp_path / "run"), sets, max_steps=2)
    finally:
        os.umask(before)
    paths = [
        os.path.join(folder, name)
        for folder, folders, names in os.walk(tmp_path / "run")
        for name in [*folders, *names]
    ]
    assert len(paths) > 8 and not [
        p for p in [str(tmp_path / "run"), *paths] if os.stat(p).st_mode & stat.S_IWOTH
    ]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/fastclip-was-here",)


def test_checkpoints_run_no_code(tmp_path):
    torch.save({"state_dict": Evil()}, tmp_path / "model.pt")
    with pytest.raises(config.ConfigError, match="cannot be read"):
        checkpoint.read(str(tmp_path / "model.pt"))
    assert not os.path.exists("/tmp/fastclip-was-here")
    for path in glob.glob(os.path.join(ROOT, "*.py")):
        for call in re.findall(r"torch\.load\(.*", open(path).read()):
            assert "weights_only=True" in call, (path, call)
