"""How fast, how large, how much is sent: ours beside open_clip from PyPI (peer.py), in one run. One command, one table.

    python bench.py step --model ViT-B-32 --batch 32      samples/s, peak memory, MFU of training steps
    python bench.py loader [SHARDS] --size 256            images/s from tar to ready batch, on one core, or with --workers=2
    python bench.py loss                                  time and peak memory of the loss against b and B
    python bench.py wire                                  bytes per step by purpose, counted, for every algorithm
    python bench.py breakdown                             where a step's time goes, on --ranks processes
    python bench.py plan                                  a step predicted, checked against a real run, projected over nodes
    python bench.py all                                   all of it, for the README (half an hour on two cores)

Each side has a fresh process of its own, in which its memory is measured (on a GPU the allocator's peak, on a CPU the most that was
resident), and the sides take turns, so that what else the machine does meets both: `ratio` is the median over the rounds of the ratio
within a round. Both train float32 (or --precision) on the same smooth-noise pictures and the same captions, 17 tokens of 77 at the
median, through their own training function. open_clip gets float pixels, normalised; ours bytes, normalised in the step. MFU is
useful work, without padding, over the rate of a matrix product measured in the same rounds.

Rows {mode, side, settings, unit, median, all, ...} are merged into --out, and all rows there are drawn into --plot.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice

import train                    # first, because it says how torch's threads are to wait
import torch
from torch.autograd import DeviceType
from tqdm import tqdm

import config as configs
import data
import dist
import lab
import model as models
import optim
import peer
import plan
import watch
from config import ConfigError
from loss import ALGORITHMS, ContrastiveLoss
from shards import load_index


class Ours:
    """train.train_step, set up as train.main does, on data.Batches from an endless iterator."""

    def __init__(self, a, batches, algorithm="fastclip-v3", grad_wire="fp32", compiled=False):
        self.c = c = configs.Config(model=a.model, algorithm=algorithm, batch_size=a.batch * dist.world_size(), precision=a.precision,
                                    grad_wire=grad_wire, warmup_steps=100, lr=1e-4, **a.numbers)
        torch.manual_seed(0)
        self.device, self.batches, self.steps = device_of(a), batches, 0
        self.model = models.create(c.model, c.tau_init, **c.model_numbers()).to(self.device).train()
        dtype = dist.precision(c.precision, self.device)
        if models.is_resnet(self.model):
            self.model.to(memory_format=torch.channels_last)
        dist.broadcast_weights(self.model)
        self.optimizer = optim.create(self.model, c)
        self.loss = ContrastiveLoss(algorithm, 4096, device=self.device, tile=c.loss_tile)
        if compiled:
            self.model.compile_blocks()
        self.reducer = dist.GradReducer([p for p in self.model.parameters() if p is not self.model.logit_scale], c.bucket_mb,
                                        torch.bfloat16 if grad_wire == "bf16" else torch.float32)
        self.scaler, self.autocast = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16), dist.autocast(dtype, self.device)

    def run(self, steps):
        for batch in islice(self.batches, steps):
            batch = batch._replace(images=batch.images.to(self.device, non_blocking=True), tokens=batch.tokens.to(self.device, non_blocking=True))
            out, _ = train.train_step(batch, self.model, self.loss, self.optimizer, self.reducer, self.scaler, self.autocast, self.c, self.steps,
                                      1000, 10_000)
            self.steps += 1
        return out.objective.item()


def theirs(a, batches, **options):
    return peer.Trainer(a.model, a.numbers, a.batch, a.precision, device_of(a), batches, **options)


def device_of(a):
    return torch.device("cuda", torch.cuda.current_device()) if a.device != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def shape_of(a):
    """-> (image size, context length, d, parameters in all, FLOPs forward of an image and of a token)."""
    with torch.device("meta"):
        model = models.create(a.model, **a.numbers)
    flops = models.forward_flops(model, model.context_length)
    return model.image_size, model.context_length, model.embed_dim, models.num_parameters(model)["total"], flops["image"], flops["text"] / model.context_length


# ---- step ----

def step_worker(a, side):
    device = dist.init(a.device)
    image_size, context_length, *_ = shape_of(a)
    batches, compiled = lab.made_batches(image_size, context_length, a.batch), side.endswith("compiled")
    if side.startswith("open_clip"):
        trainer = theirs(a, cycle([peer.batch_of(batch, context_length) for batch in batches]), compiled=compiled)
    else:
        trainer = Ours(a, cycle(batches), a.algorithm, compiled=compiled)
    steps = a.steps or (20 if device.type == "cuda" else 1)
    trainer.run(2 * len(batches) if compiled or device.type == "cuda" else 1)
    lab.forget_peak(device)
    yield
    while True:
        rate = watch.peak_flops(dist.precision(a.precision, device), device)
        start = time.perf_counter()
        trainer.run(steps)
        watch.synchronize(device)
        yield (time.perf_counter() - start) / steps, lab.memory(device), rate


def step(a):
    sides = [side + compiled for compiled in ["", " compiled"][:1 + a.compiled] for side in ("ours", "open_clip")]
    answers = lab.take_turns({side: lab.Worker(step_worker, a, side) for side in sides}, [None] * a.rounds, f"step {a.model}")
    image_flops, token_flops = shape_of(a)[4:]
    work = 3 * (image_flops + token_flops * lab.caption_lengths(4 * a.batch).float().mean().item())      # of a pair
    rate = max(rate for rows in answers.values() for _, _, rate in rows)
    settings, rows = dict(model=a.model, batch=a.batch, precision=a.precision, **a.numbers), []
    for side, values in answers.items():
        speeds = [a.batch / seconds for seconds, *_ in values]
        rows.append(row("step", side, settings, "samples/s", speeds, peak_bytes=max(m for _, m, _ in values), mfu=statistics.median(speeds) * work / rate,
                        matmul_flops=rate, algorithm=a.algorithm if side.startswith("ours") else "ClipLoss"))
    return beside(rows)


# ---- loader ----

def loader_worker(a, side, shards, count):
    if not a.workers:                               # one core, the same one for both
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    index = load_index(shards)
    yield
    while True:
        if side == "ours":
            batches = data.Loader(data.Order(index, a.batch), 224, workers=a.workers, num_steps=count // a.batch)
        else:
            batches, _ = peer.pipeline(shards, count // a.batch * a.batch, a.batch, 224, 77, a.workers)
        start, images = time.perf_counter(), 0
        for i, batch in enumerate(batches):
            images += len(batch[0])
            if i == 0 and a.workers:                # until then they were starting
                start, images = time.perf_counter(), 0
        seconds, batches = time.perf_counter() - start, None
        yield images / seconds


def loader(a):
    with tempfile.TemporaryDirectory() as folder:
        shards = a.shards or lab.make_shards(folder, a.size, a.images)
        index, source = load_index(shards), f"JPEG {a.size} px" if not a.shards else "given"
        count = min(index.num_samples, a.images)
        kilobytes = sum(os.path.getsize(s) for s in index.shards if os.path.exists(s)) / index.num_samples / 1e3
        answers = lab.take_turns({side: lab.Worker(loader_worker, a, side, shards, count) for side in ("ours", "open_clip")}, [None] * a.rounds, f"loader {source}")
    settings = dict(source=source, batch=a.batch, workers=a.workers, cores=1 if not a.workers else lab.cores())
    return beside([row("loader", side, settings, "images/s", speeds, kilobytes_per_sample=kilobytes) for side, speeds in answers.items()])


# ---- loss ----

def loss_worker(a, side, d):
    """Rank 0 of B/b, alone: what it gathers are copies of its own, nothing is sent. Asked for (b, B) -> (seconds, peak bytes)."""
    device = dist.init(a.device)
    ranks = 1
    dist.world_size, dist.all_gather = lambda: ranks, lambda x, purpose: x.repeat(ranks, *[1] * (x.ndim - 1))
    dist.all_reduce = lambda x, purpose: dist.Done()
    request = yield
    while True:
        b, B = request
        ranks, logit_scale = B // b, torch.tensor(math.log(1 / 0.07), device=device)
        features = [torch.nn.functional.normalize(torch.randn(b, d, device=device), dim=1) for _ in range(2)]
        if side == "open_clip":
            once = lambda loss=peer.loss_as_one_of(ranks): loss(*features, logit_scale)
        else:
            loss, ids = ContrastiveLoss("fastclip-v3", b, device=device, tile=a.tile if "tile" in side else 0), torch.arange(b)
            once = lambda: loss(*features, logit_scale, loss.lookup(ids), 0.5)
        once()
        lab.forget_peak(device)
        before, start, times = lab.memory(device, "VmRSS"), time.perf_counter(), 0
        while times < 1 or (times < 20 and time.perf_counter() - start < 0.5):
            once()
            watch.synchronize(device)
            times += 1
        request = yield (time.perf_counter() - start) / times, lab.memory(device) - before


def loss(a):
    b, B = a.batch, a.global_batch
    pairs = [(b, B)] + [(min(b, 128), B // 4 * 2 ** i) for i in range(4)] + [(b // 2 ** i, B) for i in (1, 2)]
    d, rows = shape_of(a)[2], []
    sides = ("ours", f"ours, loss_tile={a.tile}", "open_clip")
    answers = lab.take_turns({side: lab.Worker(loss_worker, a, side, d) for side in sides}, pairs * a.rounds, "loss")
    step_seconds = [s for s, *_ in lab.take_turns({"ours": lab.Worker(step_worker, argparse.Namespace(**{**vars(a), "batch": a.step_batch}), "ours")},
                                              [None] * min(3, a.rounds), "a step to compare with")["ours"]]
    whole = statistics.median(step_seconds) / a.step_batch * b
    for i, (b, B) in enumerate(pairs):
        for side in sides:
            values = answers[side][i::len(pairs)]
            more = dict(share_of_step=statistics.median(s for s, _ in values) / whole, step=f"{a.model}, {b} x that of {a.step_batch}") if i == 0 else {}
            rows.append(row("loss", side, dict(b=b, B=B, d=d), "ms", [1000 * s for s, _ in values], peak_bytes=statistics.median(m for _, m in values),
                            gathered_bytes=2 * B * d * 4, **more))
    return rows


# ---- wire ----

def wire_rank(a, side, grad_wire):
    """-> bytes that this rank sends in one step, by purpose; the second step, as the first sets things up."""
    dist.init(a.device)
    image_size, context_length, *_ = shape_of(a)
    batches = lab.made_batches(image_size, context_length, a.batch, count=1)
    if side == "open_clip":
        trainer = theirs(a, cycle([peer.batch_of(batch, context_length) for batch in batches]), count=True)
    else:
        trainer = Ours(a, cycle(batches), side, grad_wire)
    traffic = trainer.traffic if side == "open_clip" else dist.traffic
    trainer.run(1)
    traffic.clear()
    trainer.run(1)
    yield {k: v for k, v in traffic.items() if v}, getattr(trainer, "buffer_bytes", 0)


def wire(a):
    *_, d, parameters, _, _ = shape_of(a)
    k, rows, usual = a.ranks, [], a.global_batch // 8
    for side, grad_wire in tqdm([("open_clip", "fp32"), *((name, "fp32") for name in ALGORITHMS), ("fastclip-v3", "bf16")], desc="wire", leave=False):
        (counted, buffers), *others = lab.on_ranks(k, wire_rank, a, side, grad_wire)
        if side == "open_clip":
            formula = lambda b: peer.formula(b, d, parameters, buffers)
        else:
            state = ALGORITHMS[side]
            width, columns = 2 if grad_wire == "bf16" else 4, 2 * state.state + 7 * (state.tau == "sample")
            formula = lambda b, k=k: plan.traffic(b * k, d, columns, (parameters - 1) * width)      # tau's gradient is known to all
        expected = {name: count(k) for name, count in formula(a.batch).items() if count(k)}
        large = formula(usual) if side == "open_clip" else formula(usual, 8)
        rows.append(row("wire", side, dict(model=a.model, ranks=k, batch=a.batch, grad_wire=grad_wire, **a.numbers), "bytes",
                        [sum(counted.values()), *(sum(c.values()) for c, _ in others)], counted=counted, formula=expected,
                        # Each bucket's share is rounded down, and the sum's only once: less than a byte per bucket.
                        equal=counted.keys() == expected.keys() and all(0 <= expected[n] - counted[n] < 100 for n in expected),
                        at_8_ranks={"batch": usual, **{name: count(8) for name, count in large.items() if count(8)}}))
        in_all = lambda r: sum(v for name, v in r["at_8_ranks"].items() if name != "batch")
        rows[-1].update(share=rows[-1]["median"] / rows[0]["median"], share_at_8_ranks=in_all(rows[-1]) / in_all(rows[0]))
    return rows


# ---- breakdown ----

def breakdown_rank(a, shards, side, grad_wire):
    """-> for each round {part of a step: seconds}, from what torch's profiler saw."""
    device = dist.init(a.device)
    image_size, context_length, *_ = shape_of(a)
    if side == "open_clip":
        loader, _ = peer.pipeline(shards, 10 ** 6, a.batch, image_size, context_length, 1)
        trainer = theirs(a, iter(loader))
    else:
        order = data.Order(load_index(shards), a.batch * dist.world_size())
        trainer = Ours(a, iter(data.Loader(order, image_size, context_length, rank=dist.rank(), world_size=dist.world_size(), workers=1,
                                           device=device, num_steps=10 ** 6)), side, grad_wire)
    trainer.run(2)
    rounds = []
    for _ in range(a.rounds):
        dist.barrier()
        with torch.profiler.profile() as profile:
            start = time.perf_counter()
            trainer.run(1)
            watch.synchronize(device)
            seconds = time.perf_counter() - start
        rounds.append(parts_of(profile.events(), seconds, device.type == "cuda"))
    yield rounds


