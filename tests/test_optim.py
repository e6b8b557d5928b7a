"""optim.py: parameter groups, schedules, and the update of weights and temperature."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import optim
from config import Config

OPTIMIZERS = ["adamw", "lamb", "lion", "sgdm"]


class Toy(nn.Module):
    """The smallest model with all that optim.py looks at."""

    def __init__(self, tau=0.07):
        super().__init__()
        self.visual = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / tau)))


def toy_trainer(tau=0.07, may_skip=False, **settings):
    """What optim.py needs of a train.Trainer, with a run of 100 steps in 10 epochs."""
    settings = {"algorithm": "fastclip-v3", "warmup_steps": 0, **settings}
    config = Config(**settings)
    model = Toy(tau)
    return SimpleNamespace(
        config=config,
        model=model,
        optimizer=optim.create(model, config),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        may_skip=may_skip,
        steps_per_epoch=10,
        total_steps=100,
    )


def set_gradients(model, value=0.3):
    """The same gradient everywhere -> its norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.full_like(p, value)
    return value * math.sqrt(sum(p.numel() for p in parameters))


def loss_output(objective=1.0, learned=True):
    """What optim.update reads of a LossOutput."""
    gradient = torch.tensor(0.3) if learned else None
    return SimpleNamespace(objective=torch.tensor(objective), grad_logit_scale=gradient)


# Parameter groups -----------------------------------------------------------------------------


def test_groups():
    model = Toy()
    optimizer = optim.create(model, Config(algorithm="fastclip-v3", weight_decay=0.1))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert list(groups) == ["decay", "no_decay", "tau"]

    assert groups["decay"]["weight_decay"] == 0.1
    assert groups["decay"]["params"] == [model.visual.weight]
    assert groups["decay"]["betas"] == (0.9, 0.98)
    assert groups["decay"]["eps"] == 1e-6

    assert groups["no_decay"]["weight_decay"] == 0
    assert [p.ndim for p in groups["no_decay"]["params"]] == [1, 1, 1]

    assert groups["tau"]["params"] == [model.logit_scale]
    assert groups["tau"]["weight_decay"] == 0


@pytest.mark.parametrize("name", ["fastclip-v1", "fastclip-v2", "sogclr", "isogclr"])
def test_no_group_for_a_constant_or_per_sample_tau(name):
    model = Toy()
    optimizer = optim.create(model, Config(algorithm=name))
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "no_decay"]
    assert not model.logit_scale.requires_grad


# Schedules ------------------------------------------------------------------------------------


def test_warmup_and_cosine():
    c = Config(lr=1.0, lr_min=0.1, warmup_steps=10, algorithm="openclip")
    assert optim.lr(c, 0, 110) == pytest.approx(0.1)
    assert optim.lr(c, 9, 110) == 1.0
    assert optim.lr(c, 10, 110) == 1.0
    assert optim.lr(c, 60, 110) == pytest.approx(0.55)
    assert optim.lr(c, 110, 110) == pytest.approx(0.1)
    assert optim.lr_tau(c, 60, 110) == pytest.approx(0.55)  # openclip: tau like the weights


def test_lr_tau_constant_and_threshold():
    c = Config(lr=1.0, lr_tau=0.5, warmup_steps=10, algorithm="fastclip-v2")
    assert optim.lr_tau(c, 0, 100) == 0.5
    assert optim.lr_tau(c, 99, 100) == 0.5

    c = Config(lr=1.0, lr_tau=0.5, warmup_steps=10, algorithm="fastclip-v3")
    assert optim.lr_tau(c, 0, 100) == pytest.approx(0.05)
    assert optim.lr_tau(c, 99, 100) == 0.5


@pytest.mark.parametrize(
    "name,schedule",
    [
        ("openclip", "cosine"),
        ("fastclip-v0", "cosine"),
        ("isogclr", "constant"),
        ("fastclip-v2", "constant"),
        ("fastclip-v3", "threshold"),
    ],
)
def test_usual_schedule_of_lr_tau(name, schedule):
    assert optim.lr_tau_schedule(Config(algorithm=name)) == schedule
    for other in ("constant", "cosine", "threshold"):
        assert optim.lr_tau_schedule(Config(algorithm=name, lr_tau_schedule=other)) == other


def test_gamma_by_epochs():
    c = Config(algorithm="fastclip-v3", gamma_min=0.2, gamma_decay_epochs=4)
    by_epoch = [optim.gamma(c, 10 * epoch + 5, 10, 100) for epoch in range(6)]
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


def test_gamma_by_steps():
    c = Config(algorithm="fastclip-v3", gamma_min=0.2, gamma_decay_epochs=4, gamma_smooth=True)
    assert optim.gamma(c, 20, 10, 100) == pytest.approx(0.6)
    assert optim.gamma(c, 25, 10, 100) < 0.6


def test_gamma_of_each_kind_of_algorithm():
    sogclr = Config(algorithm="sogclr", gamma_min=0.3)
    assert optim.gamma(sogclr, 0, 10, 100) == 0.3

    # Without gamma_decay_epochs the cosine ends after half of the run.
    v1 = Config(algorithm="fastclip-v1", gamma_min=0.2)
    assert optim.gamma(v1, 50, 10, 100) == pytest.approx(0.2)

    openclip = Config(algorithm="openclip", gamma_min=0.2)
    assert optim.gamma(openclip, 50, 10, 100) == 1.0


