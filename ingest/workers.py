"""Data workers: processes that decode beside the training."""

import multiprocessing.forkserver
import os
import signal
import threading
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ingest.reader import ShardError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def default_workers():
    """Up to 8, as far as the CPUs that this job may use go round among the ranks of this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


class Stream(IterableDataset):
    """generate(worker, workers), a generator function, as a DataLoader wants it."""

    def __init__(self, generate):
        self.generate = generate

    def __iter__(self):
        info = get_worker_info()
        if info:
            # A worker ends with the trainer, however and whenever that ends: so this is done at once, and not when the first item is
            # asked for. But Slurm and Ctrl-C signal every process of a job, and a trainer that wants to finish its step, and save,
            # needs its workers: SIGTERM gives it most of the 30 seconds that torchrun gives.
            threading.Thread(
                target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
            ).start()
            for number in SIGNALS:
                signal.signal(
                    number,
                    signal.SIG_IGN if number != signal.SIGTERM else lambda *_: signal.alarm(25),
                )
        return self.items(*((info.id, info.num_workers) if info else (0, 1)))

    def items(self, worker, workers):
        try:
            yield from self.generate(worker, workers)
        except ShardError as error:
            yield str(error)  # so that the trainer shows a line, not a worker's traceback


@lru_cache  # once: while it starts, signals are ignored, which the server inherits
def start_server():
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "torchvision.io"])
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    multiprocessing.forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_workers(generate, workers, pin_memory):
    """Yield what generate(worker, workers) yields in each worker, in turn; each prepares up to 4 items ahead. Raises ShardError.

    Workers are forked from a server, a fresh process that has imported torch and done nothing else: a fork of the trainer itself
    would inherit the locks of its CUDA and gloo threads in any state, and spawned workers would each import torch."""
    if workers:
        start_server()
    for item in DataLoader(
        Stream(generate),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        prefetch_factor=4 if workers else None,
        multiprocessing_context="forkserver" if workers else None,
    ):
        if isinstance(item, str):
            raise ShardError(item)
        yield item
