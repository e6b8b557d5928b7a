"""dist.py: the overlapped gradient mean, its bf16 wire, the weight check, BatchNorm averaging, the byte counter, the watchdog."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as c10d
from torch import nn

import dist
from conftest import ROOT
from helpers import run_ranks
from runtime import hardware, watchdog


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(32, 5),
        nn.Linear(5, 1),
    )


def reduced_gradients(wire, bucket_mb, pieces):
    model = network().to(memory_format=torch.channels_last)  # strides that are not the default ones
    model.append(nn.Linear(3, 3))  # takes no part in the forward pass
    reducer = dist.GradReducer(model.parameters(), bucket_mb, wire)
    g = torch.Generator().manual_seed(dist.rank())
    for _ in range(2):  # twice: nothing may be left over from the first time
        x = torch.randn(4, 3, 6, 6, generator=g)
        reducer.zero()
        for i, part in enumerate(x.chunk(pieces)):
            if i == pieces - 1:
                reducer.arm()
            (model[:-1].eval()(part).square().sum()).backward()
        reducer.wait()
    counted = dist.traffic["gradients"]
    return (
        x,
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        len(reducer.buckets),
        counted,
    )


@pytest.mark.parametrize(
    "wire,bucket_mb,pieces",
    [(torch.float32, 25.0, 1), (torch.float32, 1e-4, 2), (torch.bfloat16, 1e-3, 1)],
)
def test_gradients_are_the_mean_over_ranks(wire, bucket_mb, pieces):
    ranks = run_ranks(2, reduced_gradients, wire, bucket_mb, pieces)
    model = network().eval()
    (torch.cat([model(x).square() for x, *_ in ranks]).sum() / 2).backward()
    for x, gradients, buckets, counted in ranks:
        for p, grad in zip(model.parameters(), gradients):
            torch.testing.assert_close(
                grad,
                p.grad,
                rtol=2e-2 if wire == torch.bfloat16 else 1e-5,
                atol=1e-2 if wire == torch.bfloat16 else 1e-6,
            )
        assert all(grad is None or not grad.any() for grad in gradients[-2:])
        assert (buckets > 3) == (bucket_mb < 1e-3)
        parameters = sum(p.numel() for p in model.parameters()) + 12
        assert counted == 2 * parameters * (
            2 if wire == torch.bfloat16 else 4
        )  # 2 steps x 2 (K-1)/K x bytes, K = 2


def test_alone_every_collective_is_the_identity():
    x = torch.arange(4.0)
    assert dist.all_gather(x, "x") is x
    dist.all_reduce(x, "x").wait()
    assert (
        x.tolist() == [0, 1, 2, 3]
        and dist.all_gather_objects("a") == ["a"]
        and dist.world_size() == 1
    )
    dist.barrier()
    assert dist.traffic["x"] == 0


def weights_checked():
    model = network()
    dist.check_same_weights(model)
    with torch.no_grad():
        model[1].running_mean += dist.rank()
        with dist.averaged_batchnorm(model):
            means = model[1].running_mean.clone()
        assert torch.equal(
            model[1].running_mean, torch.full((8,), float(dist.rank()))
        )  # and its own again
        if dist.rank() == 1:
            model[3].weight[0, 0, 0, 0] = torch.nextafter(
                model[3].weight[0, 0, 0, 0], torch.tensor(9.0)
            )  # one bit
    try:
        dist.check_same_weights(model)
        message = ""
    except RuntimeError as error:
        message = str(error)
    dist.broadcast_weights(model)
    dist.check_same_weights(model)
    return means, message


def test_weights_are_checked_and_batchnorm_averaged():
    for means, message in run_ranks(2, weights_checked):
        assert torch.equal(means, torch.full((8,), 0.5))
        assert "3.weight on ranks [1]" in message


def gathered():
    out = dist.all_gather(torch.full((2, 3), float(dist.rank())), "features")
    return out, dict(dist.traffic)


def test_gather_is_in_rank_order_and_counted():
    for out, traffic in run_ranks(2, gathered):
        assert out[:, 0].tolist() == [0, 0, 1, 1]
        assert traffic == {"features": 24}


def test_the_watchdog_names_the_step():
    code = "from runtime import watchdog; import time; w = watchdog.Watchdog(0.5); w.progress('step 7'); time.sleep(20)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (
        run.returncode == 1
        and "nothing has finished for 0 s after step 7" in run.stderr.replace("0.5", "0")
    )


@pytest.mark.parametrize(
    "last, status, words",
    [
        ("print('done')", 0, "done"),
        ("raise ConfigError('no such shard')", 1, "error: no such shard"),
        ("sys.exit(3)", 3, ""),
        ("raise ValueError('broken')", 1, "ValueError: broken"),
    ],
)
def test_a_rank_ends_whatever_its_threads_do(last, status, words):
    """Python aborts when it takes itself apart and finds a thread that comes out of torch's C++. A file in the making is still written."""
    code = f"""
import atexit, sys, threading, time
import dist, torch.distributed as c10d
from runtime import ranks
from config import ConfigError

def main(argv):
    dist.init("cpu")
    store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(4):
        threading.Thread(target=lambda: [store.check(["x"]) for _ in iter(int, 1)], daemon=True).start()
    threading.Thread(target=lambda: (time.sleep(1), print("written"))).start()
    atexit.register(print, "farewell")
    {last}

ranks.run(main, [])
"""
    env = {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "PYTHONPATH": ROOT,
    }
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env
    )
    assert (
        run.returncode == status
        and words in run.stdout + run.stderr
        and run.stdout.endswith("written\nfarewell\n")
    ), run


def test_the_watchdog_is_out_of_its_store_when_it_stops(monkeypatch):
    """A pulse after the farewell would leave a rank that seems to have gone silent."""
    store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    check, entered = c10d.PrefixStore.check, threading.Event()

    def slow_check(self, keys):
        entered.set()
        time.sleep(0.5)
        return check(self, keys)

    monkeypatch.setattr(c10d.PrefixStore, "check", slow_check)
    dog = watchdog.Watchdog(1.0)
    assert entered.wait(10)
    dog.stop()
    assert not dog.heartbeat_thread.is_alive() and store.get("watchdog/0/0") == b"gone"


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(dist.ConfigError, match="--device=cpu"):
        dist.init("cuda")


def test_compiling_needs_something_to_build_with(monkeypatch, tmp_path, capsys):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (
        hardware.compiles(True, cpu)
        and not hardware.compiles("auto", cpu)
        and not hardware.compiles(False, gpu)
        and not capsys.readouterr().err
    )
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(hardware.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "cc")
    assert hardware.compiles("auto", gpu) and not capsys.readouterr().err
    monkeypatch.delenv("CC")
    monkeypatch.setattr(hardware.shutil, "which", lambda _: None)
    assert (
        not hardware.compiles("auto", gpu) and "it needs a C compiler (" in capsys.readouterr().err
    )
    (tmp_path / "Python.h").unlink()
    assert (
        not hardware.compiles("auto", gpu)
        and "it needs a C compiler and Python.h (" in capsys.readouterr().err
    )
