"""Runs of train.py and eval.py for tests: in this process, as a command, on several ranks."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback

import pytest
import torch

import config
import dist
import train as training
from conftest import ROOT
from runtime import checkpoint, ranks

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


def words_of(*words, **settings):
    return [*words, *(f"--{key}={value}" for key, value in settings.items())]


def run(script, *words, ranks=1, **settings):
    """As a user does: a command, on several ranks under torchrun."""
    command = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            "--standalone",
        ]
    )
    return subprocess.run(
        command + [os.path.join(ROOT, script), *words_of(*words, **settings)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train(out_dir, sets, *words, ranks=1, command=False, **changes):
    """A run -> its metrics. One rank runs in this process (importing torch anew takes longer than these runs do)."""
    settings = {**TINY, "train_data": sets["train_data"], "out_dir": out_dir, **changes}
    if ranks > 1 or command:
        result = run("train.py", *words, ranks=ranks, **settings)
        assert result.returncode == 0, result.stdout + result.stderr
        with open(os.path.join(out_dir, "stdout"), "w") as f:
            f.write(result.stdout)
    else:
        training.main(words_of(*words, **settings))
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def weights(out_dir, step=None):
    root = os.path.join(out_dir, "checkpoints")
    name = f"step-{step:08d}" if step else open(os.path.join(root, "latest")).read()
    load = lambda file: torch.load(os.path.join(root, name, file), weights_only=True)
    return (
        load("model.pt")["state_dict"],
        load("train.pt"),
        load("state-00000-of-00001.pt")["table"],
    )


def refused(*expected, words=(), **changes):
    """train.main raises ConfigError, which the command line shows as one line, with all of `expected` in it."""
    with pytest.raises(config.ConfigError) as error:
        training.main(words_of(*words, **{**TINY, **changes}))
    for word in expected:
        assert word in str(error.value)


def run_ranks(world_size, function, *args):
    """function(*args) on `world_size` ranks -> list of its return values by rank. The function must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        results = []
        for rank in range(world_size):
            path = os.path.join(folder, f"{rank}.pt")
            assert os.path.exists(path), f"rank {rank} died with exit status {ranks[rank].exitcode}"
            results.append(torch.load(path, weights_only=False))
        errors = [
            f"rank {rank}:\n{r}"
            for rank, r in enumerate(results)
            if isinstance(r, str) and r.startswith("Traceback")
        ]
        assert not errors, "\n".join(errors)
        return results


def _rank(rank, world_size, folder, function, args):
    import torch.distributed as c10d

    torch.set_num_threads(1)
    c10d.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        result = function(*args)
        dist.barrier()  # nobody goes while another is still at it
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, os.path.join(folder, f"{rank}.pt"))
    ranks.leave()


RUN = dict(algorithm="fastclip-v2", max_steps=12, save_steps=4, keep=9, log_steps=3, timeout=40)


def start(script, first, out_dir, sets, ranks, **changes):
    """Ranks of one run, started by hand and not by torchrun, so that nobody helps them to end -> list of Popen."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = {**TINY, **RUN, "train_data": sets["train_data"], "out_dir": out_dir, **changes}
    command = [sys.executable, os.path.join(ROOT, script), *first, *words_of(**settings)]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    return [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]


def ends(processes, seconds=120):
    """-> [(exit status, what it printed)]; a process that does not end is a failure."""
    try:
        shown = [p.communicate(timeout=seconds) for p in processes]
    except subprocess.TimeoutExpired:
        for p in processes:
            p.kill()
        raise AssertionError(
            "does not end:\n" + "\n".join("".join(p.communicate()) for p in processes)
        ) from None
    return [(p.returncode, out + err) for p, (out, err) in zip(processes, shown)]


def newest(out_dir):
    return os.path.basename(checkpoint.find(config.Config(out_dir=out_dir, resume="auto")))


def measured(out_dir):
    """metrics.jsonl, without what a clock measured."""
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    return [
        {
            k: v
            for k, v in row.items()
            if k not in ("samples_per_second", "mfu", "data_wait", "save_wait")
        }
        for row in rows
    ]


def files_of(folder):
    return {
        name: torch.load(os.path.join(folder, name), weights_only=True)
        for name in sorted(os.listdir(folder))
        if name.endswith(".pt")
    }


def same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("config", "resume")
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def assert_same_run(a, b, step=12):
    """Weights, moments, temperatures, u-state, the log's memory: bit for bit; and the metrics."""
    a, b = ([os.path.join(out, "checkpoints", f"step-{step:08d}"), out] for out in (a, b))
    files_a, files_b = files_of(a[0]), files_of(b[0])
    assert files_a.keys() == files_b.keys()
    for name in files_a:
        assert same(files_a[name], files_b[name]), name
    assert measured(a[1]) == measured(b[1])
