"""How fast, how large, how much is sent: ours beside open_clip from PyPI (baselines.py), in one run. One command, one table.

    python bench.py step --model ViT-B-32 --batch 32      samples/s, peak memory, MFU of training steps
    python bench.py loader [SHARDS] --size 256            images/s from tar to ready batch, on one core, or with --workers=2
    python bench.py loss                                  time and peak memory of the loss against b and B
    python bench.py wire                                  bytes per step by purpose, counted, for every algorithm
    python bench.py breakdown                             where a step's time goes, on --ranks processes
    python bench.py plan                                  a step predicted, checked against a real run, projected over nodes
    python bench.py all                                   all of it, for the README (half an hour on two cores; on GPUs at their sizes)

Each side has a fresh process of its own, in which its memory is measured (on a GPU the allocator's peak, on a CPU the most that was
resident), and the sides take turns, so that what else the machine does meets both: `ratio` is the median over the rounds of the ratio
within a round. Both train float32 (or --precision) on the same smooth-noise pictures and the same captions, 17 tokens of 77 at the
median, through their own training function. open_clip gets float pixels, normalised; ours bytes, normalised in the step. MFU is
useful work, without padding, over the rate of a matrix product measured in the same rounds. Rows are merged into --out, and all
rows there are drawn into --plot.
"""

import argparse
import gc
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import time
from itertools import cycle

import torch

import config as configs
import data
import dist
from bench import baselines, harness, report
from bench.report import beside, row
from config import ConfigError
from ingest import workers
from ingest.index import load_index
from loss import ALGORITHMS, ContrastiveLoss
from runtime import hardware, plan

# ---- step ----


