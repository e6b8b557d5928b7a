"""Runs from the command line: they learn, equal each other on two ranks, and refuse bad input."""

import json
import os
import shutil
import tarfile

import pytest
import torch
import torch.nn.functional as F

import config
import data
import dist
import eval as evaluation
import shapes
import train as training
from conftest import ROOT
from helpers import TINY, refused, run, train, weights, words_of
from loss import ContrastiveLoss
from rank_server import run_ranks
from runtime import plan

RESNET = dict(
    model="RN50",
    patch_size=None,
    vision_norm="group",
    vision_width=8,
    vision_layers=(1, 1, 1, 1),
)


def column(rows, key):
    return [row[key] for row in rows]


def read_json(path):
    with open(path) as f:
        return json.load(f)


def shares(results):
    """The results of an evaluation that are shares, without counts and names."""
    return {key: value for key, value in results.items() if isinstance(value, float)}


# ---- learning ----


def test_it_learns_and_the_checkpoint_evaluates_alone(tmp_path, sets):
    """Far above chance (1 in 24) on unseen pictures, in under a minute; eval.py finds the same."""
    out = str(tmp_path / "run")
    rows = train(
        out,
        sets,
        command=True,
        workers=1,
        epochs=12,
        eval_data=sets["eval_data"],
        eval_steps=40,
        log_steps=10,
        vision_layers=1,
    )

    evals = [row for row in rows if "eval/zeroshot_top1" in row]
    assert column(evals, "step") == [40, 72]
    assert evals[-1]["eval/zeroshot_top1"] > 0.5
    assert evals[-1]["eval/zeroshot_top5"] > 0.9
    assert rows[0]["mbcl"] > rows[-2]["mbcl"]

    with open(os.path.join(out, "stdout")) as f:
        printed = f.read()
    assert "samples/s" in printed
    assert "left" in printed
    for name in ("config.py", "curves.png", "retrieval.png", "eval.json"):
        assert os.path.getsize(os.path.join(out, name)) > 100, name

    evaluation.main([out, "--device=cpu"])
    (alone,) = read_json(os.path.join(out, "eval.json"))["sets"]
    assert alone["zeroshot_top1"] == pytest.approx(evals[-1]["eval/zeroshot_top1"])

    on_two_ranks = run("eval.py", out, ranks=2, device="cpu")
    assert on_two_ranks.returncode == 0, on_two_ranks.stderr
    (again,) = read_json(os.path.join(out, "eval.json"))["sets"]
    assert shares(again) == pytest.approx(shares(alone))


