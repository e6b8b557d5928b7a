"""Data workers: processes that read and decode beside the training.

run_workers(generate, workers, pin_memory) runs a generator function in several processes and yields
what they yield, in turn. in_a_thread(items) lets a thread of this process do the last part of the
work. The rest of this file is about how the processes start and end.
"""

import multiprocessing.forkserver
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import dist
from ingest.reader import ShardError

# What Slurm, torchrun and Ctrl-C send to every process of a job.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# How long a worker lives after SIGTERM: most of the 30 seconds that torchrun gives.
SECONDS_AFTER_SIGTERM = 25

# Workers of a rank by default: one per CPU up to 8, because a small machine needs each of them. Of
# more CPUs, two are left to the trainer. Eight would not do: ViT-B/32 may take 8,000 to 12,000
# images/s on an H100 (an estimate), and a core decodes about 1,000.
FEW_WORKERS = 8
MANY_WORKERS = 32
CPUS_OF_TRAINER = 2

PREFETCH = 4  # items that each worker prepares ahead


def default_workers():
    """How many data workers this rank has by default, from 1 to 32.

    Its share of the CPUs that the job may use on this machine, without two of them if it is large.
    """
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count()
    share = cpus // dist.local_world_size()

    few = min(share, FEW_WORKERS)
    many = min(share - CPUS_OF_TRAINER, MANY_WORKERS)
    return max(1, few, many)


def run_workers(generate, workers, pin_memory):
    """Yield what generate(worker, workers) yields in each of the workers, one item of each in turn.

    Each worker prepares up to 4 items ahead. With workers = 0, generate(0, 1) runs in this process.
    Raises ShardError if a worker does.

    Workers are forked from a server, a fresh process that has imported torch and done nothing else.
    A fork of the trainer itself would inherit the locks of its CUDA and gloo threads in any state,
    and spawned workers would each import torch.
    """
    if workers:
        start_server()
    loader = DataLoader(
        Stream(generate),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context="forkserver" if workers else None,
    )
    for item in loader:
        if isinstance(item, str):
            raise ShardError(item)
        yield item


def in_a_thread(items):
    """Yield what the iterator `items` yields. A thread calls it, one item ahead.

    What it raises is raised here. When this generator is closed, the thread still completes the
    item that it is at.
    """
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, items, end)
        while True:
            item = following.result()
            if item is end:
                return
            following = thread.submit(next, items, end)
            yield item


@lru_cache
def start_server():
    """Start the process that workers are forked from, once.

    Signals are ignored while it starts, which the server inherits and keeps.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision.io"])

    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    multiprocessing.forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Stream(IterableDataset):
    """Turns generate(worker, workers), a generator function, into what a DataLoader expects.

    A ShardError is yielded as a str, its message, so that the trainer prints one line instead of
    a worker's traceback.
    """

    def __init__(self, generate):
        self.generate = generate

    def __iter__(self):
        # Not a generator itself: in a worker this part runs at once, not with the first item.
        info = get_worker_info()
        if info is None:
            return self.items(0, 1)
        end_with_trainer()
        outlive_signals()
        return self.items(info.id, info.num_workers)

    def items(self, worker, workers):
        try:
            yield from self.generate(worker, workers)
        except ShardError as error:
            yield str(error)


def end_with_trainer():
    """Let this worker exit as soon as the trainer has ended, in whatever way it ended."""

    def wait_and_exit():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()


def outlive_signals():
    """Let this worker survive the signals that the trainer, too, receives.

    Slurm and Ctrl-C signal every process of a job, and a trainer that wants to finish its step and
    save needs its workers until then.
    """

    def exit_later(number, frame):
        signal.alarm(SECONDS_AFTER_SIGTERM)

    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, exit_later)