def test_set_schedules_writes_the_learning_rates_and_returns_gamma_and_lr_tau():
    t = toy_trainer(lr=1.0, lr_tau=0.5, gamma_min=0.2, gamma_decay_epochs=4)
    gamma, lr_tau = optim.set_schedules(t, 50)
    assert gamma == pytest.approx(0.2)
    assert lr_tau == 0.5
    rates = {group["name"]: group["lr"] for group in t.optimizer.param_groups}
    assert rates == {"decay": pytest.approx(0.5), "no_decay": pytest.approx(0.5), "tau": 0.5}


# Temperature ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_threshold_is_a_third_of_the_learning_rate(name):
    """Moving a third of the way equals stepping with a third of the lr, for every optimizer."""

    def move(tau, lr, with_threshold):
        """How far ln(1/tau) moves in one step."""
        t = toy_trainer(tau, optimizer=name, lr_tau=lr)
        set_gradients(t.model)
        optim.set_schedules(t, 0)
        before = t.model.logit_scale.detach().clone()
        t.optimizer.step()
        if with_threshold:
            optim.finish_tau_step(t.model.logit_scale, before, t.config)
        return (t.model.logit_scale - before).item()

    above = move(tau=0.05, lr=0.03, with_threshold=True)
    below = move(tau=0.025, lr=0.03, with_threshold=True)
    plain = move(tau=0.025, lr=0.01, with_threshold=False)
    assert below == pytest.approx(plain, rel=1e-4)
    assert above == pytest.approx(3 * plain, rel=1e-4)


@pytest.mark.parametrize("start,end", [(9.0, 100.0), (-1.0, 1.0)])
def test_tau_is_kept_in_its_range(start, end):
    log_scale = torch.tensor(start)
    optim.finish_tau_step(log_scale, log_scale.clone(), Config(algorithm="openclip"))
    assert log_scale.exp().item() == pytest.approx(end)


def test_a_constant_tau_stays_where_a_schedule_writes_it():
    """The way that set_schedules describes: no step and no decay moves it afterwards."""
    t = toy_trainer(algorithm="fastclip-v1", weight_decay=0.1)
    optim.set_schedules(t, 0)
    t.model.logit_scale.fill_(-math.log(0.03))
    set_gradients(t.model)
    optim.update(t, loss_output(learned=False), None)
    assert t.model.logit_scale.item() == pytest.approx(-math.log(0.03))


# Update ---------------------------------------------------------------------------------------


def test_update_steps_and_returns_the_gradient_norm():
    t = toy_trainer(optimizer="sgdm", lr=0.1, lr_tau=0.1, weight_decay=0.0)
    optim.set_schedules(t, 0)
    before = t.model.visual.weight.detach().clone()
    norm = set_gradients(t.model, 0.3)
    found = optim.update(t, loss_output(), optim.save_buffers(t))
    assert found.item() == pytest.approx(norm)
    torch.testing.assert_close(t.model.visual.weight, before - 0.1 * 0.3)


def test_update_clips_but_returns_the_norm_before():
    t = toy_trainer(optimizer="sgdm", lr=0.1, weight_decay=0.0, grad_clip=1.0)
    optim.set_schedules(t, 0)
    before = t.model.visual.weight.detach().clone()
    norm = set_gradients(t.model, 30.0)
    found = optim.update(t, loss_output(), None)
    assert found.item() == pytest.approx(norm)
    torch.testing.assert_close(t.model.visual.weight, before - 0.1 * 30 / norm)


@pytest.mark.parametrize("learned", [True, False])
def test_update_finishes_the_step_of_a_learned_global_tau_only(learned):
    t = toy_trainer(tau=1.0, optimizer="sgdm", lr=0.1, lr_tau=0.1)
    optim.set_schedules(t, 0)
    set_gradients(t.model)
    optim.update(t, loss_output(learned=learned), None)
    tau = (-t.model.logit_scale).exp().item()
    assert (tau <= 1.0) == learned  # the step itself has led out of the range


@pytest.mark.parametrize("gradient,objective", [(math.nan, 1.0), (0.3, math.inf)])
def test_a_step_that_is_not_finite_is_left_out(gradient, objective):
    t = toy_trainer(may_skip=True)
    optim.set_schedules(t, 0)
    before = {name: x.clone() for name, x in t.model.state_dict().items()}

    saved_buffers = optim.save_buffers(t)
    t.model.norm(torch.randn(4, 3))  # the forward pass changes the running statistics
    assert not torch.equal(t.model.norm.running_mean, before["norm.running_mean"])
    set_gradients(t.model, gradient)
    optim.update(t, loss_output(objective), saved_buffers)

    for name, x in t.model.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_buffers_are_saved_only_where_a_step_may_be_left_out():
    assert optim.save_buffers(toy_trainer()) is None
    t = toy_trainer(may_skip=True)
    for saved, buffer in zip(optim.save_buffers(t), t.model.buffers(), strict=True):
        assert torch.equal(saved, buffer)
        assert saved is not buffer