@pytest.mark.parametrize("algorithm", ["fastclip-v3", "fastclip-v2"])
def test_two_ranks_are_one(tmp_path, sets, algorithm):
    """The same objectives to float32 rounding, from the same global batches (no BatchNorm)."""
    one = train(str(tmp_path / "one"), sets, algorithm=algorithm)
    two = train(str(tmp_path / "two"), sets, ranks=2, algorithm=algorithm)
    assert len(one) == len(two) == 30
    for a, b in zip(one, two):
        assert a["objective"] == pytest.approx(b["objective"], rel=2e-4, abs=2e-5)
        assert a["mbcl"] == pytest.approx(b["mbcl"], rel=2e-4)
        assert a["tau"] == pytest.approx(b["tau"], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_train_a_resnet(tmp_path, sets):
    """In channels_last: collectives and gradient buckets must respect the strides."""
    one = train(str(tmp_path / "one"), sets, **RESNET, max_steps=4)
    two = train(str(tmp_path / "two"), sets, **RESNET, max_steps=4, ranks=2)
    for key in ("objective", "mbcl"):
        assert column(two, key) == pytest.approx(column(one, key), rel=2e-4)


def test_micro_batches_are_exact(tmp_path, sets):
    whole_batch = str(tmp_path / "one")
    parts = str(tmp_path / "parts")
    rows = train(whole_batch, sets, max_steps=8)
    rows_of_parts = train(parts, sets, max_steps=8, micro_batch=16)

    assert column(rows_of_parts, "objective") == pytest.approx(column(rows, "objective"), rel=1e-4)
    for a, b in zip(weights(whole_batch)[0].values(), weights(parts)[0].values()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)


@pytest.mark.slow
def test_it_resumes_at_another_world_size(tmp_path, sets):
    settings = dict(algorithm="fastclip-v2", max_steps=12, save_steps=6)
    one = train(str(tmp_path / "one"), sets, **settings)

    moved = str(tmp_path / "moved")
    train(moved, sets, **settings, ranks=2)
    checkpoints = os.path.join(moved, "checkpoints")
    shutil.rmtree(os.path.join(checkpoints, "step-00000012"))
    with open(os.path.join(checkpoints, "latest"), "w") as f:
        f.write("step-00000006")

    rows = train(moved, sets, **settings, resume="auto")
    assert column(rows, "objective") == pytest.approx(column(one, "objective"), rel=2e-4)


def test_a_step_saved_again_replaces_the_old_one(tmp_path, sets):
    out = str(tmp_path / "run")
    train(out, sets, max_steps=6, save_steps=2, keep=1)
    assert sorted(os.listdir(os.path.join(out, "checkpoints"))) == ["latest", "step-00000006"]

    out = str(tmp_path / "run2")
    train(out, sets, max_steps=6, save_steps=2, keep=9)
    before = weights(out)[0]
    older = out + "/checkpoints/step-00000002"
    train(out, sets, max_steps=6, resume=older, lr=1e-4, keep=1)
    after = weights(out)[0]
    assert any(not torch.equal(before[name], after[name]) for name in before)


# ---- refusals ----


def test_a_user_sees_one_line(tmp_path, sets):
    out = str(tmp_path / "run")
    shown = run("train.py", "--larning_rate=1", out_dir=out, train_data=sets["train_data"])
    assert shown.returncode == 1
    assert shown.stderr.startswith("error: ")
    assert "unknown key 'larning_rate'" in shown.stderr
    assert len(shown.stderr.splitlines()) == 1
    assert not os.path.exists(out)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(batch_size="big"), ["batch_size = 'big'", "int"]),
        (dict(algorithm="fastclip-v33"), ["'fastclip-v33'", "did you mean 'fastclip-v3'"]),
        (dict(train_data="no/{00000..00003}.tar"), ["no/{00000..00003}.tar"]),
        (dict(train_data="()"), ["train_data is empty"]),
        (dict(lanes=5), ["lanes = 5 does not divide batch_size = 64"]),
        (dict(batch_size=1000, lanes="auto"), ["384", "1000"]),
        (dict(micro_batch=24), ["multiple of 1 ranks x micro_batch = 24"]),
        (dict(model="ViT-B-23"), ["unknown model 'ViT-B-23'", "ViT-B-32"]),
        (dict(image_size=100), ["100", "8"]),
        (dict(resume="nothing"), ["'nothing' does not exist; it is auto,"]),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_training(tmp_path, sets, settings, words):
    out = str(tmp_path / "run")
    base = dict(out_dir=out, train_data=sets["train_data"])
    refused(*words, **{**base, **settings})
    assert not os.path.exists(out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, sets):
    refused(
        "--device=cpu",
        out_dir=str(tmp_path / "run"),
        train_data=sets["train_data"],
        device="cuda",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch_size, words",
    [(66, "lanes = 33"), (33, "batch_size = 33 must be a multiple of 2 ranks")],
)
def test_batches_that_do_not_divide_among_two_ranks_are_refused(tmp_path, sets, batch_size, words):
    out = str(tmp_path / "run")
    settings = {**TINY, "out_dir": out, "train_data": sets["train_data"]}
    shown = run("train.py", ranks=2, **{**settings, "batch_size": batch_size, "lanes": 33})
    assert shown.returncode != 0
    assert words in shown.stderr
    assert not os.path.exists(out)


def test_bad_shards_are_refused(tmp_path):
    base = dict(out_dir=str(tmp_path / "run"))
    pattern = shapes.write(str(tmp_path / "a"), shards=2)
    shard = tmp_path / "a" / "00001.tar"

    os.truncate(shard, 20_000)
    refused("00001.tar", "damaged", **base, train_data=pattern)
    os.truncate(shard, 0)
    refused("00001.tar", "0 bytes", **base, train_data=pattern)
    os.remove(shard)
    refused("00001.tar", "1 of 2", **base, train_data=pattern)


def test_shards_without_captions_are_refused(tmp_path):
    path = str(tmp_path / "00000.tar")
    with tarfile.open(path, "w") as tar:
        shapes.add(tar, "000.png", b"x")
        shapes.add(tar, "001.png", b"x")
    refused("00000.tar", "png", "txt", out_dir=str(tmp_path / "run"), train_data=path)


