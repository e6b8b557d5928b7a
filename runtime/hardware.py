"""What this machine's device can do: precision, compilation, speed."""

import contextlib
import math
import os
import shutil
import sys
import sysconfig
import time

import torch

import dist
from config import ConfigError


def precision(name, device):
    """config.precision -> the dtype in which the towers compute on `device`. ConfigError where that cannot be."""
    if name == "auto":
        return (
            torch.bfloat16
            if device.type == "cuda" and torch.cuda.is_bf16_supported(False)
            else torch.float32
        )
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("precision = 'fp16' needs a GPU; on the CPU use fp32 or bf16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def compiles(setting, device):
    """config.compile -> whether to compile on `device`. "auto" does without where torch's compiler has nothing to build with, and says so."""
    if setting != "auto" or device.type != "cuda":
        return setting is True
    missing = (
        []
        if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        else ["a C compiler"]
    )
    missing += (
        []
        if os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
        else ["Python.h"]
    )
    if missing and dist.rank() == 0:
        print(
            f"training without torch.compile, and slower: it needs {' and '.join(missing)} (Debian, Ubuntu: apt install gcc python3-dev)",
            file=sys.stderr,
        )
    return not missing


def autocast(dtype, device):
    """-> a function that makes the context in which the towers run."""
    return (
        contextlib.nullcontext
        if dtype == torch.float32
        else lambda: torch.autocast(device.type, dtype)
    )


def peak_flops(dtype, device):
    """Matrix-multiply rate measured here, FLOP/s: what MFU is a share of."""
    n = 8192 if device.type == "cuda" else 768
    a = torch.randn(n, n, generator=torch.Generator(device).manual_seed(0), device=device).to(
        dtype
    )  # the global generator is the run's
    best = math.inf
    for _ in range(5):
        synchronize(device)
        start = time.monotonic()
        a @ a
        synchronize(device)
        best = min(best, time.monotonic() - start)
    return 2 * n**3 / best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
