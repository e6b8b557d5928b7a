"""Where bench.py measures: fresh processes that take turns, made pictures and captions, the trainers of both sides, and a profile."""

import argparse
import contextlib
import ctypes
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import socket
import tarfile
import time
import traceback
from io import BytesIO
from itertools import cycle, islice

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # torch's profiler, read with it: no word about GPUs that are not there

import torch
from torch.autograd import DeviceType
from torchvision.io import ImageReadMode, decode_image, encode_jpeg
from tqdm import tqdm

import config as configs
import data
import dist
import model as models
import optim
import train  # before torch, because it says how torch's threads are to wait
from bench import baselines
from config import ConfigError
from ingest.images import resize
from loss import ContrastiveLoss
from runtime import hardware, ranks

SPAWN = multiprocessing.get_context("spawn")
CAPTIONS = 17  # tokens at the median, as in CC3M, with begin and end
LEAST = 5


# ---- settings ----


def numbers(text):
    return {
        key: configs.typed(key, configs.parse(value))
        for key, value in (word.split("=") for word in re.split(r",(?![^(]*\))", text))
    }


def changed(a, **settings):
    return argparse.Namespace(**{**vars(a), **settings})


# ---- processes that take turns ----


class Worker:
    """A generator function(*args) in a fresh process. Every ask() is answered by its next value; the first says that it is ready."""

    def __init__(self, function, *args):
        self.pipe, there = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(there, function, args))
        self.process.start()
        there.close()

    def ask(self, request=None):
        self.pipe.send(request)

    def answer(self):
        try:
            value = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"a process that measures has died, exit status {self.process.exitcode}"
            ) from None
        if isinstance(value, Exception):
            raise value
        return value

    def close(self):
        self.pipe.close()  # which ends it, if it waits to be asked
        self.process.join(5)
        self.process.terminate()


def serve(pipe, function, args):
    multiprocessing.set_start_method(
        None, force=True
    )  # what is spawned would spawn too; loaders expect the system's usual way
    steps = function(*args)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = pipe.recv()
            try:
                value = steps.send(request)
            except Exception as error:
                value = (
                    error
                    if isinstance(error, ConfigError)
                    else RuntimeError(traceback.format_exc())
                )
            pipe.send(value)
    ranks.leave()


def take_turns(sides, requests, label):
    """{side: Worker} -> {side: one answer per request}: each request to every side, in an order that turns round every time."""
    answers = {side: [] for side in sides}
    try:
        for request in tqdm(
            [None, *requests], desc=label, leave=False
        ):  # the first: set up, warm up
            for side in list(sides)[:: 1 if len(answers[next(iter(sides))]) % 2 else -1]:
                sides[side].ask(request)
                answers[side].append(sides[side].answer())
    finally:
        for worker in sides.values():
            worker.close()
    return {side: values[1:] for side, values in answers.items()}


