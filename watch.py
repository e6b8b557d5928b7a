"""Watching a run: the progress line, metrics.jsonl, TensorBoard or W&B when asked, and the curves of one or many runs.

    python watch.py runs/emoji_v3 runs/emoji_openclip --out=curves.png
"""

import argparse
import importlib
import json
import math
import os
import sys
import time

import torch
from tqdm import tqdm

import config as configs
import dist
import loss
import model as models

NOISY = ("objective", "mbcl", "samples_per_second")
MOST_BAD = 0.01          # of all samples; more bad ones than this, and the data need a look before more is spent on them


class Log:
    """Collects what a step returns without waiting for the device; every `log_steps` it waits once, and reports."""

    def __init__(self, c, order, total_steps, step, model, dtype, device):
        self.c, self.order, self.total_steps = c, order, total_steps
        self.pending, self.bad, self.waited, self.seen = [], {}, 0.0, 0
        self.flops, self.peak = models.forward_flops(model, 1), peak_flops(dtype, device)
        self.text_flops = models.forward_flops(model, model.context_length)["text"] / model.context_length
        self.bar = self.file = self.board = self.wandb = None
        if dist.rank() == 0:
            os.makedirs(c.out_dir, exist_ok=True)
            with open(os.path.join(c.out_dir, "config.py"), "w") as f:
                f.write(configs.as_text(c))
            print(f"{c.algorithm} ({c.equations}), {c.model}: {models.num_parameters(model)['total'] / 1e6:.1f} M parameters, "
                  f"{order.num_samples:,} samples, {order.steps_per_epoch} steps of {c.batch_size} an epoch, {total_steps} in all, "
                  f"{dist.world_size()} rank(s) on {device.type}, {str(dtype)[6:]}; from step {step}; {c.out_dir}", flush=True)
            drop_rows_after(os.path.join(c.out_dir, "metrics.jsonl"), step)
            self.file = open(os.path.join(c.out_dir, "metrics.jsonl"), "a", buffering=1)
            self.bar = tqdm(total=total_steps, initial=step, disable=not sys.stderr.isatty(), dynamic_ncols=True, unit="step")
            if c.tensorboard:
                SummaryWriter = optional("torch.utils.tensorboard", "tensorboard").SummaryWriter
                self.board = SummaryWriter(c.out_dir)
            if c.wandb:
                wandb = optional("wandb", "wandb")
                self.wandb = wandb.init(project=c.wandb, name=os.path.basename(c.out_dir), dir=c.out_dir)
        self.start = self.since = self.asked = time.monotonic()
        self.start_step, self.printed = step, -math.inf

    def data_is_ready(self):
        """Call when a batch has arrived: the time since the end of the last step was spent waiting for it."""
        self.waited += time.monotonic() - self.asked

    def step(self, step, batch, out, gamma, optimizer, flush):
        """Take note of a step; report if it is time, or if `flush`. RuntimeError for a non-finite objective or bad data."""
        for reason, count in batch.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count
        self.pending.append((step, batch.ids, batch.lengths.float().mean().item(), torch.stack([out.objective.float(), out.mbcl.float(), out.tau.float()])))
        if flush or step % self.c.log_steps == 0 or step == self.total_steps:
            self.report(gamma, optimizer)
        self.asked = time.monotonic()

    def report(self, gamma, optimizer):
        values = torch.stack([row[3] for row in self.pending]).double().cpu()         # the only wait for the device
        for (step, ids, _, _), (objective, _, _) in zip(self.pending, values.tolist()):
            if not math.isfinite(objective):
                raise RuntimeError(f"the objective at step {step} is {objective}; sample ids of rank {dist.rank()}: {ids.tolist()}. "
                                   f"The last checkpoint is from before that step. A lower lr, or fp32, usually helps")
        now, steps, step = time.monotonic(), len(self.pending), self.pending[-1][0]
        speed = steps * self.c.batch_size / (now - self.since)
        text_length = sum(row[2] for row in self.pending) / steps
        flops = 3 * (self.flops["image"] + self.text_flops * text_length) * speed / dist.world_size()
        self.seen += steps * self.c.batch_size
        bad = {}
        for counts in dist.all_gather_objects(self.bad):
            for reason, count in counts.items():
                bad[reason] = bad.get(reason, 0) + count
        if sum(bad.values()) > max(10, MOST_BAD * self.seen):
            raise RuntimeError(f"{sum(bad.values())} of {self.seen} samples are bad: {bad}; look at the data (python data.py index --verify ...)")
        groups = {g["name"]: g["lr"] for g in optimizer.param_groups}
        row = {"step": step, "epoch": step / self.order.steps_per_epoch, "samples": step * self.c.batch_size,
               "objective": values[:, 0].mean().item(), "mbcl": values[:, 1].mean().item(), "tau": values[-1, 2].item(), "gamma": gamma,
               "lr": groups["decay"], "lr_tau": groups.get("tau", 0.0), "samples_per_second": speed, "mfu": flops / self.peak,
               "data_wait": self.waited / (now - self.since), "bad": bad}
        self.pending, self.waited, self.since = [], 0.0, now
        self.write(row)
        if self.bar is not None:
            done = (step - self.start_step) / (now - self.start)
            line = (f"objective {row['objective']:.4f}  mbcl {row['mbcl']:.3f}  tau {row['tau']:.4f}  gamma {gamma:.2f}  lr {row['lr']:.1e}  "
                    f"{speed:.0f} samples/s ({speed / dist.world_size():.0f} per rank)  mfu {row['mfu']:.0%}  data wait {row['data_wait']:.0%}"
                    + (f"  bad {sum(bad.values())}" if bad else ""))
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(line)
            if self.bar.disable and (now - self.printed > 10 or self.c.log_steps == 1 or step == self.total_steps):
                print(f"step {step}/{self.total_steps}  {line}  {duration((self.total_steps - step) / done)} left", flush=True)
                self.printed = now

    def evaluation(self, step, results):
        self.write({"step": step, **{f"eval/{key}": value for key, value in results.items()}})
        if dist.rank() == 0:
            tqdm.write(f"step {step}  " + "  ".join(f"{key} {value:.4g}" for key, value in results.items()))
        self.restart_clock()

    def restart_clock(self):
        """What was done since the last report, saving or evaluating, is neither training nor waiting for data."""
        self.asked = self.since = time.monotonic()

    def write(self, row):
        if self.file:
            self.file.write(json.dumps(row) + "\n")
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, row["step"])
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])

    def finish(self):
        if dist.rank() == 0:
            self.bar.close()
            self.file.close()
            if self.board:
                self.board.close()
            path = plot([self.c.out_dir], os.path.join(self.c.out_dir, "curves.png"))
            print(f"done in {duration(time.monotonic() - self.start)}; curves: {path}", flush=True)


