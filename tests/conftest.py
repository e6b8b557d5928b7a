"""Fixtures, and the import path: the project's files and the tests' helpers.

The path holds for this process and for those that tests start.
"""

import os
import sys
import tempfile

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2] + [os.environ.get("PYTHONPATH", "")])

# The tests keep indexes of evaluation sets here and not in the user's cache. Removed at the end.
CACHE = tempfile.TemporaryDirectory(prefix="fastclip-cache-")
os.environ["FASTCLIP_CACHE"] = CACHE.name

import faults  # noqa: E402 (the path comes first)
import shapes  # noqa: E402


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Shards of coloured shapes, to train on and to evaluate."""
    folder = str(tmp_path_factory.mktemp("shapes"))
    return dict(
        train_data=shapes.write(folder + "/train"),
        eval_data=shapes.write(folder + "/test", 1, 96, seed=1, classes=True),
    )


@pytest.fixture
def fault():
    """fault("raise@5:0"): the next training in this process has this fault (see faults.py)."""
    yield lambda text: faults.install(faults.parse(text))
    faults.uninstall()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of indexes for this test alone, and no waiting before a shard is tried again."""
    monkeypatch.setenv("FASTCLIP_CACHE", str(tmp_path / "cache" / "fastclip"))
    monkeypatch.setattr("ingest.reader.BACK_OFF", (0.01, 0.01, 0.01))
    return tmp_path / "cache" / "fastclip"


@pytest.fixture
def no_curves(monkeypatch):
    """Curves are not drawn. That takes longer than a tiny run, and test_train.py tests it."""
    monkeypatch.setattr("runtime.log.plot", lambda folders, out: out)


@pytest.fixture
def in_this_process(monkeypatch):
    """What the bench measures in processes of its own runs in this one."""
    import torch.distributed.nn

    from bench import harness
    from helpers import InThisProcess

    monkeypatch.setattr(harness, "Worker", InThisProcess)
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None, raising=False)
    # The loss of open_clip's side replaces this one; monkeypatch puts it back.
    monkeypatch.setattr(torch.distributed.nn, "all_gather", torch.distributed.nn.all_gather)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread():
    """One thread: for small tensors, threads that wait for each other are three times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
