"""python -m bench breakdown: where a training step's time goes, on ranks of this machine.

Each step reads from tar shards and is seen by torch's profiler.
"""

import gc
import statistics
import tempfile
import time

import data
import dist
from bench import baselines, harness, made_data, measure, ours, report
from ingest import workers
from ingest.index import load_index
from runtime import hardware

# (side, type in which its gradients travel)
SIDES = [
    ("openclip", "fp32"),
    ("fastclip-v1", "fp32"),
    ("fastclip-v3", "fp32"),
    ("fastclip-v3", "bf16"),
    ("open_clip", "fp32"),
]

ENDLESS = 10**6  # steps or samples that a loader promises; nobody waits for its end


def run(args):
    """Rows of results: the parts of a step of rank 0, for each of SIDES."""
    with tempfile.TemporaryDirectory() as folder:
        num_samples = max(128, 2 * args.batch * args.ranks)
        shards, _ = made_data.shards_of(args, folder, num_samples)
        load_index(shards)
        of_ranks = harness.on_ranks(args.ranks, rank_worker, args, shards, SIDES, label="breakdown")

    rows = []
    for (side, grad_wire), rounds in zip(SIDES, of_ranks[0]):
        parts = {name: statistics.median(parts[name] for parts in rounds) for name in rounds[0]}
        communication = parts["hidden"] + parts["exposed"]
        settings = dict(
            model=args.model,
            ranks=args.ranks,
            batch=args.batch,
            precision=args.precision,
            grad_wire=grad_wire,
            bucket_mb=args.bucket_mb,
            **args.numbers,
        )
        row = report.row(
            "breakdown",
            side,
            settings,
            "ms",
            [1000 * total(parts) for parts in rounds],
            parts_ms={name: 1000 * seconds for name, seconds in parts.items()},
            hidden_share=parts["hidden"] / (communication or 1),
        )
        rows.append(row)
    return rows


def total(parts):
    """Seconds of a step; what is hidden lies behind another part."""
    return sum(seconds for name, seconds in parts.items() if name != "hidden")


def rank_worker(args, shards, sides):
    """One rank: yields for each side a list with {part of a step: seconds} for each round."""
    device = dist.init(args.device)
    on_gpu = device.type == "cuda"

    results = []
    for side, grad_wire in sides:
        trainer = make_trainer(args, side, grad_wire, shards, device)
        trainer.run(2)

        rounds = []
        for _ in range(args.rounds):
            dist.barrier()
            with measure.profiled(device) as profile:
                start = time.perf_counter()
                trainer.run(1)
                hardware.synchronize(device)
                seconds = time.perf_counter() - start
            rounds.append(measure.parts_of(profile.events(), seconds, on_gpu))
        results.append(rounds)

        # The trainer's data workers end with it.
        trainer.close()
        trainer = None
        gc.collect()
    yield results


def make_trainer(args, side, grad_wire, shards, device):
    """The side's trainer on its own loader of the shards."""
    shape = harness.model_shape(args)
    default_workers = workers.default_workers() if device.type == "cuda" else 1
    num_workers = args.workers or default_workers

    if side == "open_clip":
        loader = baselines.pipeline(
            shards, ENDLESS, args.batch, shape.image_size, shape.context_length, num_workers
        )
        return baselines.Trainer(args, device, iter(loader))

    order = data.Order(load_index(shards), args.batch * dist.world_size())
    loader = data.Loader(
        order,
        shape.image_size,
        shape.context_length,
        rank=dist.rank(),
        world_size=dist.world_size(),
        workers=num_workers,
        device=device,
        num_steps=ENDLESS,
    )
    return ours.Trainer(
        args,
        iter(loader),
        side,
        num_samples=order.num_samples,
        grad_wire=grad_wire,
        bucket_mb=args.bucket_mb,
    )
