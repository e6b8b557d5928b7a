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
    metrics,
    newest_checkpoint,
    run,
    run_jobs,
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


def test_a_signal_leaves_an_evaluation(tmp_path, sets, capsys):
    """At step 6, at the end, and when the next job makes up for it: none of it costs anything."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    settings = {**TINY, **SHORT_RUN, **sets, "eval_steps": 6}
    assert run_jobs(("", dict(settings, out_dir=one))) == [None]

    settings.update(out_dir=two, resume="auto")
    for fault, evaluated in (
        ("eval-TERM@6:0", []),  # saved because of the signal
        ("eval-TERM@12:0", [6]),
        ("eval-TERM@0:0", [6]),  # before the first step of this job
    ):
        assert run_jobs((fault, settings)) == [None]
        step = 6 if "@6" in fault else 12
        printed = capsys.readouterr().out
        assert f"stopped after step {step} of 12 (SIGTERM during the evaluation)" in printed
        assert newest_checkpoint(two) == f"step-{step:08d}"
        assert evaluations(two) == evaluated

    assert run_jobs(("", settings)) == [None]
    assert evaluations(two) == [6, 12]
    assert os.path.exists(os.path.join(two, "eval.json"))
    assert_same_run(one, two)


def test_a_signal_to_one_rank_leaves_the_evaluation_of_all(tmp_path, sets):
    out = str(tmp_path / "run")
    settings = {**TINY, **SHORT_RUN, **sets, "eval_steps": 6, "out_dir": out}
    result = run("tests/faults.py", "eval-TERM@6:1", ranks=2, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stopped after step 6 of 12 (a signal during the evaluation)" in result.stdout
    assert newest_checkpoint(out) == "step-00000006"
    assert evaluations(out) == []


def test_a_signal_after_the_last_step_changes_nothing(tmp_path, sets, monkeypatch, capsys):
    """While the curves are drawn, when all is saved."""
    monkeypatch.setattr("runtime.log.plot", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or "")
    train(str(tmp_path / "run"), sets, **SHORT_RUN)
    assert "done in" in capsys.readouterr().out
    assert newest_checkpoint(str(tmp_path / "run")) == "step-00000012"


def evaluations(out_dir):
    return [row["step"] for row in metrics(out_dir) if "eval/zeroshot_top1" in row]


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
