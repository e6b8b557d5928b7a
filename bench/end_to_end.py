"""Part D of python -m bench gpu: whole runs of train.py on made JPEGs, stopped once and resumed."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from bench import harness, made_data, report
from bench.harness import WorkerError

EPOCHS = 6


def run(args):
    """Rows on a run that is stopped after half of its steps, saved, and resumed to its end.

    Of the reports after the first quarter of each job, when all is compiled and under way.
    """
    settings = dict(
        model=args.model,
        batch=args.batch,
        images=args.images,
        workers=args.workers,
        precision=args.precision,
        **args.numbers,
    )
    with tempfile.TemporaryDirectory() as folder:
        shards = made_data.make_shards(folder, args.size, args.images)
        out_dir = os.path.join(folder, "run")
        steps = EPOCHS * (args.images // args.batch)

        words = words_of(args, shards, out_dir, steps)
        start = time.monotonic()
        train([*words, f"--stop_after={steps // 2}"], args.limit)
        first_rows = metrics(out_dir)
        train([*words, "--resume=auto"], args.limit)
        seconds = time.monotonic() - start
        all_rows = metrics(out_dir)

    last_step = all_rows[-1]["step"]
    settled = without_start(first_rows) + without_start(all_rows[len(first_rows) :])
    speeds = [row["samples_per_second"] for row in settled]
    data_wait = statistics.mean(row["data_wait"] for row in settled)
    save_wait = sum(row["save_wait"] for row in all_rows)
    return [
        report.row("run", "speed", settings, "samples/s", speeds),
        report.row(
            "run",
            "waiting for data",
            settings,
            "of the time",
            [data_wait],
            goal="< 0.05",
            met=data_wait < 0.05,
        ),
        report.row("run", "waiting for saves", settings, "s in all", [save_wait]),
        report.row(
            "run",
            "stopped, resumed, ended",
            settings,
            "steps",
            [last_step],
            seconds=seconds,
            goal=f"{steps} steps, exit status 0 twice",
            met=last_step == steps and len(first_rows) < len(all_rows),
        ),
    ]


def words_of(args, shards, out_dir, steps):
    """The options of train.py."""
    settings = dict(
        args.numbers,
        model=args.model,
        train_data=shards,
        out_dir=out_dir,
        batch_size=args.batch,
        workers=args.workers,
        epochs=EPOCHS,
        device=harness.device_of(args).type,
        precision=args.precision,
        save_steps=max(1, steps // 4),
        log_steps=max(1, steps // 40),
        warmup_steps=100,
    )
    return [f"--{key}={value}" for key, value in settings.items()]


def train(words, limit):
    """train.py as a user runs it. Raises WorkerError with its last words if it fails."""
    result = subprocess.run(
        [sys.executable, os.path.join(report.ROOT, "train.py"), *words],
        capture_output=True,
        text=True,
        timeout=limit,
    )
    if result.returncode:
        printed = (result.stdout + result.stderr).strip()
        last_line = (printed.splitlines() or [""])[-1]
        reason = f"train.py ended with status {result.returncode}: {last_line}"
        raise WorkerError(reason, f"{reason}\n{printed}")


def metrics(out_dir):
    """The reports in the run's metrics.jsonl, without those of evaluations."""
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    return [row for row in rows if "samples_per_second" in row]


def without_start(rows):
    return rows[len(rows) // 4 :]
