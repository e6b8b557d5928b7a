"""Runs of train.py and eval.py for tests: in this process, as a command, on several ranks."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch

import config
import dist
import faults
import train as training
from conftest import ROOT
from rank_server import run_ranks
from runtime import checkpoint

# A model that trains for 30 steps in a few seconds on one core.
TINY = dict(
    model="ViT-B-32",
    image_size=32,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    embed_dim=32,
    context_length=16,
    text_width=64,
    text_heads=2,
    text_layers=1,
    batch_size=64,
    lanes=8,
    workers=0,
    epochs=5,
    lr=2e-3,
    warmup_steps=5,
    weight_decay=0.0,
    log_steps=1,
    rho=4.0,
    eps_u=1e-3,
    lr_tau=1e-3,
    gamma_min=0.5,
    device="cpu",
)

# Its vision tower with BatchNorm.
TINY_RESNET = dict(model="RN50", patch_size=None, vision_layers=(1, 1, 1, 1), vision_width=8)

# A run of two epochs for tests of faults: it is saved at steps 4, 8 and 12, and it reports steps
# 3, 6, 9 and 12. FastCLIP-v2 has the largest state per sample.
SHORT_RUN = dict(
    algorithm="fastclip-v2", max_steps=12, save_steps=4, keep=9, log_steps=3, timeout=40
)

# The columns of metrics.jsonl that a clock has measured.
CLOCK_KEYS = ("samples_per_second", "mfu", "data_wait", "save_wait")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def environment(**changes):
    """-> the environment of a process that a test starts: this one's, and one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def words_of(*words, **settings):
    """-> the command line words, followed by --key=value for each setting."""
    return [*words, *(f"--{key}={value}" for key, value in settings.items())]


# ---- runs ----


