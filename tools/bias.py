"""How far from the truth the estimates of g are: g of a batch, and its moving average u.

    python -m tools.bias runs/emoji_v3      measure the checkpoints of a run, or one checkpoint
    python -m tools.bias --experiment       make the runs of experiments/measured/bias.py, and
                                            measure and record those that have no record yet
    python -m tools.bias --report           its table and its picture, from the records

The loss has log(eps + g_i), where g_i is a mean over the whole data set (see loss.py). So in the
gradient, anchor i has the weight 1 / (eps + g_i). A batch gives an unbiased estimate of g_i, but
the weight made of it is biased: most batches lack the few negatives that make up most of g_i, so
most estimates of g_i are too small, and their weights too large. FastCLIP takes u_i instead, an
average over the visits of sample i. That varies less, but a part of it is old: since the earlier
visits the model has moved on, and g_i with it. Which error is larger is measured here.

At a checkpoint, before any step is done, the model encodes the batches of the present epoch just
as training does: with their crops and captions, and with the statistics of the batch in BatchNorm.
The anchors are those of the batches that come next, about 1,000. Of each of them are compared

    true        g over all other samples of the epoch: what estimates are to be near to
    batch       g over the rest of its batch
    u           the moving average with that g in it, which the step would use
    stored u    the moving average before: what remains of earlier visits

The error of an estimate is log(eps + estimate) - log(eps + true), so its factor in the gradient's
weight is exp(-error). An average over crops is compared with g of one crop of the anchor: that
counts against u. Paper and release equations have the same v = eps + u, so the same errors.

OpenCLIP has the positive among the candidates: 1 + (n - 1) g, with g over the other n - 1. That is
(n - 1) (eps + g) with eps = 1 / (n - 1). So it is compared like the others, with this eps of its
batch, and for the truth with that of the whole epoch, whose cross-entropy its loss stands for.

In the middle of an epoch a stored u is 0.5 to 1.5 epochs old, one on average, as in training. At
the end of an epoch it is half an epoch younger. So of the checkpoints of a run, those near the
middle of an epoch are measured, if there are any. It is one process: a BatchNorm that was trained
on several ranks has larger batches here.
"""

import argparse
import dataclasses
import math
import os
import shutil
import signal
import sys

import torch

import config as configs
import data
import dist
import loss as losses
import optim
import train
from bench import report
from config import ConfigError
from eval import find_checkpoint, is_run
from ingest.index import load_index
from runtime import checkpoint
from tools import bias_page, records
from tools.compare import RESULTS, ROOT
from tools.runner import is_complete
from tools.suites import read_suite

SUITE = os.path.join(ROOT, "experiments", "measured", "bias.py")

NUM_ANCHORS = 1024
CHUNK = 64  # anchors that are compared with all candidates at a time
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
EXCLUDED = -1e30  # an exponent that does not count: exp() makes it 0, and 0 times it is 0


# ---- contrast ----


def contrast(anchors, candidates, rows, tau, size):
    """Contrast anchors with the other candidates of their group -> (log g, mean exponent).

    Groups are `size` consecutive candidates: the batch size gives g of a batch, the number of all
    candidates the true g.

    anchors: float (M, d), features of one side. candidates: float (M, d), of the other side, the
    positive of each anchor in the same row. rows: int64 (n,), which anchors; chunks of them must
    not reach over the end of a group, so the first of them begins a batch. tau: float (n,).

    log g: float64 (n,). Mean exponent: float64 (n,), of x_ij = (s_ij - s_ii) / tau_i over the
    negatives, with weights proportional to exp(x_ij).
    """
    # A divisor of the size, so that all anchors of a chunk are of one group.
    chunk = math.gcd(size, CHUNK)
    log_g = []
    mean_exponents = []
    for chunk_rows, chunk_tau in zip(rows.split(chunk), tau.split(chunk)):
        start = int(chunk_rows[0]) // size * size
        group = candidates[start : start + size]  # (size, d)
        positives = (chunk_rows - start)[:, None]  # (n, 1)

        s = (anchors[chunk_rows] @ group.T).double()  # (n, size)
        x = (s - s.gather(1, positives)) / chunk_tau[:, None].double()
        x.scatter_(1, positives, EXCLUDED)
        log_g.append(x.logsumexp(1) - math.log(size - 1))
        mean_exponents.append((x.softmax(1) * x).sum(1))
    return torch.cat(log_g), torch.cat(mean_exponents)


def log_v(loss, log_g, negatives):
    """log(eps + g), (n,), with the eps of a loss.ContrastiveLoss, see above for OpenCLIP's.

    log_g: (n,), of g or of an estimate of it. negatives: how many there are in a mean g.
    """
    log_eps = -math.log(negatives) if loss.has_positive else loss.log_eps
    return losses.log_add(log_g, log_eps)


# ---- one checkpoint ----


