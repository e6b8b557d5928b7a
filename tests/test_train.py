"""Runs from the command line: they learn, are the same on two ranks and in micro-batches, resume bit for bit, and refuse."""

import json
import os
import shutil
import tarfile

import pytest
import torch
from torchvision.io import encode_png

import config
import dist
import eval as evaluation
import shapes
import train as training
from conftest import ROOT
from helpers import TINY, refused, run, run_ranks, train, weights


def test_it_learns_and_the_checkpoint_evaluates_alone(tmp_path, sets):
    """Far above chance (1 in 24) on pictures it has not seen, in under a minute; eval.py then finds the same."""
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
    assert [row["step"] for row in evals] == [40, 72]
    assert evals[-1]["eval/zeroshot_top1"] > 0.5 and evals[-1]["eval/zeroshot_top5"] > 0.9, evals[
        -1
    ]
    printed = open(os.path.join(out, "stdout")).read()
    assert rows[0]["mbcl"] > rows[-2]["mbcl"] and "samples/s" in printed and "left" in printed
    for name in ("config.py", "curves.png", "retrieval.png", "eval.json"):
        assert os.path.getsize(os.path.join(out, name)) > 100, name
    evaluation.main([out, "--device=cpu"])
    with open(os.path.join(out, "eval.json")) as f:
        results = json.load(f)
    assert results["zeroshot_top1"] == pytest.approx(evals[-1]["eval/zeroshot_top1"])
    two = run("eval.py", out, ranks=2, device="cpu")
    assert two.returncode == 0, two.stderr
    with open(os.path.join(out, "eval.json")) as f:
        again = json.load(f)
    assert {k: v for k, v in again.items() if isinstance(v, float)} == pytest.approx(
        {k: v for k, v in results.items() if isinstance(v, float)}
    )


@pytest.mark.parametrize("algorithm", ["fastclip-v3", "fastclip-v2"])
def test_two_ranks_are_one(tmp_path, sets, algorithm):
    """The same objectives, to float32 rounding, from the same global batches (a tower without BatchNorm)."""
    one = train(str(tmp_path / "one"), sets, algorithm=algorithm)
    two = train(str(tmp_path / "two"), sets, ranks=2, algorithm=algorithm)
    assert len(one) == len(two) == 30
    for a, b in zip(one, two):
        assert a["objective"] == pytest.approx(b["objective"], rel=2e-4, abs=2e-5) and a[
            "mbcl"
        ] == pytest.approx(b["mbcl"], rel=2e-4)
        assert a["tau"] == pytest.approx(b["tau"], rel=1e-4)


def test_two_ranks_train_a_resnet(tmp_path, sets):
    """In channels_last, whose strides the collectives and the gradients' buckets must bear."""
    resnet = dict(
        model="RN50",
        patch_size=None,
        vision_norm="group",
        vision_width=8,
        vision_layers=(1, 1, 1, 1),
        max_steps=4,
    )
    one = train(str(tmp_path / "one"), sets, **resnet)
    two = train(str(tmp_path / "two"), sets, ranks=2, **resnet)
    assert [row["objective"] for row in two] == pytest.approx(
        [row["objective"] for row in one], rel=2e-4
    )
    assert [row["mbcl"] for row in two] == pytest.approx([row["mbcl"] for row in one], rel=2e-4)


def test_micro_batches_are_exact(tmp_path, sets):
    one = train(str(tmp_path / "one"), sets, max_steps=8)
    parts = train(str(tmp_path / "parts"), sets, max_steps=8, micro_batch=16)
    for a, b in zip(one, parts):
        assert a["objective"] == pytest.approx(b["objective"], rel=1e-4)
    for a, b in zip(
        weights(str(tmp_path / "one"))[0].values(), weights(str(tmp_path / "parts"))[0].values()
    ):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)


