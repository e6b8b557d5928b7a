"""python -m bench gpu at toy size on the CPU: every part, going on where it stopped, its page."""

import argparse
import json
import warnings

import pytest
import torch
from torch._dynamo.utils import CompilationMetrics

import train as training
from bench import __main__ as bench
from bench import checks, end_to_end, gpu, harness, jobs, page, picture, report, step
from config import ConfigError

pytest.importorskip("open_clip")


def run(folder, *words):
    """The command at toy size -> (exit status, rows of its results file)."""
    out = folder / "gpu.json"
    status = bench.main(["gpu", "--toy", "--device=cpu", f"--out={out}", *words])
    return status, json.loads(out.read_text())["rows"]


def jobs_in(rows):
    return list(dict.fromkeys(row["job"] for row in rows))


def train_here(words, limit):
    """In place of end_to_end.train, without processes for the data, either."""
    training.main([*words, "--workers=0"])


def two_ranks_at_once(num_ranks, function, args, **options):
    """In place of harness.on_ranks: what test_two_ranks runs in processes."""
    return [{"fp32": [2.0], "bf16": [2.0]}] * num_ranks


def note_picture(rows, path):
    """In place of picture.draw, which takes a second after each job; see test_bench.py."""
    with open(path, "w") as f:
        f.write(str(len(rows)))


@pytest.fixture
def here(in_this_process, no_curves, monkeypatch):
    """All of the command runs in this process."""
    monkeypatch.setattr(end_to_end, "train", train_here)
    monkeypatch.setattr(harness, "on_ranks", two_ranks_at_once)
    monkeypatch.setattr(picture, "draw", note_picture)
    monkeypatch.setattr(checks, "PYTEST", ("-c", "print('3 passed, 1 skipped in 5s')"))


# ---- the command ----


def test_every_part_and_what_is_missing(tmp_path, here, monkeypatch):
    names = [job.name for job in gpu.jobs_of(toy_args())]
    assert len(names) == len(set(names)) == 18

    # After no time at all, only the first one is run.
    _, rows = run(tmp_path, "--part=A", "--minutes=0.0001")
    assert jobs_in(rows) == ["machine"]

    # One side of one of them runs out of memory. The others, and a smaller batch, are measured.
    with_little_memory(monkeypatch, batch=20)
    status, rows = run(tmp_path, "--minutes=0")
    assert status == 1
    assert jobs_in(rows) == names
    (failed,) = jobs.failures(rows)
    assert (failed["mode"], failed["side"], failed["job"]) == ("step", "open_clip", names[12])
    of_vit = [row for row in rows if row["job"] == names[12]]
    assert [(row["side"], row["settings"]["batch"]) for row in of_vit] == [
        ("ours", 20),
        ("open_clip", 20),
        ("ours", 14),
        ("open_clip", 14),
    ]

    # Nothing is missing, and what failed is not tried again.
    assert run(tmp_path) == (1, rows)

    shown = (tmp_path / "gpu.md").read_text()
    assert "failed: OutOfMemoryError: CUDA out of memory" in shown
    for title in list(page.SECTIONS.values())[1:]:
        assert f"## {title}" in shown


def toy_args():
    return bench.parse(["gpu", "--toy", "--device=cpu", "--out=gpu.json"])


def with_little_memory(monkeypatch, batch):
    """open_clip runs out of memory at this batch size."""
    make_trainer = step.make_trainer

    def limited(args, side, *rest):
        if side == "open_clip" and args.batch == batch:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make_trainer(args, side, *rest)

    monkeypatch.setattr(step, "make_trainer", limited)


@pytest.mark.parametrize(
    "words, message",
    [
        (["gpu", "--device=cpu"], "torch sees none here"),
        (["gpu", "--toy", "--device=cpu"], "--toy needs --out"),
    ],
)
def test_what_makes_no_sense_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        bench.parse(words)


