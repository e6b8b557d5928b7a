"""A run that is continued: bit for bit as if never stopped, on other ranks, and refusals."""

import dataclasses
import os
import re
import shutil

import pytest
import torch

import config
import faults
import shapes
from helpers import (
    SHORT_RUN,
    TINY,
    TINY_RESNET,
    assert_same_run,
    checkpoint_files,
    checkpoint_folder,
    continue_from,
    metrics_without_clock,
    newest_checkpoint,
    refused,
    run_jobs,
    train,
    weights,
)
from loss import ALGORITHMS
from rank_server import run_ranks
from runtime import checkpoint

pytestmark = pytest.mark.usefixtures("no_curves")


# ---- bit for bit ----


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resume_is_bit_for_bit(tmp_path, sets, algorithm):
    """Stopped at step 5, inside an epoch of 6 and between two rows of the metrics.

    Other numbers of workers make no difference.
    """
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {**SHORT_RUN, "algorithm": algorithm}
    train(one, sets, **settings)

    train(two, sets, **settings, stop_after=5)
    assert newest_checkpoint(two) == "step-00000005"
    workers = 2 if algorithm == "fastclip-v3" else 0
    train(two, sets, **settings, resume="auto", workers=workers)
    assert_same_run(one, two)


@pytest.mark.parametrize("algorithm", ["openclip", "fastclip-v2", "fastclip-v3"])
def test_resume_from_an_older_checkpoint_is_bit_for_bit(tmp_path, sets, algorithm):
    """A copy of a finished run continues at step 8, inside epoch 1, with workers.

    The rows of the metrics after that step are there already, and are replaced.
    """
    one, copy = str(tmp_path / "one"), str(tmp_path / "copy")
    settings = dict(algorithm=algorithm, max_steps=14, save_steps=8, keep=5)
    train(one, sets, **settings)

    shutil.copytree(one, copy)
    continue_from(copy, 8)
    train(copy, sets, resume="auto", workers=2, **settings)
    assert_same_run(one, copy, 14)


@pytest.mark.parametrize(
    "changes",
    [
        dict(TINY_RESNET, micro_batch=16),
        dict(optimizer="lamb"),
        dict(optimizer="lion"),
        dict(optimizer="sgdm"),
    ],
    ids=["batchnorm-micro_batch", "lamb", "lion", "sgdm"],
)
def test_resume_is_bit_for_bit_with_other_settings(tmp_path, sets, changes):
    """With BatchNorm and micro-batches, and with every optimizer."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {**SHORT_RUN, "algorithm": "fastclip-v3", "max_steps": 7, **changes}
    train(one, sets, **settings)
    train(two, sets, **settings, stop_after=3)
    train(two, sets, **settings, resume="auto")
    assert_same_run(one, two, 7)


def test_two_ranks_with_batchnorm_resume_bit_for_bit(tmp_path, sets):
    """Each rank goes on with its own running statistics. The saved weights have their mean."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {
        **TINY,
        **SHORT_RUN,
        **TINY_RESNET,
        **sets,
        "max_steps": 6,
        "eval_steps": 2,
    }
    errors = run_ranks(
        2,
        run_jobs,
        ("", {**settings, "out_dir": one}),
        ("", {**settings, "out_dir": two, "stop_after": 3}),
        ("", {**settings, "out_dir": two, "resume": "auto"}),
    )
    assert errors == [[None, None, None], [None, None, None]]
    assert_same_run(one, two, 6)

    files = checkpoint_files(checkpoint_folder(one, 6))
    own0 = files["state-00000-of-00002.pt"]["batchnorm"][0]
    own1 = files["state-00001-of-00002.pt"]["batchnorm"][0]
    mean = files["model.pt"]["state_dict"]["visual.bn1.running_mean"]
    assert not torch.equal(own0, own1)
    torch.testing.assert_close(mean, (own0 + own1) / 2)


# ---- other numbers of ranks ----


def floats(row):
    return {key: value for key, value in row.items() if isinstance(value, float)}


def test_four_two_eight_and_one_ranks_in_one_epoch(tmp_path, sets, monkeypatch):
    """The number of ranks changes inside an epoch of 6 steps.

    Each sample is seen exactly once, and the run equals that of one rank.
    """
    one, out, ids = str(tmp_path / "one"), str(tmp_path / "run"), tmp_path / "ids"
    settings = dict(algorithm="fastclip-v2", epochs=1, save_steps=100, log_steps=1)
    train(one, sets, **settings)

    monkeypatch.setenv("FASTCLIP_IDS", str(ids))
    job = {**TINY, **settings, "train_data": sets["train_data"], "out_dir": out, "resume": "auto"}
    for ranks, steps in ((4, 2), (2, 1), (8, 1)):
        errors = run_ranks(ranks, run_jobs, ("", {**job, "stop_after": steps}))
        assert errors == [[None]] * ranks
    assert newest_checkpoint(out) == "step-00000004"

    # This process records ids, too, but has no fault.
    faults.install({})
    try:
        train(out, sets, **settings, resume="auto")
    finally:
        faults.uninstall()

    seen = [int(i) for i in ids.read_text().split()]
    assert sorted(seen) == list(range(384))

    for a, b in zip(metrics_without_clock(one), metrics_without_clock(out)):
        assert floats(a) == pytest.approx(floats(b), rel=2e-4)
    model, _, state = weights(one)
    model2, _, state2 = weights(out)
    for name in model:
        torch.testing.assert_close(model2[name], model[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state2, state, rtol=1e-3, atol=1e-4)


# ---- refusals ----


@pytest.fixture
def finished(tmp_path, sets):
    """The settings of a run of two steps that has ended."""
    out = str(tmp_path / "run")
    train(out, sets, max_steps=2)
    return dict(train_data=sets["train_data"], out_dir=out)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, sets, finished):
    """It would write over the run that is already in out_dir."""
    other = str(tmp_path / "other")
    train(other, sets, max_steps=2)
    refused("already holds a run", **finished, resume=checkpoint_folder(other, 2))


