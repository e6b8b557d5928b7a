"""Part A of python -m bench gpu: is what the GPU computes right, and what does a step wait for?

Each function takes the command line's arguments and returns rows. A row's `goal` says in words
what was hoped for, `met` whether it is so.
"""

import gc
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from itertools import cycle, islice
from typing import NamedTuple

import torch
import torch.distributed as c10d
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

import dist
import model as models
from bench import harness, made_data, measure, ours, report
from runtime import hardware

MEGABYTE = 10**6


def settings_of(args):
    return dict(model=args.model, batch=args.batch, **args.numbers)


# ---- the machine ----


def machine(args):
    """Rows on what the hardware reaches: matrix products, and copies."""
    return harness.in_a_process(machine_worker, args)


def machine_worker(args):
    device = dist.init(args.device)
    on_gpu = device.type == "cuda"

    rows = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        teraflops = hardware.peak_flops(dtype, device) / 1e12
        row = report.row("machine", f"matrix product, {name}", {}, "TFLOP/s", [teraflops])
        rows.append(row)

    size = (1000 if on_gpu else 10) * MEGABYTE
    target = torch.empty(size, dtype=torch.uint8, device=device)
    on_host = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
    on_device = torch.zeros_like(target)
    for name, source in (("copy on the device", on_device), ("copy to the device", on_host)):
        gigabytes_per_second = size / copy_seconds(target, source, device) / 1e9
        rows.append(report.row("machine", name, {}, "GB/s", [gigabytes_per_second]))
    yield rows


def copy_seconds(target, source, device):
    """The shortest of five copies, in seconds."""
    shortest = math.inf
    for _ in range(5):
        hardware.synchronize(device)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        hardware.synchronize(device)
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


# ---- numbers ----

MIN_COSINE = 0.99
MAX_NORM_CHANGE = 0.05


class Variant(NamedTuple):
    """A way to compute the gradient, which is compared with that of float32 without compilation."""

    side: str
    precision: str
    compiled: bool
    config: dict  # further settings of the config


def variants(args):
    """The list of Variants that are measured."""
    in_two_pieces = dict(micro_batch=args.batch // 2)
    return [
        Variant("bf16, eager", "bf16", False, {}),
        Variant("bf16", "bf16", True, {}),
        Variant("bf16, checkpointing", "bf16", True, dict(grad_checkpointing=True)),
        Variant("bf16, micro-batches", "bf16", True, in_two_pieces),
        Variant("fp16", "fp16", True, {}),
    ]


def numbers(args):
    """Rows on the gradient of a step: its cosine with that of float32, and the ratio of norms."""
    return harness.in_a_process(numbers_worker, args)


def numbers_worker(args):
    device = dist.init(args.device)
    shape = harness.model_shape(args)
    batches = made_data.make_batches(shape.image_size, shape.context_length, args.batch, count=1)
    batches = made_data.pinned(batches, device)
    reference = gradient(args, batches, Variant("", "fp32", False, {}))

    rows = []
    for variant in variants(args):
        variant = variant._replace(compiled=variant.compiled and args.compiled)
        settings = dict(settings_of(args), compiled=variant.compiled)
        if variant.precision == "fp16" and device.type == "cpu":
            rows.append(report.skipped("numbers", variant.side, settings, "fp16 needs a GPU"))
            continue
        try:
            rows.append(numbers_row(args, settings, batches, reference, variant))
        except Exception as error:
            reason = harness.reason_of(error)
            rows.append(report.failed("numbers", variant.side, settings, reason))
    yield rows


def numbers_row(args, settings, batches, reference, variant):
    if "micro_batch" in variant.config and args.model.startswith("RN"):
        # BatchNorm normalises each piece by itself: in float32, too, this changes the gradient.
        in_pieces = variant._replace(precision="fp32", compiled=False)
        reference = gradient(args, batches, in_pieces)

    found = gradient(args, batches, variant)
    cosine = torch.nn.functional.cosine_similarity(found, reference, dim=0).item()
    norm_ratio = (found.norm() / reference.norm()).item()
    return report.row(
        "numbers",
        variant.side,
        settings,
        "cosine",
        [cosine],
        norm_ratio=norm_ratio,
        goal=f"cosine > {MIN_COSINE}, norms within {MAX_NORM_CHANGE:.0%}",
        met=cosine > MIN_COSINE and abs(norm_ratio - 1) < MAX_NORM_CHANGE,
    )


def gradient(args, batches, variant):
    """The gradient of the first step, (parameters,), without that of the temperature."""
    trainer = ours.Trainer(
        harness.changed(args, precision=variant.precision),
        cycle(batches),
        compiled=variant.compiled,
        **variant.config,
    )
    # float16's scale begins too high: such steps are left out, and the weights stay.
    for _ in range(20):
        trainer.run(1)
        weights = weights_of(trainer.t.model)
        found = torch.cat([p.grad.flatten() for p in weights])
        if found.isfinite().all():
            break

    trainer.close()
    del trainer, weights
    gc.collect()
    torch.cuda.empty_cache()
    return found


def weights_of(model):
    """All parameters that have a gradient, without the temperature."""
    return [p for p in model.parameters() if p is not model.logit_scale and p.grad is not None]


# ---- gradient hooks ----


def hooks(args):
    """Rows on the gradients that dist.GradReducer reduces, beside plain ones, in a group of one."""
    return harness.in_a_process(hooks_worker, args)


def hooks_worker(args):
    device = dist.init(args.device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    c10d.init_process_group(backend, store=c10d.HashStore(), rank=0, world_size=1)
    # The hooks, and collectives, are left out where a rank is alone.
    dist.world_size = two

    try:
        rows = [hooks_row(args, device, name) for name in ("float32", "bfloat16")]
    finally:
        c10d.destroy_process_group()
    yield rows


def two():
    return 2


def hooks_row(args, device, wire):
    """wire: the type in which gradients travel."""
    torch.manual_seed(0)
    model = models.create(args.model, **args.numbers).to(device)
    if args.compiled:
        model.compile_blocks()
    shape = harness.model_shape(args)
    (batch,) = made_data.make_batches(shape.image_size, shape.context_length, args.batch, count=1)
    images, tokens = batch.images.to(device), batch.tokens.to(device)

    back_propagate(model, images, tokens)
    weights = weights_of(model)
    plain = torch.cat([p.grad.flatten() for p in weights])

    reducer = dist.GradReducer(weights, 25.0, getattr(torch, wire))
    reducer.zero()
    reducer.arm()
    back_propagate(model, images, tokens)
    reducer.wait()
    reduced = torch.cat([p.grad.flatten() for p in weights])

    # Whether the mean of one is taken over one or over two is of no interest here.
    difference = (reduced / reduced.norm() - plain / plain.norm()).norm().item()
    largest = 1e-4 if wire == "float32" else 1e-2
    return report.row(
        "hooks",
        f"{wire} on the wire",
        settings_of(args),
        "relative difference",
        [difference],
        buckets=len(reducer.buckets),
        goal=f"< {largest}",
        met=difference < largest and bool(reducer.finite),
    )


def back_propagate(model, images, tokens):
    """Gradients of the sum of all features."""
    dtype = torch.bfloat16 if images.device.type == "cuda" else torch.float32
    with hardware.autocast(dtype, images.device)():
        features = model(images, tokens)
    torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])


