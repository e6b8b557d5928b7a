"""Jobs that are asked to stop: signals, stop_after, and chains of jobs that equal one."""

import os
import re
import signal
import subprocess

import pytest

from conftest import ROOT
from helpers import (
    SHORT_RUN,
    TINY,
    TORCHRUN,
    assert_same_run,
    environment,
    newest_checkpoint,
    run,
    train,
    words_of,
)

pytestmark = pytest.mark.usefixtures("no_curves")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_a_signal_saves_and_leaves(tmp_path, sets, fault, capsys, name):
    """The run that is continued equals one that was not interrupted.

    This includes the rows of the metrics, one in three steps.
    """
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    train(one, sets, **SHORT_RUN)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]

    fault(f"{name}@5:0")
    train(two, sets, **SHORT_RUN)
    assert newest_checkpoint(two) == "step-00000006"
    assert f"stopped after step 6 of 12 (SIG{name})" in capsys.readouterr().out
    assert handlers == [signal.getsignal(number) for number in STOP_SIGNALS]

    train(two, sets, **SHORT_RUN, resume="auto")
    assert_same_run(one, two)


def test_a_signal_to_one_rank_stops_all(tmp_path, sets):
    """SIGUSR1 to one rank of two: both save the same step and end in good order."""
    out = str(tmp_path / "run")
    settings = {**TINY, **SHORT_RUN, "train_data": sets["train_data"], "out_dir": out}
    result = run("tests/faults.py", "USR1@3:1", ranks=2, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stopped after step 4 of 12" in result.stdout
    assert newest_checkpoint(out) == "step-00000004"

    # Then SIGTERM to torchrun, in a longer continuation of the run.
    settings.update(resume="auto", epochs=50, max_steps=0)
    agent = subprocess.Popen(
        [
            *TORCHRUN,
            "--standalone",
            "--nproc_per_node=2",
            os.path.join(ROOT, "train.py"),
            *words_of(**settings),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in agent.stdout:
        if line.startswith("step "):
            break
    agent.send_signal(signal.SIGTERM)
    printed = agent.communicate(timeout=60)[0]
    stopped = re.search(r"stopped after step (\d+) of 300 \(SIGTERM\)", printed)
    assert stopped, printed
    step = int(stopped[1])
    assert step > 5
    assert newest_checkpoint(out) == f"step-{step:08d}"


@pytest.mark.parametrize("stop_after", [5, "0.05s"])
def test_a_chain_of_jobs_equals_one(tmp_path, sets, capsys, stop_after):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {**SHORT_RUN, "max_steps": 7}
    train(one, sets, **settings)

    jobs = 0
    while jobs == 0 or newest_checkpoint(two) != "step-00000007":
        train(two, sets, **settings, resume="auto", stop_after=stop_after)
        jobs += 1
        assert jobs < 12
    if stop_after == 5:
        assert jobs == 2
    else:
        assert jobs > 2

    # A job too many does no harm.
    train(two, sets, **settings, resume="auto", stop_after=stop_after)
    assert "already at step 7 of 7" in capsys.readouterr().out.splitlines()[-1]
    assert_same_run(one, two, 7)
