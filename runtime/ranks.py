"""Ranks that act as one outside the training step: their end, work done once, votes, stopping."""

import atexit
import os
import sys
import threading
import traceback

import torch
import torch.distributed as c10d

import dist
from config import ConfigError, or_exit

# ---- the process ----


def run(main, argv):
    """Call main(argv), then end this process, which may have become a rank meanwhile.

    A ConfigError is shown as one line on stderr.
    """
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
    """sys.exit(status) for a rank. One that others may still need waits in dist.barrier() before.

    The teardown of the interpreter is skipped: a gloo thread that frees its last tensor there
    aborts the process, although its work was done (seen with torch 2.11 and 2.15). Only
    destroy_process_group would wait for these threads, and torch 2.6 hangs in it.
    """
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1

    # What Python itself does before the teardown: wait for threads that are not daemons (one may
    # still write a checkpoint), then call the functions that libraries have registered.
    threading._shutdown()
    atexit._run_exitfuncs()

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ---- work that is done once ----


def from_first_rank(function, *args, waiting=lambda where: None, **options):
    """Call function(*args, **options) on rank 0 alone -> its result, on every rank.

    For example, a data set is indexed once, not by each of a hundred ranks. It may take longer
    than a collective may: the other ranks ask every second, and report waiting(where).

    After a ConfigError rank 0 raises it, and the others raise SystemExit(1), which prints nothing.
    """
    if dist.world_size() == 1:
        return function(*args, **options)

    call = BackgroundCall(function, args, options) if dist.rank() == 0 else None
    wait_for_first_rank(call, waiting)

    if call and call.failed_unexpectedly():
        raise call.result
    result = dist.all_gather_objects(call.result if call else None)[0]
    if isinstance(result, ConfigError):
        raise result if dist.rank() == 0 else SystemExit(1)
    return result


class BackgroundCall:
    """A call in a thread. `result` is what the function returns, or the exception it raises."""

    def __init__(self, function, args, options):
        self.result = None
        self.done = threading.Event()

        def call():
            try:
                self.result = function(*args, **options)
            except Exception as error:
                self.result = error
            self.done.set()

        threading.Thread(target=call, daemon=True).start()

    def failed_unexpectedly(self):
        return isinstance(self.result, Exception) and not isinstance(self.result, ConfigError)


def wait_for_first_rank(call, waiting):
    """Wait on all ranks until rank 0's call is done; on the others call is None."""
    ready = torch.zeros(1)
    while not ready:
        if call and call.done.wait(1.0):
            ready.fill_(1)
        dist.all_reduce(ready, "barrier").wait()
        if call is None:
            waiting("start-up, waiting for rank 0")


# ---- votes ----


class Vote:
    """Questions to all ranks, yes or no or how many, answered one step later: no step waits.

    What only some ranks know (a signal, a clock) becomes a decision that all of them take at the
    same step.

        vote = Vote(2)
        for each step:
            leave, save = vote.result()          # what was asked a step ago
            vote.ask(signal_came, clock_says_so)
    """

    def __init__(self, questions):
        """questions: their number. The first result() is 0 for each."""
        self.ask(*[False] * questions)

    def ask(self, *answers):
        """Send this rank's answers, one bool or int per question."""
        # On the CPU, by gloo: the GPU does not have to wait.
        self.sums = torch.tensor(answers, dtype=torch.int64)
        self.work = dist.all_reduce(self.sums, "votes")

    def result(self):
        """-> for each question of the last ask(), the sum of the ranks' answers."""
        self.work.wait()
        return self.sums.tolist()


# ---- stopping ----


class Interrupted(Exception):
    """Work was left unfinished on all ranks, because one of them was asked to stop."""


def interruptible(items, stop=lambda: False):
    """Yield this rank's items, each time after all ranks have done one more of theirs.

    stop() says whether this rank was asked to stop. Soon after it is true on any rank, all ranks
    raise Interrupted, at the same place. The numbers of items may differ: who has no more waits
    here for the others, so that all ranks return together.
    """
    for item in items:
        agree_to_go_on(stop(), done=False)
        yield item
    while not agree_to_go_on(stop(), done=True):
        pass


def agree_to_go_on(stop, done):
    """-> whether all ranks are done. Raises Interrupted if one of them is to stop."""
    sums = torch.tensor([stop, done], dtype=torch.float32)
    dist.all_reduce(sums, "votes").wait()
    num_stop, num_done = sums.int().tolist()
    if num_stop:
        raise Interrupted
    return num_done == dist.world_size()
