"""tools/compare.py: suites of runs, their records, tables and pictures.

Most runs here are those of a stub in place of train.py, which starts in a tenth of a second.
"""

import glob
import gzip
import os
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import config
from config import ConfigError
from helpers import ROOT, TINY
from tools import compare, comparison, comparison_page, comparison_picture, records, runner
from tools.suites import read_suite, settings_of

SUITE = """
title = "What rho does"
base = "../base.py"
settings = dict(epochs=2)
seeds = (1, 2)
x_label = "rho"
cases = []
for rho in (1.0, 2.0):
    cases.append(dict(series="v3", x=rho, settings=dict(rho=rho)))
    cases.append(dict(series="v2", x=rho, settings=dict(rho=rho + 0.5, algorithm="fastclip-v2")))
"""

# Ten steps, two epochs. What a run finds is rho/10 + seed/100. It fails with rho 13, waits while
# there is a file `slow`, and does not listen to SIGTERM while there is a file `deaf`.
STUB = """
import json, os, signal, sys, time
import config

c = config.load(sys.argv[1:])
os.makedirs(c.out_dir, exist_ok=True)
with open(c.out_dir + "/config.py", "w") as f:
    f.write(config.as_text(c))
if c.rho == 13:
    sys.exit("error: this cannot work")

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if os.path.exists("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
path = c.out_dir + "/metrics.jsonl"
start = 0
if os.path.exists(path):
    start = sum(1 for _ in open(path))
print("started at step", start, flush=True)

with open(path, "a", buffering=1) as f:
    for step in range(start + 1, 11):
        row = dict(step=step, epoch=step / 5, samples=step * c.batch_size, objective=1 / step)
        row.update(mbcl=2.0, tau=0.07, gamma=1.0, samples_per_second=100.0)
        f.write(json.dumps(row) + "\\n")
        while os.path.exists("slow") and step == 4 and not stopped:
            time.sleep(0.02)
        if stopped:
            sys.exit(0)
    f.write(json.dumps({"step": 10, "eval/zeroshot_top1": c.rho / 10 + c.seed / 100}) + "\\n")
"""