def load(folder):
    """The folder of a checkpoint -> (train.Trainer, data.Order, number of steps done)."""
    c = checkpoint.saved_config(folder)
    c = dataclasses.replace(c, compile=False)

    device = dist.init(c.device, c.timeout)
    index = load_index(c.train_data, c.caption_key, allow_left_out=c.allow_left_out)
    order = data.Order(index, c.batch_size, c.lanes, c.shuffle_block, c.seed)
    steps = order.steps_per_epoch
    t = train.build(c, index.num_samples, steps, c.total_steps(steps), device)
    step, _ = checkpoint.load(folder, t.model, t.optimizer, t.loss, t.scaler, c, index.fingerprint)
    return t, order, step


def encode_epoch(t, order, epoch):
    """Encode the batches of an epoch as its steps would -> (ids, e1, e2).

    ids: int64 (M,) on the CPU. e1, e2: float32 (M, d), features of images and of texts. Both are in
    the order of the steps. The weights stay as they are.
    """
    steps = order.steps_per_epoch
    loader = data.Loader(
        order,
        t.model.image_size,
        t.model.context_length,
        crop_scale=t.config.crop_scale,
        caption_key=t.config.caption_key,
        caption_lines=t.config.caption_lines,
        decoder=t.config.decoder,
        workers=t.config.workers,
        device=t.device,
        start_step=epoch * steps,
        num_steps=(epoch + 1) * steps,
    )

    ids = []
    images = []
    texts = []
    for batch in loader:
        ids.append(batch.ids)
        for image, text in train.encode(t, train.micro_batches(batch, t.config.micro_batch)):
            images.append(image.detach().float())
            texts.append(text.detach().float())
    return torch.cat(ids), torch.cat(images), torch.cat(texts)


@torch.no_grad()
def measure(t, order, step):
    """Compare the estimates with the true g of the anchors that come next, after `step` steps.

    t: train.Trainer with the weights and the u of that step. order: data.Order.
    -> {"image": of image anchors, "text": of text anchors}, each as estimates() returns it.
    """
    epoch, step_of_epoch = divmod(step, order.steps_per_epoch)
    ids, e1, e2 = encode_epoch(t, order, epoch)
    first = step_of_epoch * order.batch_size
    rows = torch.arange(first, min(first + NUM_ANCHORS, len(ids)))  # (n,)

    state = t.loss.lookup(ids[rows]).finish()  # {column: (n,)}
    tau1, tau2 = t.loss.temperatures(state, t.model.logit_scale, len(rows))  # (n,)
    gamma = optim.gamma(t.config, step, order.steps_per_epoch, t.total_steps)

    size = order.batch_size
    return {
        "image": estimates(t.loss, e1, e2, rows, tau1, state.get("log_u1"), gamma, size),
        "text": estimates(t.loss, e2, e1, rows, tau2, state.get("log_u2"), gamma, size),
    }


def estimates(loss, anchors, candidates, rows, tau, log_u, gamma, batch_size):
    """What is known of log v of the anchors of one side -> {name: (log v, mean exponent)}.

    loss: loss.ContrastiveLoss. anchors, candidates, rows, tau: as in contrast(). log_u: (n,) before
    this visit, None without state. gamma: weight of the new g in u.

    Names: true, batch and, with state, u and stored u, see above. log v: float64 (n,). Mean
    exponent: float64 (n,), sum_j P_ij (s_ij - s_ii) / tau_i with the weights P of equation (2),
    over the negatives that the step sees, and for "true" over all. Anchors that were never visited
    have no stored u, and are left out.
    """
    M = len(candidates)
    log_g_true, exponent_true = contrast(anchors, candidates, rows, tau, M)
    log_g, exponent = contrast(anchors, candidates, rows, tau, batch_size)

    logs = {"batch": log_v(loss, log_g, batch_size - 1)}
    if log_u is not None:
        new_log_u, _ = loss.average(log_u.double(), log_g, gamma)
        logs["u"] = log_v(loss, new_log_u, batch_size - 1)
        logs["stored u"] = log_v(loss, log_u.double(), batch_size - 1)

    true = log_v(loss, log_g_true, M - 1)
    found = {"true": (true, torch.exp(log_g_true - true) * exponent_true)}
    for name, log in logs.items():
        found[name] = (log, torch.exp(log_g - log) * exponent)
    return found if log_u is None else of_visited(found, log_u > -math.inf)


def of_visited(found, visited):
    """The same {name: (log v, mean exponent)} of visited anchors. visited: bool (n,)."""
    if not visited.any():
        raise ConfigError(
            "none of the next samples has been visited yet: in the first epoch u is g of the "
            "batch; give a later checkpoint"
        )
    return {name: (log[visited], exponent[visited]) for name, (log, exponent) in found.items()}


# ---- statistics ----


