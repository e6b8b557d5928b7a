"""Parameter groups, the four optimizers, and the three schedules: lr, gamma and the temperature's lr.

Schedules are pure functions of the step, so that resuming needs no scheduler state.
"""

import math

import torch

import model as models
from loss import ALGORITHMS, TAU_MAX, TAU_MIN

TAU_THRESHOLD = 0.03  # FastCLIP-v3: while tau is at or below it, its learning rate is a third


def create(model, config):
    """config.optimizer over three groups of the model's parameters -> torch Optimizer.

    "decay": tensors of two and more dimensions, with weight decay. "no_decay": biases, norms, embeddings of one dimension.
    "tau": logit_scale alone, with its own learning rate and no decay; absent where tau is constant or kept per sample.
    """
    algorithm = ALGORITHMS[config.algorithm]
    global_tau = algorithm.learned and algorithm.tau == "global"
    model.logit_scale.requires_grad_(global_tau)
    weights = [p for p in model.parameters() if p.requires_grad and p is not model.logit_scale]
    groups = [
        dict(
            name="decay",
            params=[p for p in weights if p.ndim >= 2],
            weight_decay=config.weight_decay,
        ),
        dict(name="no_decay", params=[p for p in weights if p.ndim < 2], weight_decay=0.0),
    ]
    if global_tau:
        groups.append(dict(name="tau", params=[model.logit_scale], weight_decay=0.0))

    resnet = models.is_resnet(model)  # the paper's settings for each kind of tower
    beta2 = config.beta2 or (0.99 if config.optimizer == "lion" else 0.999 if resnet else 0.98)
    eps = config.eps or (1e-8 if resnet else 1e-6)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, config.lr, betas=(config.beta1, beta2), eps=eps, fused=True
        )
    if config.optimizer == "sgdm":
        return torch.optim.SGD(groups, config.lr, momentum=config.beta1)
    import timm.optim

    if config.optimizer == "lamb":
        return timm.optim.Lamb(
            groups, config.lr, betas=(config.beta1, beta2), eps=eps, max_grad_norm=None
        )
    return timm.optim.Lion(groups, config.lr, betas=(config.beta1, beta2))


def set_lr(optimizer, config, step, total_steps):
    """Write this step's learning rates into the optimizer's groups."""
    for group in optimizer.param_groups:
        group["lr"] = (lr_tau if group["name"] == "tau" else lr)(config, step, total_steps)


def warm_cosine(peak, low, step, warmup_steps, total_steps):
    """Linear warm-up to `peak`, reached at step warmup_steps - 1, then half a cosine down to `low` at total_steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2


def lr(config, step, total_steps):
    return warm_cosine(config.lr, config.lr_min, step, config.warmup_steps, total_steps)


def lr_tau(config, step, total_steps):
    """Learning rate of the temperature, global or per sample, before v3's threshold (see finish_tau_step).

    constant: no warm-up. cosine: as the model's. threshold: warm-up, then constant, a third while tau <= TAU_THRESHOLD.
    """
    peak = config.lr if config.lr_tau is None else config.lr_tau
    schedule = lr_tau_schedule(config)
    if schedule == "cosine":
        return warm_cosine(peak, min(config.lr_min, peak), step, config.warmup_steps, total_steps)
    if schedule == "threshold" and step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    return peak


def lr_tau_schedule(config):
    if config.lr_tau_schedule != "auto":
        return config.lr_tau_schedule
    return {"fastclip-v3": "threshold", "fastclip-v2": "constant", "isogclr": "constant"}.get(
        config.algorithm, "cosine"
    )


def gamma(config, step, steps_per_epoch, total_steps):
    """Inner learning rate of the moving average u: constant gamma_min, or a cosine from 1 to gamma_min over
    gamma_decay_epochs, by whole epochs or (gamma_smooth) by steps; the paper's section 5, "inner LR schedule"."""
    if not ALGORITHMS[config.algorithm].state:
        return 1.0
    schedule = (
        ALGORITHMS[config.algorithm].gamma
        if config.gamma_schedule == "auto"
        else config.gamma_schedule
    )
    if schedule == "constant":
        return config.gamma_min
    decay_epochs = config.gamma_decay_epochs or total_steps / steps_per_epoch / 2
    epoch = step / steps_per_epoch if config.gamma_smooth else step // steps_per_epoch
    progress = min(1.0, epoch / decay_epochs)
    return config.gamma_min + (1 - config.gamma_min) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def finish_tau_step(logit_scale, before, config):
    """After optimizer.step(): apply v3's threshold and keep tau in [TAU_MIN, TAU_MAX]; `before` is ln(1/tau) before the step.

    All four optimizers move a parameter without decay by lr times something, so a third of the move is a move with a
    third of the lr; done this way the value of tau never has to come back from the device.
    """
    if lr_tau_schedule(config) == "threshold":
        small = before >= -math.log(TAU_THRESHOLD)
        logit_scale.copy_(torch.where(small, before + (logit_scale - before) / 3, logit_scale))
    logit_scale.clamp_(-math.log(TAU_MAX), -math.log(TAU_MIN))


def set_schedules(t, step):
    set_lr(t.optimizer, t.config, step, t.total_steps)
    return gamma(t.config, step, t.steps_per_epoch, t.total_steps), lr_tau(t.config, step, t.total_steps)


def save_buffers(t):
    return [b.clone() for b in t.model.buffers()] if t.may_skip else None


def update(t, out, buffers):
    t.scaler.unscale_(t.optimizer)
    parameters = [p for p in t.model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if t.config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, t.config.grad_clip, grad_norm)
    if buffers is not None and not torch.isfinite(grad_norm + out.objective):
        for b, before in zip(t.model.buffers(), buffers):
            b.copy_(before)
        t.scaler.update()
        return grad_norm
    log_scale = t.model.logit_scale.detach().clone()
    t.scaler.step(t.optimizer)
    t.scaler.update()
    if out.grad_logit_scale is not None:
        finish_tau_step(t.model.logit_scale, log_scale, t.config)
    return grad_norm