BASE = 'train_data = "data/train.tar"\neval_data = "data/test.tar"\nbatch_size = 20\n'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a suite and a stub in place of train.py -> its path; it is the present one."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "tiny.py").write_text(SUITE)
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "results.md").write_text("before\n<!-- tiny -->\n<!-- end of tiny -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "TRAIN", str(tmp_path / "stub.py"))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(runner, "visible_gpus", list)
    return tmp_path


def run_suite(*words):
    """The command on the suite of the fixture -> its exit status."""
    with pytest.raises(SystemExit) as end:
        compare.main(["experiments/tiny.py", "--jobs", "4", *words])
    return end.value.code


def states():
    """{name of a run: its state, a word}."""
    suite = read_suite("experiments/tiny.py")
    return {run.name: records.state_of(run).word for run in suite.runs}


def signals_once(condition, *numbers):
    """A thread that sends this process signals, one after another, once condition() is true."""

    def wait():
        while not condition():
            threading.Event().wait(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            threading.Event().wait(0.2)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def are_at_step_4():
    files = glob.glob("runs/experiments/tiny/*/metrics.jsonl")
    lengths = []
    for path in files:
        with open(path) as f:
            lengths.append(len(f.readlines()))
    return lengths == [4, 4, 4, 4]


# ---- running ----


def test_what_is_missing_is_run_and_recorded(project, capsys):
    assert run_suite() == 0
    assert set(states().values()) == {"recorded"}
    assert not glob.glob("runs/experiments/tiny/*")

    path = "experiments/tiny/v2_2.0_seed1.json.gz"
    record = records.read(path)
    assert (record["suite"], record["series"], record["x"], record["seed"]) == ("tiny", "v2", 2, 1)
    assert record["settings"]["rho"] == 2.5
    assert record["curve"]["samples"] == [20 * step for step in range(1, 11)]
    assert record["curve"]["objective"][2] == 0.333333
    assert record["evaluations"] == [{"step": 10, "samples": 200, "eval/zeroshot_top1": 0.26}]
    assert record["seconds"] == 2.0
    assert str(project) not in str(record)

    capsys.readouterr()
    assert run_suite() == 0
    assert "0 of 8 runs are missing" in capsys.readouterr().out

    # One alone is run again, and the same run gives the same bytes.
    with open(path, "rb") as f:
        content = f.read()
    os.remove(path)
    assert run_suite() == 0
    assert capsys.readouterr().out.count("started") == 1
    with open(path, "rb") as f:
        assert f.read() == content
    assert content[4:8] == bytes(4), "the time is in the file"


def test_a_run_that_another_suite_has_made_is_not_made_again(project, capsys):
    assert run_suite("--only", "v3") == 0
    other = SUITE.replace('series="v3"', 'series="ours"').replace("(1, 2)", "(2, 3)")
    (project / "experiments" / "other.py").write_text(other)

    with pytest.raises(SystemExit):
        compare.main(["experiments/other.py", "--only", "ours"])
    assert "other: 2 of 4 runs are missing" in capsys.readouterr().out
    record = records.read("experiments/other/ours_2.0_seed2.json.gz")
    assert (record["suite"], record["series"], record["seed"]) == ("other", "ours", 2)
    assert record["evaluations"][-1]["eval/zeroshot_top1"] == 0.22


def test_the_first_seed_of_all_cases_comes_first_and_only_chooses(project, capsys):
    names = [run.name for run in read_suite("experiments/tiny.py").runs]
    assert names[:4] == ["v3_1.0_seed1", "v2_1.0_seed1", "v3_2.0_seed1", "v2_2.0_seed1"]
    assert run_suite("--only", "v3", "seed2") == 0
    done = [name for name, state in states().items() if state == "recorded"]
    assert done == ["v3_1.0_seed2", "v3_2.0_seed2"]

    compare.main(["experiments/tiny.py", "--list", "--only", "v3_1.0"])
    assert capsys.readouterr().out.endswith(
        "missing   v3_1.0_seed1\nrecorded  v3_1.0_seed2\ntiny: 1 of 2 runs are recorded\n"
    )


def test_a_suite_that_was_stopped_goes_on_from_there(project, capsys):
    (project / "slow").touch()
    thread = signals_once(are_at_step_4, signal.SIGTERM)
    assert run_suite("--only", "seed1") == 130
    thread.join()
    assert list(states().values()) == ["begun"] * 4 + ["missing"] * 4
    assert "failed" not in capsys.readouterr().err

    (project / "slow").unlink()
    assert run_suite("--only", "seed1", "--keep") == 0
    assert list(states().values()) == ["recorded"] * 4 + ["missing"] * 4
    log = (project / "runs/experiments/tiny/v3_1.0_seed1.log").read_text()
    assert log == "started at step 0\nstarted at step 4\n"


def test_a_second_signal_ends_runs_that_do_not_listen(project):
    for name in ("slow", "deaf"):
        (project / name).touch()
    thread = signals_once(are_at_step_4, signal.SIGINT, signal.SIGINT)
    assert run_suite("--only", "seed1") == 130
    thread.join()
    assert "recorded" not in states().values()


def test_a_run_is_complete_with_its_last_evaluation(project):
    run = read_suite("experiments/tiny.py").runs[0]
    assert not runner.is_complete(run)
    os.makedirs(run.folder)
    with open(run.folder + "/metrics.jsonl", "w", buffering=1) as f:
        f.write('{"step": 5, "epoch": 1.0}\n{"step": 5, "eval/zeroshot_top1": 0.1}\n')
        assert runner.share_done(run) == 0.5
        assert not runner.is_complete(run)
        f.write('{"step": 10, "epoch": 2.0}\n')
        assert not runner.is_complete(run)
        f.write('{"step": 10, "eval/zeroshot_top1": 0.2}\n')
        assert runner.is_complete(run)


def test_a_failed_run_is_named_and_the_others_go_on(project, capsys):
    suite = project / "experiments" / "tiny.py"
    suite.write_text(SUITE.replace("(1.0, 2.0)", "(13.0, 2.0)"))
    assert run_suite() == 1
    assert list(states().values()).count("recorded") == 6
    printed = capsys.readouterr().err
    assert "v3_13.0_seed1 failed, exit status 1" in printed
    assert "    error: this cannot work" in printed
    assert "error: 2 runs failed: v3_13.0_seed1, v3_13.0_seed2" in printed


def test_a_run_begun_with_other_settings_starts_anew(project, capsys):
    suite = project / "experiments" / "tiny.py"
    (project / "slow").touch()
    thread = signals_once(are_at_step_4, signal.SIGTERM)
    run_suite("--only", "seed1")
    thread.join()

    (project / "slow").unlink()
    suite.write_text(SUITE.replace("dict(epochs=2)", "dict(epochs=2, lr=0.5)"))
    assert run_suite("--only", "v3_1.0_seed1") == 0
    assert "v3_1.0_seed1: begun with other settings" in capsys.readouterr().out
    assert states()["v3_1.0_seed1"] == "recorded"


def test_a_record_of_other_settings_is_stale_until_it_is_run_again(project, capsys):
    suite = project / "experiments" / "tiny.py"
    run_suite()
    suite.write_text(SUITE.replace("dict(rho=rho)", "dict(rho=rho * 2, log_steps=7)"))
    compare.main(["experiments/tiny.py", "--list", "--only", "v3_2.0_seed1"])
    assert "stale     v3_2.0_seed1  rho 2.0, now 4.0\n" in capsys.readouterr().out

    compare.main(["experiments/tiny.py", "--report", "--results", "results.md"])
    text = (project / "results.md").read_text()
    assert "4 of 8 runs are recorded" in text
    assert "| v3 |" not in text

    assert run_suite() == 0
    assert records.read("experiments/tiny/v3_2.0_seed1.json.gz")["settings"]["rho"] == 4


def test_an_option_that_came_later_makes_no_record_stale_at_its_default():
    settings = {"lr": 1e-3}
    assert records.differences(settings, config.Config(lr=1e-3)) == ""
    assert records.differences(settings, config.Config(lr=2e-3, rho=3.0)) == (
        "rho 6.5, now 3.0, lr 0.001, now 0.002"
    )


def test_a_damaged_record_is_named(project):
    os.mkdir("experiments/tiny")
    with gzip.open("experiments/tiny/v3_1.0_seed1.json.gz", "wb") as f:
        f.write(b"{")
    with pytest.raises(ConfigError, match="v3_1.0_seed1.json.gz is no record"):
        states()


def test_a_real_run(project, sets, monkeypatch):
    monkeypatch.setattr(runner, "TRAIN", os.path.join(ROOT, "train.py"))
    os.mkdir("data")
    os.symlink(os.path.dirname(sets["train_data"]), "data/train")
    os.symlink(os.path.dirname(sets["eval_data"]), "data/test")
    settings = {**TINY, "train_data": "data/train/*.tar", "eval_data": "data/test/*.tar"}
    settings.update(max_steps=4, eval_steps=2, log_steps=1, device="cpu")
    suite = SUITE.replace("dict(epochs=2)", repr(settings))
    (project / "experiments" / "tiny.py").write_text(suite)

    assert run_suite("--only", "v3_1.0_seed1") == 0
    record = records.read("experiments/tiny/v3_1.0_seed1.json.gz")
    assert [row["step"] for row in record["evaluations"]] == [2, 4]
    assert record["curve"]["step"] == [1, 2, 3, 4]
    assert record["samples_per_second"] > 0
    assert record["threads"] >= 1


def test_places(monkeypatch):
    monkeypatch.setattr(runner.harness, "cores", lambda: 8)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 0)
    assert runner.places() == [runner.Place(None, 1, 0)] * 8
    assert runner.places(jobs=2) == [runner.Place(None, 4, 0)] * 2

    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place.gpu for place in runner.places(jobs_per_gpu=2)] == ["3", "5", "3", "5"]
    with pytest.raises(ConfigError, match="must be positive"):
        runner.places(jobs_per_gpu=0)