# ---- going on where it stopped ----


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, but for what a test adds to it: [seconds]."""
    seconds = [0.0]
    monkeypatch.setattr(jobs, "time", argparse.Namespace(monotonic=lambda: seconds[0]))
    return seconds


def make_jobs(clock, ran, broken=(), slow=()):
    """Three jobs of three minutes, which append their names to `ran`."""

    def run(args):
        ran.append(args.name)
        clock[0] += 180
        if args.name in broken:
            raise ValueError("two lines\nof text")
        met = args.name not in slow
        return [report.row("job", args.name, {}, "ms", [1.0], goal="to be fast", met=met)]

    result = []
    for name in ("one", "two", "three"):
        args = argparse.Namespace(name=name, model="RN50", batch=4)
        result.append(jobs.Job(name, run, args, minutes=3))
    return result


def go(folder, clock, ran, minutes=0, retry=False, **faults):
    args = argparse.Namespace(out=str(folder / "b.json"), minutes=minutes, retry=retry)
    shown = []
    rows = jobs.run_missing(make_jobs(clock, ran, **faults), args, shown.append)
    assert not shown or shown[-1] == rows
    return rows


def test_only_what_is_missing_is_run(tmp_path, clock):
    ran = []
    # Two jobs of three minutes do not fit into five.
    go(tmp_path, clock, ran, minutes=5)
    assert ran == ["one"]
    go(tmp_path, clock, ran, minutes=6)
    assert ran == ["one", "two", "three"]
    assert [row["side"] for row in go(tmp_path, clock, ran)] == ["one", "two", "three"]
    assert ran == ["one", "two", "three"]


def test_what_failed_is_noted_and_run_again_when_asked(tmp_path, clock):
    ran = []
    rows = go(tmp_path, clock, ran, broken=["two"], slow=["three"])
    assert ran == ["one", "two", "three"]
    (failed,) = jobs.failures(rows)
    assert failed["failed"] == "ValueError: two lines"
    assert jobs.exit_status(rows) == 1

    go(tmp_path, clock, ran)
    assert len(ran) == 3
    rows = go(tmp_path, clock, ran, retry=True)
    assert ran[3:] == ["two", "three"]
    assert not jobs.failures(rows), "its rows replace the failed one"
    assert not jobs.missed(rows)
    assert jobs.exit_status(rows) == 0


def test_all_goes_on_by_mode(tmp_path, clock, monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "jobs_of_all", lambda args: make_jobs(clock, ran))
    words = ["all", "--device=cpu", f"--out={tmp_path}/b.json"]
    bench.main([*words, "--minutes=1"])
    assert ran == ["one"]
    bench.main(words)
    assert ran == ["one", "two", "three"]


# ---- part A ----


def test_two_ranks():
    args = next(job.args for job in gpu.jobs_of(toy_args()) if job.name == "two ranks")
    in_fp32, in_bf16 = checks.two_ranks(args)
    assert in_fp32["median"] < 1e-4
    assert in_fp32["met"]
    assert 0 < in_bf16["median"] < 1e-2


@pytest.mark.parametrize("model", ["ViT-B-32", "RN50"])
def test_gradients_are_compared_with_float32(model, monkeypatch, in_this_process):
    name = f"numbers {model}"
    args = next(job.args for job in gpu.jobs_of(toy_args()) if job.name == name)
    rows = checks.numbers(args)
    assert [row["side"] for row in rows] == [variant.side for variant in checks.variants(args)]
    assert rows[-1]["skipped"] == "fp16 needs a GPU"
    for row in rows[:-1]:
        assert row["met"] and row["median"] > 0.99, row

    monkeypatch.setattr(checks, "gradient", wrong_in_bf16(checks.gradient))
    for row in checks.numbers(args)[:-1]:
        assert not row["met"], row


def wrong_in_bf16(gradient):
    """checks.gradient, which in bf16 points elsewhere."""

    def wrong(args, batches, variant):
        found = gradient(args, batches, variant)
        return found.flip(0) if variant.precision == "bf16" else found

    return wrong


class WaitingTrainer:
    """Steps that make torch warn, as it does where the host waits for a GPU."""

    batches = iter(range(100))

    def step(self, batch):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)


def test_waits_for_the_gpu_are_counted_by_their_place(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    row = checks.waits_row(WaitingTrainer(), {}, torch.device("cuda"))
    ((place, count),) = row["places"].items()
    assert place.startswith("tests/test_bench_gpu.py:")
    assert row["median"] == count == 4
    assert not row["met"]
    assert modes == ["warn", "default"]


def test_kernels_that_take_longest():
    def event(name, milliseconds):
        time = 1000 * milliseconds
        return argparse.Namespace(key=name, self_device_time_total=time, self_cpu_time_total=0)

    events = [event("short", 5), event("long", 50), event("shorter", 1)]
    profile = argparse.Namespace(key_averages=lambda: events)
    # Of five steps.
    assert checks.longest_kernels(profile, on_gpu=True, count=2) == {"long": 10, "short": 1}


def double(x):
    return x * 2


def test_compilations_are_counted_with_their_reasons():
    compiled = torch.compile(double, backend="eager", dynamic=False)
    compiled(torch.ones(3))
    checks.count_compilations()
    compiled(torch.ones(3))
    assert checks.compilations_row({})["met"], "nothing new"

    compiled(torch.ones(4))
    row = checks.compilations_row({})
    assert row["median"] == 1
    assert not row["met"]
    if hasattr(CompilationMetrics, "recompile_reason"):  # torch 2.6 does not tell
        (reason,) = row["reasons"]
        assert "expected 3, actual 4" in reason


def test_counts_of_tests():
    printed = "....\nFAILED tests/a.py::b - x\n2 failed, 10 passed, 3 skipped, 900 deselected in 5s"
    assert checks.counts_of_tests(printed) == dict(passed=10, failed=2, skipped=3, error=0)
    assert checks.counts_of_tests("") == dict(passed=0, failed=0, skipped=0, error=0)


# ---- part D ----


def test_a_run_that_fails_says_its_last_words():
    with pytest.raises(harness.WorkerError) as error:
        end_to_end.train(["--no_such_key=1"], limit=60)
    assert error.value.reason.startswith("train.py ended with status 1: error: ")
    assert "no_such_key" in error.value.reason


# ---- the page ----


def step_row(model, side, speed, batch=64, **more):
    settings = dict(model=model, batch=batch, precision="bf16")
    return report.row("step", side, settings, "samples/s", [speed], peak_bytes=1, **more)


def test_the_page_shows_goals_and_failures(tmp_path):
    rows = [
        step_row("ViT-B-16", "ours compiled", 930.0, mfu_padded=0.49),
        step_row("ViT-B-16", "open_clip compiled", 700.0),
        step_row("ViT-B-16", "released", 600.0),
        step_row("ViT-B-16", "ours compiled", 920.0, batch=32, mfu_padded=0.48),
        step_row("ViT-B-16", "open_clip compiled", 500.0, batch=32),
        report.failed("step", "open_clip", dict(model="RN50", batch=8), "OutOfMemoryError: a | b"),
        report.row("watch", "idle", {}, "of the time", [0.3], goal="< 0.1", met=False),
        report.row("run", "speed", dict(model="ViT-B-16", batch=64), "samples/s", [837.0]),
    ]
    out = tmp_path / "b.json"
    report.save(rows, str(out))
    page.write(rows, str(out), str(tmp_path / "b.png"))
    lines = (tmp_path / "b.md").read_text().splitlines()

    # 930 / 600 = 1.55, and 930 / 700 = 1.33 at the larger of two batches.
    assert "| ViT-B-16: 1.5 times the released code | 1.55 x | met |" in lines
    assert "| ViT-B-16: 1.2 times compiled open_clip | 1.33 x | met |" in lines
    assert "| ViT-B-16: 50 % MFU, counted at padded FLOPs | 49% | **missed** |" in lines
    assert "| ViT-B-16: more than 926 pairs/s on one H100 | 930 pairs/s | met |" in lines
    assert "| RN50: 1.2 times compiled open_clip | not yet | |" in lines

    assert "* step open_clip, RN50 8: OutOfMemoryError: a / b" in lines
    assert "* watch idle: 0.3 of the time instead of < 0.1" in lines
    assert any("837 samples/s" in line and "90% of the step alone" in line for line in lines)
    assert any("TF32" in line for line in lines)
    assert "![all of it in one picture](b.png)" in lines