def optional(module, package):
    """Import what only some runs need; ConfigError with the remedy if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise configs.ConfigError(f"--{package} needs the package {package}: pip install {package} ({error})") from error


def drop_rows_after(path, step):
    """A run that is continued from `step` repeats the steps after it: their old rows go."""
    if os.path.exists(path):
        rows = [line for line in open(path) if line.endswith("\n") and json.loads(line)["step"] <= step]
        with open(path + ".partial", "w") as f:
            f.writelines(rows)
        os.replace(path + ".partial", path)


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def peak_flops(dtype, device):
    """Matrix-multiply rate measured here, FLOP/s: what MFU is a share of."""
    n = 8192 if device.type == "cuda" else 768
    a = torch.randn(n, n, dtype=dtype, device=device)
    best = math.inf
    for _ in range(5):
        synchronize(device)
        start = time.monotonic()
        a @ a
        synchronize(device)
        best = min(best, time.monotonic() - start)
    return 2 * n ** 3 / best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plot(folders, out):
    """Curves of the runs in `folders` -> one picture at `out` (its path is returned): evaluation, objective, MBCL, tau, gamma, speed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs = {}
    for folder in folders:
        with open(os.path.join(folder, "metrics.jsonl")) as f:
            runs[os.path.basename(os.path.normpath(folder))] = [json.loads(line) for line in f]
    evals = sorted({key for rows in runs.values() for row in rows for key in row if key.startswith("eval/")})
    panels = [("eval/zeroshot_top1" if "eval/zeroshot_top1" in evals else evals[0], "unseen data")] if evals else []
    panels += [("objective", "the algorithm's own objective"), ("mbcl", f"in-batch contrastive loss at tau = {loss.TAU_REFERENCE}"),
               ("tau", "temperature"), ("gamma", "inner learning rate gamma"), ("lr", "learning rate")]
    panels += [("samples_per_second", "speed")][:6 - len(panels)]
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (key, title) in zip(axes.flat, panels):
        for name, rows in runs.items():
            x, y = zip(*([(row["step"], row[key]) for row in rows if key in row] or [((), ())]))
            if key in NOISY and len(x) > 50:     # a faint line of what was measured, a firm one of its running mean
                line, = axis.plot(x, y, alpha=0.25)
                width = len(x) // 50
                parts = [y[max(0, i - width):i + width + 1] for i in range(len(y))]
                axis.plot(x, [sum(part) / len(part) for part in parts], color=line.get_color(), label=name)
            else:
                axis.plot(x, y, marker="o" if key.startswith("eval/") else None, label=name)
        if key.startswith("eval/"):
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="step", ylabel=key.removeprefix("eval/"))
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Curves of one or many runs.")
    parser.add_argument("runs", nargs="+", help="run folders, each with a metrics.jsonl")
    parser.add_argument("--out", default="curves.png")
    arguments = parser.parse_args()
    missing = [run for run in arguments.runs if not os.path.exists(os.path.join(run, "metrics.jsonl"))]
    if missing:
        sys.exit(f"error: no metrics.jsonl in {', '.join(missing)}")
    print(plot(arguments.runs, arguments.out))