def test_it_resumes_at_another_world_size(tmp_path, sets):
    one = train(str(tmp_path / "one"), sets, algorithm="fastclip-v2", max_steps=12, save_steps=6)
    moved = str(tmp_path / "moved")
    train(moved, sets, algorithm="fastclip-v2", max_steps=12, save_steps=6, ranks=2)
    shutil.rmtree(os.path.join(moved, "checkpoints", "step-00000012"))
    with open(os.path.join(moved, "checkpoints", "latest"), "w") as f:
        f.write("step-00000006")
    rows = train(moved, sets, algorithm="fastclip-v2", max_steps=12, save_steps=6, resume="auto")
    assert [row["objective"] for row in rows] == pytest.approx(
        [row["objective"] for row in one], rel=2e-4
    )


def test_bad_input_ends_before_training_with_a_word(tmp_path, sets):
    base = dict(out_dir=str(tmp_path / "run"), train_data=sets["train_data"])
    shown = run("train.py", "--larning_rate=1", **base)  # once as a user sees it
    assert (
        shown.returncode == 1
        and shown.stderr.startswith("error: ")
        and "unknown key 'larning_rate'" in shown.stderr
    )
    assert len(shown.stderr.splitlines()) == 1 and "Traceback" not in shown.stderr
    refused("batch_size = 'big'", "int", **{**base, "batch_size": "big"})
    refused(
        "no/{00000..00003}.tar",
        **{**base, "train_data": str(tmp_path / "no" / "{00000..00003}.tar")},
    )
    refused("train_data is empty", **{**base, "train_data": "()"})
    refused("lanes = 5 does not divide batch_size = 64", **base, lanes=5)
    refused("384", "1000", **{**base, "batch_size": 1000, "lanes": "auto"})
    refused("multiple of 1 ranks x micro_batch = 24", **base, micro_batch=24)
    refused("unknown model 'ViT-B-23'", "ViT-B-32", **base, model="ViT-B-23")
    refused("100", "8", **base, image_size=100)
    refused("is no checkpoint", **base, resume=str(tmp_path / "nothing"))
    if not torch.cuda.is_available():
        refused("--device=cpu", **base, device="cuda")
    two = {**TINY, **base, "batch_size": 66, "lanes": 33}
    shown = run("train.py", ranks=2, **two)
    assert shown.returncode != 0 and "lanes = 33" in shown.stderr
    shown = run("train.py", ranks=2, **{**two, "batch_size": 33})
    assert shown.returncode != 0 and "batch_size = 33 must be a multiple of 2 ranks" in shown.stderr
    assert not os.path.exists(base["out_dir"])


def test_bad_shards_are_refused(tmp_path, sets):
    base = dict(out_dir=str(tmp_path / "run"))
    pattern = shapes.write(str(tmp_path / "a"), shards=2)
    with open(tmp_path / "a" / "00001.tar", "r+b") as f:
        f.truncate(20_000)
    refused("00001.tar", "damaged", **base, train_data=pattern)
    with open(tmp_path / "a" / "00001.tar", "wb"):
        pass
    refused("00001.tar", "0 bytes", **base, train_data=pattern)
    os.remove(tmp_path / "a" / "00001.tar")
    refused("00001.tar", "1 of 2", **base, train_data=pattern)
    os.makedirs(tmp_path / "c")
    with tarfile.open(tmp_path / "c" / "00000.tar", "w") as tar:
        shapes.add(tar, "000.png", b"x")
        shapes.add(tar, "001.png", b"x")
    refused("00000.tar", "png", "txt", **base, train_data=str(tmp_path / "c" / "00000.tar"))


def test_an_id_outside_the_state_is_named(tmp_path, sets, monkeypatch):
    """What no order of ours does: ids that the u-state was not made for."""
    monkeypatch.setattr(
        training.ContrastiveLoss, "lookup", lambda self, ids: self.state.lookup(ids + 1000)
    )
    with pytest.raises(ValueError, match=r"sample id 1\d+ is outside \[0, 384\)"):
        train(str(tmp_path / "run"), sets)