# ---- suites ----


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("seeds = (1, 2)", "", "needs seeds"),
        ("seeds = (1, 2)", "seeds = (1, 1)", "different numbers"),
        ("x=rho", "x=1", "two cases have the name 'v3_1_seed1'"),
        ("epochs=2", "epoch=2", "did you mean 'epochs'"),
        ("epochs=2", "train_data='/x/*.tar'", "would be of this machine alone"),
        ("epochs=2", "eval_data=()", "needs eval_data"),
        ("x=rho, ", "", "a case is dict"),
        ("x=rho", "x=str(rho)", "trend = True needs numbers"),
        ("cases = []", "cases = [] + 1", "tiny.py, line 8: TypeError"),
        ("cases = []", "cases = [", "tiny.py, line 8: SyntaxError"),
        ("cases = []", "reference = 'v4'\ncases = []", "no series is called 'v4'"),
    ],
)
def test_a_suite_that_cannot_work_is_refused(project, old, new, message):
    path = project / "experiments" / "tiny.py"
    path.write_text("trend = True\n" + SUITE.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_suite(str(path))


def test_the_tuning_gives_fastclip_no_more_runs_than_openclip(monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = read_suite("experiments/tune_batch_size.py")
    counts = {}
    for run in suite.runs:
        side = "OpenCLIP, tau constant" if run.config.lr_tau == 0 else run.config.algorithm
        counts[side, run.x] = counts.get((side, run.x), 0) + 1
        assert "emoji/tune/" in run.config.train_data[0]
        assert "emoji/tune/" in run.config.eval_data[0]
    assert len(counts) == 4 * 3
    for x in suite.xs:
        for algorithm in ("fastclip-v1", "fastclip-v3"):
            assert 3 <= counts[algorithm, x] <= counts["OpenCLIP, tau constant", x]


def test_settings_are_chosen_on_other_data_than_the_test(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in glob.glob("experiments/tune_*.py"):
        for run in read_suite(path).runs:
            assert "/val/" in run.config.eval_data[0], run.name


@pytest.mark.parametrize("name, shared", [("memory", 27), ("temperature", 9)])
def test_suites_share_runs_whose_settings_they_repeat(monkeypatch, name, shared):
    """Each suite can be read alone, so that settings stand in several, which must agree."""
    monkeypatch.chdir(ROOT)
    runs = read_suite(f"experiments/{name}.py").runs
    others = read_suite("experiments/batch_size.py").runs
    settings = {records.as_text(settings_of(run.config)) for run in runs}
    settings_of_others = {records.as_text(settings_of(run.config)) for run in others}
    assert len(settings & settings_of_others) == shared


def test_the_page_of_results_is_what_the_records_give(monkeypatch):
    monkeypatch.chdir(ROOT)
    with open("docs/results.md", encoding="utf-8") as f:
        page = f.read()
    for path in sorted(glob.glob("experiments/*.py")):
        suite = read_suite(path)
        text = comparison_page.section(suite, records.current(suite))
        assert f"<!-- {suite.name} -->\n\n{text}\n\n<!-- end of {suite.name} -->\n" in page, (
            "run: make results"
        )


# ---- numbers ----


def test_intervals_by_hand():
    differences = np.array([1.0, 2.0, 6.0])  # mean 3, standard deviation sqrt(7)
    half = 4.303 * np.sqrt(7 / 3)
    assert comparison.t_interval(differences) == pytest.approx((3 - half, 3 + half))
    # One of 27 draws is three times the smallest: 3.7 %, more than 2.5 %.
    assert comparison.bootstrap_interval(differences) == pytest.approx((1, 6))


def test_the_trend_of_a_difference_by_hand():
    # v3 leads v2 by 4, 3 and 2 with seed 1, by 6, 3 and 0 with seed 2; seed 3 lacks one x.
    leads = {16: {1: 4, 2: 6, 3: 9}, 32: {1: 3, 2: 3}, 64: {1: 2, 2: 0, 3: 9}}
    cells = {}
    for x, by_seed in leads.items():
        others = dict.fromkeys(by_seed, 20)
        values = {seed: 20 + lead for seed, lead in by_seed.items()}
        cells["v2", x] = comparison.Cell("v2", x, others, others, {}, {})
        cells["v3", x] = comparison.Cell("v3", x, values, values, {}, {})
    suite = SimpleNamespace(xs=[16, 32, 64, 128], seeds=(1, 2, 3))  # none has 128

    xs, differences = comparison.differences_of_seeds(suite, cells, "v3", "v2")
    assert xs == [16, 32, 64]
    assert differences.tolist() == [[4, 3, 2], [6, 3, 0]]
    assert comparison.slopes_of(xs, differences) == pytest.approx([-1, -3])


def test_a_measure_may_be_a_mean_over_sets():
    row = {"eval/a/zeroshot_top1": 0.2, "eval/b/zeroshot_top1": 0.4, "eval/a/zeroshot_top5": 0.9}
    assert records.value_of(row, "eval/*/zeroshot_top1") == pytest.approx(0.3)
    assert records.value_of(row, "eval/a/zeroshot_top1") == 0.2
    assert records.value_of(row, "eval/zeroshot_top1") is None


def test_the_tables_and_the_picture(project):
    (project / "experiments" / "tiny.py").write_text(
        SUITE + "curves = True\ntrend = True\nalso = ('eval/zeroshot_top*',)\n"
    )
    run_suite()
    compare.main(["experiments/tiny.py", "--report", "--results", "results.md"])
    text = (project / "results.md").read_text()
    assert text.startswith("before\n<!-- tiny -->\n\nWhat rho does.\n")
    assert text.endswith("\n<!-- end of tiny -->\nafter\n")
    # v3: 10 + 1 and 10 + 2 %. v2 is 5 above it with either seed, at either rho.
    assert "\n| 1.0 | v3 | 11.5 ± 0.7 (2) | 11.5 | 0.070 |\n" in text
    assert "\n| 1.0 | v2 | 16.5 ± 0.7 (2) | 16.5 | 0.070 |\n" in text
    assert "\n| v2 | 16.5 ± 0.7 (2) | 26.5 ± 0.7 (2) |\n" in text
    assert "\n| v2 | v3 | +5.0 (+5.0 to +5.0) | +5.0 (+5.0 to +5.0) |\n" in text
    assert "\n| 1.0 | v2 | v3 | +5.0 (2) | +5.0 to +5.0 | +5.0 to +5.0 |\n" in text
    trend = "| v2 | v3 | +5.0 (2) | +5.0 to +5.0 | 0.0 (2) | 0.0 to 0.0 |\n"
    assert f"\n| zeroshot_top1 {trend}" in text
    assert f"\n| zeroshot_top* {trend}" in text

    with open("experiments/tiny.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    compare.main(["experiments/tiny.py", "--report", "--results", "results.md"])
    assert (project / "results.md").read_text() == text


def test_a_series_may_have_several_references_of_which_the_first_is_drawn(project):
    more = "cases.append(dict(series='v1', x=1.0, settings=dict(algorithm='fastclip-v1')))\n"
    reference = "reference = {'v2': ('v3', 'v1'), 'v1': 'v3'}\n"
    (project / "experiments" / "tiny.py").write_text(SUITE + more + reference)
    suite = read_suite("experiments/tiny.py")
    assert suite.pairs == (("v2", "v3"), ("v2", "v1"), ("v1", "v3"))
    assert comparison_picture.first_pairs(suite) == [("v2", "v3"), ("v1", "v3")]


def test_the_panel_of_differences_has_their_intervals(project):
    import matplotlib.pyplot as plt

    (project / "experiments" / "tiny.py").write_text(SUITE + "trend = True\n")
    run_suite()
    suite = read_suite("experiments/tiny.py")
    cells = comparison.cells_of(suite, records.current(suite))
    cells["v2", 2.0].last[2] += 0.02  # differences 5 and 7 at x = 2

    figure, axis = plt.subplots()
    comparison_picture.draw_differences(axis, suite, cells)
    (bars,) = axis.containers
    points, _, (lines,) = bars
    assert list(points.get_ydata()) == pytest.approx([5, 6])
    at_1, at_2 = lines.get_segments()
    assert list(at_1[:, 1]) == pytest.approx([5, 5])
    assert list(at_2[:, 1]) == pytest.approx([6 - 12.706, 6 + 12.706])
    plt.close(figure)


def test_series_may_be_drawn_at_their_temperature_and_compared_with_nothing(project):
    import matplotlib.pyplot as plt

    text = 'reference = {}\nlog_x = True\nat_last_tau = ("v3",)\n'
    (project / "experiments" / "tiny.py").write_text(SUITE + text)
    run_suite()
    suite = read_suite("experiments/tiny.py")
    cells = comparison.cells_of(suite, records.current(suite))
    assert "ifference" not in comparison_page.section(suite, records.current(suite))

    figure, axis = plt.subplots()
    comparison_picture.draw_against_x(axis, suite, cells)
    lines = {line.get_label(): list(line.get_xdata()) for line in axis.lines}
    assert lines["v3"] == [0.07, 0.07]
    assert lines["v2"] == [1.0, 2.0]
    plt.close(figure)


def test_nothing_is_said_of_series_and_differences_without_records(project):
    assert run_suite("--only", "v3") == 0
    suite = read_suite("experiments/tiny.py")
    text = comparison_page.section(suite, records.current(suite))
    assert "| 1.0 | v3 | 11.5" in text
    assert "v2" not in text
    assert "ifference" not in text


def test_the_best_of_each_side_of_a_tuning(project):
    (project / "experiments" / "tiny.py").write_text(SUITE + 'best_of = ("v3", "v")\n')
    assert run_suite("--only", "seed1") == 0
    suite = read_suite("experiments/tiny.py")
    cells = comparison.cells_of(suite, records.current(suite))
    assert comparison_page.best_table(suite, cells).splitlines() == [
        "| rho | v3 | v |",
        "| --- | --- | --- |",
        "| 1.0 | 11.0 (; of 1) | 16.0 (2; of 2) |",
        "| 2.0 | 21.0 (; of 1) | 26.0 (2; of 2) |",
    ]


def test_a_page_without_a_place_is_refused(project):
    with pytest.raises(ConfigError, match="add the lines <!-- other -->"):
        comparison_page.write_section("results.md", "other", "text")
