"""Two hosts made on this machine, with a torchrun agent on each.

They train as one host does, and a broken link ends a run, which can be continued.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import warnings
from typing import NamedTuple

import pytest
import torch

import shapes
from conftest import ROOT
from helpers import TINY, TORCHRUN, checkpoint_folder, environment, metrics, words_of
from helpers import run as run_script

STEPS = 16
SAVED_STEP = 6
TIMEOUT = 20  # seconds

NOT_OF_THE_CLOCK = ("step", "objective", "mbcl", "tau", "gamma", "lr", "lr_tau")


class Host(NamedTuple):
    enter: list  # the words in front of a command that run it on this host; none: on this machine
    address: str
    interface: str
    port: int


# ---- making hosts ----


def run(host, command):
    """Run a shell command on a host -> what it printed."""
    result = subprocess.run(
        [*host.enter, "sh", "-c", command], check=True, capture_output=True, text=True
    )
    return result.stdout


def make_namespace(stack, command):
    """Make a network namespace by a command that ends in `unshare` -> the id of a process in it.

    The namespace has no name that could collide. It lives as long as that process, which ends
    with its standard input, that is when the stack is left or when this process dies in whatever
    way.
    """
    process = subprocess.Popen(
        [*command, "sh", "-c", "echo made; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    stack.enter_context(process)
    if not process.stdout.readline():
        raise OSError(process.stderr.read().strip())
    return process.pid


def make_hosts(stack, unshare):
    """Two network namespaces, joined by a veth pair and by nothing else -> two Hosts.

    unshare: its options. Raises OSError or CalledProcessError where they are not permitted.
    """
    user = ["--user", "--preserve-credentials"] if "--user" in unshare else []

    def host(number, pid):
        enter = ["nsenter", f"--target={pid}", "--net", *user]
        return Host(enter, f"10.73.0.{number}", "veth0", 29500)

    # The second namespace is made within the user namespace of the first one.
    first_pid = make_namespace(stack, ["unshare", *unshare])
    first = host(1, first_pid)
    second_pid = make_namespace(stack, [*first.enter, "unshare", "--net"])
    second = host(2, second_pid)

    run(first, f"ip link add veth0 type veth peer name veth0 netns {second_pid}")
    for each in (first, second):
        run(each, f"ip address add {each.address}/24 dev veth0")
        run(each, "ip link set veth0 up && ip link set lo up")
    return [first, second]


def try_to_make_hosts(stack):
    """As root or as another user -> (two Hosts, []), or (None, why neither is permitted)."""
    refusals = []
    for unshare in (["--net"], ["--user", "--map-root-user", "--net"]):
        try:
            return make_hosts(stack, unshare), []
        except (OSError, subprocess.CalledProcessError) as error:
            refusals.append(getattr(error, "stderr", None) or str(error))
    return None, refusals


@pytest.fixture
def hosts():
    """Two namespaces. Where none are permitted, this machine twice, with a warning that says so."""
    with contextlib.ExitStack() as stack:
        two, refusals = try_to_make_hosts(stack)
        if two is None:
            warnings.warn(
                f"no network namespaces here ({'; '.join(refusals)}): "
                f"two torchrun agents share this machine's loopback instead",
                stacklevel=2,
            )
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            two = [Host([], "127.0.0.1", "lo", port)] * 2
        yield two


# ---- training on them ----


def agent_command(hosts, number, out_dir, settings):
    """train.py with 2 ranks on host `number`, 0 or 1.

    Torchrun and gloo would otherwise look up this machine's name, and find an address that the
    other host cannot reach. So they are told which host has the rendezvous (is_host), where its
    first rank is found (local_addr), and on which interface gloo listens (see agents).
    """
    host = hosts[number]
    return [
        *host.enter,
        *TORCHRUN,
        "--nnodes=2",
        "--nproc_per_node=2",
        "--rdzv_id=test",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint={hosts[0].address}:{host.port}",
        f"--rdzv_conf=is_host={1 - number}",
        f"--local_addr={host.address}",
        os.path.join(ROOT, "train.py"),
        *words_of(**settings, out_dir=out_dir),
    ]


@contextlib.contextmanager
def agents(hosts, out_dir, settings):
    """Each host's torchrun agent, running; they print to the files out_dir.0 and out_dir.1."""
    running = []
    try:
        for number, host in enumerate(hosts):
            with open(f"{out_dir}.{number}", "w") as output:
                agent = subprocess.Popen(
                    agent_command(hosts, number, out_dir, settings),
                    stdout=output,
                    stderr=output,
                    env=environment(GLOO_SOCKET_IFNAME=host.interface),
                )
            running.append(agent)
        yield running
    finally:
        for agent in running:
            # There are ranks left only if the test has failed.
            for pid in living_ranks(agent):
                os.kill(pid, signal.SIGKILL)
            agent.kill()
            agent.wait()