def parts_of(events, seconds, on_gpu):
    """A profile of one step -> {part: seconds}. Busy: when an operator (GPU: a kernel) runs that is not a collective; communication counts from
    a collective's start to its end, so with the wait for the slowest rank; hidden is what of it lies within busy time, exposed the rest."""
    spans = lambda wanted: union((e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events if wanted(e))
    here = lambda e: (e.device_type == DeviceType.CUDA) == on_gpu
    collective = lambda e: here(e) and (not e.is_user_annotation and "nccl" in e.name.lower() if on_gpu else e.name.startswith("gloo:"))
    threads = {e.thread for e in events if collective(e)}           # gloo's own: what runs there is part of the collective
    comm = spans(collective)
    busy = spans(lambda e: here(e) and not collective(e) and (not e.is_user_annotation if on_gpu else e.name.startswith("aten::") and e.thread not in threads))
    optimizer = spans(lambda e: here(e) and e.name.startswith("Optimizer.step"))
    waiting = spans(lambda e: e.name.startswith("enumerate(DataLoader)"))
    parts = {"compute": length(without(busy, optimizer)), "optimizer": length(busy) - length(without(busy, optimizer)),
             "exposed": length(without(comm, busy)), "data": length(without(without(waiting, busy), comm))}
    return {**parts, "other": seconds - sum(parts.values()), "hidden": length(comm) - parts["exposed"]}


def union(spans):
    out = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def without(spans, others):
    """What of the spans lies in none of the others; both are unions."""
    for a, b in others:
        spans = [(s, e) for start, end in spans for s, e in ((start, min(end, a)), (max(start, b), end)) if s < e]
    return spans


def length(spans):
    return sum(end - start for start, end in spans)


def breakdown(a):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shards = a.shards or lab.make_shards(folder, a.size, 128)
        load_index(shards)
        sides = [("openclip", "fp32"), ("fastclip-v1", "fp32"), ("fastclip-v3", "fp32"), ("fastclip-v3", "bf16"), ("open_clip", "fp32")]
        for side, grad_wire in tqdm(sides, desc="breakdown", leave=False):
            rounds = lab.on_ranks(a.ranks, breakdown_rank, a, shards, side, grad_wire)[0]
            parts = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            rows.append(row("breakdown", side, dict(model=a.model, ranks=a.ranks, batch=a.batch, precision=a.precision, grad_wire=grad_wire, **a.numbers),
                            "ms", [1000 * sum(v for name, v in r.items() if name != "hidden") for r in rounds],
                            parts_ms={name: 1000 * seconds for name, seconds in parts.items()},
                            hidden_share=parts["hidden"] / (parts["hidden"] + parts["exposed"])))
    return rows


# ---- plan ----

def plan_rank(a):
    """-> (seconds of an all-reduce of 1 kB, of 64 MB; of a step that sends nothing, while the other ranks do theirs; of a step)."""
    device = dist.init(a.device)
    image_size, context_length, *_ = shape_of(a)

    def timed(function, times):
        function()
        seconds = []
        for _ in range(times):
            dist.barrier()
            start = time.perf_counter()
            function()
            watch.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)
    small, large = (timed(lambda x=torch.ones(size // 4, device=device): dist.all_reduce(x, "ping").wait(), times)
                    for size, times in ((1000, 50), (int(64e6), 5)))
    batches = lab.made_batches(image_size, context_length, a.batch)
    trainer = Ours(a, cycle(batches), a.algorithm, a.grad_wire)
    with_others = timed(lambda: trainer.run(1), a.rounds)
    buckets, size = len(trainer.reducer.buckets), dist.world_size
    trainer.reducer.buckets, dist.world_size = [], lambda: 1          # from here on as if alone
    trainer = Ours(a, cycle(batches), a.algorithm)
    alone = []
    for _ in range(a.rounds + 1):
        torch.distributed.barrier()
        start = time.perf_counter()
        trainer.run(1)
        alone.append(time.perf_counter() - start)
    dist.world_size = size
    yield small, large, statistics.median(alone[1:]), with_others, buckets


def predicted(compute, traffic, ranks, buckets, alpha, bandwidth):
    """Seconds of a step. A collective takes alpha per message of its ring, K-1 of an all-gather and 2(K-1) of an all-reduce, and its bytes'
    time. Look-ups hide behind the forward pass. Gradients hide behind the backward pass, two thirds of `compute`, but for the last bucket."""
    seconds = lambda name, messages: messages * (ranks - 1) * alpha + traffic[name] / bandwidth if name in traffic else 0.0
    exposed = sum(seconds(name, 1) for name in ("features", "scalars", "feature gradients"))
    gradients = seconds("gradients", 2 * buckets)
    return compute + exposed + max(gradients / buckets, gradients - 2 / 3 * compute)


def plan_mode(a):
    rows, columns = [], 2 * ALGORITHMS[a.algorithm].state + 7 * (ALGORITHMS[a.algorithm].tau == "sample")
    *_, d, parameters, _, _ = shape_of(a)
    for ranks in a.check_ranks:
        small, large, compute, real, buckets = (statistics.median(x) for x in zip(*lab.on_ranks(ranks, plan_rank, a, label=f"plan, {ranks} ranks")))
        alpha = small / (2 * (ranks - 1))
        bandwidth = 2 * (ranks - 1) / ranks * 64e6 / (large - small)
        sent = {name: count(ranks) for name, count in plan.traffic(a.batch * ranks, d, columns, parameters * (2 if a.grad_wire == "bf16" else 4)).items()}
        guess = predicted(compute, sent, ranks, int(buckets), alpha, bandwidth)
        rows.append(row("plan", f"{ranks} ranks here", dict(model=a.model, batch=a.batch, algorithm=a.algorithm, grad_wire=a.grad_wire, **a.numbers), "ms",
                        [1000 * real], predicted_ms=1000 * guess, error=guess / real - 1, compute_ms=1000 * compute, alpha_us=1e6 * alpha,
                        bytes_per_second=bandwidth))
    # Over nodes of 8, at links whose speed is given: one ring through all GPUs enters and leaves each node once.
    a = argparse.Namespace(**{**vars(a), "model": a.plan_model, "numbers": {}})
    _, length, d, parameters, image, token = shape_of(a)
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        ranks = 8 * nodes
        b = a.global_batch // ranks
        compute = 3 * b * (image + token * lab.CAPTIONS) / (1e12 * a.tflops)
        for side, gradient, width in (("fastclip-v3", "fp32", 4), ("fastclip-v3", "bf16", 2), ("open_clip", "fp32", 4)):
            parts = peer.formula(b, d, parameters, 0) if side == "open_clip" else plan.traffic(a.global_batch, d, 2, parameters * width)
            sent = {name: count(ranks) for name, count in parts.items()}
            for link in a.links:
                seconds = predicted(compute, sent, ranks, math.ceil(parameters * 4 / 25e6), 1e-6 * a.alpha, link / 8 * 1e9)
                rows.append(row("plan", f"{side} {gradient}", dict(model=a.model, B=a.global_batch, gpus=ranks, gbit=link, tflops=a.tflops, alpha_us=a.alpha),
                                "ms", [1000 * seconds], efficiency=compute / seconds, nodes=nodes))
    return rows


# ---- rows, table, picture ----

def row(mode, side, settings, unit, values, **more):
    return dict(mode=mode, side=side, settings=settings, unit=unit, median=statistics.median(values), all=values, **more)


def beside(rows):
    """Add to each of ours its ratio with open_clip's, round by round, compiled with compiled."""
    theirs = {r["side"]: r for r in rows}
    for r in rows:
        other = theirs[r["side"].replace("ours", "open_clip")]
        r["ratio"] = statistics.median(x / y for x, y in zip(r["all"], other["all"]))
    return rows


def machine():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    return dict(cpu=name, cores=lab.cores(), gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def commit():
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def save(rows, out):
    """Rows take the place of older ones with the same mode, side and settings. ConfigError if the file is of another machine."""
    document = dict(machine=machine(), rows=[])
    if os.path.exists(out):
        with open(out) as f:
            document = json.load(f)
        if document["machine"] != machine():
            raise ConfigError(f"{out} was measured on another machine, {document['machine']}: name another --out")
    now = dict(commit=commit(), date=datetime.datetime.now().isoformat(timespec="minutes"), load=os.getloadavg()[1],
               versions=dict(python=platform.python_version(), torch=torch.__version__, open_clip=peer.version()))
    key = lambda r: json.dumps([r["mode"], r["side"], r["settings"]], sort_keys=True)
    new = {key(r) for r in rows}
    document["rows"] = [r for r in document["rows"] if key(r) not in new] + [{**r, **now} for r in rows]
    document.update(now)
    with open(out + ".partial", "w") as f:
        json.dump(document, f, indent=1)
    os.replace(out + ".partial", out)
    return document["rows"]


SHOWN = {"ratio": "{:.2f} x", "mfu": "MFU {:.0%}", "share": "{:.3f} of open_clip's", "share_at_8_ranks": "{:.3f} at 8 ranks", "equal": "formula: {}",
         "share_of_step": "{:.2%} of a step", "hidden_share": "{:.0%} of communication hidden", "predicted_ms": "predicted {:.0f} ms", "error": "{:+.0%}",
         "efficiency": "efficiency {:.0%}"}


def table(rows):
    for r in rows:
        settings = " ".join(f"{k}={v}" for k, v in r["settings"].items() if k not in ("model", "source", "precision"))
        more = [form.format(r[k]) for k, form in SHOWN.items() if k in r] + [f"peak {plan.size(r['peak_bytes'])}"] * ("peak_bytes" in r)
        name = r["settings"].get("model", r["settings"].get("source", ""))
        value = plan.size(r["median"]) if r["unit"] == "bytes" else f"{r['median']:.4g} {r['unit']}"
        spread = f"{min(r['all']):.4g}..{max(r['all']):.4g}" if len(set(r["all"])) > 1 else ""
        print(f"{r['mode']:<10}{name:<15}{r['side']:<22}{value:>16}  {spread:<16}{', '.join(more):<50}  {settings}")


def picture(rows, out):
    """All rows -> one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 4, figsize=(19, 8.5), layout="constrained")
    of = lambda mode: [r for r in rows if r["mode"] == mode]

    def bars(axis, rows, group, value, title, unit, note=None):
        """Groups of bars, one for each side."""
        groups, sides = list(dict.fromkeys(map(group, rows))), list(dict.fromkeys(r["side"] for r in rows))
        for i, side in enumerate(sides):
            mine = [r for r in rows if r["side"] == side]
            x = [groups.index(group(r)) + (i - (len(sides) - 1) / 2) * 0.8 / len(sides) for r in mine]
            drawn = axis.bar(x, [value(r) for r in mine], 0.8 / len(sides), label=side)
            if note:
                axis.bar_label(drawn, [note(r) for r in mine], fontsize=8)
        axis.set_xticks(range(len(groups)), groups, fontsize=8)
        axis.set(title=title, ylabel=unit)
        axis.legend(fontsize=8)
    ratio = lambda r: f"{r['ratio']:.2f}x" if r["side"].startswith("ours") else ""
    steps = lambda r: f"{r['settings']['model']}\nbatch {r['settings']['batch']}"
    bars(axes[0, 0], of("step"), steps, lambda r: r["median"], "training step", "samples/s", ratio)
    bars(axes[0, 1], of("step"), steps, lambda r: r["peak_bytes"] / 1e9, "memory of the process at its peak", "GB")
    bars(axes[0, 2], of("loader"), lambda r: f"{r['settings']['source']}\n{r['settings']['workers'] or 'no'} workers", lambda r: r["median"],
         "tar to ready batch", "images/s", ratio)
    losses = of("loss")
    B0 = statistics.mode([r["settings"]["b"] for r in losses]) if losses else 0
    for axis, value, title, unit in ((axes[0, 3], lambda r: r["median"], "time of the loss", "ms"),
                                     (axes[1, 0], lambda r: (r["peak_bytes"] - r["gathered_bytes"]) / 1e6, "its memory at the peak, beyond the features", "MB")):
        for side in dict.fromkeys(r["side"] for r in losses):
            points = sorted((r["settings"]["B"], value(r)) for r in losses if r["side"] == side and r["settings"]["b"] == B0)
            axis.plot(*zip(*points), marker="o", label=side)
        axis.set(title=f"{title}, b = {B0}", xlabel="global batch B", ylabel=unit, ylim=(0, None))
        axis.legend(fontsize=8)
    axis, sent = axes[1, 1], [(f"{r['side']} {r['settings']['grad_wire']}", r["counted"]) for r in of("wire")]
    stack(axis, sent, 1e6)
    axis.set(title="sent in a step, counted", xlabel="MB")
    axis, parts = axes[1, 2], [(f"{r['side']} {r['settings']['grad_wire']}", {k: v for k, v in r["parts_ms"].items() if k != "hidden"}) for r in of("breakdown")]
    stack(axis, parts, 1)
    for i, r in enumerate(of("breakdown")):     # what lies beside the computation, not behind it
        axis.barh(i + 0.38, r["parts_ms"]["hidden"], 0.12, color="black", label="communication, hidden" if i == 0 else None)
    axis.set(title="where a step's time goes", xlabel="ms")
    axis.legend(fontsize=8)
    axis = axes[1, 3]
    for i, side in enumerate(dict.fromkeys(r["side"] for r in of("plan") if "nodes" in r)):
        for link, style in zip(sorted({r["settings"]["gbit"] for r in of("plan") if "nodes" in r}), (":", "--", "-")):
            mine = [r for r in of("plan") if r["side"] == side and r["settings"].get("gbit") == link]
            axis.plot([r["nodes"] for r in mine], [r["efficiency"] for r in mine], style, color=f"C{i}", label=f"{side}, {link} Gbit/s")
    axis.set(title="projected: computing's share of a step", xlabel="nodes of 8 GPUs", xscale="log", ylim=(0, 1.02))
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    axis.legend(fontsize=7)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=90)
    plt.close(figure)


def stack(axis, bars, unit):
    """[(label, {part: value})] -> horizontal stacked bars."""
    left = [0.0] * len(bars)
    for part in dict.fromkeys(part for _, parts in bars for part in parts):
        values = [parts.get(part, 0) / unit for _, parts in bars]
        axis.barh(range(len(bars)), values, 0.6, left=left, label=part)
        left = [x + y for x, y in zip(left, values)]
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=8)


MODES = {"step": step, "loader": loader, "loss": loss, "wire": wire, "breakdown": breakdown, "plan": plan_mode}
DEFAULTS = {"step": dict(model="ViT-B-32", batch=32), "loader": dict(batch=64), "loss": dict(model="ViT-B-16", batch=640),
            "wire": dict(model="ViT-B-32", batch=4), "breakdown": dict(model="ViT-B-32", batch=8), "plan": dict(model="ViT-B-32", batch=8)}
EVERYTHING = [("step", dict(model="ViT-B-32", batch=32)), ("step", dict(model="RN50", batch=16)), ("step", dict(model="ViT-B-16", batch=16)),
              ("loader", dict(size=256)), ("loader", dict(size=512)), ("loader", dict(size=256, workers=2)), ("loss", {}), ("wire", {}),
              ("breakdown", {}), ("plan", dict(numbers=dict(vision_layers=3, text_layers=3)))]


def parse(argv):
    parser = argparse.ArgumentParser(prog="bench.py", description="Ours beside open_clip: speed, memory, bytes.")
    add = parser.add_argument
    add("mode", choices=[*MODES, "all"])
    add("shards", nargs="?", help="loader, breakdown: tar shards; without, they are made")
    add("--model", help="step: ViT-B-32; loss (whose step it is a share of): ViT-B-16; wire, breakdown, plan: ViT-B-32")
    add("--batch", type=int, help="samples of a rank in a step; loss: b")
    add("--numbers", type=numbers, default={}, help="change the model: vision_layers=2,text_layers=2")
    add("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--algorithm", default="fastclip-v3", choices=list(ALGORITHMS))
    add("--grad_wire", default="fp32", choices=["fp32", "bf16"], help="plan: the type in which gradients travel")
    add("--compiled", action="store_true", help="step: both sides compiled, too")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=0, help="step: steps in a turn; 0: 1, or 20 on a GPU")
    add("--size", type=int, default=256, help="loader: shorter side of the pictures that are made, pixels")
    add("--images", type=int, default=512, help="loader: images in a turn")
    add("--workers", type=int, default=0, help="loader: 0 is one core and no other process")
    add("--global_batch", type=int, default=5120, help="loss, wire, plan: B")
    add("--tile", type=int, default=512, help="loss: loss_tile")
    add("--step_batch", type=int, default=8, help="loss: batch of the step that is measured to compare with")
    add("--ranks", type=int, default=2, help="wire, breakdown: processes on this machine")
    add("--check_ranks", type=int, nargs="+", default=[2, 4], help="plan: numbers of processes for which it is checked here")
    add("--plan_model", default="ViT-B-16", help="plan: what is projected over nodes")
    add("--tflops", type=float, default=150.0, help="plan: what a GPU computes, useful work of this model")
    add("--links", type=int, nargs="+", default=[100, 200, 400], help="plan: Gbit/s of a node")
    add("--alpha", type=float, default=10.0, help="plan: latency of a message, microseconds")
    add("--out", default="assets/bench_cpu.json")
    add("--plot", default="assets/bench.png")
    return parser.parse_args(argv)


def numbers(text):
    return {key: configs.typed(key, configs.parse(value)) for key, value in (word.split("=") for word in text.split(","))}


def main(argv):
    a = parse(argv)
    peer.load()
    if a.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda', but torch sees no GPU here; use --device=cpu")
    given = {name: value for name, value in vars(a).items() if value is not None}
    for mode, settings in EVERYTHING if a.mode == "all" else [(a.mode, {})]:
        rows = MODES[mode](argparse.Namespace(**{**vars(a), **DEFAULTS[mode], **(given if a.mode != "all" else {}), **settings}))
        table(rows)
        everything = save(rows, a.out)
        picture(everything, a.plot)


if __name__ == "__main__":
    configs.or_exit(main, sys.argv[1:])
