"""What the device of this machine can do: precision, compilation, speed."""

import contextlib
import math
import os
import shutil
import socket
import sys
import sysconfig
import time
from functools import partial

import torch

import dist
from config import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precision(name, device):
    """config.precision -> the dtype in which the towers compute on `device`.

    "auto" is bfloat16 on a GPU that has it in hardware, and float32 elsewhere.
    Raises ConfigError for float16 on the CPU.
    """
    if name == "auto":
        including_emulation = False
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation):
            return torch.bfloat16
        return torch.float32
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("precision = 'fp16' needs a GPU; on the CPU use fp32 or bf16")
    return DTYPES[name]


def autocast(dtype, device):
    """-> a function that makes the context in which the towers run."""
    if dtype == torch.float32:
        return contextlib.nullcontext
    return partial(torch.autocast, device.type, dtype)


def compiles(setting, device):
    """config.compile -> whether to compile the towers on `device`.

    "auto" compiles on a GPU, unless torch's compiler lacks something to build with. Rank 0 says so.
    """
    if setting != "auto":
        return setting
    if device.type != "cuda":
        return False

    missing = missing_build_tools()
    if missing and dist.rank() == 0:
        print(
            f"training without torch.compile, and slower: it needs {' and '.join(missing)} "
            f"(Debian, Ubuntu: apt install gcc python3-dev)",
            file=sys.stderr,
        )
    return not missing


def missing_build_tools():
    """-> what torch's compiler needs and this machine lacks, in words."""
    missing = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler")
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        missing.append("Python.h")
    return missing


def report_idle_gpus(device):
    """Say so, on rank 0, if its host has more GPUs than ranks."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    ranks = dist.local_world_size()
    if dist.rank() > 0 or gpus <= ranks:
        return
    print(
        f"warning: {gpus - ranks} of the {gpus} GPUs of {socket.gethostname()} stay idle, because "
        f"it runs {ranks} rank(s): `torchrun --nproc_per_node gpu train.py ...` starts one per GPU "
        "on each host",
        file=sys.stderr,
        flush=True,
    )


def peak_flops(dtype, device):
    """The rate of a matrix product, measured here, in FLOP/s. MFU is a share of it."""
    n = 8192 if device.type == "cuda" else 768
    # A generator of its own, because the global one belongs to the run.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(n, n, generator=generator, device=device).to(dtype)

    best = math.inf
    for _ in range(5):
        synchronize(device)
        start = time.monotonic()
        a @ a
        synchronize(device)
        best = min(best, time.monotonic() - start)
    return 2 * n**3 / best


class HostCopy:
    """A copy of a tensor in the host's memory, under way: neither host nor device wait for it."""

    def __init__(self, x):
        self.event = None
        self.copy = x
        if x.device.type == "cuda":
            self.copy = torch.empty_like(x, device="cpu", pin_memory=True)
            self.copy.copy_(x, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self):
        """-> the copy, a tensor on the CPU. Waits until the device has computed it."""
        if self.event:
            self.event.synchronize()
        return self.copy


def synchronize(device):
    """Wait until the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