def living_ranks(agent):
    """-> the ids of an agent's ranks that have not ended.

    A rank that has ended is a zombie, Z, until the agent takes note of it.
    """
    alive = []
    if agent.poll() is not None:
        return alive
    # What ends while we look has ended.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for pid in read(f"/proc/{agent.pid}/task/{agent.pid}/children").split():
            state = read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0]
            if state != "Z":
                alive.append(int(pid))
    return alive


def read(path):
    with open(path) as f:
        return f.read()


def printed(out_dir):
    """What both agents and their ranks have printed."""
    return read(f"{out_dir}.0") + "\n" + read(f"{out_dir}.1")


def train_on_one_host(out_dir, settings):
    """4 ranks of one agent -> what they printed."""
    result = run_script("train.py", ranks=4, **settings, out_dir=out_dir)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run on one host with which the others are compared -> (settings, out_dir).

    FastCLIP-v2 keeps the most per sample.
    """
    folder = str(tmp_path_factory.mktemp("hosts"))
    settings = {
        **TINY,
        "train_data": shapes.write(folder + "/train"),
        "algorithm": "fastclip-v2",
        "max_steps": STEPS,
        "save_steps": SAVED_STEP,
        "timeout": TIMEOUT,
        "resume": "auto",
    }
    out = folder + "/one"
    train_on_one_host(out, settings)
    return settings, out


def load(out_dir, name):
    path = os.path.join(checkpoint_folder(out_dir, STEPS), name)
    return torch.load(path, weights_only=True)


def numbers_of_steps(out_dir):
    rows = metrics(out_dir)
    return [[row[key] for key in NOT_OF_THE_CLOCK] for row in rows]


def assert_same(one, two):
    """Two runs of 4 ranks, bit for bit: each step's numbers, weights, each rank's u and tau."""
    assert len(numbers_of_steps(one)) == STEPS
    assert numbers_of_steps(one) == numbers_of_steps(two)

    model = load(one, "model.pt")["state_dict"]
    model2 = load(two, "model.pt")["state_dict"]
    for name in model:
        assert torch.equal(model[name], model2[name]), name
    for rank in range(4):
        name = f"state-{rank:05d}-of-00004.pt"
        assert torch.equal(load(one, name)["table"], load(two, name)["table"]), name


def bytes_sent(host):
    """Over the link, since the host was made."""
    counters = re.search(r"veth0:(.*)", run(host, "cat /proc/net/dev"))[1].split()
    return int(counters[8])


# ---- tests ----


def test_two_hosts_train_as_one(hosts, reference, tmp_path):
    """2 hosts x 2 ranks give what 4 ranks of one host give, and it is sent over the link."""
    settings, one = reference
    two = str(tmp_path / "two")
    with agents(hosts, two, settings) as running:
        assert [agent.wait(300) for agent in running] == [0, 0], printed(two)

    if hosts[0].enter:
        # In each step a host at least sends its sum of the gradients.
        weights = load(two, "model.pt")["state_dict"].values()
        size = sum(x.numel() * x.element_size() for x in weights)
        for host in hosts:
            assert bytes_sent(host) > STEPS * size
    assert_same(one, two)


def test_a_broken_link_ends_the_run_which_then_resumes(hosts, reference, tmp_path):
    """The ranks of both hosts end within the time-out, and name rank and step.

    The agents follow. The continued run is the same, bit for bit.
    """
    if not hosts[0].enter:
        pytest.skip("no network namespaces here, so there is no link to take down")
    settings, one = reference
    cut = str(tmp_path / "cut")
    for host in hosts:
        # TCP, and an agent that asks the other host, gives up after 25 s instead of 15 minutes.
        run(host, "echo 6 > /proc/sys/net/ipv4/tcp_retries2")

    with agents(hosts, cut, settings) as running:
        while not os.path.exists(os.path.join(cut, "checkpoints", "latest")):
            assert [agent.poll() for agent in running] == [None, None], printed(cut)
            time.sleep(0.02)
        run(hosts[1], "ip link set veth0 down")

        end = time.monotonic() + TIMEOUT + 15
        while living_ranks(running[0]) or living_ranks(running[1]):
            left = [living_ranks(agent) for agent in running]
            assert time.monotonic() < end, f"still running: {left}; {printed(cut)}"
            time.sleep(0.02)
        assert 0 not in [agent.wait(90) for agent in running]

    # Of the two ranks of a host, the agent may end one because the other has failed.
    assert re.search(r"error: rank [01]\b.*\bstep \d+", read(f"{cut}.0")), printed(cut)
    assert re.search(r"error: rank [23]\b.*\bstep \d+", read(f"{cut}.1")), printed(cut)

    assert f"from step {SAVED_STEP};" in train_on_one_host(cut, settings)
    assert_same(one, cut)
