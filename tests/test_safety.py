"""A run opens no door: permissions of what it writes, and no code is run from checkpoints."""

import glob
import os
import re
import stat

import pytest
import torch

import config
from conftest import ROOT
from helpers import train
from runtime import checkpoint


@pytest.mark.usefixtures("no_curves")
def test_nothing_is_writable_by_everybody(tmp_path, sets):
    """Whatever the umask."""
    out = str(tmp_path / "run")
    before = os.umask(0)
    try:
        train(out, sets, max_steps=2)
    finally:
        os.umask(before)

    paths = [out]
    for folder, folders, names in os.walk(out):
        paths += [os.path.join(folder, name) for name in folders + names]
    assert len(paths) > 9
    for path in paths:
        assert not os.stat(path).st_mode & stat.S_IWOTH, path


class CodeInPickle:
    """Unpickled in the ordinary way, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_checkpoints_run_no_code(tmp_path):
    path = str(tmp_path / "model.pt")
    made_by_code = tmp_path / "made-by-code"
    torch.save({"state_dict": CodeInPickle(str(made_by_code))}, path)
    with pytest.raises(config.ConfigError, match="cannot be read"):
        checkpoint.read(path)
    assert not made_by_code.exists()

    # Without weights_only=True the code would have run.
    torch.load(path, weights_only=False)
    assert made_by_code.exists()


def test_every_torch_load_is_told_to_run_no_code():
    paths = glob.glob(os.path.join(ROOT, "*.py"))
    for folder in ("bench", "ingest", "runtime", "tools"):
        paths += glob.glob(os.path.join(ROOT, folder, "*.py"))

    calls = []
    for path in paths:
        with open(path) as f:
            calls += re.findall(r"torch\.load\(.*", f.read())
    assert calls
    for call in calls:
        assert "weights_only=True" in call