def statistics(found):
    """{name: (log v, mean exponent)}, with "true" -> {name: {statistic: number or list}}.

    mean, deviation     of the errors, in natural logarithms
    quantiles           of the errors, at QUANTILES
    weight              mean of exp(-error), the factor in the gradient's weight
    rank_correlation    Spearman's, of estimates with truth
    divergence          mean over anchors of sum_j P_ij (s_ij - s_ii) / tau_i - log v_i, which for
                        the truth is the divergence of P_i from the uniform distribution, if eps is
                        small. v3's temperature is at rest where it is rho.
    """
    true, _ = found["true"]
    result = {}
    for name, (log, exponent) in found.items():
        errors = log - true  # (n,)
        result[name] = {
            "mean": errors.mean().item(),
            "deviation": errors.std().item(),
            "quantiles": errors.quantile(errors.new_tensor(QUANTILES)).tolist(),
            "weight": torch.exp(-errors).mean().item(),
            "rank_correlation": rank_correlation(log, true),
            "divergence": (exponent - log).mean().item(),
        }
    return result


def rank_correlation(x, y):
    """Spearman's correlation of two tensors (n,) without equal values."""
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()])  # (2, n)
    return torch.corrcoef(ranks.double())[0, 1].item()


def row_of(t, order, step, measured):
    """What is kept of a checkpoint. measured: of measure()."""
    row = {
        "step": step,
        "epoch": step / order.steps_per_epoch,
        "gamma": optim.gamma(t.config, step, order.steps_per_epoch, t.total_steps),
        "anchors": len(measured["image"]["true"][0]),
    }
    for side, found in measured.items():
        row[side] = statistics(found)
    return row


def points_of(measured):
    """{estimate: log v of the image anchors, list} of measure(), for the picture."""
    points = {}
    for name, (log, _) in measured["image"].items():
        points[name] = [round(x, 3) for x in log.tolist()]
    return points


# ---- runs ----


def checkpoints_of(path):
    """The folders of the checkpoints to be measured, oldest first; of a run, or the one itself.

    A checkpoint of the first epoch is left out, because there u is g of the batch.
    """
    if not is_run(path):
        return [find_checkpoint(path)]

    root = os.path.join(path, "checkpoints")
    names = sorted(checkpoint.steps(root), key=checkpoint.step_key)
    folders = [os.path.join(root, name) for name in names]
    if not folders:
        raise ConfigError(f"{path} has no checkpoint")

    c = checkpoint.saved_config(folders[-1])
    index = load_index(c.train_data, c.caption_key, allow_left_out=c.allow_left_out)
    steps_per_epoch = index.num_samples // c.batch_size
    epochs = {folder: int(folder.rpartition("-")[2]) / steps_per_epoch for folder in folders}

    later = [folder for folder in folders if epochs[folder] >= 1]
    if not later:
        raise ConfigError(f"{path} has no checkpoint after the first epoch")
    middle = [folder for folder in later if abs(epochs[folder] % 1 - 0.5) <= 0.25]
    return middle or later


def measure_run(path):
    """Measure the checkpoints of a run, or one checkpoint -> (rows, points of the last one)."""
    rows = []
    for folder in checkpoints_of(path):
        t, order, step = load(folder)
        measured = measure(t, order, step)
        row = row_of(t, order, step, measured)
        rows.append(row)
        print(bias_page.line(row), flush=True)
    return rows, points_of(measured)


def run_experiment(suite, words):
    """Run and record those runs of a suite that have no record -> exit status.

    words: only runs whose names have all of these. A run that was stopped goes on from its last
    checkpoint, with the same command.
    """
    for run in suite.runs:
        is_chosen = all(word in run.name for word in words)
        if not is_chosen or records.state_of(run).word == "recorded":
            continue

        print(f"{run.name}: {run.folder}", flush=True)
        commit = report.commit()
        train.main([*run.words, f"--out_dir={run.folder}", "--resume=auto", "--workers=0"])
        if not is_complete(run):
            print("stopped; the same command goes on from here")
            return 128 + signal.SIGINT

        about = {
            "machine": report.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit,
        }
        record = records.make(suite, run, about)
        rows, points = measure_run(run.folder)
        record["bias"] = records.rounded(rows)
        record["points"] = points
        records.write(record, run.record)
        shutil.rmtree(run.folder)
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m tools.bias",
        description="How far from the true g its estimates are: g of a batch, and u.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs, or checkpoints")
    parser.add_argument("--experiment", action="store_true", help="run and record what is missing")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--report", action="store_true", help="write the table and the picture")
    parser.add_argument(
        "--results", default=RESULTS, help="the page for the table (default: docs/results.md)"
    )
    parser.epilog = "--only: only runs of the experiment whose names have all of these words."
    args = parser.parse_args(argv)
    if not (args.runs or args.experiment or args.report):
        parser.error("give a RUN, --experiment or --report")
    return args


def main(argv):
    args = parse(argv)
    for path in args.runs:
        print(path)
        measure_run(path)

    suite = read_suite(os.path.relpath(SUITE))
    if args.experiment:
        status = run_experiment(suite, args.only)
        if status:
            sys.exit(status)
    if args.report:
        bias_page.report(suite, records.current(suite), args.results)


if __name__ == "__main__":
    configs.or_exit(main, sys.argv[1:])