# ---- two ranks ----

STEPS = 3
GRAD_WIRES = ("fp32", "bf16")


def two_ranks(args):
    """Rows on the steps of two ranks, which share a GPU if there is one, beside those of one."""
    args = harness.changed(args, precision="fp32")
    (alone,) = harness.on_ranks(1, steps_worker, args, label="one rank", share_gpu=True)
    together = harness.on_ranks(2, steps_worker, args, label="two ranks", share_gpu=True)

    rows = []
    for wire in GRAD_WIRES:
        difference = 0.0
        for of_rank in together:
            for found, expected in zip(of_rank[wire], alone[wire]):
                difference = max(difference, abs(found / expected - 1))
        largest = 1e-3 if wire == "fp32" else 1e-2
        row = report.row(
            "ranks",
            f"gradients in {wire}",
            settings_of(args),
            "relative difference",
            [difference],
            goal=f"objective and gradient norm of {STEPS} steps < {largest}",
            met=difference < largest,
        )
        rows.append(row)
    return rows


def steps_worker(args):
    """One rank: yields {type on the wire: [objective and gradient norm of each step]}.

    Raises RuntimeError if the ranks' weights have drifted apart.
    """
    # Before there are ranks, so that it is the same global batch everywhere.
    shape = harness.model_shape(args)
    batches = made_data.make_batches(shape.image_size, shape.context_length, args.batch, STEPS)
    dist.init(args.device)
    size = args.batch // dist.world_size()
    own = slice(dist.rank() * size, (dist.rank() + 1) * size)
    shares = []
    for batch in batches:
        share = batch._replace(
            images=batch.images[own],
            tokens=batch.tokens[own],
            lengths=batch.lengths[own],
            ids=batch.ids[own],
        )
        shares.append(share)

    results = {}
    for wire in GRAD_WIRES:
        own_args = harness.changed(args, batch=size)
        trainer = ours.Trainer(own_args, iter(shares), grad_wire=wire)
        values = []
        for _ in range(STEPS):
            values.append(trainer.run(1))
            gradients = [p.grad for p in weights_of(trainer.t.model)]
            values.append(torch.nn.utils.get_total_norm(gradients).item())
        dist.check_same_weights(trainer.t.model)
        results[wire] = values
        trainer.close()
    yield results


# ---- what a step waits for ----


def watch(args):
    """Rows on training steps after warm-up: waits of the host, compilations, idle time."""
    return harness.in_a_process(watch_worker, args)


