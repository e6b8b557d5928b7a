"""Ranks that act as one outside the training step: start and end of a process, work done once, votes."""

import atexit
import os
import sys
import threading
import traceback

import torch
import torch.distributed as c10d

import dist
from config import ConfigError, or_exit


def run(main, argv):
    """main(argv), and then the end of this process, which may have become a rank; a ConfigError is one line on stderr."""
    status = 0
    try:
        or_exit(main, argv)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        if not c10d.is_initialized():
            raise
        status = traceback.format_exc()
    if c10d.is_initialized():
        leave(status)
    sys.exit(status)


def leave(status=0):
    """sys.exit(status) for a rank, which must not take Python apart: a gloo thread that lets go of its last tensor only then would abort
    the process, though its work was done (torch 2.11 and 2.15). To wait for these threads there is only destroy_process_group, in
    which torch 2.6 hangs. A rank that others may still need waits for them first, in barrier()."""
    if not isinstance(status, int):
        print(status, file=sys.stderr)
    threading._shutdown()  # as at Python's own end: wait for threads that are no daemons (a checkpoint's writer),
    atexit._run_exitfuncs()  # and call what libraries have left to be called
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def from_first_rank(function, *args, waiting=lambda where: None, **options):
    """Rank 0's result on every rank: a set is indexed once, not by each of a hundred ranks. It may take longer than a collective may:
    the others ask every second, and say waiting(where). After a ConfigError rank 0 raises it, and the others end without a word."""
    if dist.world_size() == 1:
        return function(*args, **options)
    results, done = [], threading.Event()

    def call():
        try:
            results.append(function(*args, **options))
        except Exception as error:
            results.append(error)
        done.set()

    if dist.rank() == 0:
        threading.Thread(target=call, daemon=True).start()
    ready = torch.zeros(1)
    while not ready:
        ready.fill_(dist.rank() == 0 and done.wait(1.0))
        dist.all_reduce(ready, "barrier").wait()
        if dist.rank() > 0:
            waiting("start-up, waiting for rank 0")
    result = results[0] if dist.rank() == 0 else None
    if isinstance(result, Exception) and not isinstance(result, ConfigError):
        raise result
    result = dist.all_gather_objects(result)[0]
    if isinstance(result, ConfigError):
        raise result if dist.rank() == 0 else SystemExit(1)
    return result


class Vote:
    """Yes-or-no questions to all ranks, answered one step later, so that no step waits for the answer. What only some ranks know (a
    signal, a clock, a file that is written) becomes a decision that all of them take at the same step."""

    def __init__(self, questions):
        self.ask(*[False] * questions)

    def ask(self, *yes):
        """Launch: this rank's answers, bools."""
        self.sums = torch.tensor(
            yes, dtype=torch.float32
        )  # on the CPU, by gloo: no GPU is kept waiting
        self.work = dist.all_reduce(self.sums, "agreement")

    def result(self):
        """Finish -> for each question, how many ranks said yes."""
        self.work.wait()
        return self.sums.int().tolist()
