"""Watching a run: the progress line, metrics.jsonl, TensorBoard or W&B when asked, and the curves of one or many runs."""

import contextlib
import importlib
import json
import math
import os
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

import config as configs
import dist
import model as models
from runtime.hardware import peak_flops
from runtime.plots import plot

MAX_BAD = 0.01  # of all samples; more bad ones than this, and the data need a look before more is spent on them


class BadRun(RuntimeError):
    """What makes a run end although it could go on. All ranks raise it at the same step."""


class Log:
    """Collects what a step returns without waiting for the device; every `log_steps` it waits once, and reports."""

    def __init__(self, c, order, total_steps, step, model, dtype, device, state=None):
        """step, state: where the run is continued from, and what state() gave then."""
        state = state or {"bad": {}, "window": [], "seen": 0, "skipped": 0}
        self.c, self.order, self.total_steps = c, order, total_steps
        self.skipping = (
            c.skip_nonfinite or dtype == torch.float16
        )  # a float16 scaler finds its scale by skipping
        self.pending, self.bad, self.waited, self.save_wait, self.unwritten = (
            [],
            Counter(),
            0.0,
            0.0,
            b"",
        )
        self.bad_before, self.window, self.seen, self.skipped = (
            state["bad"],
            state["window"],
            state["seen"],
            state["skipped"],
        )
        self.flops, self.peak = models.forward_flops(model, 1), peak_flops(dtype, device)
        self.text_flops = (
            models.forward_flops(model, model.context_length)["text"] / model.context_length
        )
        self.bar = self.file = self.board = self.wandb = None
        if dist.rank() == 0:
            os.makedirs(c.out_dir, exist_ok=True)
            with open(os.path.join(c.out_dir, "config.py"), "w") as f:
                f.write(configs.as_text(c))
            print(
                f"{c.algorithm} ({c.equations}), {c.model}: {models.num_parameters(model)['total'] / 1e6:.1f} M parameters, "
                f"{order.num_samples:,} samples, {order.steps_per_epoch} steps of {c.batch_size} an epoch, {total_steps} in all, "
                f"{dist.world_size()} rank(s) on {device.type}, {str(dtype)[6:]}; from step {step}; {c.out_dir}",
                flush=True,
            )
            drop_rows_after(os.path.join(c.out_dir, "metrics.jsonl"), step)
            self.file = open(os.path.join(c.out_dir, "metrics.jsonl"), "ab", buffering=0)
            self.bar = tqdm(
                total=total_steps,
                initial=step,
                disable=not sys.stderr.isatty(),
                dynamic_ncols=True,
                unit="step",
            )
            if c.tensorboard:
                SummaryWriter = optional("torch.utils.tensorboard", "tensorboard").SummaryWriter
                self.board = SummaryWriter(c.out_dir)
            if c.wandb:
                wandb = optional("wandb", "wandb")
                self.wandb = wandb.init(
                    project=c.wandb, name=os.path.basename(c.out_dir), dir=c.out_dir
                )
        self.start = self.since = self.asked = time.monotonic()
        self.start_step, self.reported, self.printed = step, step, -math.inf

    def data_is_ready(self):
        """Call when a batch has arrived: the time since the end of the last step was spent waiting for it."""
        self.waited += time.monotonic() - self.asked

    def step(self, step, batch, out, grad_norm, grad_finite, gamma, optimizer):
        """Take note of a step, and report if it is time. BadRun as in collect()."""
        for reason, count in batch.bad.items():
            self.bad[reason] += count
        values = torch.stack([x.float() for x in (out.objective, out.mbcl, out.tau, grad_norm)])
        self.pending.append(
            (step, batch.ids, batch.lengths.float().mean().item(), values, out.finite, grad_finite)
        )
        if step % self.c.log_steps == 0 or step == self.total_steps:
            self.report(step, gamma, optimizer)
        self.asked = time.monotonic()

    def collect(self):
        """Wait for the device and look at the steps since the last time, before a report and before a checkpoint. BadRun for a
        non-finite objective or gradient, naming step, ranks and ids, or for too many skipped steps or bad samples."""
        values = (
            torch.stack([row[3] for row in self.pending]).double().cpu().tolist()
            if self.pending
            else []
        )
        for (step, ids, text_length, _, finite, grad_finite), (
            objective,
            mbcl,
            tau,
            grad_norm,
        ) in zip(self.pending, values):
            self.seen += 1
            if math.isfinite(objective) and math.isfinite(grad_norm):
                self.window.append([objective, mbcl, tau, grad_norm, text_length])
                continue
            self.skipped += 1  # the same on all ranks, for all know the same sums
            features, gradients = zip(
                *dist.all_gather_objects(
                    (ids[~finite.cpu()].tolist(), [] if grad_finite else ids.tolist())
                )
            )
            # A feature that is not finite spoils the gradients of all ranks: then those say nothing.
            where = "; ".join(
                f"on rank {r}, sample ids {', '.join(map(str, ids[:8]))}{f' and {len(ids) - 8} more' * (len(ids) > 8)}"
                for r, ids in enumerate(features if any(features) else gradients)
                if ids
            )
            what = f"step {step}: the {'gradient' if math.isfinite(objective) else 'objective'} is not finite: {where or 'only in the sum over all ranks'}"
            if not self.skipping:
                raise BadRun(
                    f"{what}. Checkpoints are from before that step. A lower lr, or fp32, usually helps; "
                    f"--skip_nonfinite=True leaves such steps out"
                )
            if dist.rank() == 0:
                tqdm.write(f"skipped {what}")
        self.pending = []
        bad = Counter(self.bad_before)
        for counts in dist.all_gather_objects(self.bad):
            bad.update(counts)
        for count, of, what in (
            (
                sum(bad.values()),
                self.seen * self.c.batch_size,
                f"samples are bad: {dict(bad)}; look at the data (python -m ingest.index --verify ...)",
            ),
            (self.skipped, self.seen, "steps were not finite; a lower lr, or fp32, usually helps"),
        ):
            if count > max(10, MAX_BAD * of):
                raise BadRun(f"{count} of {of} {what}")
        return dict(bad)

    def state(self):
        """What a checkpoint keeps, so that the rows of a run that was continued are those of one that was not."""
        if self.file:
            with contextlib.suppress(OSError):  # a full disk, or a kind of file that knows no fsync
                os.fsync(self.file.fileno())
        return {
            "bad": self.collect(),
            "window": self.window,
            "seen": self.seen,
            "skipped": self.skipped,
        }

    def report(self, step, gamma, optimizer):
        bad = self.collect()
        now, rows = time.monotonic(), self.window or [[math.nan] * 5]
        steps = step - self.reported
        speed = steps * self.c.batch_size / (now - self.since)
        objective, mbcl, _, grad_norm, text_length = (
            sum(column) / len(rows) for column in zip(*rows)
        )
        flops = (
            3 * (self.flops["image"] + self.text_flops * text_length) * speed / dist.world_size()
        )
        groups = {g["name"]: g["lr"] for g in optimizer.param_groups}
        row = {
            "step": step,
            "epoch": step / self.order.steps_per_epoch,
            "samples": step * self.c.batch_size,
            "objective": objective,
            "mbcl": mbcl,
            "tau": rows[-1][2],
            "grad_norm": grad_norm,
            "gamma": gamma,
            "lr": groups["decay"],
            "lr_tau": groups.get("tau", 0.0),
            "samples_per_second": speed,
            "mfu": flops / self.peak,
            "data_wait": self.waited / (now - self.since),
            "save_wait": self.save_wait,
            "skipped": self.skipped,
            "bad": bad,
        }
        self.window, self.waited, self.save_wait, self.since, self.reported = (
            [],
            0.0,
            0.0,
            now,
            step,
        )
        self.write(row)
        if self.bar is not None:
            done = (step - self.start_step) / (now - self.start)
            line = (
                f"objective {row['objective']:.4f}  mbcl {row['mbcl']:.3f}  tau {row['tau']:.4f}  gamma {gamma:.2f}  lr {row['lr']:.1e}  "
                f"{speed:.0f} samples/s ({speed / dist.world_size():.0f} per rank)  mfu {row['mfu']:.0%}  data wait {row['data_wait']:.0%}"
                + (f"  bad {sum(bad.values())}: {bad}" if bad else "")
                + (f"  skipped {self.skipped}" if self.skipped else "")
            )
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(line)
            if self.bar.disable and (
                now - self.printed > 10 or self.c.log_steps == 1 or step == self.total_steps
            ):
                print(
                    f"step {step}/{self.total_steps}  {line}  {duration((self.total_steps - step) / done)} left",
                    flush=True,
                )
                self.printed = now

    def evaluation(self, step, results):
        self.write({"step": step, **{f"eval/{key}": value for key, value in results.items()}})
        if dist.rank() == 0:
            tqdm.write(
                f"step {step}  " + "  ".join(f"{key} {value:.4g}" for key, value in results.items())
            )

    def has_evaluation(self, step):
        """Is the evaluation after this step in metrics.jsonl? (On rank 0.)"""
        with open(self.file.name) as f:
            return any(
                row["step"] == step and any(key.startswith("eval/") for key in row)
                for row in map(json.loads, f)
            )

    @contextlib.contextmanager
    def pause(self):
        """Inside, time is neither training nor waiting for data."""
        start = time.monotonic()
        yield
        self.asked = time.monotonic()
        self.since += self.asked - start

    def write(self, row):
        if self.file:
            known = {
                k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()
            }  # JSON has no NaN
            self.append(json.dumps(known).encode() + b"\n")
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, row["step"])
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])

    def append(self, line):
        """To metrics.jsonl. A full disk must not end the training: what cannot be written waits for room."""
        self.unwritten += line
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            print(
                f"warning: {self.file.name} cannot be written, {len(self.unwritten)} bytes wait: {error}",
                file=sys.stderr,
                flush=True,
            )

    def left(self, step, reason):
        """The last word of a job that ends before its run does."""
        if dist.rank() == 0:
            self.close()
            print(
                f"stopped after step {step} of {self.total_steps} ({reason}); it is saved: continue with --resume=auto",
                flush=True,
            )

    def finish(self):
        if dist.rank() == 0:
            self.close()
            try:
                curves = "curves: " + plot(
                    [self.c.out_dir], os.path.join(self.c.out_dir, "curves.png")
                )
            except (
                Exception
            ) as error:  # the run is saved: it must not count as failed for want of a picture
                curves = f"the curves could not be drawn: {type(error).__name__}: {error}"
            print(f"done in {duration(time.monotonic() - self.start)}; {curves}", flush=True)

    def close(self):
        self.bar.close()
        self.append(b"")
        self.file.close()
        if self.board:
            self.board.close()


def optional(module, package):
    """Import what only some runs need; ConfigError with the remedy if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise configs.ConfigError(
            f"--{package} needs the package {package}: pip install {package} ({error})"
        ) from error


def drop_rows_after(path, step):
    """A run that is continued from `step` repeats the steps after it: their old rows go."""

    def keep(line):
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):  # what a crash has left
            return False

    if os.path.exists(path):
        with open(path, errors="replace") as f:
            rows = [line for line in f if keep(line)]
        with open(path + ".partial", "w") as f:
            f.writelines(rows)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".partial", path)


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
