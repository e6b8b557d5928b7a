"""The optimizer: parameter groups, the schedules of gamma and of the learning rates, the update.

train_step calls two functions of this file. `set_schedules` decides the numbers of a step before
it runs: change a schedule there. `update` turns gradients into new weights after it.

Schedules are pure functions of the step, so that resuming needs no scheduler state.
"""

import math

import torch

import model as models
from config import ConfigError
from loss import TAU_MAX, TAU_MIN, get_algorithm

# Schedule "threshold" (FastCLIP-v3): while tau is at or below this, its learning rate is a third.
TAU_THRESHOLD = 0.03


# ------------------------------------------------------------------------------------------------
# Parameter groups and optimizers
# ------------------------------------------------------------------------------------------------


def create(model, config):
    """config.optimizer over the groups of the model's parameters -> torch Optimizer."""
    groups = parameter_groups(model, config)
    resnet = models.is_resnet(model)
    beta2 = config.beta2 or default_beta2(config.optimizer, resnet)
    betas = (config.beta1, beta2)
    eps = config.eps or default_eps(resnet)

    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.lr, betas=betas, eps=eps, fused=True)
    if config.optimizer == "sgdm":
        return torch.optim.SGD(groups, config.lr, momentum=config.beta1)

    import timm.optim  # here, because most runs do without timm

    if config.optimizer == "lamb":
        # Clipping is done in `update`, for every optimizer.
        return timm.optim.Lamb(groups, config.lr, betas=betas, eps=eps, max_grad_norm=None)
    return timm.optim.Lion(groups, config.lr, betas=betas)


def default_beta2(optimizer, resnet):
    """beta2 as in the paper: 0.99 for Lion, else 0.999 with a ResNet and 0.98 with a ViT."""
    if optimizer == "lion":
        return 0.99
    return 0.999 if resnet else 0.98


def default_eps(resnet):
    """The paper's epsilon of Adam for each kind of image tower."""
    return 1e-8 if resnet else 1e-6


def parameter_groups(model, config):
    """The model's parameters in two or three groups -> list of dicts, as torch's optimizers want.

    decay: tensors of two and more dimensions, with weight decay.
    no_decay: biases, norms, embeddings of one dimension.
    tau: logit_scale alone, with its own learning rate and no decay. It is missing where tau is
    constant or kept per sample; logit_scale is then frozen.
    """
    algorithm = get_algorithm(config.algorithm)
    learns_global_tau = algorithm.learned and algorithm.tau == "global"
    model.logit_scale.requires_grad_(learns_global_tau)

    weights = [p for p in model.parameters() if p.requires_grad and p is not model.logit_scale]
    matrices = [p for p in weights if p.ndim >= 2]
    vectors = [p for p in weights if p.ndim < 2]
    groups = [
        dict(name="decay", params=matrices, weight_decay=config.weight_decay),
        dict(name="no_decay", params=vectors, weight_decay=0.0),
    ]
    if learns_global_tau:
        groups.append(dict(name="tau", params=[model.logit_scale], weight_decay=0.0))
    return groups


# ------------------------------------------------------------------------------------------------
# Schedules
# ------------------------------------------------------------------------------------------------


def set_schedules(t, step):
    """Everything that a step's number decides: writes the learning rates into t.optimizer.

    t: train.Trainer (config, optimizer, steps_per_epoch, total_steps). step: from 0.
    -> (gamma, lr_tau): the weight of the new g in the moving average u, and the learning rate of
    per-sample temperatures, which the loss updates itself.

    To let the temperature follow a schedule instead of learning it, take an algorithm whose tau is
    constant (sogclr, fastclip-v1) and write its value here:

        t.model.logit_scale.fill_(-math.log(my_tau(step, t.total_steps)))
    """
    c = t.config
    set_lr(t.optimizer, c, step, t.total_steps)
    step_gamma = gamma(c, step, t.steps_per_epoch, t.total_steps)
    step_lr_tau = lr_tau(c, step, t.total_steps)
    return step_gamma, step_lr_tau


def set_lr(optimizer, config, step, total_steps):
    """Write this step's learning rates into the optimizer's groups."""
    for group in optimizer.param_groups:
        schedule = lr_tau if group["name"] == "tau" else lr
        group["lr"] = schedule(config, step, total_steps)


def lr(config, step, total_steps):
    """Learning rate of the weights: linear warm-up, then half a cosine down to lr_min."""
    return warm_cosine(config.lr, config.lr_min, step, config.warmup_steps, total_steps)


