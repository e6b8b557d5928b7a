"""Runs of a suite in processes of their own, several side by side, until each has its record.

Every run is `train.py BASE --key=value ... --resume=auto` in its folder under runs/experiments/,
what it prints is in FOLDER.log. A run that was cut off continues from its checkpoint. When it is
done, its record is written, and its folder is removed.

Side by side means a core each (one thread, and the data decoded in the training process: for the
emoji set that is faster than with a worker), or a GPU each, or several on a GPU.

Ctrl-C, or SIGTERM, goes to the runs, which save and end. A second one ends them at once.
"""

import collections
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import torch

import config as configs
from bench import harness, report
from config import ConfigError
from runtime.log import duration
from runtime.plots import read_metrics
from tools import records
from tools.suites import Run, settings_of

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN = os.path.join(ROOT, "train.py")

POLL_SECONDS = 0.2
SHOW_SECONDS = 30  # between two reports of progress
LAST_LINES = 8  # that a failed run is shown with


class Place(NamedTuple):
    """Where one of the runs that go side by side is run."""

    gpu: str | None  # for CUDA_VISIBLE_DEVICES; None: on the CPU
    threads: int
    workers: int  # data workers


class Child(NamedTuple):
    """A run that is going on."""

    run: Run
    place: Place
    process: subprocess.Popen
    commit: str  # of the code that it runs


def places(jobs=0, jobs_per_gpu=1):
    """The places for `jobs` runs at a time; 0: one per core or, if there are GPUs, those of each.

    Raises ConfigError for numbers that are not positive.
    """
    if jobs < 0 or jobs_per_gpu < 1:
        raise ConfigError(f"--jobs {jobs}, --jobs_per_gpu {jobs_per_gpu}: they must be positive")
    gpus = visible_gpus() * jobs_per_gpu
    cores = harness.cores()
    jobs = jobs or len(gpus) or cores

    threads = max(1, cores // jobs)
    if gpus:
        return [Place(gpus[i % len(gpus)], threads, threads) for i in range(jobs)]
    return [Place(None, threads, 0)] * jobs


def visible_gpus():
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.device_count() and named:
        return named.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]


