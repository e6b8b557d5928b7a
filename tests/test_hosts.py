"""Two hosts made on this machine, a torchrun agent on each: they train as one host does, and a broken link ends a run, which resumes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import namedtuple

import pytest
import torch

import shapes
from conftest import ROOT
from helpers import TINY, words_of

STEPS, SAVED, TIMEOUT = 16, 6, 20
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
Host = namedtuple(
    "Host", "enter address interface port"
)  # enter: what precedes a command to run it in the host's namespace


def namespaces(stack, unshare):
    """Two network namespaces, joined by a veth pair and by nothing else; OSError or CalledProcessError where that is not permitted.

    They have no names that could collide, and live as long as a process in them: `cat`, which ends with its standard input,
    that is when the stack is left, or this process dies in whatever way.
    """
    hosts, pids = [], []
    for n in (1, 2):
        command = (
            ["unshare", *unshare] if n == 1 else [*hosts[0].enter, "unshare", "--net"]
        )  # within the first one's user namespace
        holder = stack.enter_context(
            subprocess.Popen(
                [*command, "sh", "-c", "echo made; exec cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        if not holder.stdout.readline():
            raise OSError(holder.stderr.read().strip())
        pids.append(holder.pid)
        user = ["--user", "--preserve-credentials"] if "--user" in unshare else []
        hosts.append(
            Host(
                ["nsenter", f"--target={holder.pid}", "--net", *user],
                f"10.73.0.{n}",
                "veth0",
                29500,
            )
        )
    run(hosts[0], f"ip link add veth0 type veth peer name veth0 netns {pids[1]}")
    for host in hosts:
        run(
            host,
            f"ip address add {host.address}/24 dev veth0 && ip link set veth0 up && ip link set lo up",
        )
    return hosts


def run(host, command):
    return subprocess.run(
        [*host.enter, "sh", "-c", command], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def hosts():
    """Two namespaces, made as root or as another user; where neither may, this machine twice, with a warning that says so."""
    refusals = []
    with contextlib.ExitStack() as stack:
        for unshare in (["--net"], ["--user", "--map-root-user", "--net"]):
            try:
                two = namespaces(stack, unshare)
                break
            except (OSError, subprocess.CalledProcessError) as error:
                refusals.append(getattr(error, "stderr", None) or str(error))
        else:
            warnings.warn(
                f"no network namespaces here ({'; '.join(refusals)}): two torchrun agents share this machine's loopback instead"
            )
            with socket.create_server(("127.0.0.1", 0)) as free:
                two = 2 * [Host([], "127.0.0.1", "lo", free.getsockname()[1])]
        yield two


@contextlib.contextmanager
def agents(hosts, out_dir, settings):
    """train.py with 2 ranks on each host -> each host's torchrun agent; they write to out_dir.0 and out_dir.1.

    Torchrun and gloo would otherwise look up this machine's name, and find an address that the other host cannot reach; so they
    are told who holds the rendezvous (is_host), where to find its first rank (local_addr), and where gloo is to listen.
    """
    running = []
    try:
        for n, host in enumerate(hosts):
            command = [
                *host.enter,
                *TORCHRUN,
                "--nnodes=2",
                "--nproc_per_node=2",
                "--rdzv_id=test",
                "--rdzv_backend=c10d",
                f"--rdzv_endpoint={hosts[0].address}:{host.port}",
                f"--rdzv_conf=is_host={1 - n}",
                f"--local_addr={host.address}",
                os.path.join(ROOT, "train.py"),
                *words_of(**settings, out_dir=out_dir),
            ]
            with open(f"{out_dir}.{n}", "w") as output:
                running.append(
                    subprocess.Popen(
                        command,
                        stdout=output,
                        stderr=output,
                        env={
                            **os.environ,
                            "OMP_NUM_THREADS": "1",
                            "GLOO_SOCKET_IFNAME": host.interface,
                        },
                    )
                )
        yield running
    finally:
        for agent in running:
            for pid in ranks(agent):  # none, unless the test has failed
                os.kill(pid, signal.SIGKILL)
            agent.kill()
            agent.wait()


def ranks(agent):
    """The processes of an agent's ranks that have not ended. (One that has is a zombie, Z, until the agent takes note.)"""
    alive = []
    with contextlib.suppress(
        FileNotFoundError, ProcessLookupError
    ):  # what ends while we look has ended
        for pid in (
            open(f"/proc/{agent.pid}/task/{agent.pid}/children").read().split()
            if agent.poll() is None
            else ()
        ):
            if open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z":
                alive.append(int(pid))
    return alive