def lr_tau(config, step, total_steps):
    """Learning rate of the temperature, global or per sample, by its schedule:

    constant:  lr_tau, without warm-up.
    cosine:    the shape of the weights' schedule, with lr_tau as its peak.
    threshold: warm-up, then lr_tau; a third of it while tau <= TAU_THRESHOLD (finish_tau_step).
    """
    peak = config.lr if config.lr_tau is None else config.lr_tau
    schedule = lr_tau_schedule(config)
    if schedule == "cosine":
        return warm_cosine(peak, min(config.lr_min, peak), step, config.warmup_steps, total_steps)
    if schedule == "threshold" and step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    return peak


def lr_tau_schedule(config):
    """The config's schedule of tau's learning rate, or with "auto" the algorithm's usual one."""
    if config.lr_tau_schedule == "auto":
        return get_algorithm(config.algorithm).lr_tau
    return config.lr_tau_schedule


def gamma(config, step, steps_per_epoch, total_steps):
    """Weight of the new g in the moving average u, in (0, 1] (the paper's inner learning rate).

    constant: gamma_min. cosine, with E = gamma_decay_epochs (0: half of the run):

        gamma = gamma_min + (1 - gamma_min) (1 + cos(pi min(1, epoch / E))) / 2

    by whole epochs, or with gamma_smooth by steps. An algorithm without state has gamma = 1.
    """
    algorithm = get_algorithm(config.algorithm)
    if not algorithm.state:
        return 1.0
    schedule = config.gamma_schedule
    if schedule == "auto":
        schedule = algorithm.gamma
    if schedule == "constant":
        return config.gamma_min
    if schedule != "cosine":
        raise ConfigError(f"gamma_schedule = {schedule!r} is neither 'constant' nor 'cosine'")

    decay_epochs = config.gamma_decay_epochs or total_steps / steps_per_epoch / 2
    epoch = step / steps_per_epoch
    if not config.gamma_smooth:
        epoch = step // steps_per_epoch
    progress = min(1.0, epoch / decay_epochs)
    return half_cosine(1.0, config.gamma_min, progress)


def warm_cosine(peak, low, step, warmup_steps, total_steps):
    """Linear warm-up to `peak`, reached at step warmup_steps - 1, then half a cosine down to `low`,
    reached at total_steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return half_cosine(peak, low, progress)


def half_cosine(start, end, progress):
    """From `start` at progress 0 to `end` at progress 1, by half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------------------------------------
# Update
# ------------------------------------------------------------------------------------------------


def save_buffers(t):
    """Copies of the model's buffers before a step that may be left out; None if no step may be.

    t: train.Trainer (model, may_skip). -> list of tensors, in the order of model.buffers().
    """
    if not t.may_skip:
        return None
    return [buffer.clone() for buffer in t.model.buffers()]


def update(t, out, saved_buffers):
    """Turn the averaged gradients into new weights and a new global temperature.

    t: train.Trainer (model, optimizer, scaler, config), with all gradients in place (after
    reducer.wait()). out: the step's LossOutput. saved_buffers: what save_buffers gave before the
    step; unless it is None, a step whose objective or gradient is not finite is left out.

    -> norm of the unscaled gradient before clipping, (). The host waits for the device only if
    saved_buffers is given: that is the price of leaving steps out.
    """
    t.scaler.unscale_(t.optimizer)
    parameters = [p for p in t.model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if t.config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, t.config.grad_clip, grad_norm)

    if saved_buffers is not None and not torch.isfinite(grad_norm + out.objective):
        # BatchNorm's running statistics have already seen the batch that is left out.
        restore_buffers(t.model, saved_buffers)
        t.scaler.update()  # a float16 scaler lowers its scale
        return grad_norm

    log_scale_before = t.model.logit_scale.detach().clone()
    t.scaler.step(t.optimizer)
    t.scaler.update()
    if out.grad_logit_scale is not None:
        finish_tau_step(t.model.logit_scale, log_scale_before, t.config)
    return grad_norm


@torch.no_grad()
def restore_buffers(model, saved_buffers):
    """Set the model's buffers back to what they were."""
    for buffer, saved in zip(model.buffers(), saved_buffers):
        buffer.copy_(saved)


@torch.no_grad()
def finish_tau_step(logit_scale, before, config):
    """After optimizer.step(): apply schedule "threshold", and keep tau in [TAU_MIN, TAU_MAX].

    logit_scale: (), ln(1/tau) after the step, changed in place. before: its value before the step.

    All four optimizers move a parameter without weight decay by lr times something, so a third of
    the move is a move with a third of the lr. Done this way, the value of tau never has to come
    back from the device.
    """
    if lr_tau_schedule(config) == "threshold":
        is_small = before >= -math.log(TAU_THRESHOLD)
        a_third = before + (logit_scale - before) / 3
        logit_scale.copy_(torch.where(is_small, a_third, logit_scale))
    logit_scale.clamp_(-math.log(TAU_MAX), -math.log(TAU_MIN))
