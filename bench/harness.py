"""Processes that take turns, ranks on this machine, and the shape of the model that is measured."""

import argparse
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import traceback
from typing import NamedTuple

import torch
from tqdm import tqdm

import dist
import model as models
from config import ConfigError
from runtime import ranks

SPAWN = multiprocessing.get_context("spawn")

END_SECONDS = 5  # that a process has to end by itself


# ---- settings ----


def changed(args, **changes):
    """A copy of the command line's arguments with some of them changed."""
    return argparse.Namespace(**{**vars(args), **changes})


def device_of(args):
    """The torch.device that --device asks for."""
    if args.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def cores():
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class Shape(NamedTuple):
    """What the modes need to know about a model."""

    image_size: int  # pixels
    context_length: int  # tokens
    embed_dim: int
    parameters: int  # of both towers, with logit_scale
    image_flops: float  # forward, per image
    token_flops: float  # forward, per token of a caption


def model_shape(args):
    """The Shape of args.model with the changes of --numbers; no weights are allocated."""
    with torch.device("meta"):
        model = models.create(args.model, **args.numbers)

    flops = models.forward_flops(model, model.context_length)
    return Shape(
        image_size=model.image_size,
        context_length=model.context_length,
        embed_dim=model.embed_dim,
        parameters=models.num_parameters(model)["total"],
        image_flops=flops["image"],
        token_flops=flops["text"] / model.context_length,
    )


# ---- processes that take turns ----


class WorkerError(RuntimeError):
    """A process did not measure what it was asked for.

    reason: one line. details: the traceback, if there is one.
    """

    def __init__(self, reason, details=""):
        super().__init__(reason, details)
        self.reason = reason
        self.details = details

    def __str__(self):
        return self.details or self.reason


class Failed(NamedTuple):
    """In place of what a side should have measured: why it did not."""

    reason: str  # one line


def reason_of(error):
    """An exception as one line: "OutOfMemoryError: CUDA out of memory. Tried to ..."."""
    if isinstance(error, WorkerError):
        return error.reason
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


class Worker:
    """The generator function(*args) in a fresh process, so that its memory and threads are its own.

    Each send() resumes the generator; receive() waits for the value that it yields next. The first
    value says that the process is set up.
    """

    def __init__(self, function, *args):
        self.pipe, far_end = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(far_end, function, args))
        self.process.start()
        far_end.close()

    def send(self, request=None):
        self.pipe.send(request)

    def receive(self, limit=None):
        """The next value. limit: seconds to wait for it; None or 0: for ever.

        Raises ConfigError if the generator did, and WorkerError for its other exceptions, if the
        process died, and after the limit.
        """
        if limit and not self.pipe.poll(limit):
            raise WorkerError(f"no answer within {limit:g} seconds")
        try:
            value = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise WorkerError(
                f"a measuring process died with exit status {self.process.exitcode}: see its "
                "messages above"
            ) from None
        if isinstance(value, Exception):
            raise value
        return value

    def close(self):
        # A process that waits for a request ends when the pipe is closed.
        self.pipe.close()
        self.process.join(END_SECONDS)
        self.process.terminate()


def serve(pipe, function, args):
    """What a Worker's process runs: one value of the generator for each request."""
    # A spawned process would itself spawn; data loaders are measured with the platform's default.
    multiprocessing.set_start_method(None, force=True)

    generator = function(*args)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            request = pipe.recv()
            try:
                value = generator.send(request)
            except ConfigError as error:
                value = error
            except Exception as error:
                value = WorkerError(reason_of(error), traceback.format_exc())
            pipe.send(value)
    ranks.leave()


def in_a_process(function, args):
    """The first value of the generator function(args), in a process of its own."""
    worker = Worker(function, args)
    try:
        worker.send()
        return worker.receive(args.limit)
    finally:
        worker.close()


