"""runtime/log.py under faults: a full disk, broken curves, bad samples, a lost evaluation."""

import glob
import json
import os
import tarfile

import pytest

import shapes
from helpers import SHORT_RUN, train
from runtime.log import MetricsFile


@pytest.mark.usefixtures("no_curves")
def test_rows_of_the_metrics_wait_for_a_full_disk(tmp_path, sets, monkeypatch, capsys):
    """The disk is full for three rows. They are written when there is room again."""
    plain_append = MetricsFile.append
    appended = []

    def append(self, row):
        appended.append(row)
        good_file = self.file
        if 3 <= len(appended) < 6:
            self.file = open("/dev/full", "wb", buffering=0)
        plain_append(self, row)
        self.file = good_file

    monkeypatch.setattr(MetricsFile, "append", append)
    rows = train(str(tmp_path / "run"), sets, max_steps=8)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert "bytes wait" in capsys.readouterr().err


def test_curves_that_cannot_be_drawn_do_not_fail_the_run(tmp_path, sets, monkeypatch, capsys):
    def broken_plot(folders, out):
        raise ZeroDivisionError

    monkeypatch.setattr("runtime.log.plot", broken_plot)
    train(str(tmp_path / "run"), sets, max_steps=2)
    assert "the curves could not be drawn: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.usefixtures("no_curves")
def test_a_finished_evaluation_is_not_lost(tmp_path, sets):
    """Killed between the last checkpoint and its evaluation: the next job only evaluates."""
    out = str(tmp_path / "run")
    settings = dict(max_steps=4, save_steps=4, log_steps=2, eval_data=sets["eval_data"])
    rows = train(out, sets, **settings)
    assert "eval/zeroshot_top1" in rows[-1]

    with open(os.path.join(out, "metrics.jsonl"), "w") as f:
        for row in rows[:-1]:
            f.write(json.dumps(row) + "\n")
        f.write('{"step": 4, "eval/zero')  # an incomplete line, as a crash leaves it
    assert train(out, sets, **settings, resume="auto") == rows
    assert train(out, sets, **settings, resume="auto") == rows


# ---- bad samples ----


def write_shapes_with_bad_images(folder, every):
    """Shards of shapes in which one image of `every` is none -> their pattern."""
    pattern = shapes.write(str(folder))
    for path in glob.glob(str(folder / "*.tar")):
        with tarfile.open(path) as tar:
            files = [(member.name, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(path, "w") as tar:
            images = 0
            for name, content in files:
                if name.endswith("png"):
                    if images % every == 0:
                        content = b"no picture"
                    images += 1
                shapes.add(tar, name, content)
    return pattern


@pytest.mark.usefixtures("no_curves")
def test_bad_samples_are_counted_over_all_jobs(tmp_path, capsys):
    """They are replaced, and counted by reason in the metrics and in the log, across jobs."""
    out = str(tmp_path / "run")
    sets = dict(train_data=write_shapes_with_bad_images(tmp_path / "few", 96))
    train(out, sets, **SHORT_RUN, stop_after=6)
    rows = train(out, sets, **SHORT_RUN, resume="auto")

    # 4 in each of 2 epochs, some of them before the last row.
    assert rows[-1]["bad"] == {"corrupt image": 8}
    assert rows[-2]["bad"]["corrupt image"] <= 8
    assert "bad 8: {'corrupt image': 8}" in capsys.readouterr().out


@pytest.mark.usefixtures("no_curves")
def test_too_many_bad_samples_stop_the_run(tmp_path):
    """More than 1 %."""
    sets = dict(train_data=write_shapes_with_bad_images(tmp_path / "many", 4))
    message = r"of 192 samples are bad: {'corrupt image': \d+}; look at the data"
    with pytest.raises(RuntimeError, match=message):
        train(str(tmp_path / "run"), sets, **SHORT_RUN)
