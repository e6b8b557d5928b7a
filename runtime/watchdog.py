"""Failure detection: if a rank dies, hangs or raises, the others name it and exit.

A rank that waits in a collective for a rank that never comes cannot raise. So two threads run
beside it. They talk through the key-value store by which torchrun brought the ranks together,
because it works while collectives do not:

    "0", "1", ...   each rank's heartbeat, renewed every second: "COUNT|COLLECTIVES|WHERE", a
    count, the
                    number of collectives that the rank has begun, and where it is; "gone" after the
                    rank has left in good order
    "failed"        the first failure on any rank; who reads it ends

Each rank listens to the heartbeat of the next one, so a silent rank is found whichever it is. A
rank that hangs still has a heartbeat, but it has begun fewer collectives than the others.
"""

import contextlib
import datetime
import faulthandler
import os
import sys
import threading
import time

import torch.distributed as c10d

import dist
from config import BadRun, ConfigError
from runtime import PARENT

# Seconds without a heartbeat after which a rank counts as dead; at most half of the timeout.
SILENCE = 30.0
GONE = "gone"  # the heartbeat of a rank that has left in good order
LEAVING = "leaving"  # where a rank is that has finished, and waits for the others to finish
MAX_NAMED = 8  # ranks that one message names


class Watchdog:
    """Ends this process with a message when another rank has failed, or when this one hangs.

    timeout: seconds after which a rank that has reported no progress counts as hanging.

        watchdog.progress("step 120")    # what this rank is doing now; messages say it
        watchdog.failed(error)           # tells the other ranks of an exception
        watchdog.stop()                  # leaves in good order
    """

    def __init__(self, timeout):
        self.timeout = timeout
        self.interval = min(1.0, timeout / 10)  # seconds between heartbeats
        self.silence = min(SILENCE, timeout / 2)

        self.where = "start-up"
        self.last_progress = time.monotonic()
        self.stopped = threading.Event()
        self.ending = threading.Lock()

        self.store = None
        self.heartbeat_thread = None
        if dist.world_size() > 1 and "MASTER_ADDR" in os.environ:
            self.store = connect(timeout)
            self.heartbeat_thread = start_thread(self.exchange_heartbeats)

        # This one has a thread of its own, because the store may be out of reach for minutes.
        start_thread(self.watch_progress)

    def progress(self, where):
        self.where = where
        self.last_progress = time.monotonic()

    def stop(self):
        """Leave in good order: from now on no other rank misses this one."""
        self.stopped.set()
        if self.store:
            # Otherwise the last heartbeat could come after GONE.
            self.heartbeat_thread.join(5.0)
            bounded(lambda: self.store.set(str(dist.rank()), GONE), 5.0)

    # ---- the two threads ----

    def watch_progress(self):
        """End this process when it has reported no progress for `timeout` seconds."""
        woke = time.monotonic()
        while not self.stopped.wait(self.interval):
            # Time for which the whole process was suspended does not count.
            asleep = time.monotonic() - woke
            if asleep > 5 * self.interval:
                self.last_progress += asleep
            woke = time.monotonic()

            if time.monotonic() - self.last_progress > self.timeout:
                cause = self.cause()
                self.end(
                    f"gives up: nothing has finished for {self.timeout:g} s after {self.where}. "
                    f"{cause} (To wait longer: --timeout)",
                    cause,
                    trace=True,
                )

    def exchange_heartbeats(self):
        """Send this rank's heartbeat, read failures and the heartbeat of the next rank.

        End this process when another rank has failed, when the next rank falls silent, or when the
        store does not answer.
        """
        neighbour = (dist.rank() + 1) % dist.world_size()
        count = 0
        heard = None  # the neighbour's last heartbeat
        heard_at = time.monotonic()
        woke = time.monotonic()

        while not self.stopped.wait(self.interval):
            # If the whole process was suspended, the neighbour was not silent.
            if time.monotonic() - woke > 5 * self.interval:
                heard_at = time.monotonic()
            woke = time.monotonic()

            try:
                count += 1
                self.send_heartbeat(count)
                failure = self.failure()
                if not failure:
                    heartbeat = self.heartbeats([neighbour])[neighbour]
            except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
                # The store lives on the first host, which may already have left.
                if self.where == LEAVING:
                    return
                if not self.stopped.is_set():
                    self.end_without_store(error)
                return

            if failure:
                this_one_hangs = f"rank {dist.rank()} hangs" in failure
                self.end(f"ends at {self.where}, because {failure}", failure, trace=this_one_hangs)

            if heartbeat != heard:
                heard = heartbeat
                heard_at = time.monotonic()
            elif heartbeat != GONE and time.monotonic() - heard_at > self.silence:
                reason = describe_silent([neighbour], {neighbour: heartbeat})
                self.end(f"ends at {self.where}, because {reason}", reason)

    # ---- the store ----

    def send_heartbeat(self, count):
        collectives = sum(dist.calls.values())
        self.store.set(str(dist.rank()), f"{count}|{collectives}|{self.where}")

    def heartbeats(self, ranks):
        """-> {rank: its last heartbeat, "" if there was none}"""
        result = {}
        for rank in ranks:
            key = str(rank)
            result[rank] = self.store.get(key).decode() if self.store.check([key]) else ""
        return result

    def failure(self):
        """-> what the first rank that failed has told the others, "" if none has."""
        return self.store.get("failed").decode() if self.store.check(["failed"]) else ""

    def post(self, message):
        """Tell all ranks of a failure. Only the first message stays."""
        if not self.store:
            return
        bounded(lambda: self.store.compare_set("failed", "", message), 3.0)
        if dist.rank() == 0:
            # The store may live in this process: let the others read it.
            time.sleep(2.5 * self.interval)

    # ---- why, and the end ----

    def cause(self):
        """Why this rank cannot go on, as far as the store tells; "" without a store."""
        if not self.store:
            return ""
        found = bounded(self.compare_heartbeats, 3.0 + 2.5 * self.interval)
        return found or (
            "The store does not answer either: look at the network, and at the first host"
        )

    def compare_heartbeats(self):
        """Look at all heartbeats twice -> a sentence about a failed, a silent or a hanging rank."""
        everyone = range(dist.world_size())
        before = self.heartbeats(everyone)
        time.sleep(2.5 * self.interval)
        now = self.heartbeats(everyone)

        failure = self.failure()
        if failure:
            return failure

        silent = []
        for rank in everyone:
            unchanged = now[rank] == before[rank] and now[rank] != GONE
            if unchanged and rank != dist.rank():
                silent.append(rank)
        if silent:
            return describe_silent(silent, now)

        return describe_hanging(now) or (
            "All ranks have a heartbeat and wait in the same place: "
            "look at the network between them"
        )

    def failed(self, error):
        """Tell all ranks of the exception that ends this one.

        If the exception only says that the other side of a collective has gone, name the cause
        and end the process here.
        """
        if is_echo(error):
            cause = self.cause()
            self.end(
                f"cannot go on at {self.where}: {cause} ({shown_error(error)})",
                cause,
            )

        # From here on this rank reports its own failure, not one that it reads in the store.
        self.stopped.set()
        message = f"{type(error).__name__}: {error}"
        # The command line shows these itself, in one line.
        if not isinstance(error, (ConfigError, BadRun)):
            complain(f"rank {dist.rank()}, {self.where}: {message}")
        self.post(f"rank {dist.rank()} failed at {self.where}: {message}")

    def end_without_store(self, error):
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.end(
            f"ends at {self.where}, because the store at {address} no longer answers ({error}): "
            f"the first host, or the agent or rank 0 on it, has died"
        )

    def end(self, message, reason="", trace=False):
        """Print the message, tell the others the reason, and end the process at once.

        An exception would not do: the main thread may be in a call that none can interrupt.
        trace: also print where every thread is.
        """
        # Only the first thread that gets here reports.
        with self.ending:
            self.stopped.set()
            complain(f"rank {dist.rank()} {message}")
            if trace:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            self.post(reason or f"rank {dist.rank()} {message}")
            os._exit(1)


