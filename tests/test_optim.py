"""optim.py: groups and schedules."""

import math

import pytest
import torch
from torch import nn

import optim
from config import Config


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Linear(3, 2)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def test_warmup_and_cosine():
    c = Config(lr=1.0, lr_min=0.1, warmup_steps=10, algorithm="openclip")
    assert (
        optim.lr(c, 0, 110) == pytest.approx(0.1)
        and optim.lr(c, 9, 110) == 1.0
        and optim.lr(c, 10, 110) == 1.0
    )
    assert optim.lr(c, 60, 110) == pytest.approx(0.55) and optim.lr(c, 110, 110) == pytest.approx(
        0.1
    )
    assert optim.lr_tau(c, 60, 110) == pytest.approx(0.55)  # openclip: tau as the model


def test_lr_tau_constant_and_threshold():
    c = Config(lr=1.0, lr_tau=0.5, warmup_steps=10, algorithm="fastclip-v2")
    assert optim.lr_tau(c, 0, 100) == optim.lr_tau(c, 99, 100) == 0.5
    c = Config(lr=1.0, lr_tau=0.5, warmup_steps=10, algorithm="fastclip-v3")
    assert optim.lr_tau(c, 0, 100) == pytest.approx(0.05) and optim.lr_tau(c, 99, 100) == 0.5


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion", "sgdm"])
def test_the_threshold_is_a_third_of_the_learning_rate(name):
    """Moving a third of the way equals stepping with a third of the lr, for every optimizer."""
    moved = {}
    for tau, lr in ((0.05, 0.03), (0.025, 0.03), (0.025, 0.01)):
        c = Config(algorithm="fastclip-v3", optimizer=name, lr_tau=lr, warmup_steps=0)
        model = Toy()
        with torch.no_grad():
            model.logit_scale.fill_(-math.log(tau))
        optimizer = optim.create(model, c)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.3)
        optim.set_lr(optimizer, c, 0, 10)
        before = model.logit_scale.detach().clone()
        optimizer.step()
        if lr == 0.01:
            moved[tau, lr] = (
                model.logit_scale - before
            ).item()  # the plain step, with a third of the lr
        else:
            optim.finish_tau_step(model.logit_scale, before, c)
            moved[tau, lr] = (model.logit_scale - before).item()
    assert moved[0.025, 0.03] == pytest.approx(moved[0.025, 0.01], rel=1e-4)
    assert moved[0.05, 0.03] == pytest.approx(3 * moved[0.025, 0.01], rel=1e-4)


def test_tau_is_kept_in_its_range():
    c = Config(algorithm="openclip")
    for start, end in ((9.0, 100.0), (-1.0, 1.0)):
        scale = torch.tensor(start)
        optim.finish_tau_step(scale, scale.clone(), c)
        assert scale.exp().item() == pytest.approx(end)


def test_gamma():
    c = Config(algorithm="fastclip-v3", gamma_min=0.2, gamma_decay_epochs=4)
    by_epoch = [optim.gamma(c, 10 * e + 5, 10, 100) for e in range(6)]
    assert by_epoch == pytest.approx(
        [
            1.0,
            0.2 + 0.4 * (1 + math.cos(math.pi / 4)),
            0.6,
            0.2 + 0.4 * (1 + math.cos(3 * math.pi / 4)),
            0.2,
            0.2,
        ]
    )
    smooth = Config(algorithm="fastclip-v3", gamma_min=0.2, gamma_decay_epochs=4, gamma_smooth=True)
    assert (
        optim.gamma(smooth, 20, 10, 100) == pytest.approx(0.6)
        and optim.gamma(smooth, 25, 10, 100) < 0.6
    )
    assert optim.gamma(Config(algorithm="sogclr", gamma_min=0.3), 0, 10, 100) == 0.3
    assert optim.gamma(
        Config(algorithm="fastclip-v1", gamma_min=0.2), 50, 10, 100
    ) == pytest.approx(0.2)  # default: half of the run


def test_groups():
    model = Toy()
    groups = {
        g["name"]: g
        for g in optim.create(model, Config(algorithm="fastclip-v3", weight_decay=0.1)).param_groups
    }
    assert groups["decay"]["weight_decay"] == 0.1 and [
        p.ndim for p in groups["decay"]["params"]
    ] == [2]
    assert groups["no_decay"]["weight_decay"] == 0 and [
        p.ndim for p in groups["no_decay"]["params"]
    ] == [1]
    assert groups["tau"]["params"][0] is model.logit_scale and groups["tau"]["weight_decay"] == 0
    assert groups["decay"]["betas"] == (0.9, 0.98) and groups["decay"]["eps"] == 1e-6
    for name in (
        "fastclip-v1",
        "fastclip-v2",
        "sogclr",
        "isogclr",
    ):  # tau constant, or kept per sample
        assert [g["name"] for g in optim.create(Toy(), Config(algorithm=name)).param_groups] == [
            "decay",
            "no_decay",
        ]