def step_worker(a, side):
    device = dist.init(a.device)
    image_size, context_length, *_ = harness.shape_of(a)
    batches, compiled = (
        harness.made_batches(image_size, context_length, a.batch),
        side.endswith("compiled"),
    )
    warm_up, steps = (
        2 * len(batches) if compiled or device.type == "cuda" else 1,
        a.steps or (20 if device.type == "cuda" else 1),
    )
    if side.startswith("ours"):
        trainer = harness.Ours(
            a, cycle(harness.pinned(batches, device)), a.algorithm, compiled=compiled
        )
    else:
        clone = a.released if side.startswith("released") else ""
        batches = harness.pinned(
            [baselines.batch_of(batch, context_length, bool(clone)) for batch in batches], device
        )
        trainer = harness.theirs(a, cycle(batches), compiled=compiled, clone=clone)
    trainer.run(warm_up)
    harness.forget_peak(device)
    torch.cuda.empty_cache()  # all sides' processes live side by side on one GPU
    yield
    while True:
        if device.type == "cuda":  # what the allocator gave back for the others' turns
            trainer.run(1)
        rate = hardware.peak_flops(hardware.precision(a.precision, device), device)
        start, cpu = time.perf_counter(), time.process_time()
        trainer.run(steps)
        hardware.synchronize(device)
        seconds, cpu = (time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps
        torch.cuda.empty_cache()
        yield seconds, harness.memory(device), rate, cpu


def step(a):
    sides = [
        side + compiled
        for compiled in ["", " compiled"][: 1 + a.compiled]
        for side in ("ours", "open_clip")
    ] + ["released"] * bool(a.released)
    answers = harness.take_turns(
        {side: harness.Worker(step_worker, a, side) for side in sides},
        [None] * a.rounds,
        f"step {a.model}",
    )
    image_flops, token_flops = harness.shape_of(a)[4:]
    work = 3 * (
        image_flops + token_flops * harness.caption_lengths(4 * a.batch).float().mean().item()
    )  # of a pair
    rate = max(rate for rows in answers.values() for _, _, rate, _ in rows)
    settings, rows = dict(model=a.model, batch=a.batch, precision=a.precision, **a.numbers), []
    for side, values in answers.items():
        speeds = [a.batch / seconds for seconds, *_ in values]
        rows.append(
            row(
                "step",
                side,
                settings,
                "samples/s",
                speeds,
                peak_bytes=max(m for _, m, *_ in values),
                matmul_flops=rate,
                cpu_seconds=[cpu for *_, cpu in values],
                mfu=statistics.median(speeds) * work / rate,
                algorithm={"ours": a.algorithm, "open_clip": "ClipLoss", "released": "fastclip-v3"}[
                    side.split()[0]
                ],
            )
        )
    return beside(rows)


# ---- loader ----


def loader_worker(a, side, shards, count):
    if not a.workers:  # one core, the same one for both
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    index = load_index(shards)
    yield
    while True:
        decoder = side.split()[-1]
        if side == "open_clip":
            batches, _ = baselines.pipeline(
                shards, count // a.batch * a.batch, a.batch, 224, 77, a.workers
            )
        else:
            batches = data.Loader(
                data.Order(index, a.batch),
                224,
                workers=a.workers,
                num_steps=count // a.batch,
                decoder=decoder,
                device="cuda" if decoder == "nvjpeg" else "cpu",
            )
        images = 0
        for i, batch in enumerate(batches):
            images += len(batch[0])
            if i == 0:  # until then workers start, lanes look for their place, shuffle buffers fill
                start, cpu, images = time.perf_counter(), time.process_time(), 0
        hardware.synchronize(batch[0].device)
        seconds, batches = time.perf_counter() - start, None  # and with them their workers
        yield images / seconds, (time.process_time() - cpu) / images


def loader(a):
    with tempfile.TemporaryDirectory() as folder:
        shards, source = harness.shards_of(a, folder, a.images)
        index = load_index(shards)
        count = min(index.num_samples, a.images)
        if count < 2 * a.batch:
            raise ConfigError(
                f"{count} images are fewer than two batches of {a.batch}, the first of which is not timed: raise --images"
            )
        kilobytes = (
            sum(os.path.getsize(s) for s in index.shards if os.path.exists(s))
            / index.num_samples
            / 1e3
        )
        sides = {
            side: harness.Worker(loader_worker, a, side, shards, count)
            for side in ("open_clip", *(f"ours, {name}" for name in a.decoders))
        }
        answers = harness.take_turns(sides, [None] * a.rounds, f"loader {source}")
    settings = dict(
        source=source,
        batch=a.batch,
        workers=a.workers,
        cores=1 if not a.workers else harness.cores(),
    )
    return beside(
        [
            row(
                "loader",
                side,
                settings,
                "images/s",
                [speed for speed, _ in values],
                kilobytes_per_sample=kilobytes,
                **({} if a.workers else {"cpu_seconds": [cpu for _, cpu in values]}),
            )
            for side, values in answers.items()
        ]
    )


# ---- loss ----


def loss_worker(a, side, d):
    """Rank 0 of B/b, alone: what it gathers are copies of its own, nothing is sent. Asked for (b, B) -> (seconds, peak bytes)."""
    device = dist.init(a.device)
    ranks = 1
    dist.world_size, dist.all_gather = (
        lambda: ranks,
        lambda x, purpose: x.repeat(ranks, *[1] * (x.ndim - 1)),
    )
    dist.all_reduce = lambda x, purpose: dist.NoWork()
    request = yield
    while True:
        b, B = request
        ranks, logit_scale = B // b, torch.tensor(math.log(1 / 0.07), device=device)
        features = [
            torch.nn.functional.normalize(torch.randn(b, d, device=device), dim=1) for _ in range(2)
        ]
        if side == "open_clip":
            once = (
                lambda loss=baselines.loss_as_one_of(ranks, hardware.autocast(hardware.precision(a.precision, device), device)): (
                    loss(*features, logit_scale)
                )
            )
        else:
            loss, ids = (
                ContrastiveLoss(
                    "fastclip-v3", b, device=device, tile=a.tile if "tile" in side else 0
                ),
                torch.arange(b),
            )
            once = lambda: loss(*features, logit_scale, loss.lookup(ids), 0.5)
        request = yield harness.seconds_of(once, device), harness.peak_of(once, device)


def loss(a):
    b, B = a.batch, a.global_batch
    pairs = (
        [(b, B)]
        + [(min(b, 128), B // 4 * 2**i) for i in range(4)]
        + [(b // 2**i, B) for i in (1, 2)]
    )
    d, rows = harness.shape_of(a)[2], []
    answers = harness.take_turns(
        {
            side: harness.Worker(loss_worker, a, side, d)
            for side in ("ours", f"ours, loss_tile={a.tile}", "open_clip")
        },
        pairs * a.rounds,
        "loss",
    )
    a = harness.changed(a, batch=a.step_batch or (b if harness.device_of(a).type == "cuda" else 8))
    steps = harness.take_turns(
        {"ours": harness.Worker(step_worker, a, "ours")},
        [None] * min(3, a.rounds),
        f"step {a.model}",
    )["ours"]
    for i, (b, B) in enumerate(pairs):
        for side in answers:
            values = answers[side][i :: len(pairs)]
            rows.append(
                row(
                    "loss",
                    side,
                    dict(b=b, B=B, d=d, precision=a.precision),
                    "ms",
                    [1000 * s for s, _ in values],
                    gathered_bytes=2 * B * d * 4,
                    peak_bytes=statistics.median(m for _, m in values),
                )
            )
            if i == 0:
                rows[-1].update(
                    share_of_step=rows[-1]["median"]
                    / 1000
                    / (statistics.median(seconds for seconds, *_ in steps) / a.batch * b),
                    step=f"{a.model}, {b} samples as fast as {a.batch}",
                )
    return rows


# ---- wire ----


def wire_rank(a, sides):
    """-> for each side ({purpose: bytes that this rank sends in one step}, bytes of buffers); the second step, as the first sets things up."""
    dist.init(a.device)
    image_size, context_length, *_ = harness.shape_of(a)
    batches, sent = harness.made_batches(image_size, context_length, a.batch, count=1), []
    for side, grad_wire in sides:
        if side == "open_clip":
            trainer = harness.theirs(
                a,
                cycle([baselines.batch_of(batch, context_length) for batch in batches]),
                count=True,
            )
        else:
            trainer = harness.Ours(a, cycle(batches), side, grad_wire=grad_wire)
        traffic = getattr(trainer, "traffic", dist.traffic)
        trainer.run(1)
        traffic.clear()
        trainer.run(1)
        sent.append(({k: v for k, v in traffic.items() if v}, getattr(trainer, "buffer_bytes", 0)))
        trainer.close()
        trainer = None
        gc.collect()
    yield sent


def wire(a):
    *_, d, parameters, _, _ = harness.shape_of(a)
    sides = [
        ("open_clip", "fp32"),
        *((name, "fp32") for name in ALGORITHMS),
        ("fastclip-v3", "bf16"),
    ]
    ranks, rows, usual = (
        harness.on_ranks(a.ranks, wire_rank, a, sides, label="wire"),
        [],
        a.global_batch // 8,
    )
    for (side, grad_wire), counts in zip(sides, zip(*ranks)):
        sent, buffers = counts[0]
        width, state = 2 if grad_wire == "bf16" else 4, ALGORITHMS.get(side)

        def formula(k, b):
            if side == "open_clip":
                parts = baselines.formula(b, d, parameters, buffers)
            else:  # every rank knows tau's gradient: it is not sent
                parts = plan.traffic(
                    b * k,
                    d,
                    2 * state.state + 7 * (state.tau == "sample"),
                    (parameters - 1) * width,
                )
            return {name: count(k) for name, count in parts.items() if count(k)}

        expected, large = formula(a.ranks, a.batch), formula(8, usual)
        # A bucket's share is rounded down to a byte, in the formula only their sum's is.
        equal = sent.keys() == expected.keys() and all(
            0 <= expected[name] - sent[name] < 100 for name in expected
        )
        settings = dict(
            model=a.model, ranks=a.ranks, batch=a.batch, grad_wire=grad_wire, **a.numbers
        )
        rows.append(
            row(
                "wire",
                side,
                settings,
                "bytes",
                [sum(c.values()) for c, _ in counts],
                counted=sent,
                formula=expected,
                equal=equal,
                at_8_ranks={"batch": usual, **large},
            )
        )
        rows[-1].update(
            share=rows[-1]["median"] / rows[0]["median"],
            share_at_8_ranks=sum(large.values())
            / sum(v for name, v in rows[0]["at_8_ranks"].items() if name != "batch"),
        )
    return rows


# ---- breakdown ----

DIVIDED = [
    ("openclip", "fp32"),
    ("fastclip-v1", "fp32"),
    ("fastclip-v3", "fp32"),
    ("fastclip-v3", "bf16"),
    ("open_clip", "fp32"),
]


def breakdown_rank(a, shards, sides):
    """-> for each side, for each round, {part of a step: seconds}, from what torch's profiler saw."""
    device, rounds = dist.init(a.device), {side: [] for side in sides}
    image_size, context_length, *_ = harness.shape_of(a)
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (
        device.type == "cuda"
    )
    workers = a.workers or (workers.default_workers() if device.type == "cuda" else 1)
    for side, grad_wire in sides:
        if side == "open_clip":
            loader, _ = baselines.pipeline(
                shards, 10**6, a.batch, image_size, context_length, workers
            )
            trainer = harness.theirs(a, iter(loader))
        else:
            order = data.Order(load_index(shards), a.batch * dist.world_size())
            loader = data.Loader(
                order,
                image_size,
                context_length,
                rank=dist.rank(),
                world_size=dist.world_size(),
                workers=workers,
                device=device,
                num_steps=10**6,
            )
            trainer = harness.Ours(
                a,
                iter(loader),
                side,
                num_samples=order.num_samples,
                grad_wire=grad_wire,
                bucket_mb=a.bucket_mb,
            )
        trainer.run(2)
        for _ in range(a.rounds):
            dist.barrier()
            with torch.profiler.profile(activities=activities) as profile:
                start = time.perf_counter()
                trainer.run(1)
                hardware.synchronize(device)
                seconds = time.perf_counter() - start
            rounds[side, grad_wire].append(
                harness.parts_of(profile.events(), seconds, device.type == "cuda")
            )
        trainer.close()
        loader = trainer = None  # and with them their data workers
        gc.collect()
    yield rounds


def breakdown(a):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shards, _ = harness.shards_of(a, folder, max(128, 2 * a.batch * a.ranks))
        load_index(shards)
        for (side, grad_wire), rounds in harness.on_ranks(
            a.ranks, breakdown_rank, a, shards, DIVIDED, label="breakdown"
        )[0].items():
            parts = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            settings = dict(
                model=a.model,
                ranks=a.ranks,
                batch=a.batch,
                precision=a.precision,
                grad_wire=grad_wire,
                bucket_mb=a.bucket_mb,
                **a.numbers,
            )
            rows.append(
                row(
                    "breakdown",
                    side,
                    settings,
                    "ms",
                    [1000 * sum(v for name, v in r.items() if name != "hidden") for r in rounds],
                    parts_ms={name: 1000 * seconds for name, seconds in parts.items()},
                    hidden_share=parts["hidden"] / ((parts["hidden"] + parts["exposed"]) or 1),
                )
            )
    return rows


# ---- plan ----


def plan_rank(a):
    """-> (seconds of an all-reduce of 1 kB, of 64 MB; of a step that sends nothing, while the other ranks do theirs; of a step)."""
    device = dist.init(a.device)
    image_size, context_length, *_ = harness.shape_of(a)

    def timed(function, times):
        function()
        seconds = []
        for _ in range(times):
            dist.barrier()
            start = time.perf_counter()
            function()
            hardware.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    small, large = (
        timed(
            lambda x=torch.ones(size // 4, device=device): dist.all_reduce(x, "ping").wait(), times
        )
        for size, times in ((1000, 50), (int(64e6), 5))
    )
    batches = harness.made_batches(image_size, context_length, a.batch)
    trainer = harness.Ours(a, cycle(batches), a.algorithm, grad_wire=a.grad_wire)
    with_others = timed(lambda: trainer.run(1), a.rounds)
    buckets = len(trainer.reducer.buckets)
    dist.rank, dist.world_size = lambda: 0, lambda: 1  # from here on each as if alone
    trainer = harness.Ours(a, cycle(batches), a.algorithm)
    alone = []
    for _ in range(a.rounds + 1):
        torch.distributed.barrier()
        start = time.perf_counter()
        trainer.run(1)
        alone.append(time.perf_counter() - start)
    yield small, large, statistics.median(alone[1:]), with_others, buckets


def plan_mode(a):
    rows, columns = (
        [],
        2 * ALGORITHMS[a.algorithm].state + 7 * (ALGORITHMS[a.algorithm].tau == "sample"),
    )
    *_, d, parameters, _, _ = harness.shape_of(a)
    for ranks in a.check_ranks:
        measured = harness.on_ranks(ranks, plan_rank, a, label=f"plan, {ranks} ranks")
        small, large, compute, real, buckets = map(statistics.median, zip(*measured))
        alpha = small / (2 * (ranks - 1))
        bandwidth = 2 * (ranks - 1) / ranks * 64e6 / (large - small)
        traffic = plan.traffic(
            a.batch * ranks, d, columns, parameters * (2 if a.grad_wire == "bf16" else 4)
        )
        sent = {name: count(ranks) for name, count in traffic.items()}
        guess = plan.predicted(
            compute,
            sent,
            ranks,
            int(buckets),
            alpha,
            bandwidth,
            2 / 3 if harness.device_of(a).type == "cuda" else 0,
        )
        settings = dict(
            model=a.model, batch=a.batch, algorithm=a.algorithm, grad_wire=a.grad_wire, **a.numbers
        )
        rows.append(
            row(
                "plan",
                f"{ranks} ranks here",
                settings,
                "ms",
                [1000 * real],
                predicted_ms=1000 * guess,
                error=guess / real - 1,
                compute_ms=1000 * compute,
                alpha_us=1e6 * alpha,
                bytes_per_second=bandwidth,
            )
        )
    # Over nodes of 8, at links whose speed is given: one ring through all GPUs enters and leaves each node once.
    _, _, d, parameters, image, token = harness.shape_of(
        harness.changed(a, model=a.plan_model, numbers={})
    )
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        ranks = 8 * nodes
        b = a.global_batch // ranks
        compute = 3 * b * (image + token * harness.CAPTIONS) / (1e12 * a.tflops)
        for side, gradient, width in (
            ("fastclip-v3", "fp32", 4),
            ("fastclip-v3", "bf16", 2),
            ("open_clip", "fp32", 4),
        ):
            parts = (
                baselines.formula(b, d, parameters, 0)
                if side == "open_clip"
                else plan.traffic(a.global_batch, d, 2, parameters * width)
            )
            sent = {name: count(ranks) for name, count in parts.items()}
            for link in a.links:
                seconds = plan.predicted(
                    compute,
                    sent,
                    ranks,
                    math.ceil(parameters * 4 / 25e6),
                    1e-6 * a.alpha,
                    link / 8 * 1e9,
                )
                settings = dict(
                    model=a.plan_model,
                    B=a.global_batch,
                    gpus=ranks,
                    gbit=link,
                    tflops=a.tflops,
                    alpha_us=a.alpha,
                )
                rows.append(
                    row(
                        "plan",
                        f"{side} {gradient}",
                        settings,
                        "ms",
                        [1000 * seconds],
                        efficiency=compute / seconds,
                        nodes=nodes,
                    )
                )
    return rows


# ---- the command ----

MODES = {
    "step": step,
    "loader": loader,
    "loss": loss,
    "wire": wire,
    "breakdown": breakdown,
    "plan": plan_mode,
}
DEFAULTS = {
    "step": dict(model="ViT-B-32", batch=32),
    "loader": dict(batch=64),
    "loss": dict(model="ViT-B-16", batch=640),
    "wire": dict(model="ViT-B-32", batch=4),
    "breakdown": dict(model="ViT-B-32", batch=8),
    "plan": dict(model="ViT-B-32", batch=8),
}
LOADERS = [
    ("loader", dict(size=256)),
    ("loader", dict(size=512)),
    ("loader", dict(size=256, workers=2)),
]
EVERYTHING = [
    *(
        ("step", dict(model=model, batch=b))
        for model, b in (("ViT-B-32", 32), ("RN50", 16), ("ViT-B-16", 16))
    ),
    *LOADERS,
    ("loss", {}),
    ("wire", {}),
    ("breakdown", {}),
    ("plan", dict(numbers=dict(vision_layers=3, text_layers=3))),
]
ON_A_GPU = [
    *(
        ("step", dict(model=model, batch=b, compiled=True))
        for model, b in (("ViT-B-16", 640), ("ViT-B-32", 256), ("ViT-B-32", 512), ("RN50", 128))
    ),
    *LOADERS,
    ("loss", {}),
]
ON_GPUS = [
    ("wire", dict(batch=256)),
    ("breakdown", dict(batch=256)),
    ("plan", dict(batch=256, check_ranks=[2])),
]


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Ours beside open_clip: speed, memory, bytes."
    )
    add = parser.add_argument
    add("mode", choices=[*MODES, "all"])
    add(
        "shards",
        nargs="?",
        default="",
        help="loader, breakdown: tar shards, or a folder of photos to make them from; without, made from noise",
    )
    add(
        "--model",
        help="step: ViT-B-32; loss (whose step it is a share of): ViT-B-16; wire, breakdown, plan: ViT-B-32",
    )
    add("--batch", type=int, help="samples of a rank in a step; loss: b")
    add(
        "--numbers",
        type=harness.numbers,
        default={},
        help="change the model: vision_layers=2,text_layers=2",
    )
    add(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        help="without: bf16 on a GPU, fp32 on a CPU",
    )
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--algorithm", default="fastclip-v3", choices=list(ALGORITHMS))
    add(
        "--grad_wire",
        default="fp32",
        choices=["fp32", "bf16"],
        help="plan: the type in which gradients travel",
    )
    add("--compiled", action="store_true", help="step: both sides compiled, too")
    add(
        "--released",
        default="",
        help="step: a clone of github.com/Optimization-AI/fast_clip, to measure it, too",
    )
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=0, help="step: steps in a turn; 0: 1, or 20 on a GPU")
    add(
        "--size",
        type=int,
        default=256,
        help="loader: shorter side of the pictures that are made, pixels",
    )
    add("--images", type=int, default=2048, help="loader: images in a turn")
    add(
        "--decoders",
        nargs="+",
        default=["torchvision", "pillow"]
        + ["simplejpeg"] * bool(importlib.util.find_spec("simplejpeg")),
        help="loader: ours with each of these; without the word, those that are installed",
    )
    add("--workers", type=int, default=0, help="loader: 0 is one core and no other process")
    add("--global_batch", type=int, default=5120, help="loss, wire, plan: B")
    add("--tile", type=int, default=512, help="loss: loss_tile")
    add(
        "--step_batch",
        type=int,
        default=0,
        help="loss: batch of the step that is measured to compare with; 0: 8, or b on a GPU",
    )
    add("--bucket_mb", type=float, default=25.0, help="breakdown: size of ours's gradient buckets")
    add(
        "--ranks",
        type=int,
        default=2,
        help="wire (2 or more), breakdown: processes on this machine, each with a GPU of its own if there are any",
    )
    add(
        "--check_ranks",
        type=int,
        nargs="+",
        default=[2, 4],
        help="plan: numbers of processes for which it is checked here",
    )
    add("--plan_model", default="ViT-B-16", help="plan: what is projected over nodes")
    add(
        "--tflops",
        type=float,
        default=150.0,
        help="plan: what a GPU computes, useful work of this model",
    )
    add("--links", type=int, nargs="+", default=[100, 200, 400], help="plan: Gbit/s of a node")
    add("--alpha", type=float, default=10.0, help="plan: latency of a message, microseconds")
    add("--out", help="assets/bench_cpu.json, or bench_gpu.json where there is a GPU")
    add("--plot", help="as --out, .png")
    a = parser.parse_args(argv)
    on_gpu = harness.device_of(a).type == "cuda"
    a.precision = a.precision or ("bf16" if on_gpu else "fp32")
    a.out = a.out or f"assets/bench_{'gpu' if on_gpu else 'cpu'}.json"
    a.plot = a.plot or os.path.splitext(a.out)[0] + ".png"
    if {"wire": a.ranks, "plan": min(a.check_ranks)}.get(a.mode, 2) < 2:
        raise ConfigError(
            f"{a.mode} measures what is sent between ranks: it needs 2 of them or more"
        )
    return a


def main(argv):
    a = parse(argv)
    baselines.load()
    report.check(a.out)
    given = (
        {}
        if a.mode == "all"
        else {name: value for name, value in vars(a).items() if value is not None}
    )
    everything = (
        ON_A_GPU + ON_GPUS * (torch.cuda.device_count() > 1)
        if harness.device_of(a).type == "cuda"
        else EVERYTHING
    )
    for mode, settings in everything if a.mode == "all" else [(a.mode, {})]:
        rows = MODES[mode](harness.changed(a, **{**DEFAULTS[mode], **given, **settings}))
        report.table(rows)
        report.picture(report.save(rows, a.out), a.plot)


if __name__ == "__main__":
    configs.or_exit(main, sys.argv[1:])