def printed(out_dir):
    return "\n".join(open(f"{out_dir}.{n}").read() for n in range(2))


def one_host(out_dir, settings):
    """4 ranks of one agent -> what they printed."""
    command = [
        *TORCHRUN,
        "--standalone",
        "--nproc_per_node=4",
        os.path.join(ROOT, "train.py"),
        *words_of(**settings, out_dir=out_dir),
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run on one host that the others are compared with -> its settings and out_dir. FastCLIP-v2 keeps most per sample."""
    folder = str(tmp_path_factory.mktemp("hosts"))
    settings = {
        **TINY,
        "train_data": shapes.write(folder + "/train"),
        "algorithm": "fastclip-v2",
        "max_steps": STEPS,
        "save_steps": SAVED,
        "timeout": TIMEOUT,
        "resume": "auto",
    }
    one_host(folder + "/one", settings)
    return settings, folder + "/one"


def load(out_dir, name):
    return torch.load(
        os.path.join(out_dir, "checkpoints", f"step-{STEPS:08d}", name), weights_only=True
    )


def assert_same(one, two):
    """Two runs of 4 ranks, bit for bit: every step's numbers, the weights, and each rank's rows of u and tau."""
    rows, rows2 = (
        [json.loads(line) for line in open(os.path.join(out_dir, "metrics.jsonl"))]
        for out_dir in (one, two)
    )
    measured = ("step", "objective", "mbcl", "tau", "gamma", "lr", "lr_tau")
    assert len(rows) == STEPS and [[row[k] for k in measured] for row in rows] == [
        [row[k] for k in measured] for row in rows2
    ]
    model, model2 = load(one, "model.pt")["state_dict"], load(two, "model.pt")["state_dict"]
    assert all(torch.equal(model[name], model2[name]) for name in model)
    for name in (f"state-{rank:05d}-of-00004.pt" for rank in range(4)):
        assert torch.equal(load(one, name)["table"], load(two, name)["table"]), name


def test_two_hosts_train_as_one(hosts, reference, tmp_path):
    """2 hosts x 2 ranks give what 4 ranks of one host give, and it went over the link."""
    settings, one = reference
    two = str(tmp_path / "two")
    with agents(hosts, two, settings) as running:
        assert [agent.wait(300) for agent in running] == [0, 0], printed(two)
    if hosts[0].enter:  # at each step either host has at least to tell its sum of the gradients
        size = sum(
            x.numel() * x.element_size() for x in load(two, "model.pt")["state_dict"].values()
        )
        for host in hosts:
            assert (
                int(re.search(r"veth0:(.*)", run(host, "cat /proc/net/dev"))[1].split()[8])
                > STEPS * size
            )
    assert_same(one, two)


def test_a_broken_link_ends_the_run_which_then_resumes(hosts, reference, tmp_path):
    """The ranks of both hosts end within the time-out, say rank and step, and the agents follow; continued, no bit is lost."""
    if not hosts[0].enter:
        pytest.skip("no network namespaces here, so there is no link to take down")
    settings, one = reference
    cut = str(tmp_path / "cut")
    for host in (
        hosts
    ):  # TCP, and with it an agent that asks the other host, gives up after 25 s, not 15 min
        run(host, "echo 6 > /proc/sys/net/ipv4/tcp_retries2")
    with agents(hosts, cut, settings) as running:
        while not os.path.exists(os.path.join(cut, "checkpoints", "latest")):
            assert [agent.poll() for agent in running] == [None, None], printed(cut)
            time.sleep(0.02)
        run(hosts[1], "ip link set veth0 down")
        end = time.monotonic() + TIMEOUT + 15
        while any(map(ranks, running)):
            assert time.monotonic() < end, (
                f"still running: {list(map(ranks, running))}; {printed(cut)}"
            )
            time.sleep(0.02)
        assert 0 not in [agent.wait(90) for agent in running]
    for n, ours in enumerate(
        ("01", "23")
    ):  # of two ranks the agent may end one because the other has failed
        assert re.search(rf"error: rank [{ours}]\b.*\bstep \d+", open(f"{cut}.{n}").read()), (
            printed(cut)
        )
    assert f"from step {SAVED};" in one_host(cut, settings)
    assert_same(one, cut)
