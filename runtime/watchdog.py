"""Nobody waits for the dead: when a rank is killed, hangs or raises, all others say which one and where, and end.

A rank that waits in a collective for one that will never come cannot raise, so threads watch beside it. Ranks talk through the
key-value store by which torchrun brought them together, which works while collectives do not:

    "0", "1", ...   each rank's pulse, renewed every second: a count, the collectives it has begun, where it is
    "failed"        the first failure anywhere; who reads it ends

Each rank listens to the next one's pulse, so a silent rank is found wherever it sits. A rank that hangs still has a pulse, but it has
begun fewer collectives than the others.
"""

import datetime
import faulthandler
import os
import sys
import threading
import time

import torch.distributed as c10d

import dist
from config import ConfigError

SILENCE = 30.0  # seconds without a pulse after which a rank counts as dead (less if the time-out is short)
GONE = "gone"  # the pulse of a rank that has left in good order
LEAVING = "leaving"  # where a rank is that waits for the others to leave with it


class Watchdog:
    """Ends this process, saying why, when another rank has failed, or when nothing was reported here for `timeout` seconds.

    progress(where) reports progress; `where` is what messages name, e.g. "step 120". failed(error) tells the others of an exception."""

    def __init__(self, timeout):
        self.timeout, self.pulse, self.silence = (
            timeout,
            min(1.0, timeout / 10),
            min(SILENCE, timeout / 2),
        )
        self.where, self.since, self.done, self.store = (
            "start-up",
            time.monotonic(),
            threading.Event(),
            None,
        )
        self.ending = threading.Lock()
        if dist.world_size() > 1 and "MASTER_ADDR" in os.environ:
            store = c10d.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=datetime.timedelta(seconds=timeout),
            )
            self.store = c10d.PrefixStore(
                "watchdog/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store
            )
            self.talker = threading.Thread(target=self.talk, daemon=True)
            self.talker.start()
        threading.Thread(
            target=self.watch, daemon=True
        ).start()  # its own thread: a store may be out of reach for minutes

    def progress(self, where):
        self.where, self.since = where, time.monotonic()

    def stop(self):
        """Leave in good order: from now on nobody is missed."""
        self.done.set()
        if self.store:
            self.talker.join(5.0)  # else its last pulse may come after this
            bounded(lambda: self.store.set(str(dist.rank()), GONE), 5.0)

    def watch(self):
        asleep = time.monotonic()
        while not self.done.wait(self.pulse):
            if (
                time.monotonic() - asleep > 5 * self.pulse
            ):  # the whole process was suspended: that is nobody's fault
                self.since += time.monotonic() - asleep
            asleep = time.monotonic()
            if time.monotonic() - self.since > self.timeout:
                cause = self.cause()
                self.end(
                    f"gives up: nothing has finished for {self.timeout:g} s after {self.where}. {cause} (To wait longer: --timeout)",
                    cause,
                    trace=True,
                )

    def talk(self):
        beats, neighbour, heard, since, asleep = (
            0,
            (dist.rank() + 1) % dist.world_size(),
            None,
            time.monotonic(),
            time.monotonic(),
        )
        while not self.done.wait(self.pulse):
            if time.monotonic() - asleep > 5 * self.pulse:
                since = time.monotonic()
            asleep = time.monotonic()
            try:
                beats += 1
                self.store.set(str(dist.rank()), f"{beats}|{sum(dist.calls.values())}|{self.where}")
                if self.store.check(["failed"]):
                    reason = self.store.get("failed").decode()
                    self.end(
                        f"ends at {self.where}, because {reason}",
                        reason,
                        trace=f"rank {dist.rank()} hangs" in reason,
                    )
                pulse = self.pulses([neighbour])[neighbour]
                if pulse != heard:
                    heard, since = pulse, time.monotonic()
                elif pulse != GONE and time.monotonic() - since > self.silence:
                    reason = silent([neighbour], {neighbour: pulse})
                    self.end(f"ends at {self.where}, because {reason}", reason)
            except (RuntimeError, OSError) as error:  # DistError is a RuntimeError
                if self.where == LEAVING:  # rank 0, where the store lives, may be gone already
                    return
                if not self.done.is_set():
                    self.end(
                        f"ends at {self.where}, because the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} no longer "
                        f"answers ({error}): the first host, or the agent or rank 0 on it, has died"
                    )

    def pulses(self, ranks):
        return {
            r: self.store.get(str(r)).decode() if self.store.check([str(r)]) else "" for r in ranks
        }

    def cause(self):
        """What the others' pulses say about why this rank cannot go on: a failure, a silent rank, or one that is behind."""
        if not self.store:
            return ""

        def look():
            first = self.pulses(range(dist.world_size()))
            time.sleep(2.5 * self.pulse)
            second = self.pulses(range(dist.world_size()))
            if self.store.check(["failed"]):
                return self.store.get("failed").decode()
            dead = [
                r for r, pulse in second.items() if pulse == first[r] != GONE and r != dist.rank()
            ]
            if dead:
                return silent(dead, second)
            begun = {
                r: int(pulse.split("|")[1]) for r, pulse in second.items() if pulse.count("|") > 1
            }
            behind = [r for r in begun if begun[r] < max(begun.values())]
            if behind:
                return "; ".join(
                    f"rank {r} hangs at {second[r].split('|', 2)[2]}: it has begun {begun[r]} collectives, others "
                    f"{max(begun.values())}"
                    for r in behind[:8]
                )
            return "All ranks have a pulse and wait in the same place: look at the network between them"

        return (
            bounded(look, 3.0 + 2.5 * self.pulse)
            or "The store does not answer either: look at the network, and at the first host"
        )

    def failed(self, error):
        """Tell all ranks of the exception that ends this one. Where it only echoes another rank's end, this does not return."""
        if is_echo(error):
            cause = self.cause()
            self.end(
                f"cannot go on at {self.where}: {cause} ({type(error).__name__}: {str(error)[:160]})",
                cause,
            )
        self.done.set()  # this rank has its own words, and does not wait for those in the store
        if not isinstance(error, ConfigError):  # the command line shows those in one line
            print(
                f"error: rank {dist.rank()}, {self.where}: {type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )
        self.post(f"rank {dist.rank()} failed at {self.where}: {type(error).__name__}: {error}")

    def post(self, message):
        if self.store:
            bounded(
                lambda: self.store.compare_set("failed", "", message), 3.0
            )  # the first one stays
            if dist.rank() == 0:
                time.sleep(
                    2.5 * self.pulse
                )  # the store may live in this process: let the others read it

    def end(self, message, reason="", trace=False):
        """Print the message, give the others the reason, and end the process: the main thread may be where no exception reaches it."""
        with self.ending:  # the first thread that comes is the one that speaks
            self.done.set()
            print(f"error: rank {dist.rank()} {message}", file=sys.stderr, flush=True)
            if trace:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            self.post(reason or f"rank {dist.rank()} {message}")
            os._exit(1)


def end_with_torchrun():
    """From now on this process ends when torchrun does, even where no watchdog is yet: a rank may look for the others for minutes."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1.0)
        print(
            f"error: rank {os.environ['RANK']} ends, because its torchrun has died",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def silent(ranks, pulses):
    """-> the sentence that names ranks without a pulse."""
    return "; ".join(
        f"rank {r} no longer answers, it was last heard of at {pulses[r].split('|', 2)[-1] or 'start-up'}: killed, or its host is gone"
        for r in ranks[:8]
    )


def is_echo(error):
    """Was this raised by a collective whose other side has gone?"""
    return isinstance(error, c10d.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def bounded(function, seconds):
    """function()'s result; None if it raises, or takes longer than that (it is then left behind in its thread)."""
    result = []

    def call():
        try:
            result.append(function())
        except Exception:
            pass  # the store is gone: the callers say so

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None
