"""Failure detection: if a rank dies, hangs or raises, the others name it and exit in time.

Also the end of a rank: with its torchrun, and whatever its threads do.
"""

import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as c10d

import dist
from conftest import ROOT
from helpers import (
    SHORT_RUN,
    TINY,
    assert_all_succeed,
    assert_same_run,
    environment,
    metrics,
    newest_checkpoint,
    run,
    start_ranks,
    wait_for,
)
from runtime import watchdog


def python(code, **changes):
    """Run Python code in a process of its own -> CompletedProcess."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(**changes),
    )


# ---- another rank fails ----


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sets):
    """A run of two ranks in which nothing fails -> its folder."""
    out = str(tmp_path_factory.mktemp("uninterrupted") / "run")
    assert_all_succeed(start_ranks("train.py", [], out, sets, 2))
    return out


@pytest.mark.parametrize(
    "fault, status, message",
    [
        (
            "kill",
            -9,
            r"cannot go on at step 6: rank 1 no longer answers, "
            r"it was last heard of at (step \d|start-up)",
        ),
        ("hang", 1, r"rank 1 hangs at step 6: it has begun \d+ collectives, others \d+"),
        ("raise", 1, r"rank 1 failed at step 6: ValueError: boom"),
    ],
)
def test_a_rank_that_fails_ends_the_others(tmp_path, sets, uninterrupted, fault, status, message):
    """Within the time-out the other rank says which one it was, and where.

    The run can then be continued as if nothing had happened.
    """
    out = str(tmp_path / "run")
    # Saved at once, so that it is certain which checkpoint there is when the rank fails.
    settings = dict(timeout=25 if fault == "hang" else 60, save_background=False)
    began = time.monotonic()
    ranks = start_ranks("tests/faults.py", [f"{fault}@6:1"], out, sets, 2, **settings)
    (status0, printed0), (status1, printed1) = wait_for(ranks)

    assert status0 == 1, printed0 + printed1
    assert status1 == status, printed0 + printed1
    assert re.search(message, printed0), printed0
    assert "rank 0" in printed0, printed0
    assert time.monotonic() - began < 170  # most of which is the start
    if fault == "raise":
        assert "error: rank 1, step 6: ValueError: boom" in printed1
    if fault == "hang":
        # The rank that hangs prints the stack of where it does.
        assert "faults.py" in printed1, printed1

    assert newest_checkpoint(out) == "step-00000004"
    if fault == "kill":
        assert_all_succeed(start_ranks("train.py", [], out, sets, 2, resume="auto"))
        assert_same_run(uninterrupted, out)


def test_the_death_of_the_first_rank_is_named(tmp_path, sets):
    """Without torchrun's agent the ranks' key-value store lives in rank 0, and ends with it."""
    ranks = start_ranks("tests/faults.py", ["kill@3:0"], str(tmp_path / "run"), sets, 2)
    _, (status, printed) = wait_for(ranks)

    assert status == 1, printed
    for word in ("rank 1", "step 3", "first host"):
        assert word in printed, printed


def test_a_kill_during_an_evaluation_costs_no_step(tmp_path, sets):
    """A save is the newest checkpoint while the evaluation after it still goes on."""
    out = str(tmp_path / "run")
    settings = {**TINY, **SHORT_RUN, **sets, "eval_steps": 8, "out_dir": out}
    result = run("tests/faults.py", "eval-kill@8:1", ranks=2, **settings)
    assert result.returncode != 0
    assert newest_checkpoint(out) == "step-00000008"

    result = run("train.py", ranks=2, **settings, resume="auto")
    assert result.returncode == 0, result.stderr
    assert "from step 8;" in result.stdout
    assert [row["step"] for row in metrics(out) if "eval/zeroshot_top1" in row] == [8, 12]


def test_a_slow_start_is_no_hang(tmp_path, sets):
    """Indexing on rank 0 may take longer than the time-out, as long as it goes on."""
    folder = os.path.dirname(sets["train_data"])
    # Shard n takes 3 (n + 1) seconds when it is first read.
    slow = (
        f"pipe:f={folder}/{{00000..00003}}.tar; n=$(basename $f .tar); "
        f"[ -e $f.seen ] || sleep $((3 * (1 + $n))); touch $f.seen; cat $f"
    )
    settings = dict(index_remote=True, timeout=8, max_steps=1, epochs=1)
    out = str(tmp_path / "slow")
    assert_all_succeed(start_ranks("train.py", [], out, {"train_data": slow}, 2, **settings))

    hanging = f"pipe:sleep 20; cat {folder}/00000.tar"
    out = str(tmp_path / "hanging")
    ranks = wait_for(start_ranks("train.py", [], out, {"train_data": hanging}, 2, **settings))
    assert [status for status, _ in ranks] == [1, 1], ranks
    assert "start-up" in ranks[0][1], ranks


# ---- this rank hangs, or leaves ----


def test_the_watchdog_names_the_step_of_a_hang():
    run = python(
        "from runtime import watchdog\n"
        "import time\n"
        "dog = watchdog.Watchdog(0.5)\n"
        "dog.progress('step 7')\n"
        "time.sleep(20)\n"
    )
    assert run.returncode == 1
    assert "nothing has finished for 0.5 s after step 7" in run.stderr


def test_the_last_words_of_nccl_are_shown():
    """NCCL names the cause at the end. gloo does at the start, and then lists its call stack."""
    long = "NCCL error in: ProcessGroupNCCL.cpp:94, " + 300 * "." + " Last error: peer has gone"
    assert watchdog.shown_error(RuntimeError(long)) == f"RuntimeError: {long}"

    long = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer" + 300 * "."
    shown = watchdog.shown_error(RuntimeError(long))
    assert "Connection closed by peer" in shown
    assert len(shown) < 200


def test_the_watchdog_sends_nothing_after_it_has_stopped(monkeypatch):
    """A heartbeat after the farewell would look like a rank that has fallen silent."""
    store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(dist, "world_size", lambda: 2)

    plain_check = c10d.PrefixStore.check
    entered = threading.Event()

    def slow_check(self, keys):
        entered.set()
        time.sleep(0.5)
        return plain_check(self, keys)

    monkeypatch.setattr(c10d.PrefixStore, "check", slow_check)
    dog = watchdog.Watchdog(1.0)
    assert entered.wait(10)
    dog.stop()
    assert not dog.heartbeat_thread.is_alive()
    assert store.get("watchdog/0/0") == b"gone"


UP = "print('up', flush=True)"
WAIT_FOR_OTHERS = (
    "import time; time.sleep(1); from runtime import watchdog; watchdog.end_with_torchrun()"
)


@pytest.mark.parametrize("before, after", [(WAIT_FOR_OTHERS, UP), (UP, WAIT_FOR_OTHERS)])
def test_ranks_end_with_their_torchrun(before, after):
    """Also while they still look for each other, or load torch: there is no watchdog yet."""
    rank = f"import runtime; {before}; {after}; time.sleep(600)"
    agent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    parent = subprocess.Popen(
        [sys.executable, "-c", agent],
        text=True,
        env=environment(TORCHELASTIC_RUN_ID="x", RANK="3"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert parent.stdout.readline() == "up\n"
    parent.kill()
    # read() returns when the rank has ended, too, because that closes the pipe.
    assert parent.stdout.read() == "error: rank 3 ends, because its torchrun has died\n"


RANK_WITH_BUSY_THREADS = """
import atexit, sys, threading, time
import torch.distributed as c10d
import dist
from config import ConfigError
from runtime import ranks

def ask_forever(store):
    while True:
        store.check(["x"])

def write_late():
    time.sleep(1)
    print("written")

def main(argv):
    dist.init("cpu")
    store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(4):
        threading.Thread(target=ask_forever, args=(store,), daemon=True).start()
    threading.Thread(target=write_late).start()
    atexit.register(print, "farewell")
    LAST_STATEMENT

ranks.run(main, [])
"""


@pytest.mark.parametrize(
    "last_statement, status, printed",
    [
        ("print('done')", 0, "done"),
        ("raise ConfigError('no such shard')", 1, "error: no such shard"),
        ("sys.exit(3)", 3, ""),
        ("raise ValueError('broken')", 1, "ValueError: broken"),
    ],
)
def test_a_rank_ends_whatever_its_threads_do(last_statement, status, printed):
    """Its exit status is right, and a file that is being written is finished.

    The teardown of the interpreter would abort when a thread returns from torch's C++.
    """
    run = python(
        RANK_WITH_BUSY_THREADS.replace("LAST_STATEMENT", last_statement),
        RANK="0",
        WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        PYTHONPATH=ROOT,
    )
    assert run.returncode == status, run
    assert printed in run.stdout + run.stderr, run
    assert run.stdout.endswith("written\nfarewell\n"), run
