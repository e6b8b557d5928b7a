"""What a config would do, without data or a GPU: `python train.py CONFIG --plan=True`."""

import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

import data
import loss
import model as models
from config import ConfigError
from ingest.index import load_index

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
FLOAT = 4  # bytes of a float32

# Tensors that an optimizer keeps per weight.
MOMENTS = {"adamw": 2, "lamb": 2, "lion": 1, "sgdm": 1}


class Anchor(NamedTuple):
    """A training speed that somebody has published."""

    model: str
    gpu: str
    speed: float  # samples per second of one GPU
    source: str


ANCHORS = (
    Anchor("ViT-B-16", "H100", 926.0, "DRRho-CLIP, arXiv 2505.06699"),
    Anchor("ViT-B-16", "A100", 332.0, "open_clip"),
    Anchor("ViT-B-32", "A100", 773.0, "open_clip"),
)

# The largest ratio, either way, between the FLOPs of a model and of the anchor it is scaled from.
FARTHEST_ANCHOR = 4

FOOTNOTE = (
    "(OpenCLIP: local loss, gather with gradient, which sends d-dimensional gradients back, and "
    "float32 gradients)"
)


def report(c):
    """Config -> text: what the run is, and a table with a column for each possible number of ranks.

    Raises ConfigError for what cannot work on any number of ranks.
    """
    run = numbers(c)
    usable = usable_ranks(c, run)
    known_speeds = speeds(c, run)

    lines = summary(c, run)
    warning = c.long_warmup(run.total_steps)
    if warning:
        lines.append(f"warning      {warning}")
    lines += [
        *duration(c, run, known_speeds),
        "",
        "per rank, on so many ranks; bytes sent per step (ring algorithms)",
        *format_table(table(c, run, usable)),
        *format_table(days(c, run, usable, known_speeds)),
        FOOTNOTE,
    ]
    return "\n".join(lines)


# ---- numbers ----


@dataclass
class Numbers:
    """What follows from a config. Sizes are in bytes, of float32 if not said otherwise."""

    num_samples: int
    source: str  # of num_samples, in words
    steps_per_epoch: int
    total_steps: int
    lanes: int

    parameters: dict  # {"image", "text", "total": their number}
    flops: dict  # {"image", "text": of the forward pass of one sample at full length}
    image_size: int  # pixels
    context_length: int  # tokens
    embed_dim: int

    columns: int  # floats that the u-state keeps per sample
    weight_bytes: int
    moment_bytes: int
    state_bytes: int  # of all ranks
    gradient_bytes: int  # on the wire


def numbers(c):
    """Config -> Numbers, of a model without memory (on the meta device)."""
    num_samples, source = count_samples(c)
    steps_per_epoch = num_samples // c.batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"{num_samples} samples do not fill one global batch of {c.batch_size}: "
            f"lower batch_size"
        )
    lanes, _ = data.lanes_and_block(c.batch_size, c.lanes, c.shuffle_block)

    with torch.device("meta"):
        model = models.create(c.model, c.tau_init, **c.model_numbers())
    parameters = models.num_parameters(model)
    weight_bytes = parameters["total"] * FLOAT
    columns = len(loss.state_columns(loss.get_algorithm(c.algorithm)))

    # The gradient of tau is not sent: every rank computes it from what has been gathered.
    gradient_bytes = (parameters["total"] - 1) * (2 if c.grad_wire == "bf16" else FLOAT)

    return Numbers(
        num_samples=num_samples,
        source=source,
        steps_per_epoch=steps_per_epoch,
        total_steps=c.total_steps(steps_per_epoch),
        lanes=lanes,
        parameters=parameters,
        flops=models.forward_flops(model, model.context_length),
        image_size=model.image_size,
        context_length=model.context_length,
        embed_dim=model.embed_dim,
        columns=columns,
        weight_bytes=weight_bytes,
        moment_bytes=weight_bytes * MOMENTS[c.optimizer],
        state_bytes=num_samples * columns * FLOAT,
        gradient_bytes=gradient_bytes,
    )


def count_samples(c):
    """-> (number of training samples, where it is from)"""
    if c.train_samples:
        return c.train_samples, "train_samples in the config"
    if c.train_data:
        index = load_index(
            c.train_data,
            c.caption_key,
            count_remote=c.index_remote,
            allow_left_out=c.allow_left_out,
        )
        return index.num_samples, "the index of the shards"
    raise ConfigError(
        "plan needs the number of samples: give train_samples, or train_data that is at hand"
    )