def connect(timeout):
    """-> the part of torchrun's key-value store that belongs to the watchdogs of this attempt."""
    store = c10d.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=timeout),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return c10d.PrefixStore(f"watchdog/{attempt}", store)


def end_with_torchrun():
    """From now on this process ends when its torchrun does.

    This also holds before there is a watchdog: ranks may look for each other for minutes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return

    def watch_parent():
        while os.getppid() == PARENT:
            time.sleep(1.0)
        complain(f"rank {os.environ['RANK']} ends, because its torchrun has died")
        os._exit(1)

    start_thread(watch_parent)


def describe_silent(ranks, heartbeats):
    """-> the sentence that names ranks without a heartbeat. heartbeats: {rank: its last one}."""
    sentences = []
    for rank in ranks[:MAX_NAMED]:
        where = heartbeats[rank].split("|", 2)[-1] or "start-up"
        sentences.append(
            f"rank {rank} no longer answers, it was last heard of at {where}: "
            f"killed, or its host is gone"
        )
    return "; ".join(sentences)


def describe_hanging(heartbeats):
    """-> the sentence that names ranks that are some collectives behind; "" if none is."""
    begun = {}
    where = {}
    for rank, heartbeat in heartbeats.items():
        if heartbeat.count("|") > 1:
            parts = heartbeat.split("|", 2)
            begun[rank] = int(parts[1])
            where[rank] = parts[2]

    most = max(begun.values(), default=0)
    behind = [rank for rank in begun if begun[rank] < most]
    sentences = []
    for rank in behind[:MAX_NAMED]:
        sentences.append(
            f"rank {rank} hangs at {where[rank]}: it has begun {begun[rank]} collectives, "
            f"others {most}"
        )
    return "; ".join(sentences)


def is_echo(error):
    """Was this raised by a collective because its other side has gone?"""
    if isinstance(error, c10d.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def shown_error(error):
    """-> the words of an error by which a collective says that its other side has gone.

    gloo's first words say all. NCCL's last ones do ("Last error: ..."), so they are shown whole.
    """
    text = str(error)
    if "nccl" not in text.lower():
        text = text[:160]
    return f"{type(error).__name__}: {text}"


def complain(message):
    # Nobody may be reading any more; that must not keep this process from ending.
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {message}", file=sys.stderr, flush=True)


def start_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def bounded(function, seconds):
    """function()'s result; None if it raises or takes longer (its thread is then left behind)."""
    results = []

    def call():
        try:
            results.append(function())
        except Exception:
            pass  # the store is gone, which the callers report

    start_thread(call).join(seconds)
    return results[0] if results else None
