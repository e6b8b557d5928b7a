"""python -m bench plan: the time of a step, predicted, checked here and projected over nodes.

The model of a step is runtime.plan.predicted. Checked: latency, bandwidth and computation are
measured on ranks of this machine, and the prediction is put beside a real step. Projected: latency,
bandwidth and the speed of a GPU are given, and the nodes have eight GPUs each.
"""

import math
import statistics
import time
from itertools import cycle, product
from typing import NamedTuple

import torch

import dist
from bench import baselines, harness, made_data, ours, report
from runtime import hardware, plan

SMALL_BYTES = 1000  # takes the latency only
LARGE_BYTES = 64_000_000

GPUS_PER_NODE = 8
NODES = (1, 2, 4, 8, 16, 32, 64)
BUCKET_BYTES = 25_000_000  # of gradients, as config.bucket_mb

# (side, type in which its gradients travel)
PROJECTED_SIDES = [("fastclip-v3", "fp32"), ("fastclip-v3", "bf16"), ("open_clip", "fp32")]


def run(args):
    """Rows of results: the check on each number of --check_ranks, then the projection."""
    checks = [check(args, num_ranks) for num_ranks in args.check_ranks]
    return checks + projection(args)


# ---- checked here ----


class Measured(NamedTuple):
    """What a rank has measured; seconds are medians."""

    small_seconds: float  # of an all-reduce of SMALL_BYTES
    large_seconds: float  # of an all-reduce of LARGE_BYTES
    compute_seconds: float  # of a step that sends nothing, while the other ranks do theirs
    step_seconds: float  # of a step
    buckets: int  # in which gradients are sent


def check(args, num_ranks):
    """The row of one number of ranks: the predicted and the measured time of a step."""
    of_ranks = harness.on_ranks(num_ranks, rank_worker, args, label=f"plan, {num_ranks} ranks")
    medians = Measured(*(statistics.median(values) for values in zip(*of_ranks)))

    # A ring's all-reduce sends 2(K-1) messages, each of 1/K of the bytes.
    messages = 2 * (num_ranks - 1)
    alpha = medians.small_seconds / messages
    bytes_sent = messages / num_ranks * LARGE_BYTES
    bandwidth = bytes_sent / (medians.large_seconds - medians.small_seconds)

    # On a CPU the communication takes cores from the computation: nothing of it is hidden.
    on_gpu = harness.device_of(args).type == "cuda"
    shape = harness.model_shape(args)
    predicted = plan.predicted(
        medians.compute_seconds,
        our_traffic(args.algorithm, args.grad_wire, shape, args.batch * num_ranks, num_ranks),
        num_ranks,
        int(medians.buckets),
        alpha,
        bandwidth,
        2 / 3 if on_gpu else 0,
    )

    settings = dict(
        model=args.model,
        batch=args.batch,
        algorithm=args.algorithm,
        grad_wire=args.grad_wire,
        **args.numbers,
    )
    return report.row(
        "plan",
        f"{num_ranks} ranks here",
        settings,
        "ms",
        [1000 * medians.step_seconds],
        predicted_ms=1000 * predicted,
        error=predicted / medians.step_seconds - 1,
        compute_ms=1000 * medians.compute_seconds,
        alpha_us=1e6 * alpha,
        bytes_per_second=bandwidth,
    )


def our_traffic(algorithm, grad_wire, shape, global_batch, num_ranks):
    """The bytes that one of our ranks sends in a step, by purpose."""
    gradient_bytes = shape.parameters * (2 if grad_wire == "bf16" else 4)
    columns = ours.columns_per_sample(algorithm)
    parts = plan.traffic(global_batch, shape.embed_dim, columns, gradient_bytes)
    return {purpose: count(num_ranks) for purpose, count in parts.items()}


def rank_worker(args):
    """One rank: yields what it has Measured."""
    device = dist.init(args.device)
    shape = harness.model_shape(args)
    batches = made_data.make_batches(shape.image_size, shape.context_length, args.batch)

    small_seconds = all_reduce_seconds(SMALL_BYTES, device, times=50)
    large_seconds = all_reduce_seconds(LARGE_BYTES, device, times=5)

    trainer = ours.Trainer(args, cycle(batches), args.algorithm, grad_wire=args.grad_wire)
    step_seconds = median_seconds(lambda: trainer.run(1), device, args.rounds)
    buckets = len(trainer.t.reducer.buckets)

    # torch's own barrier: dist.barrier, too, will believe that this rank is alone.
    harness.act_alone(1)
    trainer = ours.Trainer(args, cycle(batches), args.algorithm)
    seconds = []
    for _ in range(args.rounds + 1):
        torch.distributed.barrier()
        start = time.perf_counter()
        trainer.run(1)
        seconds.append(time.perf_counter() - start)
    compute_seconds = statistics.median(seconds[1:])

    yield Measured(small_seconds, large_seconds, compute_seconds, step_seconds, buckets)


def all_reduce_seconds(num_bytes, device, times):
    x = torch.ones(num_bytes // 4, device=device)
    return median_seconds(lambda: dist.all_reduce(x, "ping").wait(), device, times)


def median_seconds(function, device, times):
    """The median duration of so many calls, begun together on all ranks, after an untimed one."""
    function()
    seconds = []
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        function()
        hardware.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# ---- projected over nodes ----


def projection(args):
    """A row for each number of nodes, side and link.

    One ring through all GPUs enters and leaves each node once: its bandwidth is that of a link.
    """
    shape = harness.model_shape(harness.changed(args, model=args.plan_model, numbers={}))
    pair_flops = 3 * (shape.image_flops + shape.token_flops * made_data.MEDIAN_TOKENS)
    buckets = math.ceil(shape.parameters * 4 / BUCKET_BYTES)

    rows = []
    for nodes, (side, grad_wire), link in product(NODES, PROJECTED_SIDES, args.links):
        num_ranks = GPUS_PER_NODE * nodes
        b = args.global_batch // num_ranks
        compute_seconds = b * pair_flops / (1e12 * args.tflops)
        sent = projected_traffic(side, grad_wire, shape, args.global_batch, num_ranks)
        bytes_per_second = link / 8 * 1e9
        seconds = plan.predicted(
            compute_seconds, sent, num_ranks, buckets, 1e-6 * args.alpha, bytes_per_second
        )

        settings = dict(
            model=args.plan_model,
            B=args.global_batch,
            gpus=num_ranks,
            gbit=link,
            tflops=args.tflops,
            alpha_us=args.alpha,
        )
        row = report.row(
            "plan",
            f"{side} {grad_wire}",
            settings,
            "ms",
            [1000 * seconds],
            efficiency=compute_seconds / seconds,
            nodes=nodes,
        )
        rows.append(row)
    return rows


def projected_traffic(side, grad_wire, shape, global_batch, num_ranks):
    """The bytes that one rank of a side sends in a step, by purpose."""
    if side != "open_clip":
        return our_traffic(side, grad_wire, shape, global_batch, num_ranks)
    b = global_batch // num_ranks
    parts = baselines.traffic_formula(b, shape.embed_dim, shape.parameters, buffer_bytes=0)
    return {purpose: count(num_ranks) for purpose, count in parts.items()}