def usable_ranks(c, run):
    """-> the numbers of ranks among which the global batch can be divided."""
    usable = []
    for ranks in RANKS:
        if c.batch_size % ranks or run.lanes % ranks:
            continue
        if c.micro_batch and (c.batch_size // ranks) % c.micro_batch:
            continue
        usable.append(ranks)

    if not usable:
        raise ConfigError(
            f"no number of ranks works with batch_size = {c.batch_size}, lanes = {run.lanes}, "
            f"micro_batch = {c.micro_batch}"
        )
    return usable


# ---- text ----


def summary(c, run):
    """-> the lines on the run as a whole."""
    algorithm = loss.get_algorithm(c.algorithm)
    tau = "per-sample" if algorithm.tau == "sample" else "global"
    learned = "learned" if algorithm.learned else "constant"
    parameters = run.parameters

    image_gflops = run.flops["image"] / 1e9
    text_gflops = run.flops["text"] / 1e9
    samples_seen = run.total_steps * c.batch_size
    # The backward pass costs twice the forward pass.
    exaflops = 3 * (image_gflops + text_gflops) * samples_seen / 1e9

    checkpoint_bytes = run.weight_bytes + run.moment_bytes + run.state_bytes
    folder = os.path.join(c.out_dir, "checkpoints")
    save_steps = c.save_steps or run.steps_per_epoch

    return [
        f"{c.algorithm}, equations of the {c.equations}: {algorithm.loss}, {tau} tau, {learned}",
        f"model        {c.model}: {parameters['total']:,} parameters "
        f"(image {parameters['image']:,}, text {parameters['text']:,}), "
        f"input {run.image_size} px, {run.context_length} tokens, d = {run.embed_dim}",
        f"compute      {image_gflops + text_gflops:.1f} GFLOP per pair forward at full length "
        f"(image {image_gflops:.1f}, text {text_gflops:.1f}); {exaflops:,.4g} EFLOP in all",
        f"data         {run.num_samples:,} samples ({run.source}); {run.lanes} lanes",
        f"run          {run.steps_per_epoch:,} steps of {c.batch_size} an epoch, "
        f"{run.total_steps:,} steps, {samples_seen:,} samples seen "
        f"({run.total_steps / run.steps_per_epoch:.4g} epochs)",
        f"checkpoint   {size(checkpoint_bytes)} each (weights {size(run.weight_bytes)}, "
        f"optimizer {size(run.moment_bytes)}, u-state {size(run.state_bytes)}), "
        f"{c.keep} kept in {folder}; every {save_steps:,} steps",
    ]


def duration(c, run, known_speeds):
    """-> the lines on how many GPU-hours the run takes, and dollars if the config has a price.

    Only training is counted: no start-up, no evaluation, no waiting for data or for other GPUs.
    """
    if not known_speeds:
        return [
            "time         not known, as no speed is published for a model of about its size: "
            "give --plan_speed=SAMPLES_PER_SECOND"
        ]

    lines = []
    for speed in known_speeds:
        epoch = gpu_hours(run.steps_per_epoch * c.batch_size, speed)
        total = gpu_hours(run.total_steps * c.batch_size, speed)
        hours = f"{rounded(epoch)} GPU-hours an epoch, {rounded(total)} in all"
        lines.append(f"time         {speed.gpu}: {hours}, at {rounded(speed.samples)} samples/s")
        lines.append(f"             ({speed.source})")
        if c.plan_price:
            lines.append(
                f"cost         {speed.gpu}: ${rounded(epoch * c.plan_price)} an epoch, "
                f"${rounded(total * c.plan_price)} in all, at ${c.plan_price:g} a GPU-hour"
            )
    return lines


def table(c, run, usable):
    """-> rows of cells: a title, then a cell for each number of ranks in `usable`."""
    purposes = traffic(c.batch_size, run.embed_dim, run.columns, run.gradient_bytes)
    # Weights, gradients and moments are on every rank.
    fixed_bytes = 2 * run.weight_bytes + run.moment_bytes

    titles = ["ranks", "samples per step", "weights+grads+optimizer", "u-state"]
    titles += [f"send {name}" for name in purposes]
    titles += ["send in all", "OpenCLIP would send"]

    columns = [titles]
    for ranks in usable:
        sent = {name: count(ranks) for name, count in purposes.items()}
        rows_per_rank = -(-run.num_samples // ranks)  # rounded up
        gradients = 2 * (ranks - 1) / ranks * run.weight_bytes
        openclip = 2 * sent["features"] + gradients  # features there, and their gradients back

        column = [ranks, c.batch_size // ranks]
        column += [size(fixed_bytes), size(rows_per_rank * run.columns * FLOAT)]
        column += [size(count) for count in sent.values()]
        column += [size(sum(sent.values())), size(openclip)]
        columns.append(column)
    return list(zip(*columns))  # transposed: a row for each title


def days(c, run, usable, known_speeds):
    """-> further rows of the table: the days that the run takes, for each known speed."""
    samples_seen = run.total_steps * c.batch_size
    rows = []
    for speed in known_speeds:
        one_gpu = gpu_hours(samples_seen, speed) / 24
        rows.append([f"days, {speed.gpu}", *(rounded(one_gpu / ranks) for ranks in usable)])
    return rows


def format_table(rows):
    """-> lines, right-aligned; the first column is wider than the others."""
    lines = []
    for title, *cells in rows:
        lines.append(f"{title:>25}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def rounded(x):
    """A positive number -> text with three digits, or with all those before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def size(count):
    """Bytes -> text with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


# ---- how fast one GPU is ----


class Speed(NamedTuple):
    """How fast one GPU trains the config's model, and how that is known."""

    gpu: str  # which kind, or "given"
    samples: float  # per second
    source: str


def speeds(c, run):
    """-> list of Speed: the config's plan_speed, or what is published for each kind of GPU.

    For a model without a published speed it is that of the anchor nearest in FLOPs per pair,
    scaled by them. A kind of GPU without an anchor that is near enough is left out.
    """
    if c.plan_speed:
        return [Speed("given", c.plan_speed, "plan_speed")]

    pair_flops = run.flops["image"] + run.flops["text"]
    found = {}  # GPU -> (distance, Speed)
    for anchor in ANCHORS:
        factor = anchor_flops(anchor) / pair_flops
        distance = abs(math.log(factor))
        is_nearest = anchor.gpu not in found or distance < found[anchor.gpu][0]
        if distance <= math.log(FARTHEST_ANCHOR) and is_nearest:
            found[anchor.gpu] = distance, scaled(anchor, factor)
    return [speed for _, speed in found.values()]


def anchor_flops(anchor):
    """FLOPs of the forward pass of one pair, at full length, of the anchor's model."""
    with torch.device("meta"):
        model = models.create(anchor.model)
    return sum(models.forward_flops(model, model.context_length).values())


def scaled(anchor, factor):
    """The anchor's Speed for a model that needs 1/factor times the FLOPs of the anchor's."""
    source = f"published: {anchor.model}, {anchor.source}"
    if factor != 1:
        source += f": {anchor.speed:g}, scaled by the FLOPs of a pair"
    return Speed(anchor.gpu, anchor.speed * factor, source)


def gpu_hours(samples, speed):
    return samples / speed.samples / 3600


# ---- what is sent in a step, and how long it takes ----


def traffic(batch_size, d, columns, gradient_bytes):
    """Bytes that a rank sends in a step: {purpose: function of the number of ranks}.

    It equals what dist.traffic counts. batch_size: global. d: of the features. columns: of the
    u-state.
    """

    def features(ranks):
        return gather_bytes(2 * d * FLOAT, batch_size, ranks)

    def scalars(ranks):
        return gather_bytes(5 * FLOAT, batch_size, ranks)

    def gradients(ranks):
        return reduce_bytes(gradient_bytes, ranks)

    def ids(ranks):
        return gather_bytes(8, batch_size, ranks)  # int64

    def state(ranks):
        return reduce_bytes(batch_size * columns * FLOAT, ranks)

    purposes = {"features": features, "scalars": scalars, "gradients": gradients}
    if columns:
        purposes["ids"] = ids
        purposes["state"] = state
    return purposes


def gather_bytes(bytes_per_sample, batch_size, ranks):
    """What a rank sends of its part of the batch in a ring all-gather."""
    return (ranks - 1) * (batch_size // ranks) * bytes_per_sample


def reduce_bytes(num_bytes, ranks):
    """What a rank sends of a tensor in a ring all-reduce."""
    return 2 * (ranks - 1) * num_bytes // ranks


def predicted(compute, sent, ranks, buckets, alpha, bandwidth, hide=2 / 3):
    """Seconds of a step.

    compute: seconds of a step on a rank that sends nothing.
    sent: {purpose: bytes that a rank sends}.
    buckets: number of gradient buckets.
    alpha, bandwidth: seconds per message, bytes per second. A collective takes alpha per message
    of its ring, K-1 of an all-gather and 2(K-1) of an all-reduce, and the time of its bytes.
    hide: share of `compute` beside which gradients are sent, that of the backward pass. (On a CPU
    it is 0, because what sends is what computes.)

    The ids are sent a step ahead, the u-state beside the forward pass, and the gradients beside the
    backward pass, except for the last bucket.
    """

    def seconds(purpose, rings):
        if purpose not in sent:
            return 0.0
        return rings * (ranks - 1) * alpha + sent[purpose] / bandwidth

    # OpenCLIP gathers the features of images and those of texts apart, and returns gradients for
    # both.
    gathers = 2 if "feature gradients" in sent else 1
    exposed = 0.0
    for purpose in ("features", "scalars", "feature gradients"):
        exposed += seconds(purpose, gathers)

    gradients = seconds("gradients", 2 * buckets)
    last_bucket = gradients / buckets
    return compute + exposed + max(last_bucket, gradients - hide * compute)
