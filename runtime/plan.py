"""What a config would do, without data or a GPU: `python train.py CONFIG --plan=True`."""

import os

import torch

import data
import loss
import model as models
from config import ConfigError
from ingest.index import load_index

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)


def report(c):
    """Config -> text. ConfigError for what cannot work on any number of ranks; a column per number of ranks that can."""
    if c.train_samples:
        num_samples, source = c.train_samples, "train_samples in the config"
    elif c.train_data:
        num_samples, source = (
            load_index(c.train_data, c.caption_key, count_remote=c.index_remote).num_samples,
            "the index of the shards",
        )
    else:
        raise ConfigError(
            "plan needs the number of samples: give train_samples, or train_data that is at hand"
        )
    steps_per_epoch = num_samples // c.batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"{num_samples} samples do not fill one global batch of {c.batch_size}: lower batch_size"
        )
    total = min(max(1, int(c.epochs * steps_per_epoch)), c.max_steps or 2**62)
    with torch.device("meta"):
        model = models.create(c.model, c.tau_init, **c.model_numbers())
    parameters = models.num_parameters(model)
    flops = models.forward_flops(model, model.context_length)
    lanes, _ = data.lanes_and_block(c.batch_size, c.lanes, c.shuffle_block)
    algorithm = loss.ALGORITHMS[c.algorithm]
    columns = 2 * algorithm.state + 7 * (algorithm.tau == "sample")
    total_parameters, d = parameters["total"], model.embed_dim
    moments = {"adamw": 2, "lamb": 2, "lion": 1, "sgdm": 1}[c.optimizer]
    state_bytes = num_samples * columns * 4
    saved = total_parameters * 4 * (1 + moments) + state_bytes
    rows = [
        f"{c.algorithm}, equations of the {c.equations}: {algorithm.loss}, "
        f"{'per-sample' if algorithm.tau == 'sample' else 'global'} tau, {'learned' if algorithm.learned else 'constant'}",
        f"model        {c.model}: {total_parameters:,} parameters (image {parameters['image']:,}, text {parameters['text']:,}), "
        f"input {model.image_size} px, {model.context_length} tokens, d = {d}",
        f"compute      {(flops['image'] + flops['text']) / 1e9:.1f} GFLOP per pair forward at full length (image "
        f"{flops['image'] / 1e9:.1f}, text {flops['text'] / 1e9:.1f}); "
        f"{3 * (flops['image'] + flops['text']) * total * c.batch_size / 1e18:,.4g} EFLOP in all",
        f"data         {num_samples:,} samples ({source}); {lanes} lanes",
        f"run          {steps_per_epoch:,} steps of {c.batch_size} an epoch, {total:,} steps, {total * c.batch_size:,} samples seen "
        f"({total / steps_per_epoch:.4g} epochs)",
        f"checkpoint   {size(saved)} each (weights {size(total_parameters * 4)}, optimizer {size(total_parameters * 4 * moments)}, "
        f"u-state {size(state_bytes)}), {c.keep} kept in {os.path.join(c.out_dir, 'checkpoints')}; every "
        f"{c.save_steps or steps_per_epoch:,} steps",
        "",
        "per rank, on so many ranks; bytes sent per step (ring algorithms)",
    ]
    usable = [
        k
        for k in RANKS
        if c.batch_size % k == 0
        and lanes % k == 0
        and not (c.micro_batch and c.batch_size // k % c.micro_batch)
    ]
    if not usable:
        raise ConfigError(
            f"no number of ranks works with batch_size = {c.batch_size}, lanes = {lanes}, micro_batch = {c.micro_batch}"
        )
    gradient_bytes = (total_parameters - 1) * (
        2 if c.grad_wire == "bf16" else 4
    )  # every rank knows tau's
    table = [
        ["ranks", *usable],
        ["samples per step", *(c.batch_size // k for k in usable)],
        ["weights+grads+optimizer", *[size(total_parameters * 4 * (2 + moments))] * len(usable)],
        ["u-state", *(size(-(-num_samples // k) * columns * 4) for k in usable)],
    ]
    sent = traffic(c.batch_size, d, columns, gradient_bytes)
    table += [["send " + name, *(size(count(k)) for k in usable)] for name, count in sent.items()]
    table.append(["send in all", *(size(sum(count(k) for count in sent.values())) for k in usable)])
    table.append(
        [
            "OpenCLIP would send",
            *(
                size(2 * sent["features"](k) + 2 * (k - 1) / k * total_parameters * 4)
                for k in usable
            ),
        ]
    )
    rows += [
        "".join(f"{cell:>{25 if i == 0 else 10}}" for i, cell in enumerate(row)) for row in table
    ]
    rows.append(
        "(OpenCLIP: local loss, gather with gradient, which sends d-dimensional gradients back, and float32 gradients)"
    )
    return "\n".join(rows)


def traffic(batch_size, d, columns, gradient_bytes):
    """Bytes that a rank sends in a step, by purpose: {name: function of the number of ranks}, as dist.traffic counts them."""
    gathered = lambda bytes_per_sample: lambda k: (k - 1) * (batch_size // k) * bytes_per_sample
    reduced = lambda count: lambda k: 2 * (k - 1) * count // k
    parts = {
        "features": gathered(2 * d * 4),
        "scalars": gathered(5 * 4),
        "gradients": reduced(gradient_bytes),
    }
    if columns:
        parts.update({"ids": gathered(8), "state": reduced(batch_size * columns * 4)})
    return parts


def predicted(compute, traffic, ranks, buckets, alpha, bandwidth, hide=2 / 3):
    """Seconds of a step. A collective takes alpha per message of its ring, K-1 of an all-gather and 2(K-1) of an all-reduce, and its bytes'
    time. The u-state hides behind the forward pass. Gradients hide behind the backward pass, the share `hide` of `compute`, but for the last bucket. (On a CPU hide
    is 0: what sends is what computes.)"""
    seconds = lambda name, messages: (
        messages * (ranks - 1) * alpha + traffic[name] / bandwidth if name in traffic else 0.0
    )
    apart = (
        2 if "feature gradients" in traffic else 1
    )  # open_clip sends those of images and those of texts
    exposed = sum(
        seconds(name, apart) for name in ("ids", "features", "scalars", "feature gradients")
    )
    gradients = seconds("gradients", 2 * buckets)
    return compute + exposed + max(gradients / buckets, gradients - hide * compute)


def size(count):
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
