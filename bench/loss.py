"""python -m bench loss: time and peak memory of the loss against b and B, ours beside open_clip.

One process acts as rank 0 of B/b: nothing is sent.
"""

import math
import statistics

import torch

import dist
from bench import baselines, harness, measure, report, step
from loss import ContrastiveLoss
from runtime import hardware


def run(args):
    """Rows of results: each side at each (b, B), the first with its share of a whole step."""
    sizes = sizes_of(args.batch, args.global_batch)
    embed_dim = harness.model_shape(args).embed_dim
    sides = ("ours", f"ours, loss_tile={args.tile}", "open_clip")
    workers = {side: harness.Worker(worker, args, side, embed_dim) for side in sides}
    requests = sizes * args.rounds
    turns = harness.take_turns(workers, requests, "loss", args.limit)
    sample_seconds = seconds_per_sample(args)

    rows = []
    for number, (b, B) in enumerate(sizes):
        for side in sides:
            # Every round measured each size once, until the side failed.
            rounds = turns[side][number :: len(sizes)]
            settings = dict(b=b, B=B, d=embed_dim, precision=args.precision)
            row = row_of(side, settings, rounds)
            if number == 0 and "median" in row and sample_seconds:
                row["share_of_step"] = row["median"] / 1000 / (sample_seconds * b)
                row["step"] = f"{args.model}, {b} samples as fast as {step_args(args).batch}"
            rows.append(row)
    return rows


def row_of(side, settings, rounds):
    """The row of a side at one size. rounds: (seconds, peak bytes) or Failed for each round."""
    measured = harness.measured(rounds)
    if not measured:
        return report.failed("loss", side, settings, rounds[-1].reason)

    milliseconds = [1000 * seconds for seconds, _ in measured]
    row = report.row("loss", side, settings, "ms", milliseconds)
    row["gathered_bytes"] = 2 * settings["B"] * settings["d"] * 4
    row["peak_bytes"] = statistics.median([peak_bytes for _, peak_bytes in measured])
    return row


def sizes_of(b, B):
    """The pairs (b, B) that are measured: the given one, then other B, then other b."""
    small_b = min(b, 128)
    quarter = B // 4
    other_B = [(small_b, factor * quarter) for factor in (1, 2, 4, 8)]
    other_b = [(b // 2, B), (b // 4, B)]
    return [(b, B), *other_B, *other_b]


def step_args(args):
    """The arguments of the training step that the loss is compared with."""
    on_gpu = harness.device_of(args).type == "cuda"
    default = args.batch if on_gpu else 8
    return harness.changed(args, batch=args.step_batch or default)


def seconds_per_sample(args):
    """The time of our training step, per sample; None if it failed."""
    args = step_args(args)
    workers = {"ours": harness.Worker(step.worker, args, "ours")}
    requests = [None] * min(3, args.rounds)
    turns = harness.take_turns(workers, requests, f"step {args.model}", args.limit)
    measured = harness.measured(turns["ours"])
    if not measured:
        return None
    return statistics.median(turn.seconds for turn in measured) / args.batch


def worker(args, side, embed_dim):
    """One side's process: asked for (b, B), yields (seconds, peak bytes) of a call of the loss."""
    device = dist.init(args.device)
    b, B = yield
    while True:
        harness.act_alone(B // b)
        call = make_call(args, side, b, B, embed_dim, device)
        seconds = measure.seconds_of(call, device)
        peak_bytes = measure.peak_of(call, device)
        b, B = yield seconds, peak_bytes


def make_call(args, side, b, B, embed_dim, device):
    """A function that computes the side's loss and gradients once, on random features (b, d)."""
    image_features = random_features(b, embed_dim, device)
    text_features = random_features(b, embed_dim, device)
    logit_scale = torch.tensor(math.log(1 / 0.07), device=device)

    if side == "open_clip":
        autocast = hardware.autocast(hardware.precision(args.precision, device), device)
        clip_loss = baselines.loss_as_first_of(B // b, autocast)

        def call():
            clip_loss(image_features, text_features, logit_scale)

        return call

    tile = args.tile if "loss_tile" in side else 0
    loss = ContrastiveLoss("fastclip-v3", b, device=device, tile=tile)
    ids = torch.arange(b).repeat(B // b)  # of all ranks

    def call():
        loss(image_features, text_features, logit_scale, loss.lookup(ids), 0.5)

    return call


def random_features(b, embed_dim, device):
    return torch.nn.functional.normalize(torch.randn(b, embed_dim, device=device), dim=1)