def watch_worker(args):
    device = dist.init(args.device)
    on_gpu = device.type == "cuda"
    shape = harness.model_shape(args)
    batches = made_data.make_batches(shape.image_size, shape.context_length, args.batch)
    batches = made_data.pinned(batches, device)
    trainer = ours.Trainer(args, cycle(batches), compiled=args.compiled)
    trainer.run(2 * len(batches))
    measure.reset_peak_memory(device)

    settings = dict(settings_of(args), precision=args.precision)
    count_compilations()
    rows = [waits_row(trainer, settings, device)]
    rows += time_rows(trainer, settings, device, args.steps or (20 if on_gpu else 2))
    rows.append(compilations_row(settings))
    yield rows


def count_compilations():
    """Start anew what compilations_row counts."""
    counters["stats"]["unique_graphs"] = 0
    clear_compilation_metrics()


def compilations_row(settings):
    """The row on the graphs that torch.compile has made since count_compilations, and why."""
    count = counters["stats"]["unique_graphs"]
    reasons = Counter()
    for compilation in get_compilation_metrics():
        # Not in all versions of torch; None for the first graph of a function.
        reason = getattr(compilation, "recompile_reason", None)
        if reason:
            reasons[f"{compilation.co_name}: {reason}"] += 1

    side = "compilations after warm-up"
    row = report.row("watch", side, settings, "graphs", [count], reasons=dict(reasons))
    return dict(row, goal="0", met=count == 0)


def waits_row(trainer, settings, device):
    """The row on how often the host waited for the GPU in four steps, and where."""
    side = "waits for the GPU"
    if device.type != "cuda":
        return report.skipped("watch", side, settings, "there is no GPU to wait for")

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        places = places_of_waits(trainer, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    count = sum(places.values())
    row = report.row("watch", side, settings, "waits", [count], places=places)
    return dict(row, goal="0", met=count == 0)


def places_of_waits(trainer, steps):
    """{"file.py:line": how often the host waited there} in so many steps.

    torch warns of it. (In the mode "error" it would stop at the first place.)
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in islice(trainer.batches, steps):
            trainer.step(batch)

    places = Counter()
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            file = os.path.relpath(warning.filename, report.ROOT)
            places[f"{file}:{warning.lineno}"] += 1
    return dict(places)


def time_rows(trainer, settings, device, steps):
    """Rows on the speed, and on the share of a step in which the device does nothing."""
    on_gpu = device.type == "cuda"
    start = time.perf_counter()
    trainer.run(steps)
    hardware.synchronize(device)
    speed = steps * settings["batch"] / (time.perf_counter() - start)
    peak_bytes = measure.peak_memory(device)

    with measure.profiled(device) as profile:
        start = time.perf_counter()
        for batch in islice(trainer.batches, 5):
            trainer.step(batch)
        hardware.synchronize(device)
        seconds = time.perf_counter() - start
    parts = measure.parts_of(profile.events(), seconds, on_gpu)
    idle = parts["other"] / seconds

    return [
        report.row("watch", "speed", settings, "samples/s", [speed], peak_bytes=peak_bytes),
        report.row(
            "watch",
            "idle",
            settings,
            "of the time",
            [idle],
            parts_ms={name: 1000 * value / 5 for name, value in parts.items()},
            longest_ms=longest_kernels(profile, on_gpu),
            goal="< 0.1",
            met=idle < 0.1,
        ),
    ]


def longest_kernels(profile, on_gpu, count=15):
    """{name: milliseconds per step} of the operators or kernels that take most of 5 steps."""
    milliseconds = []
    for event in profile.key_averages():
        total = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        milliseconds.append((total / 1000 / 5, event.key))
    milliseconds.sort(reverse=True)
    return {name[:100]: value for value, name in milliseconds[:count]}


# ---- the tests that need a GPU ----


PYTEST = ("-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-k", "cuda", "tests")


def tests(args):
    """The row on the project's tests with "cuda" in their name: passed, failed, skipped."""
    result = subprocess.run(
        [sys.executable, *PYTEST],
        cwd=report.ROOT,
        capture_output=True,
        text=True,
        timeout=args.limit,
    )
    counts = counts_of_tests(result.stdout)
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)$", result.stdout, re.MULTILINE)
    if not sum(counts.values()):
        lines = (result.stdout + result.stderr).strip().splitlines() or [""]
        return [report.failed("tests", "pytest -k cuda", {}, lines[-1])]

    row = report.row(
        "tests",
        "pytest -k cuda",
        {},
        "passed",
        [counts["passed"]],
        counts=counts,
        failed_tests=failed,
        goal="none failed",
        met=result.returncode == 0,
    )
    return [row]


def counts_of_tests(printed):
    """{"passed": n, "failed": n, "skipped": n, "error": n} of pytest's last line."""
    counts = dict(passed=0, failed=0, skipped=0, error=0)
    last_line = (printed.strip().splitlines() or [""])[-1]
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last_line):
        counts[word] = int(number)
    return counts