def run(script, *words, ranks=1, **settings):
    """Run a script as a user does, on several ranks under torchrun -> CompletedProcess."""
    command = [sys.executable]
    if ranks > 1:
        command = [*TORCHRUN, "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.run(
        [*command, os.path.join(ROOT, script), *words_of(*words, **settings)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )


def train(out_dir, sets, *words, ranks=1, command=False, **changes):
    """A tiny run -> the rows of its metrics.

    Unless command=True, it runs in this process, or on ranks that are forked: importing torch again
    takes longer than the run.
    """
    settings = {**TINY, "train_data": sets["train_data"], "out_dir": out_dir, **changes}
    if command:
        result = run("train.py", *words, ranks=ranks, **settings)
        assert result.returncode == 0, result.stdout + result.stderr
        with open(os.path.join(out_dir, "stdout"), "w") as f:
            f.write(result.stdout)
    elif ranks > 1:
        run_ranks(ranks, training.main, words_of(*words, **settings))
    else:
        training.main(words_of(*words, **settings))
    return metrics(out_dir)


def refused(*expected, words=(), **changes):
    """Check that train.main raises ConfigError, with all of `expected` in its message."""
    with pytest.raises(config.ConfigError) as error:
        training.main(words_of(*words, **{**TINY, **changes}))
    for word in expected:
        assert word in str(error.value)


def run_jobs(*jobs):
    """Train several times in this process -> for each job the error that it raised, or None.

    jobs: (faults, settings), faults as in tests/faults.py. This can be given to run_ranks.
    """
    errors = []
    for text, settings in jobs:
        faults.install(faults.parse(text))
        try:
            training.main(words_of(**settings))
            errors.append(None)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def start_ranks(script, first_words, out_dir, sets, world_size, **changes):
    """Start the ranks of a short run -> list of Popen.

    They are not started by torchrun, which would end them when one fails.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    settings = {**TINY, **SHORT_RUN, "train_data": sets["train_data"], "out_dir": out_dir}
    options = words_of(**{**settings, **changes})

    processes = []
    for rank in range(world_size):
        process = subprocess.Popen(
            [sys.executable, os.path.join(ROOT, script), *first_words, *options],
            env=environment(
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                WORLD_SIZE=str(world_size),
                RANK=str(rank),
                LOCAL_RANK=str(rank),
            ),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        processes.append(process)
    return processes


def wait_for(processes, seconds=120):
    """-> [(exit status, what the process printed)]. A process that does not end is a failure."""
    printed = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=seconds)
            printed.append(out + err)
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        rest = ["".join(process.communicate()) for process in processes]
        raise AssertionError("does not end:\n" + "\n".join(rest)) from None
    return [(process.returncode, text) for process, text in zip(processes, printed)]


def assert_all_succeed(processes):
    for status, printed in wait_for(processes):
        assert status == 0, printed


# ---- processes of the bench ----

# Some of which a worker of the bench replaces, because it believes that the process is its own.
PLAIN_DIST = {name: value for name, value in vars(dist).items() if callable(value)}


class InThisProcess:
    """bench.harness.Worker without a process: importing torch once is enough for most tests."""

    def __init__(self, function, *args):
        self.generator = function(*args)

    def send(self, request=None):
        self.value = self.generator.send(request)

    def receive(self, limit=None):
        return self.value

    def close(self):
        self.generator.close()
        for name, function in PLAIN_DIST.items():
            setattr(dist, name, function)


# ---- what a run has written ----


def metrics(out_dir):
    """-> the rows of metrics.jsonl."""
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def metrics_without_clock(out_dir):
    rows = metrics(out_dir)
    for row in rows:
        for key in CLOCK_KEYS:
            row.pop(key, None)
    return rows


def newest_checkpoint(out_dir):
    """-> the name of the checkpoint from which --resume=auto would continue."""
    folder = checkpoint.find(config.Config(out_dir=out_dir, resume="auto"))
    return os.path.basename(folder)


def checkpoint_names(out_dir):
    """-> the names of the checkpoints that are there, damaged or not, oldest first."""
    return sorted(name for name in os.listdir(checkpoint_root(out_dir)) if name != "latest")


def checkpoint_root(out_dir):
    return os.path.join(out_dir, "checkpoints")


def checkpoint_folder(out_dir, step):
    return os.path.join(checkpoint_root(out_dir), f"step-{step:08d}")


def checkpoint_files(folder):
    """-> {file name: content} of a checkpoint."""
    contents = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".pt"):
            contents[name] = torch.load(os.path.join(folder, name), weights_only=True)
    return contents


def weights(out_dir, step=None):
    """-> (state dict, content of train.pt, u-state) of a run on one rank; the newest by default."""
    if step is None:
        with open(os.path.join(checkpoint_root(out_dir), "latest")) as f:
            folder = os.path.join(checkpoint_root(out_dir), f.read())
    else:
        folder = checkpoint_folder(out_dir, step)
    files = checkpoint_files(folder)
    return (
        files["model.pt"]["state_dict"],
        files["train.pt"],
        files["state-00000-of-00001.pt"]["table"],
    )


def continue_from(out_dir, step):
    """Remove all checkpoints that are later than `step`, as if they had not been saved."""
    for name in checkpoint_names(out_dir):
        if name > f"step-{step:08d}":
            shutil.rmtree(os.path.join(checkpoint_root(out_dir), name))
    with open(os.path.join(checkpoint_root(out_dir), "latest"), "w") as f:
        f.write(f"step-{step:08d}")


def equal(a, b):
    """Are two contents of checkpoint files the same, bit for bit, except for their configs?"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        keys = a.keys() - {"config", "resume"}
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


def assert_same_run(one, two, step=12):
    """Two runs are the same, bit for bit: their checkpoints at `step`, and their metrics.

    A checkpoint holds weights, moments, temperatures, u-state and the state of the log.
    """
    files_one = checkpoint_files(checkpoint_folder(one, step))
    files_two = checkpoint_files(checkpoint_folder(two, step))
    assert files_one.keys() == files_two.keys()
    for name in files_one:
        assert equal(files_one[name], files_two[name]), name
    assert metrics_without_clock(one) == metrics_without_clock(two)