def test_a_checkpoint_of_another_model_or_run_is_refused(tmp_path, sets):
    out = str(tmp_path / "run")
    base = dict(out_dir=out, train_data=sets["train_data"])
    train(out, sets, max_steps=2)
    refused("already holds a run", "--resume=auto", **base)
    refused(
        "another model",
        "vision_width = 64 there, 128 here",
        **base,
        resume="auto",
        **{"vision_width": 128},
    )
    refused("algorithm = 'fastclip-v3'", **base, resume="auto", algorithm="openclip")
    path = os.path.join(out, "checkpoints", "step-00000002", "train.pt")
    with open(path, "r+b") as f:
        f.truncate(1000)
    refused("train.pt is not what was written (1000 bytes", **base, resume="auto")


def test_plan_needs_neither_data_nor_gpu(capsys):
    for name, numbers in (
        ("cc3m_v3", ("RN50", "102,0", "2,723,840", "2,660 steps", "98,420 steps")),
        ("laion315m_v3", ("ViT-B-16", "149,620,737", "61,652 steps", "2.53 GB")),
    ):
        training.main([os.path.join(ROOT, "configs", name + ".py"), "--plan=True"])
        printed = capsys.readouterr().out
        for number in numbers:
            assert number in printed, (number, printed)
    with pytest.raises(config.ConfigError, match="100 samples do not fill"):
        training.main(
            [os.path.join(ROOT, "configs", "cc3m_v3.py"), "--plan=True", "--train_samples=100"]
        )


def traffic_of_a_step(columns):
    import torch.nn.functional as F

    from loss import ContrastiveLoss

    loss = ContrastiveLoss({0: "openclip", 2: "fastclip-v3", 9: "fastclip-v2"}[columns], 64)
    features = F.normalize(torch.randn(2, 8, 6), dim=-1)
    loss(*features, torch.tensor(2.6), loss.lookup(torch.arange(8) + 8 * dist.rank()))
    return dict(dist.traffic)


@pytest.mark.parametrize("columns", [0, 2, 9])
def test_the_planned_bytes_are_those_that_are_sent(columns):
    from runtime import plan

    planned = {
        name: count(2)
        for name, count in plan.traffic(16, 6, columns, 0).items()
        if name != "gradients"
    }
    assert run_ranks(2, traffic_of_a_step, columns)[0] == planned


def test_evaluation_leaves_out_what_is_bad_and_wants_a_class_list(tmp_path, sets):
    os.makedirs(tmp_path / "test")
    generator = torch.Generator().manual_seed(5)
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for n in range(30):
            png = encode_png(shapes.picture(shapes.CLASSES[n % 24], generator)).numpy().tobytes()
            shapes.add(tar, f"{n:03d}.png", b"no picture" if n == 3 else png)
            shapes.add(tar, f"{n:03d}.cls", str(n % 24).encode())
    base = dict(
        out_dir=str(tmp_path / "run"),
        train_data=sets["train_data"],
        eval_data=str(tmp_path / "test" / "0.tar"),
    )
    refused("no classnames.txt", **base)
    (tmp_path / "classnames.txt").write_text(
        "\n".join(shapes.CLASSES) + "\n"
    )  # in the folder above will do
    rows = train(base["out_dir"], sets, max_steps=2, eval_data=base["eval_data"])
    assert "eval/zeroshot_top1" in rows[-1]
    results = json.load(open(tmp_path / "run" / "eval.json"))
    assert results["left_out"] == {"corrupt image": 1} and results["images"] == 29
    assert os.path.getsize(tmp_path / "run" / "retrieval.png") > 1000


def test_a_step_saved_again_replaces_the_old_one(tmp_path, sets):
    out = str(tmp_path / "run")
    train(out, sets, max_steps=6, save_steps=2, keep=1)
    assert sorted(os.listdir(os.path.join(out, "checkpoints"))) == ["latest", "step-00000006"]
    out += "2"
    train(out, sets, max_steps=6, save_steps=2, keep=9)
    before = weights(out)[0]
    train(out, sets, max_steps=6, resume=out + "/checkpoints/step-00000002", lr=1e-4, keep=1)
    after = weights(out)[0]
    assert any(not torch.equal(before[name], after[name]) for name in before)