def on_ranks(ranks, function, *args, label=""):
    """A generator function(*args) on so many ranks of this machine, each with its share of the cores -> what each yields first."""
    gpus = torch.cuda.device_count()
    if device_of(args[0]).type == "cuda" and ranks > gpus:
        raise ConfigError(
            f"{label} needs a GPU for each of {ranks} ranks, here are {gpus}: lower --ranks or --check_ranks, or --device=cpu --out=FILE"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [Worker(as_rank, rank, ranks, port, function, args) for rank in range(ranks)]
    try:
        for worker in workers:
            worker.ask()
        waiting, results = {w.pipe: i for i, w in enumerate(workers)}, [None] * ranks
        with tqdm(total=ranks, desc=label, leave=False):
            while waiting:  # whoever answers first: the others wait in vain for one that has failed
                for pipe in multiprocessing.connection.wait(list(waiting)):
                    rank = waiting.pop(pipe)
                    results[rank] = workers[rank].answer()
        return results
    finally:
        for worker in workers:
            worker.close()


def as_rank(rank, ranks, port, function, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(max(1, cores() // ranks))
    yield from function(*args)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def forget_peak(device):
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(
            0
        )  # else what was freed stays resident, and using it again looks like nothing
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")


def memory(device):
    """Bytes, the most since forget_peak: on a GPU of what was allocated, on a CPU of what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open(
        "/proc/self/status"
    ) as f:  # not getrusage, which remembers the process that started this one
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def seconds_of(function, device):
    """How long a call takes, not the first: the mean over half a second or 20 calls. On a GPU, for how long it is busy with one, because in a
    training step the host queues such a call while the towers are still at work."""
    function()
    hardware.synchronize(device)
    if device.type == "cuda":
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            function()
            hardware.synchronize(device)
        return parts_of(profile.events(), 0.0, on_gpu=True)["compute"]
    start, times = time.perf_counter(), 0
    while times < 1 or (times < 20 and time.perf_counter() - start < 0.5):
        function()
        times += 1
    return (time.perf_counter() - start) / times


def peak_of(function, device):
    """The most bytes that tensors take at once while function() runs, beyond what they took before; exact, as their allocators say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events, waiting = [], profile.profiler.kineto_results.experimental_event_tree()
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            events.append(
                (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
            )
    live, most = {}, 0
    for _, pointer, size in sorted(events):
        live[pointer] = (
            size if size > 0 else 0
        )  # what is freed may be from before: that is no gain here
        most = max(most, sum(live.values())) if size > 0 else most
    return most


# ---- what is trained on ----


def caption_lengths(count, seed=0):
    """Tokens of `count` captions, int64, 5..77: the quantiles of a log-normal with median CAPTIONS, shuffled."""
    z = math.sqrt(2) * torch.erfinv(2 * (torch.arange(count) + 0.5) / count - 1)
    lengths = (CAPTIONS * torch.exp(0.45 * z)).round().long().clamp(LEAST, 77)
    return lengths[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


def photo(height, width, generator):
    """uint8 [3, height, width] that as a JPEG takes about as many bytes as a photograph: noise that falls with its frequency, colours much alike."""
    frequency = (
        (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2)
        .sqrt()
        .clamp(min=1 / max(height, width))
    )
    x = torch.fft.irfft2(
        torch.fft.rfft2(torch.randn(3, height, width, generator=generator)) / frequency**1.5,
        s=(height, width),
    )
    x = x / x.std()
    return (128 + 55 * (0.9 * x[:1] + 0.3 * x)).clamp(0, 255).to(torch.uint8)


def photos(folder, shapes, generator):
    """For each shape (height, width) a random crop of the next photograph in the folder, half of it or more, reduced to it -> uint8 [3, height, width]."""
    files = sorted(
        os.path.join(folder, name)
        for name in os.listdir(folder)
        if name.lower().endswith((".jpg", ".jpeg", ".png"))
    )
    if not files:
        raise ConfigError(
            f"{folder} has no .jpg or .png: name a folder of photographs, or tar shards"
        )
    whole = [decode_image(file, ImageReadMode.RGB) for file in files]
    for image, (height, width) in zip(cycle(whole), shapes):
        share = 0.5 + 0.5 * torch.rand((), generator=generator).item()
        scale = share * min(image.shape[1] / height, image.shape[2] / width)
        h, w = int(scale * height), int(scale * width)
        top, left = (
            int(torch.randint(room + 1, (), generator=generator))
            for room in (image.shape[1] - h, image.shape[2] - w)
        )
        yield resize(image[:, top : top + h, left : left + w], height, width)


def make_shards(folder, size, count, source="", shards=16):
    """Tar shards of JPEGs, quality 90, 4:3 or 3:4, shorter side `size`, made from noise, or from the photographs in the folder `source`
    -> their pattern. After 512 they begin again, under other names."""
    generator, lengths = torch.Generator().manual_seed(0), caption_lengths(count).tolist()
    words = "a photo of the old red house by sea with two dogs and one man on green grass near big trees".split()
    shapes = [
        (size, size * 4 // 3) if i % 8 < 5 else (size * 4 // 3, size)
        for i in range(min(count, 512))
    ]
    pictures = (
        photos(source, shapes, generator)
        if source
        else (photo(*shape, generator) for shape in shapes)
    )
    jpegs = [
        encode_jpeg(picture, 90).numpy().tobytes()
        for picture in tqdm(pictures, "making JPEGs", len(shapes), leave=False)
    ]
    for shard in range(shards):
        with tarfile.open(os.path.join(folder, f"{shard:05d}.tar"), "w") as tar:
            for i in range(shard, count, shards):
                caption = " ".join(
                    islice(cycle(words), i % len(words), i % len(words) + lengths[i] - 2)
                )
                for extension, content in (
                    ("jpg", jpegs[i % len(jpegs)]),
                    ("txt", caption.encode()),
                ):
                    member = tarfile.TarInfo(f"{i:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    return os.path.join(folder, "{%05d..%05d}.tar" % (0, shards - 1))


def shards_of(a, folder, count):
    """-> (the shards that were named, or are made in the folder of the photographs that were named, or of noise; in a word, which)."""
    if a.shards and not os.path.isdir(a.shards):
        return a.shards, "given"
    return make_shards(
        folder, a.size, count, a.shards
    ), f"{'photos' if a.shards else 'noise'} {a.size} px"


def pinned(batches, device):
    """Batches as a GPU's trainer gets them, ours and theirs: in memory from which it can copy while it computes."""
    pin = lambda batch: (
        type(batch)(*map(pin_one, batch))
        if hasattr(batch, "_fields")
        else tuple(map(pin_one, batch))
    )
    pin_one = lambda x: x.pin_memory() if isinstance(x, torch.Tensor) else x
    return [pin(batch) for batch in batches] if device.type == "cuda" else batches


def made_batches(image_size, context_length, batch, count=4):
    """-> list of data.Batch, this rank's, from memory: what data.Loader would yield."""
    generator = torch.Generator().manual_seed(dist.rank())
    lengths, batches = caption_lengths(count * batch).clamp(max=context_length).split(batch), []
    for length in lengths:
        longest = min(context_length, -(-int(length.max()) // 8) * 8)
        place, tokens = (
            torch.arange(longest),
            torch.randint(1, 49406, (batch, longest), generator=generator),
        )
        tokens = torch.where(place < length[:, None] - 1, tokens, 0).index_fill_(
            1, torch.tensor([0]), 49406
        )
        tokens[torch.arange(batch), length - 1] = 49407
        images = torch.stack(
            [photo(image_size, image_size, generator) for _ in range(batch)]
        ).contiguous(memory_format=torch.channels_last)
        batches.append(
            data.Batch(
                images, tokens, length, torch.randint(4096, (batch,), generator=generator), {}
            )
        )
    return batches


# ---- the trainers ----


class Ours:
    """train.train_step, set up as train.main does, on data.Batches from an endless iterator."""

    def __init__(
        self, a, batches, algorithm="fastclip-v3", compiled=False, num_samples=4096, **settings
    ):
        self.c = c = configs.Config(
            model=a.model,
            algorithm=algorithm,
            batch_size=a.batch * dist.world_size(),
            precision=a.precision,
            warmup_steps=100,
            lr=1e-4,
            **a.numbers,
            **settings,
        )
        torch.manual_seed(0)
        self.device, self.batches, self.steps = device_of(a), batches, 0
        self.model = models.create(c.model, c.tau_init, **c.model_numbers()).to(self.device).train()
        dtype = hardware.precision(c.precision, self.device)
        if models.is_resnet(self.model):
            self.model.to(memory_format=torch.channels_last)
        dist.broadcast_weights(self.model)
        self.optimizer = optim.create(self.model, c)
        self.loss = ContrastiveLoss(algorithm, num_samples, device=self.device, tile=c.loss_tile)
        if compiled:
            self.model.compile_blocks()
        self.reducer = dist.GradReducer(
            [p for p in self.model.parameters() if p is not self.model.logit_scale],
            c.bucket_mb,
            torch.bfloat16 if c.grad_wire == "bf16" else torch.float32,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.autocast = hardware.autocast(dtype, self.device)

    def run(self, steps):
        for batch in islice(self.batches, steps):
            out = self.step(batch)
        return out.objective.item()

    def close(self):
        """Free the weights: they hold hooks, which hold the buckets, which hold the weights, through C++ where Python's collector cannot see."""
        for bucket in self.reducer.buckets:
            bucket.parameters.clear()
            bucket.flat = None
        self.reducer.parameters.clear()

    def step(self, batch):
        images, tokens = (
            x.to(self.device, non_blocking=True) for x in (batch.images, batch.tokens)
        )
        self.steps += 1
        return train.train_step(
            batch._replace(images=images, tokens=tokens),
            self.model,
            self.loss,
            self.optimizer,
            self.reducer,
            self.scaler,
            self.autocast,
            self.c,
            self.steps - 1,
            1000,
            10_000,
        )[0]


def theirs(a, batches, **options):
    return baselines.Trainer(
        a.model, a.numbers, a.batch, a.precision, device_of(a), batches, **options
    )


def device_of(a):
    return (
        torch.device("cuda", torch.cuda.current_device())
        if a.device != "cpu" and torch.cuda.is_available()
        else torch.device("cpu")
    )


def shape_of(a):
    """-> (image size, context length, d, parameters in all, FLOPs forward of an image and of a token)."""
    with torch.device("meta"):
        model = models.create(a.model, **a.numbers)
    flops = models.forward_flops(model, model.context_length)
    return (
        model.image_size,
        model.context_length,
        model.embed_dim,
        models.num_parameters(model)["total"],
        flops["image"],
        flops["text"] / model.context_length,
    )


# ---- a profile, taken apart ----


def parts_of(events, seconds, on_gpu):
    """A profile of one step -> {part: seconds}. Busy: when an operator (GPU: a kernel) runs that is not a collective; communication counts from
    a collective's start to its end, so with the wait for the slowest rank; hidden is what of it lies within busy time, exposed the rest."""
    spans = lambda wanted: union(
        (e.time_range.start / 1e6, e.time_range.end / 1e6) for e in events if wanted(e)
    )
    here = lambda e: (e.device_type == DeviceType.CUDA) == on_gpu
    kernel = lambda e: here(e) and not e.is_user_annotation
    collective = lambda e: (
        kernel(e) and "nccl" in e.name.lower() if on_gpu else e.name.startswith("gloo:")
    )
    threads = {
        e.thread for e in events if collective(e)
    }  # gloo's own: what runs there is part of the collective
    comm = spans(collective)
    busy = spans(
        lambda e: (
            not collective(e)
            and (kernel(e) if on_gpu else e.name.startswith("aten::") and e.thread not in threads)
        )
    )
    optimizer = spans(lambda e: here(e) and e.name.startswith("Optimizer.step"))
    waiting = spans(lambda e: e.name.startswith("enumerate(DataLoader)"))
    parts = {
        "compute": length(without(busy, optimizer)),
        "optimizer": length(busy) - length(without(busy, optimizer)),
        "exposed": length(without(comm, busy)),
        "data": length(without(without(waiting, busy), comm)),
    }
    return {
        **parts,
        "other": seconds - sum(parts.values()),
        "hidden": length(comm) - parts["exposed"],
    }


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
        spans = [
            (s, e)
            for start, end in spans
            for s, e in ((start, min(end, a)), (max(start, b), end))
            if s < e
        ]
    return spans


def length(spans):
    return sum(end - start for start, end in spans)
