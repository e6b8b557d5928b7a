"""What a run shows: the progress line, metrics.jsonl, and TensorBoard or W&B when asked."""

import contextlib
import importlib
import json
import math
import os
import shlex
import sys
import time
from collections import Counter, deque
from typing import NamedTuple

import torch
from tqdm import tqdm

import config as configs
import dist
from config import MAX_BAD, BadRun
from runtime import results
from runtime.hardware import HostCopy, peak_flops
from runtime.plots import plot

PRINT_SECONDS = 10  # between two lines of progress, where there is no terminal

# From this share of its chance level ln(B) on, the in-batch loss says that nothing is learned. Runs
# with a learning rate far too high lie at 1.000 to 1.012 of it, the emoji runs at 0.76 at the end
# of their warm-up. With a large batch, too, little is asked of the model: the similarity of a
# positive must exceed that of the negatives by 0.01 ln(B) TAU_REFERENCE, 0.008 for B = 65,536.
CHANCE_SHARE = 0.99
LOOK_AFTER = 1000  # steps after the warm-up, or half of those left then, if that is less
LOOK_AT = 10  # the mean of the last so many reports

LOOK_LEAST = 20  # runs with fewer steps after the warm-up are not judged
NOT_LEARNING = (
    "the model tells no caption from another. Try a lower lr, a longer warm-up (warmup_steps), "
    "grad_clip, or look whether the captions belong to the images (docs/running.md)"
)


class Step(NamedTuple):
    """What is kept of a step until the device has computed it."""

    step: int
    ids: torch.Tensor  # (b,) this rank's samples
    text_length: float  # mean tokens of its captions
    values: torch.Tensor  # (4,) objective, mbcl, tau, grad_norm, on the device
    features_finite: torch.Tensor  # (b,) bool
    gradient_finite: torch.Tensor  # () bool, of this rank's own gradient


class Report(NamedTuple):
    """A row of metrics.jsonl as far as the host knows it when it is due."""

    step: int
    at: float  # by time.monotonic()
    speed: float  # samples/s since the report before
    data_wait: float  # share of the time since then
    save_wait: float  # seconds
    lr: dict  # {group of parameters: its learning rate}
    bad: Counter  # bad samples of this rank and job until then, by reason
    steps: list  # the Steps since the report before
    values: HostCopy  # (n, 4), of these steps
    gamma: HostCopy  # ()