def test_an_id_outside_the_state_is_named(tmp_path, sets, monkeypatch):
    """What no order of ours yields: ids that the u-state was not made for."""

    def lookup_of_wrong_ids(self, ids):
        return self.state.lookup(ids + 1000)

    monkeypatch.setattr(ContrastiveLoss, "lookup", lookup_of_wrong_ids)
    with pytest.raises(ValueError, match=r"sample id 1\d+ is outside \[0, 384\)"):
        train(str(tmp_path / "run"), sets)


def test_a_checkpoint_of_another_model_or_run_is_refused(tmp_path, sets):
    out = str(tmp_path / "run")
    base = dict(out_dir=out, train_data=sets["train_data"])
    train(out, sets, max_steps=2)

    refused("already holds a run", "--resume=auto", **base)
    difference = "vision_width = 64 there, 128 here"
    refused("another model", difference, **base, resume="auto", vision_width=128)
    difference = "algorithm: 'fastclip-v3' -> 'openclip'"
    refused("cannot change", difference, **base, resume="auto", algorithm="openclip")

    os.truncate(os.path.join(out, "checkpoints", "step-00000002", "train.pt"), 1000)
    refused("train.pt is not what was written (1000 bytes", **base, resume="auto")


# ---- the plan ----


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("cc3m_v3", ["RN50", "102,0", "2,723,840", "2,660 steps", "98,420 steps"]),
        ("laion315m_v3", ["ViT-B-16", "149,620,737", "61,652 steps", "2.53 GB"]),
    ],
)
def test_plan_needs_neither_data_nor_gpu(capsys, name, numbers):
    training.main([os.path.join(ROOT, "configs", name + ".py"), "--plan=True"])
    printed = capsys.readouterr().out
    for number in numbers:
        assert number in printed, (number, printed)


def test_plan_refuses_a_set_that_fills_no_batch():
    path = os.path.join(ROOT, "configs", "cc3m_v3.py")
    with pytest.raises(config.ConfigError, match="100 samples do not fill"):
        training.main([path, "--plan=True", "--train_samples=100"])


def test_plan_warns_of_a_long_warm_up(capsys):
    path = os.path.join(ROOT, "configs", "cc3m_v3.py")
    training.main([path, "--plan=True"])
    assert "warning" not in capsys.readouterr().out
    training.main([path, "--plan=True", "--max_steps=20000"])
    assert "warmup_steps = 10000 of 20000 steps is more than a third" in capsys.readouterr().out


def traffic_of_a_step(algorithm):
    """One step of the loss on this rank -> {purpose: bytes sent}."""
    loss = ContrastiveLoss(algorithm, 64)
    features = F.normalize(torch.randn(2, 8, 6), dim=-1)
    ids = torch.arange(8) + 8 * dist.rank()
    batch = data.Batch(None, None, None, ids, {})

    (batch,) = data.with_global_ids([batch], loss.algorithm.state)
    loss(*features, torch.tensor(2.6), loss.lookup(batch.global_ids))
    return dict(dist.traffic)


@pytest.mark.parametrize(
    "algorithm, columns", [("openclip", 0), ("fastclip-v3", 2), ("fastclip-v2", 9)]
)
def test_the_planned_bytes_are_those_that_are_sent(algorithm, columns):
    planned = plan.traffic(16, 6, columns, 0)
    planned = {name: count(2) for name, count in planned.items() if name != "gradients"}
    assert run_ranks(2, traffic_of_a_step, algorithm)[0] == planned


def collectives_of_a_step(algorithm):
    """Two steps of training on this rank -> (those begun by the second one, number of buckets)."""
    settings = {**TINY, "algorithm": algorithm, "train_data": "x", "bucket_mb": 0.1}
    c = config.load(words_of(**settings))
    t = training.build(c, 64, 10, 10, torch.device("cpu"))
    batch = data.Batch(
        images=torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
        tokens=torch.tensor([[5, 9, 0, 0]] * 4),
        lengths=torch.full((4,), 2),
        ids=torch.arange(4) + 4 * dist.rank(),
        bad={},
    )
    batches = data.with_global_ids([batch] * 3, t.loss.algorithm.state)
    for step in range(2):
        before = dist.calls.copy()
        training.train_step(t, next(batches), step)
    return dist.calls - before, len(t.reducer.buckets)


@pytest.mark.parametrize("algorithm, with_state", [("openclip", False), ("fastclip-v2", True)])
def test_the_collectives_of_a_step(algorithm, with_state):
    (calls, buckets), _ = run_ranks(2, collectives_of_a_step, algorithm)
    expected = {"features": 1, "scalars": 1, "gradients": buckets}
    if with_state:
        expected.update(ids=1, state=1)
    assert calls == expected
    assert buckets > 3
