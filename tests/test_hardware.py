"""runtime/hardware.py, and the device that dist.init gives."""

import pytest
import torch

import dist
from config import ConfigError
from runtime import hardware

GPU = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="--device=cpu"):
        dist.init("cuda")


def test_compile_is_as_set_or_for_gpus_only(capsys):
    assert hardware.compiles(True, CPU)
    assert not hardware.compiles("auto", CPU)
    assert not hardware.compiles(False, GPU)
    assert not capsys.readouterr().err


def test_compiling_needs_a_compiler_and_the_headers_of_python(monkeypatch, tmp_path, capsys):
    header = tmp_path / "Python.h"
    header.touch()
    monkeypatch.setattr(hardware.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "cc")
    assert hardware.compiles("auto", GPU)
    assert not capsys.readouterr().err

    monkeypatch.delenv("CC")
    monkeypatch.setattr(hardware.shutil, "which", lambda _: None)
    assert not hardware.compiles("auto", GPU)
    assert "it needs a C compiler (" in capsys.readouterr().err

    header.unlink()
    assert not hardware.compiles("auto", GPU)
    assert "it needs a C compiler and Python.h (" in capsys.readouterr().err


def test_gpus_without_a_rank_are_reported(monkeypatch, capsys):
    """torchrun starts one rank per host unless it is told otherwise."""
    monkeypatch.setattr(hardware.torch.cuda, "device_count", lambda: 8)
    hardware.report_idle_gpus(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    hardware.report_idle_gpus(GPU)
    assert not capsys.readouterr().err

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    hardware.report_idle_gpus(GPU)
    printed = capsys.readouterr().err
    assert "7 of the 8 GPUs" in printed
    assert "--nproc_per_node gpu" in printed

    # Rank 0 speaks for all.
    monkeypatch.setattr(hardware.dist, "rank", lambda: 1)
    hardware.report_idle_gpus(GPU)
    assert not capsys.readouterr().err