class Log:
    """Collects what steps return, without waiting for the device; reports every `log_steps`.

    A row of metrics is written one report later. By then the device has computed its values, and a
    vote has told whether any rank had bad samples, so that training waits neither for the device
    nor for other ranks. Only a save and an evaluation complete all rows at once.

    save_wait: seconds since the last report in which training waited for a checkpoint's copy.
    num_bad: bad samples of all ranks in this job, as the last vote told.
    """

    def __init__(self, t, num_samples, step, state=None):
        """t: train.Trainer. step, state: where the run continues, and what state() gave there."""
        c = t.config
        self.t = t
        self.config = c

        # What the run remembers over its jobs.
        state = state or {"bad": {}, "window": [], "seen": 0, "skipped": 0}
        self.bad_before = state["bad"]
        self.window = state["window"]  # rows since the last report, five numbers each
        self.seen = state["seen"]  # steps
        self.skipped = state["skipped"]

        # What has come in since the last report.
        self.pending = []  # Steps
        self.gamma = 1.0
        self.data_wait = 0.0  # seconds
        self.save_wait = 0.0

        self.reports = deque()  # Reports whose rows are not written yet
        self.bad = Counter()  # samples of this rank and job, by reason
        self.bad_of_all = Counter()  # samples of all ranks in this job, as last gathered
        self.num_bad = 0

        # mbcl of the last reports, once it should be below chance.
        steps_after_warmup = max(0, t.total_steps - c.warmup_steps)
        self.look_from = c.warmup_steps + min(steps_after_warmup // 2, LOOK_AFTER)
        if steps_after_warmup < LOOK_LEAST:
            self.look_from = math.inf
        self.recent_mbcl = deque(maxlen=LOOK_AT)
        self.has_warned = False

        self.flops = t.flops()
        self.peak_flops = peak_flops(t.dtype, t.device)
        self.bar = None
        self.file = None
        self.board = None
        self.wandb = None
        if dist.rank() == 0:
            self.open(num_samples, step)

        self.start = time.monotonic()
        self.start_step = step
        self.reported_at = self.start
        self.reported_step = step
        self.printed_at = -math.inf
        self.step_ended_at = self.start

    def open(self, num_samples, step):
        """On rank 0: the resolved config, metrics.jsonl, the progress bar; TensorBoard, W&B."""
        c = self.config
        t = self.t
        with configs.writing_to(c.out_dir):
            os.makedirs(c.out_dir, exist_ok=True)
            write_config(c, step)
            self.file = MetricsFile(os.path.join(c.out_dir, "metrics.jsonl"), step)

        parameters = sum(p.numel() for p in t.model.parameters())
        print(
            f"{c.algorithm} ({c.equations}), {c.model}: {parameters / 1e6:.1f} M parameters, "
            f"{num_samples:,} samples, {t.steps_per_epoch} steps of {c.batch_size} an epoch, "
            f"{t.total_steps} in all, {dist.world_size()} rank(s) on {t.device.type}, "
            f"{str(t.dtype)[6:]}; from step {step}; {c.out_dir}",
            flush=True,
        )

        warning = c.long_warmup(t.total_steps)
        if warning and step < c.warmup_steps:
            print(f"warning: {warning}", file=sys.stderr, flush=True)

        self.bar = tqdm(
            total=t.total_steps,
            initial=step,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            unit="step",
        )
        if c.tensorboard:
            tensorboard = import_optional("torch.utils.tensorboard", "tensorboard")
            self.board = tensorboard.SummaryWriter(c.out_dir)
        if c.wandb:
            wandb = import_optional("wandb", "wandb")
            name = os.path.basename(c.out_dir)
            self.wandb = wandb.init(project=c.wandb, name=name, dir=c.out_dir)

    # ---- a step ----

    def data_is_ready(self):
        """A batch has arrived: the time since the end of the last step was spent waiting for it."""
        self.data_wait += time.monotonic() - self.step_ended_at

    def step(self, step, batch, out, grad_norm):
        """Note what a step returned, and report if it is time. Raises BadRun as look_at() does.

        step: steps done. batch: data.Batch. out: LossOutput. grad_norm: ().
        """
        self.bad.update(batch.bad)
        self.gamma = out.gamma
        values = torch.stack([x.float() for x in (out.objective, out.mbcl, out.tau, grad_norm)])
        self.pending.append(
            Step(
                step=step,
                ids=batch.ids,
                text_length=batch.lengths.float().mean().item(),
                values=values,
                features_finite=out.finite,
                gradient_finite=self.t.reducer.finite,
            )
        )
        if step % self.config.log_steps == 0 or step == self.t.total_steps:
            self.report(step)
        self.step_ended_at = time.monotonic()

    @contextlib.contextmanager
    def pause(self):
        """Inside, time is neither training nor waiting for data."""
        start = time.monotonic()
        yield
        self.step_ended_at = time.monotonic()
        self.reported_at += self.step_ended_at - start

    # ---- looking at the steps since the last time ----

    def look_at(self, steps, values):
        """Look at Steps and their values, a HostCopy (n, 4).

        Raises BadRun for an objective or a gradient that is not finite, naming step, ranks and
        sample ids.
        """
        for row, (objective, mbcl, tau, grad_norm) in zip(steps, values.read().tolist()):
            self.seen += 1
            if math.isfinite(objective) and math.isfinite(grad_norm):
                self.window.append([objective, mbcl, tau, grad_norm, row.text_length])
            else:
                self.note_nonfinite(row, objective)

    def gather_bad(self, of_this_rank):
        """-> {reason: bad samples of all ranks and jobs}. of_this_rank: Counter, of this job.

        Raises BadRun for too many bad samples or skipped steps.
        """
        self.bad_of_all = Counter()
        for counts in dist.all_gather_objects(of_this_rank):
            self.bad_of_all.update(counts)
        return self.checked_bad()

    def checked_bad(self):
        """-> {reason: bad samples of all ranks and jobs}, as last gathered. Raises BadRun."""
        bad = Counter(self.bad_before)
        bad.update(self.bad_of_all)
        self.check_limits(bad)
        return dict(bad)

    def note_nonfinite(self, row, objective):
        """Count a step that was skipped and say where it came from; BadRun if none may be skipped.

        All ranks are here together, because all know the same objective and gradient norm.
        """
        self.skipped += 1
        bad_features = row.ids[~row.features_finite.cpu()].tolist()
        bad_gradient = [] if row.gradient_finite else row.ids.tolist()
        ranks = dist.all_gather_objects((bad_features, bad_gradient))

        # A feature that is not finite spoils the gradients of all ranks: then those say nothing.
        ids_by_rank = [features for features, _ in ranks]
        if not any(ids_by_rank):
            ids_by_rank = [gradients for _, gradients in ranks]
        places = [describe_ids(r, ids) for r, ids in enumerate(ids_by_rank) if ids]
        where = "; ".join(places) or "only in the sum over all ranks"
        kind = "gradient" if math.isfinite(objective) else "objective"
        what = f"step {row.step}: the {kind} is not finite: {where}"

        if not self.t.may_skip:
            raise BadRun(
                f"{what}. Checkpoints are from before that step. A lower lr, or fp32, usually "
                "helps; --skip_nonfinite=True leaves such steps out"
            )
        if dist.rank() == 0:
            tqdm.write(f"skipped {what}")

    def check_limits(self, bad):
        """BadRun if more than MAX_BAD (and more than ten) of the samples or steps are unusable."""
        samples = self.seen * self.config.batch_size
        num_bad = sum(bad.values())
        if num_bad > max(10, MAX_BAD * samples):
            raise BadRun(
                f"{num_bad} of {samples} samples are bad: {dict(bad)}; more than {MAX_BAD:.0%} end "
                f"a run, look at the data: {verify_command(self.config)}"
            )
        if self.skipped > max(10, MAX_BAD * self.seen):
            raise BadRun(
                f"{self.skipped} of {self.seen} steps were not finite; a lower lr, or fp32, "
                "usually helps"
            )

    def state(self):
        """What a checkpoint keeps, so that a continued run writes the rows of one never stopped.

        Waits for the device. Raises BadRun, so that nothing is saved of a run that must not go on.
        """
        self.complete_reports()
        if self.pending:
            self.look_at(self.pending, self.copy_of_values())
            self.pending = []
        bad = self.gather_bad(self.bad)

        if self.file:
            self.file.flush()
        return {
            "bad": bad,
            "window": self.window,
            "seen": self.seen,
            "skipped": self.skipped,
        }

    # ---- reports ----

    def report(self, step):
        """Note what is known of a row of metrics, and write those that can be completed."""
        now = time.monotonic()
        seconds = now - self.reported_at
        report = Report(
            step=step,
            at=now,
            speed=(step - self.reported_step) * self.config.batch_size / seconds,
            data_wait=self.data_wait / seconds,
            save_wait=self.save_wait,
            lr={group["name"]: group["lr"] for group in self.t.optimizer.param_groups},
            bad=Counter(self.bad),
            steps=self.pending,
            values=self.copy_of_values(),
            gamma=HostCopy(torch.as_tensor(self.gamma, dtype=torch.float64)),
        )
        self.reports.append(report)
        self.pending = []
        self.data_wait = 0.0
        self.save_wait = 0.0
        self.reported_at = now
        self.reported_step = step

        # The vote asked after a step is answered in the next one: num_bad counts until step - 2.
        while self.reports[0].step <= step - 2:
            report = self.reports.popleft()
            has_new_bad = self.num_bad != sum(self.bad_of_all.values())
            self.complete(report, gather=has_new_bad)

    def copy_of_values(self):
        """The values of the pending steps -> HostCopy (n, 4)."""
        return HostCopy(torch.stack([row.values for row in self.pending]))

    def complete_reports(self):
        """Write all rows of metrics that wait. Waits for the device and for the other ranks."""
        while self.reports:
            self.complete(self.reports.popleft(), gather=True)

    def complete(self, report, gather):
        """Write a report's row; move the progress line. gather: whether there are new bad samples.

        All ranks call it at the same step.
        """
        self.look_at(report.steps, report.values)
        bad = self.gather_bad(report.bad) if gather else self.checked_bad()
        row = self.metrics(report, bad)
        self.window = []
        self.write(row)
        if dist.rank() == 0:
            self.show(row, report.at)
            self.look_at_mbcl(row)

    def metrics(self, report, bad):
        """A row of metrics.jsonl: means over the window, present values of what is scheduled."""
        # Without a finite step since the last report, the means are not a number.
        rows = self.window or [[math.nan] * 5]
        columns = list(zip(*rows))
        objective, mbcl, _, grad_norm, text_length = (sum(x) / len(rows) for x in columns)
        tau = columns[2][-1]

        # A backward pass counts as two forward passes.
        pair_flops = 3 * (self.flops["image"] + self.flops["token"] * text_length)
        mfu = pair_flops * report.speed / dist.world_size() / self.peak_flops
        return {
            "step": report.step,
            "epoch": report.step / self.t.steps_per_epoch,
            "samples": report.step * self.config.batch_size,
            "objective": objective,
            "mbcl": mbcl,
            "tau": tau,
            "grad_norm": grad_norm,
            "gamma": report.gamma.read().item(),
            "lr": report.lr["decay"],
            "lr_tau": report.lr.get("tau", 0.0),
            "samples_per_second": report.speed,
            "mfu": mfu,
            "data_wait": report.data_wait,
            "save_wait": report.save_wait,
            "skipped": self.skipped,
            "bad": bad,
        }

    def show(self, row, at):
        """The progress line: on a terminal in place, elsewhere a printed line now and then.

        at: when the row was due.
        """
        step = row["step"]
        line = progress_line(row, self.chance())
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(line)

        now = time.monotonic()
        is_last = step == self.t.total_steps
        is_time = now - self.printed_at > PRINT_SECONDS or self.config.log_steps == 1
        if self.bar.disable and (is_time or is_last):
            steps_per_second = (step - self.start_step) / (at - self.start)
            left = duration((self.t.total_steps - step) / steps_per_second)
            print(f"step {step}/{self.t.total_steps}  {line}  {left} left", flush=True)
            self.printed_at = now

    def chance(self):
        """The in-batch loss of features that know nothing: all captions are equally probable."""
        return math.log(self.config.batch_size)

    def look_at_mbcl(self, row):
        """Warn once, some time after the warm-up, if the in-batch loss is still at chance."""
        if row["step"] < self.look_from:
            return
        self.recent_mbcl.append(row["mbcl"])
        warning = self.not_learning()
        if warning and not self.has_warned:
            self.has_warned = True
            tqdm.write(f"warning: step {row['step']}: {warning}: {NOT_LEARNING}", file=sys.stderr)

    def not_learning(self):
        """-> a sentence if the in-batch loss of the last reports is at chance, otherwise ""."""
        if not self.recent_mbcl:
            return ""
        mbcl = sum(self.recent_mbcl) / len(self.recent_mbcl)
        if not mbcl >= CHANCE_SHARE * self.chance():  # it may be nan
            return ""
        return f"mbcl {mbcl:.3f} is at chance ({self.chance():.3f})"

    def evaluation(self, step, found):
        """Note the results of sets, a list of dicts as in runtime/results.py. All ranks call it."""
        self.complete_reports()  # their rows come first
        measures = results.measures(found, isinstance(self.config.eval_data, dict))
        row = {"step": step}
        for key, value in measures.items():
            row[f"eval/{key}"] = value
        self.write(row)
        if dist.rank() == 0:
            for line in evaluation_lines(measures):
                tqdm.write(f"step {step}  {line}")
            for line in results.note_lines(found):
                tqdm.write(line)

    def has_evaluation(self, step):
        """On rank 0: whether the evaluation after this step is in metrics.jsonl."""
        for row in self.file.read():
            if row["step"] == step and any(key.startswith("eval/") for key in row):
                return True
        return False

    def write(self, row):
        """A row to metrics.jsonl, and its numbers to TensorBoard and W&B."""
        if self.file:
            self.file.append(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        if self.board:
            for key, value in numbers.items():
                self.board.add_scalar(key, value, row["step"])
        if self.wandb:
            self.wandb.log(numbers, step=row["step"])

    # ---- the end ----

    def left(self, step, reason):
        """The last word of a job that ends before its run does."""
        if dist.rank() == 0:
            self.close()
            self.say_last(
                f"stopped after step {step} of {self.t.total_steps} ({reason}); it is saved: "
                "continue with --resume=auto"
            )

    def finish(self):
        """The last word of a run, with its curves."""
        if dist.rank() > 0:
            return
        self.close()
        try:
            path = os.path.join(self.config.out_dir, "curves.png")
            curves = "curves: " + plot([self.config.out_dir], path)
        except Exception as error:
            # The run is saved: it must not count as failed for want of a picture.
            curves = f"the curves could not be drawn: {type(error).__name__}: {error}"

        total = self.t.total_steps
        took = f"done in {duration(time.monotonic() - self.start)}"
        if self.start_step == total:
            took = f"already at step {total} of {total}: nothing was left to train"
        self.say_last(f"{took}; {curves}")

    def say_last(self, text):
        """Print the last words of this job. That nothing is learned belongs to them."""
        warning = self.not_learning()
        if warning:
            text += f". But {warning}: nothing was learned, see the warning above"
        print(text, flush=True)

    def close(self):
        self.bar.close()
        self.file.close()
        if self.board:
            self.board.close()


def write_config(config, step):
    """Write the resolved config to the run's folder.

    Another one that is there, with which the run came to this step, is kept beside it.
    """
    path = os.path.join(config.out_dir, "config.py")
    old_path = os.path.join(config.out_dir, f"config-until-step-{step}.py")
    text = configs.as_text(config)
    if step > 0 and os.path.exists(path) and not os.path.exists(old_path):
        with open(path) as f:
            differs = settings_of_run(f.read()) != settings_of_run(text)
        if differs:
            os.rename(path, old_path)

    with open(path, "w") as f:
        f.write(text)


def settings_of_run(text):
    """The lines of a resolved config, without those that may differ from job to job."""
    lines = text.splitlines()
    return [line for line in lines if line.partition(" = ")[0] not in configs.JOB_KEYS]


def evaluation_lines(results):
    """{measure, or NAME/measure: value} -> lines, one for each set."""
    shown = {}  # by set
    for key, value in results.items():
        name, _, measure = key.rpartition("/")
        shown.setdefault(name, []).append(f"{measure} {value:.4g}")
    lines = []
    for name, measures in shown.items():
        start = f"{name}: " if name else ""
        lines.append(start + "  ".join(measures))
    return lines


class MetricsFile:
    """metrics.jsonl: one JSON object per line. A full disk must not end the training: rows wait."""

    def __init__(self, path, step):
        """Rows after `step` are dropped: a run that continues from there repeats those steps."""
        self.path = path
        self.unwritten = b""
        drop_rows_after(path, step)
        self.file = open(path, "ab", buffering=0)

    def append(self, row):
        """Write {key: value}; NaN becomes null, as JSON has none. What finds no room waits."""
        known = {}
        for key, value in row.items():
            is_nan = isinstance(value, float) and math.isnan(value)
            known[key] = None if is_nan else value
        self.unwritten += json.dumps(known).encode() + b"\n"
        self.write_waiting()

    def write_waiting(self):
        try:
            while self.unwritten:
                written = self.file.write(self.unwritten)
                self.unwritten = self.unwritten[written:]
        except OSError as error:
            print(
                f"warning: {self.path} cannot be written, {len(self.unwritten)} bytes wait: "
                f"{error}",
                file=sys.stderr,
                flush=True,
            )

    def flush(self):
        """Down to the disk, unless it is full or the file is of a kind that knows no fsync."""
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())

    def read(self):
        """Yield the rows that are in the file."""
        with open(self.path) as f:
            for line in f:
                yield json.loads(line)

    def close(self):
        self.write_waiting()
        self.file.close()


def drop_rows_after(path, step):
    """Rewrite a metrics file without the rows after `step`, and without what a crash has left."""
    if not os.path.exists(path):
        return
    with open(path, errors="replace") as f:
        rows = [line for line in f if is_row_until(line, step)]
    with open(path + ".partial", "w") as f:
        f.writelines(rows)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".partial", path)


