"""runtime/plan.py: how long a run takes and what it costs, with numbers computed by hand."""

import os

import pytest

import config
from config import ConfigError
from conftest import ROOT
from runtime import plan


def report(**changes):
    """The plan of 10 epochs of 36,000 samples each, in batches of 1,000 -> its lines."""
    settings = dict(train_samples=36_000, batch_size=1_000, epochs=10.0, **changes)
    return plan.report(config.Config(**settings)).splitlines()


def line(lines, start):
    (found,) = [text for text in lines if text.strip().startswith(start)]
    return found


def test_hours_days_and_dollars_of_a_given_speed():
    lines = report(plan_speed=10.0, plan_price=2.5)
    # 36,000 samples at 10 per second are 3,600 seconds.
    assert "given: 1 GPU-hours an epoch, 10 in all, at 10 samples/s" in line(lines, "time")
    assert "$2.5 an epoch, $25 in all, at $2.5 a GPU-hour" in line(lines, "cost")
    assert not any("published" in text for text in lines)

    # 10 hours are 0.417 days; the batch and its lanes can be divided among up to 4 ranks.
    days = line(lines, "days, given").split()[2:]
    assert days == ["0.417", "0.208", "0.104"]


def test_without_a_price_there_are_no_dollars():
    assert "$" not in "\n".join(report(plan_speed=10.0))


def test_without_a_speed_it_is_the_published_one():
    lines = report(model="ViT-B-16")
    # 360,000 samples / 926 / 3,600 s and / 332 / 3,600 s.
    assert "0.108 in all, at 926 samples/s" in line(lines, "time         H100")
    assert "0.301 in all, at 332 samples/s" in line(lines, "time         A100")
    assert any("published: ViT-B-16, DRRho-CLIP, arXiv 2505.06699" in text for text in lines)
    assert not any("scaled" in text for text in lines)


def test_another_model_has_the_speed_of_the_nearest_scaled_by_flops(monkeypatch):
    monkeypatch.setattr(
        plan,
        "ANCHORS",
        (
            plan.Anchor("ViT-B-16", "H100", 900.0, "a paper"),
            plan.Anchor("ViT-B-16", "A100", 300.0, "a paper"),
            plan.Anchor("ViT-B-32", "A100", 800.0, "a table"),
        ),
    )
    monkeypatch.setattr(plan, "anchor_flops", flops_of_anchor)

    run = plan.numbers(config.Config(train_samples=36_000))
    run.flops = {"image": 15.0, "text": 5.0}
    of_h100, of_a100 = plan.speeds(config.Config(), run)
    # 20 FLOPs are nearer to 30 than to 10: a ratio of 1.5 instead of 2.
    assert (of_h100.gpu, of_h100.samples) == ("H100", pytest.approx(900 * 30 / 20))
    assert (of_a100.gpu, of_a100.samples) == ("A100", pytest.approx(300 * 30 / 20))
    assert of_a100.source == "published: ViT-B-16, a paper: 300, scaled by the FLOPs of a pair"


def flops_of_anchor(anchor):
    return {"ViT-B-16": 30.0, "ViT-B-32": 10.0}[anchor.model]


def test_for_a_model_of_another_size_none_is_known():
    lines = report(vision_layers=1, text_layers=1)
    assert "not known" in line(lines, "time")
    assert "--plan_speed" in line(lines, "time")
    assert not any("days" in text for text in lines)


@pytest.mark.parametrize("key", ["plan_speed", "plan_price"])
def test_a_negative_number_is_refused(key):
    with pytest.raises(ConfigError, match=f"{key} = -1.0 must not be negative"):
        config.load([f"--{key}=-1"])


@pytest.mark.parametrize("scale, samples_seen", [("small", 12_800_000), ("medium", 128_000_000)])
@pytest.mark.parametrize("loss", ["openclip", "v1", "v3"])
def test_datacomp_has_the_samples_seen_of_its_scale(scale, samples_seen, loss):
    """Of the whole pool, of one of which 30 % are left, and of one of which 1 % is left."""
    c = config.load([os.path.join(ROOT, "configs", f"datacomp_{scale}_{loss}.py")])
    for share in (1.0, 0.3, 0.01):
        total_steps = c.total_steps(int(samples_seen * share) // c.batch_size)
        assert total_steps * c.batch_size == samples_seen
        assert not c.long_warmup(total_steps)

    lines = plan.report(c).splitlines()
    assert f"{samples_seen:,} samples seen (1 epochs)" in line(lines, "run")
