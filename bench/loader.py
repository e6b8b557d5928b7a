"""python -m bench loader: images/s from tar shards to ready batches, ours beside open_clip.

On one core, the same one for both, or with --workers=N.
"""

import os
import tempfile
import time

import torch

import data
from bench import baselines, harness, made_data, report
from config import ConfigError
from ingest.index import load_index
from runtime import hardware

IMAGE_SIZE = 224
CONTEXT_LENGTH = 77


def run(args):
    """Rows of results: open_clip's pipeline, and ours with each decoder."""
    with tempfile.TemporaryDirectory() as folder:
        shards, source = made_data.shards_of(args, folder, args.images)
        index = load_index(shards)
        count = min(index.num_samples, args.images)
        if count < 2 * args.batch:
            raise ConfigError(
                f"{count} images are fewer than two batches of {args.batch}, the first of which "
                "is not timed: raise --images"
            )
        shard_bytes = sum(os.path.getsize(s) for s in index.shards if os.path.exists(s))

        sides = ["open_clip", *(f"ours, {decoder}" for decoder in args.decoders)]
        workers = {side: harness.Worker(worker, args, side, shards, count) for side in sides}
        requests = [None] * args.rounds
        turns = harness.take_turns(workers, requests, f"loader {source}", args.limit)

    settings = dict(
        source=source,
        batch=args.batch,
        workers=args.workers,
        cores=harness.cores() if args.workers else 1,
    )
    rows = []
    for side, of_side in turns.items():
        if isinstance(of_side[-1], harness.Failed):
            rows.append(report.failed("loader", side, settings, of_side[-1].reason))
            continue

        row = report.row(
            "loader",
            side,
            settings,
            "images/s",
            [images_per_second for images_per_second, _ in of_side],
            kilobytes_per_sample=shard_bytes / index.num_samples / 1e3,
        )
        if not args.workers:
            # The CPU time of other processes is not known.
            row["cpu_seconds"] = [cpu_seconds for _, cpu_seconds in of_side]
        rows.append(row)
    return report.with_ratios(rows)


def worker(args, side, shards, count):
    """One side's process: yields (images per second, CPU seconds per image) when it is asked."""
    if not args.workers:
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    index = load_index(shards)
    yield

    while True:
        batches = make_loader(args, side, shards, index, count // args.batch)
        images = 0
        for number, batch in enumerate(batches):
            if number == 0:
                # Not timed: workers start, lanes seek to their positions, shuffle buffers fill.
                start = time.perf_counter()
                cpu_start = time.process_time()
            else:
                images += len(batch[0])
        hardware.synchronize(batch[0].device)
        seconds = time.perf_counter() - start
        cpu_seconds = time.process_time() - cpu_start

        # Ends its workers before it is the other side's turn.
        batches = None
        yield images / seconds, cpu_seconds / images


def make_loader(args, side, shards, index, num_batches):
    """An iterable of so many batches, as the side's training would get them."""
    if side == "open_clip":
        num_samples = num_batches * args.batch
        return baselines.pipeline(
            shards, num_samples, args.batch, IMAGE_SIZE, CONTEXT_LENGTH, args.workers
        )

    decoder = side.removeprefix("ours, ")
    return data.Loader(
        data.Order(index, args.batch),
        IMAGE_SIZE,
        workers=args.workers,
        num_steps=num_batches,
        decoder=decoder,
        device="cuda" if decoder == "nvjpeg" else "cpu",
    )