def is_row_until(line, step):
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def progress_line(row, chance):
    """A row of metrics -> the words of the progress line. chance: mbcl when nothing is learned."""
    speed = row["samples_per_second"]
    parts = [
        f"objective {row['objective']:.4f}",
        f"mbcl {row['mbcl']:.3f} (chance {chance:.3f})",
        f"tau {row['tau']:.4f}",
        f"gamma {row['gamma']:.4g}",
        f"lr {row['lr']:.1e}",
        f"{speed:.0f} samples/s ({speed / dist.world_size():.0f} per rank)",
        f"mfu {row['mfu']:.0%}",
        f"data wait {row['data_wait']:.0%}",
    ]
    if row["bad"]:
        parts.append(f"bad {sum(row['bad'].values())}: {row['bad']}")
    if row["skipped"]:
        parts.append(f"skipped {row['skipped']}")
    return "  ".join(parts)


def describe_ids(rank, ids):
    """ "on rank 1, sample ids 3, 8, ..." for a message."""
    shown = ", ".join(map(str, ids[:8]))
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return f"on rank {rank}, sample ids {shown}{more}"


def duration(seconds):
    """Seconds -> "2 h 05 min" or "3 min 20 s"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s"


def verify_command(config):
    """The command line that looks at every sample of the training data."""
    words = ["python", "-m", "ingest.index", "--verify", *config.train_data]
    if config.caption_key:
        words += ["--caption_key", config.caption_key]
    return shlex.join(words)


def check_packages(config):
    """ConfigError if the config asks for a logger that is not installed. Here it costs nothing."""
    if config.tensorboard:
        import_optional("torch.utils.tensorboard", "tensorboard")
    if config.wandb:
        import_optional("wandb", "wandb")


def import_optional(module, package):
    """Import what only some runs need; ConfigError with the remedy if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise configs.ConfigError(
            f"--{package} needs the package {package}: pip install {package} ({error})"
        ) from error