def test_a_checkpoint_from_beyond_the_end_is_refused(finished):
    message = "is at step 2, this run ends at step 1"
    refused(message, **finished, resume="auto", max_steps=1)


def test_a_changed_method_is_refused_before_anything_is_done(finished, monkeypatch):
    """All changed keys are named, old value and new one; the folder stays as it was."""

    def not_yet(*args):
        raise AssertionError("the data are indexed")

    config_file = os.path.join(finished["out_dir"], "config.py")
    before = os.stat(config_file).st_mtime_ns
    monkeypatch.setattr("runtime.job.load_index", not_yet)
    changes = dict(rho=5.0, equations="release", crop_scale="(0.5,1.0)", lr=1e-4)
    refused(
        "equations: 'paper' -> 'release'; rho: 4.0 -> 5.0; crop_scale: (0.9, 1.0) -> (0.5, 1.0)",
        "--resume_changes=True",
        **finished,
        resume="auto",
        **changes,
    )
    fixed = "cannot change (seed: 2024 -> 1; text_heads: 2 -> 4)"
    refused(fixed, **finished, resume="auto", text_heads=4, seed=1, resume_changes=True)
    assert os.stat(config_file).st_mtime_ns == before


def test_changes_are_printed_and_those_of_the_method_allowed(finished, sets, capsys):
    out = finished["out_dir"]
    train(out, sets, max_steps=3, resume="auto", rho=5.0, lr=1e-3, resume_changes=True)
    printed = capsys.readouterr().out
    changes = re.findall(r"changed since .*step-00000002: (.*)", printed)
    assert changes == ["rho: 4.0 -> 5.0", "max_steps: 2 -> 3", "lr: 0.002 -> 0.001"]

    # Nothing is said where nothing has changed.
    capsys.readouterr()
    train(out, sets, max_steps=3, resume="auto", rho=5.0, lr=1e-3)
    assert "changed since" not in capsys.readouterr().out


def test_every_key_that_a_resume_looks_at_exists():
    keys = [*checkpoint.FIXED_KEYS, *checkpoint.METHOD_KEYS, *config.JOB_KEYS]
    assert len(set(keys)) == len(keys)
    assert not set(keys) - set(config.HINTS)


@pytest.mark.parametrize("given", [[1, 1, 1, 1], (1, 1, 1, 1)], ids=["list", "tuple"])
def test_a_list_is_the_tuple_that_it_was(tmp_path, given):
    """Files of checkpoints hold lists in place of tuples."""
    c = config.Config(model="RN50", vision_layers=(1, 1, 1, 1), train_data=("a.tar",))
    saved = {**dataclasses.asdict(c), "vision_layers": given, "train_data": ["a.tar"]}
    saved["crop_scale"] = [0.9, 1]
    saved["gone"] = 1  # a key of an older version
    del saved["rho"]  # a key that is younger than the checkpoint had its default value
    torch.save({"config": saved}, tmp_path / "train.pt")
    assert checkpoint.changed_settings(str(tmp_path), c) == {}

    c.rho = 7.0
    assert checkpoint.changed_settings(str(tmp_path), c) == {"rho": (6.5, 7.0)}


# ---- the folder that is named ----


@pytest.mark.parametrize("folder", ["", "/", "/checkpoints", "/checkpoints/step-00000002"])
def test_resume_from_a_run_takes_its_newest_checkpoint(tmp_path, finished, sets, folder, capsys):
    """In that run, and into a new one."""
    resume = finished["out_dir"] + folder
    new = str(tmp_path / "new")
    rows = train(new, sets, max_steps=3, resume=resume)
    assert [row["step"] for row in rows] == [3]
    said = "its newest checkpoint is" in capsys.readouterr().out
    assert said == ("step" not in folder)

    rows = train(finished["out_dir"], sets, max_steps=3, resume=resume)
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_folder_that_is_not_there_is_answered_by_those_that_are(tmp_path, finished):
    out = finished["out_dir"]
    new = dict(finished, out_dir=str(tmp_path / "new"))
    refused("does not exist; ", "holds step-00000002", **new, resume=f"{out}/checkpoints/step-3")
    refused("did you mean", f"{out}'?", **new, resume=out + "x")
    os.makedirs(tmp_path / "empty")
    # In out_dir itself, too, where another run's checkpoint would be refused.
    refused("does not exist; ", **finished, resume=f"{out}/checkpoints/step-3")
    refused("is neither a checkpoint nor a run; it is auto", **new, resume=str(tmp_path / "empty"))
    runs = os.path.dirname(out)
    refused("is neither a checkpoint nor a run; did you mean", out, **new, resume=runs)


def test_a_finished_run_says_that_it_is(finished, sets, capsys):
    train(finished["out_dir"], sets, max_steps=2, resume="auto")
    assert "already at step 2 of 2" in capsys.readouterr().out.splitlines()[-1]


def test_a_checkpoint_of_another_data_set_is_refused(tmp_path, finished):
    """As many samples, in other shards."""
    finished["train_data"] = shapes.write(str(tmp_path / "set"), shards=3, per_shard=128)
    refused("another data set", **finished, resume="auto")