def take_turns(workers, requests, label, limit=None):
    """Send every request to each side in turn, in an order that is reversed every time.

    workers: {side: Worker}. They are closed at the end, whatever happens. limit: seconds in which
    a request must be answered.
    Returns {side: [a value for each request]}. The values that say "set up" are left out. A side
    that fails, for lack of memory, say, is closed and asked no more, so that the others have the
    machine to themselves: from then on its values are Failed. A ConfigError is raised.
    """
    values = {side: [] for side in workers}
    failures = {}  # side -> Failed
    set_up = None
    try:
        for number, request in enumerate(tqdm([set_up, *requests], desc=label, leave=False)):
            sides = list(workers)
            if number % 2 == 0:
                sides.reverse()
            for side in sides:
                if side in failures:
                    values[side].append(failures[side])
                    continue

                value = ask(workers[side], request, f"{label}, {side}", limit)
                values[side].append(value)
                if isinstance(value, Failed):
                    failures[side] = value
                    workers[side].close()
    finally:
        for worker in workers.values():
            worker.close()
    return {side: of_side[1:] for side, of_side in values.items()}


def ask(worker, request, label, limit):
    """The worker's next value, or Failed, which is also printed."""
    try:
        worker.send(request)
        return worker.receive(limit)
    except (RuntimeError, OSError) as error:
        print(f"{label} failed: {error}", file=sys.stderr, flush=True)
        return Failed(reason_of(error))


def measured(values):
    """Those of a side's values that are not Failed."""
    return [value for value in values if not isinstance(value, Failed)]


# ---- ranks on this machine ----


def on_ranks(num_ranks, function, args, *more, label="", share_gpu=False):
    """Run the generator function(args, *more) on ranks of this machine, which share its cores.

    share_gpu: several ranks may have the same GPU (dist.init), which is for tests only.
    Returns the first value that each rank yields, in rank order. Raises ConfigError if there are
    fewer GPUs than ranks, and what the first rank to fail raised.
    """
    gpus = torch.cuda.device_count()
    if device_of(args).type == "cuda" and num_ranks > gpus and not share_gpu:
        raise ConfigError(
            f"{label} needs a GPU for each of {num_ranks} ranks, and there are {gpus} here: lower "
            "--ranks or --check_ranks, or use --device=cpu --out=FILE"
        )

    port = free_port()
    workers = [
        Worker(run_as_rank, rank, num_ranks, port, share_gpu, function, (args, *more))
        for rank in range(num_ranks)
    ]
    try:
        for worker in workers:
            worker.send()
        return receive_in_any_order(workers, label, args.limit)
    finally:
        for worker in workers:
            worker.close()


def receive_in_any_order(workers, label, limit):
    """One value of each worker, in the workers' order.

    Whoever has a value is received first: if a rank fails, the others wait for it in vain. Raises
    WorkerError if for `limit` seconds (0: for ever) none has one.
    """
    waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
    values = [None] * len(workers)
    with tqdm(total=len(workers), desc=label, leave=False) as progress:
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), limit or None)
            if not ready:
                raise WorkerError(f"{label}: no rank answered within {limit:g} seconds")
            for pipe in ready:
                rank = waiting.pop(pipe)
                values[rank] = workers[rank].receive()
                progress.update()
    return values


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_as_rank(rank, num_ranks, port, share_gpu, function, args):
    """The generator function(*args) in the environment that torchrun would give to this rank."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if share_gpu:
        os.environ["FASTCLIP_SHARE_GPUS"] = "1"
    torch.set_num_threads(max(1, cores() // num_ranks))
    yield from function(*args)


def act_alone(num_ranks):
    """From here on this process computes as rank 0 of num_ranks and sends nothing.

    What it gathers are copies of its own rows, so shapes and work are those of the real rank 0.
    It replaces functions of dist in this process, for good.
    """

    def rank():
        return 0

    def world_size():
        return num_ranks

    def all_gather(x, purpose):
        if num_ranks == 1:
            return x
        return x.repeat(num_ranks, *[1] * (x.ndim - 1))

    def start_all_gather(x, purpose):
        return dist.Gathering(all_gather(x, purpose), dist.NoWork())

    def all_reduce(x, purpose, mean=False):
        return dist.NoWork()

    dist.rank = rank
    dist.world_size = world_size
    dist.all_gather = all_gather
    dist.start_all_gather = start_all_gather
    dist.all_reduce = all_reduce