class Runner:
    """Runs those runs of a suite that it is given, in their order.

    suite: suites.Suite. runs: list of its runs. places: list of Place. keep: leave the folders of
    finished runs, with their checkpoints, where they are.

    failed: names of the runs that failed. stopping: whether a signal has come.
    """

    def __init__(self, suite, runs, places, keep=False):
        self.suite = suite
        self.keep = keep
        self.waiting = collections.deque(runs)
        self.free = collections.deque(places)
        self.children = []
        self.failed = []
        self.stopping = False

        self.count = len(runs)
        self.ended = 0
        self.done_before = self.runs_done()  # by earlier jobs
        self.started = time.monotonic()
        self.shown_at = self.started

    def run(self):
        """Run them all; returns at the end of the last, or soon after a signal."""
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, self.handle)
        try:
            while self.children or (self.waiting and not self.stopping):
                self.start_waiting()
                time.sleep(POLL_SECONDS)
                self.collect()
                self.show_if_due()
        finally:
            self.send(signal.SIGKILL)  # none is left, unless this process has failed
            for number, handler in handlers.items():
                signal.signal(number, handler)

    # ---- signals ----

    def handle(self, number, frame):
        """The first signal asks the runs to save and end, a second one ends them."""
        self.send(signal.SIGKILL if self.stopping else signal.SIGTERM)
        self.stopping = True

    def send(self, number):
        for child in self.children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    # ---- runs ----

    def start_waiting(self):
        """Start runs while there are places."""
        while self.waiting and self.free and not self.stopping:
            self.start(self.waiting.popleft(), self.free.popleft())

    def start(self, run, place):
        remove_if_changed(run)
        os.makedirs(os.path.dirname(run.folder), exist_ok=True)
        options = [f"--out_dir={run.folder}", "--resume=auto", f"--workers={place.workers}"]

        commit = report.commit()
        environment = {**os.environ, "OMP_NUM_THREADS": str(place.threads)}
        if place.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = place.gpu
        with open(run.folder + ".log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, TRAIN, *run.words, *options],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C at the terminal must reach them once, from here.
                start_new_session=True,
            )
        self.children.append(Child(run, place, process, commit))
        print(f"{run.name}: started", flush=True)
        if self.stopping:  # a signal came before this run was in the list
            process.send_signal(signal.SIGTERM)

    def collect(self):
        """Take the runs that have ended from the list: write their records, or say what failed."""
        for child in list(self.children):
            if child.process.poll() is None:
                continue
            self.children.remove(child)
            self.free.append(child.place)
            if child.process.returncode == 0 and is_complete(child.run):
                self.finish(child)
            elif not self.stopping:
                self.fail(child.run, f"exit status {child.process.returncode}")

    def finish(self, child):
        """Write the record of a run that is done."""
        run = child.run
        about = {
            "machine": report.machine(),
            "threads": child.place.threads,
            "torch": torch.__version__,
            "commit": child.commit,
        }
        try:
            record = records.make(self.suite, run, about)
        except ConfigError as error:
            self.fail(run, str(error))
            return
        records.write(record, run.record)

        self.ended += 1
        value = records.value_of(record["evaluations"][-1], self.suite.measure)
        took = duration(record["seconds"])
        print(f"{run.name}: {self.suite.measure} {value:.4f}, {took} of training", flush=True)
        if not self.keep:
            shutil.rmtree(run.folder)
            os.remove(run.folder + ".log")

    def fail(self, run, reason):
        """Name a run that failed, with the last lines that it printed."""
        self.failed.append(run.name)
        self.ended += 1
        path = run.folder + ".log"
        with open(path, errors="replace") as f:
            lines = f.read().splitlines()[-LAST_LINES:]
        print(f"{run.name} failed, {reason}; the end of {path}:", file=sys.stderr)
        for line in lines:
            print(f"    {line}", file=sys.stderr, flush=True)

    # ---- progress ----

    def show_if_due(self):
        """Now and then: a line for the suite, and one for each run that is going on."""
        now = time.monotonic()
        if now - self.shown_at < SHOW_SECONDS:
            return
        self.shown_at = now

        done = self.runs_done()
        gained = done - self.done_before
        left = "an unknown time"
        if gained > 0:
            left = "about " + duration((self.count - done) * (now - self.started) / gained)
        print(f"{self.suite.name}: {done:.1f} of {self.count} runs are done, {left} left")
        for child in self.children:
            share = share_done(child.run)
            print(f"    {child.run.name}: {share:.0%}{self.last_value(child.run)}", flush=True)

    def runs_done(self):
        """How many runs are done, parts of runs included."""
        others = [*self.waiting, *(child.run for child in self.children)]
        return self.ended + sum(share_done(run) for run in others)

    def last_value(self, run):
        """The newest evaluation of a run that is going on, as words; "" before the first."""
        values = [records.value_of(row, self.suite.measure) for row in rows_of(run)]
        values = [value for value in values if value is not None]
        return f", {self.suite.measure} {values[-1]:.4f}" if values else ""


# ---- what the folder of a run tells ----


def rows_of(run):
    """The rows of metrics.jsonl of a run; none before it has begun."""
    if not os.path.exists(os.path.join(run.folder, "metrics.jsonl")):
        return []
    return read_metrics(run.folder)


def steps_of(run):
    """(steps done, steps in all) of a run; (0, 1) before its first row."""
    training = [row for row in rows_of(run) if row.get("epoch")]
    if not training:
        return 0, 1
    last = training[-1]
    steps_per_epoch = round(last["step"] / last["epoch"])
    return last["step"], run.config.total_steps(steps_per_epoch)


def share_done(run):
    """The part of a run that is done, 0 to 1."""
    step, total = steps_of(run)
    return step / total


def is_complete(run):
    """Whether a run has come to its end, the last evaluation: a signal may have ended it before."""
    step, total = steps_of(run)
    if step < total:
        return False
    last_rows = [row for row in rows_of(run) if row["step"] == total]
    keys = itertools.chain.from_iterable(last_rows)
    return any(key.startswith("eval/") for key in keys)


def remove_if_changed(run):
    """Remove the folder of a run that was begun with other settings: it could not be continued."""
    path = os.path.join(run.folder, "config.py")
    if not os.path.exists(path):
        return
    try:
        settings = settings_of(configs.load([path]))
    except ConfigError:  # of an older version
        settings = None
    if settings != settings_of(run.config):
        print(f"{run.name}: begun with other settings than the suite has now, so from the start")
        shutil.rmtree(run.folder)
