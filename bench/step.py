"""python -m bench step: samples/s, peak memory and MFU of training steps, ours beside open_clip.

With --on_device the batches are in the device's memory before the first step, for both sides.
"""

import statistics
import time
from itertools import chain, cycle
from typing import NamedTuple

import torch

import dist
from bench import baselines, harness, made_data, measure, ours, report
from runtime import hardware


class Turn(NamedTuple):
    """What one side measured in one turn."""

    seconds: float  # of a step
    peak_bytes: int
    matmul_flops: float  # FLOP/s of a matrix product, measured in the same turn
    cpu_seconds: float  # of a step, all threads


def run(args):
    """Rows of results: a training step of each side."""
    sides = ["ours", "open_clip"]
    if args.compiled:
        sides += ["ours compiled", "open_clip compiled"]
    if args.released:
        sides.append("released")
    workers = {side: harness.Worker(worker, args, side) for side in sides}
    turns = harness.take_turns(workers, [None] * args.rounds, f"step {args.model}", args.limit)

    settings = dict(model=args.model, batch=args.batch, precision=args.precision, **args.numbers)
    if args.on_device:
        settings["on_device"] = True

    # MFU: work per second over the best rate that a matrix product reached.
    measured = harness.measured(chain(*turns.values()))
    matmul_flops = max((turn.matmul_flops for turn in measured), default=None)
    rows = [row_of(args, side, settings, turns[side], matmul_flops) for side in sides]
    return report.with_ratios(rows)


def row_of(args, side, settings, turns, matmul_flops):
    """The row of a side: of the turns before it failed, if it did, there is none."""
    algorithms = {"ours": args.algorithm, "open_clip": "ClipLoss", "released": "fastclip-v3"}
    algorithm = algorithms[side.split()[0]]
    if isinstance(turns[-1], harness.Failed):
        return report.failed("step", side, settings, turns[-1].reason, algorithm=algorithm)

    speeds = [args.batch / turn.seconds for turn in turns]
    speed = statistics.median(speeds)
    row = report.row(
        "step",
        side,
        settings,
        "samples/s",
        speeds,
        peak_bytes=max(turn.peak_bytes for turn in turns),
        matmul_flops=matmul_flops,
        cpu_seconds=[turn.cpu_seconds for turn in turns],
        mfu=speed * useful_flops(args) / matmul_flops,
        mfu_padded=speed * padded_flops(args) / matmul_flops,
        algorithm=algorithm,
    )
    if side == "released":
        row["released_commit"] = report.commit(args.released)
    return row


def useful_flops(args):
    """FLOPs of a training step per pair, without padding."""
    tokens = made_data.caption_lengths(4 * args.batch).float().mean().item()
    return pair_flops(args, tokens)


def padded_flops(args):
    """FLOPs of a training step per pair if every caption were as long as the context.

    Others report MFU of this work, whether or not it is done.
    """
    return pair_flops(args, harness.model_shape(args).context_length)


def pair_flops(args, tokens):
    """FLOPs of a training step per pair: the backward pass costs twice the forward pass."""
    shape = harness.model_shape(args)
    return 3 * (shape.image_flops + shape.token_flops * tokens)


def worker(args, side):
    """One side's process: yields a Turn whenever it is asked."""
    device = dist.init(args.device)
    on_gpu = device.type == "cuda"
    compiled = side.endswith("compiled")
    shape = harness.model_shape(args)
    batches = made_data.make_batches(shape.image_size, shape.context_length, args.batch)
    trainer = make_trainer(args, side, batches, device)

    # Every batch has another length, for which compiled code and cuDNN need a step to prepare.
    trainer.run(2 * len(batches) if compiled or on_gpu else 1)
    measure.reset_peak_memory(device)
    # The processes of all sides share one GPU's memory.
    torch.cuda.empty_cache()
    yield

    steps = args.steps or (20 if on_gpu else 1)
    while True:
        if on_gpu:
            # Take back the memory that was given up for the others' turns.
            trainer.run(1)
        matmul_flops = hardware.peak_flops(hardware.precision(args.precision, device), device)

        start = time.perf_counter()
        cpu_start = time.process_time()
        trainer.run(steps)
        hardware.synchronize(device)
        seconds = (time.perf_counter() - start) / steps
        cpu_seconds = (time.process_time() - cpu_start) / steps

        torch.cuda.empty_cache()
        yield Turn(seconds, measure.peak_memory(device), matmul_flops, cpu_seconds)


def make_trainer(args, side, batches, device):
    """The side's trainer, on these data.Batches for ever."""
    compiled = side.endswith("compiled")
    if side.startswith("ours"):
        batches = placed(args, batches, device)
        return ours.Trainer(args, cycle(batches), args.algorithm, compiled=compiled)

    clone = args.released if side.startswith("released") else ""
    context_length = harness.model_shape(args).context_length
    batches = [baselines.batch_of(batch, context_length, bool(clone)) for batch in batches]
    batches = placed(args, batches, device)
    return baselines.Trainer(args, device, cycle(batches), compiled=compiled, clone=clone)


def placed(args, batches, device):
    """The batches where a step finds them: on the host, or with --on_device on the device."""
    if args.on_device:
        return made_data.on_device(batches, device)
    return made_data.pinned(batches, device)
