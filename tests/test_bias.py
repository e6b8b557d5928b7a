"""tools/bias.py: the true g by loops, u where it must come to it, the page from the records."""

import math
import os

import pytest
import torch
import torch.nn.functional as F

import data
import train as training
from config import ConfigError
from helpers import ROOT, TINY, TINY_RESNET, checkpoint_folder, train
from loss import ContrastiveLoss, log_add
from tools import bias, bias_page, records
from tools.suites import read_suite


def features(n, d=5):
    """Features of n images and of n texts, float64 (2, n, d)."""
    g = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(2, n, d, generator=g, dtype=torch.float64), dim=-1)


# ---- the numbers ----


@pytest.mark.parametrize("size", [12, 4])
def test_contrast_is_that_of_loops(size):
    e1, e2 = features(12)
    rows = torch.arange(4, 12)
    tau = torch.linspace(0.1, 0.4, 8)
    log_g, exponent = bias.contrast(e1, e2, rows, tau, size)

    for k, i in enumerate(rows.tolist()):
        start = i // size * size
        others = [j for j in range(start, start + size) if j != i]
        x = [float(e1[i] @ (e2[j] - e2[i])) / float(tau[k]) for j in others]
        w = [math.exp(each) for each in x]
        weighted = sum(a * b for a, b in zip(w, x)) / sum(w)
        assert log_g[k].item() == pytest.approx(math.log(sum(w) / len(w)), abs=1e-6)
        assert exponent[k].item() == pytest.approx(weighted, abs=1e-6)


def test_with_a_frozen_model_and_gamma_1_over_k_u_comes_to_the_true_g():
    """Then u is the mean of k estimates that are unbiased. Their logarithms stay biased."""
    N, B, epochs = 64, 8, 200
    e1, e2 = features(N)
    tau = torch.tensor(0.2, dtype=torch.float64)
    loss = ContrastiveLoss("sogclr", N, eps_u=0.0, dtype=torch.float64)
    torch.manual_seed(0)

    for epoch in range(epochs):
        ids = torch.randperm(N)
        for batch in ids.split(B):
            loss(e1[batch], e2[batch], -tau.log(), loss.lookup(batch), gamma=1 / (epoch + 1))

    divergences = {"true": [], "batch": [], "u": []}
    for _ in range(50):
        ids = torch.randperm(N)
        log_u = loss.state.table[ids, 0]
        rows = torch.arange(N)
        found = bias.estimates(loss, e1[ids], e2[ids], rows, tau.expand(N), log_u, 1e-9, B)
        result = bias.statistics(found)
        for name, values in divergences.items():
            values.append(result[name]["divergence"])

    assert abs(result["u"]["mean"]) < 0.02
    assert result["u"]["deviation"] < 0.1
    assert result["u"]["rank_correlation"] > 0.99
    assert result["batch"]["mean"] < -0.2
    assert result["batch"]["weight"] > 1.3

    # So is what moves v3's temperature, on average over the batches.
    true, batch, u = (sum(values) / 50 for values in divergences.values())
    assert u == pytest.approx(true, rel=0.1)
    assert batch < 0.85 * true


def test_openclip_is_compared_with_its_positive():
    """log v of OpenCLIP is the cross-entropy of an anchor but for ln(B - 1), and ln(M - 1)."""
    e1, e2 = features(12)
    tau = torch.full((4,), 0.2)
    loss = ContrastiveLoss("openclip", 12)
    found = bias.estimates(loss, e1, e2, torch.arange(4), tau, None, 1.0, 4)
    assert list(found) == ["true", "batch"]

    for name, candidates in (("batch", 4), ("true", 12)):
        expected = F.cross_entropy(
            e1[:4] @ e2[:candidates].T / 0.2, torch.arange(4), reduction="none"
        )
        log_v, _ = found[name]
        assert torch.allclose(log_v + math.log(candidates - 1), expected)


def test_statistics_by_hand():
    true = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    estimate = true + torch.tensor([0.0, 0.0, 0.0, math.log(4)], dtype=torch.float64) - math.log(2)
    result = bias.statistics({"true": (true, true + 2), "batch": (estimate, true)})
    assert result["true"]["divergence"] == 2
    row = result["batch"]
    assert row["mean"] == pytest.approx(-math.log(2) / 2)
    assert row["deviation"] == pytest.approx(math.log(2))
    assert row["quantiles"][2] == pytest.approx(-math.log(2))
    assert row["weight"] == pytest.approx((2 + 2 + 2 + 0.5) / 4)
    assert row["divergence"] == pytest.approx(math.log(2) / 2)
    assert row["rank_correlation"] == pytest.approx(1)
    assert bias.rank_correlation(true, -true) == pytest.approx(-1)


# ---- checkpoints ----


def test_u_is_what_the_next_step_makes_of_it(tmp_path, sets, one_thread, no_curves):
    """With crops, BatchNorm, a temperature per sample, in the middle of an epoch."""
    out = str(tmp_path)
    settings = dict(algorithm="fastclip-v2", max_steps=9, save_steps=3, keep=9)
    train(out, sets, **TINY_RESNET, **settings)
    t, order, step = bias.load(checkpoint_folder(out, 9))
    measured = bias.measure(t, order, step)

    loader = data.Loader(
        order, t.model.image_size, t.model.context_length, workers=0, start_step=9, num_steps=10
    )
    (batch,) = data.with_global_ids(loader)
    training.train_step(t, batch, step)
    for side, column in (("image", "log_u1"), ("text", "log_u2")):
        log_u = t.loss.state.table[batch.ids, t.loss.state.columns.index(column)]
        log_v, _ = measured[side]["u"]
        assert torch.allclose(log_v[:64].float(), log_add(log_u, t.loss.log_eps), atol=1e-4)

    # Six steps are an epoch: 9 is in the middle of one, 6 at an end, 3 in the first.
    assert bias.checkpoints_of(out) == [checkpoint_folder(out, 9)]
    t, order, step = bias.load(checkpoint_folder(out, 3))
    with pytest.raises(ConfigError, match="give a later checkpoint"):
        bias.measure(t, order, step)


SUITE = """
title = "A title"
base = "../../base.py"
seeds = (1,)
x_label = "batch size"
settings = dict(max_steps=9, save_steps=9)
cases = [
    dict(series="sogclr", x=64, settings=dict(algorithm="sogclr", stop_after=5)),
    dict(series="openclip", x=64, settings=dict(algorithm="openclip")),
]
"""


@pytest.fixture
def project(tmp_path, sets, monkeypatch):
    """A folder with an experiment of two tiny runs, which do not learn; it is the present one."""
    os.makedirs(tmp_path / "experiments/measured")
    os.makedirs(tmp_path / "data")
    os.symlink(os.path.dirname(sets["train_data"]), tmp_path / "data/train")
    os.symlink(os.path.dirname(sets["eval_data"]), tmp_path / "data/test")
    base = {**TINY, "train_data": "data/train/*.tar", "eval_data": "data/test/*.tar"}
    base.update(lr=0.0, lr_tau=0.0, crop_scale=(1.0, 1.0), tau_init=0.01, gamma_min=0.5)
    (tmp_path / "base.py").write_text("".join(f"{key} = {base[key]!r}\n" for key in base))
    (tmp_path / "experiments/measured/bias.py").write_text(SUITE)
    (tmp_path / "results.md").write_text("before\n<!-- bias -->\n<!-- end of bias -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runtime.plots.write_picture", lambda *_: None)
    monkeypatch.setattr(bias, "SUITE", str(tmp_path / "experiments/measured/bias.py"))
    return tmp_path


def test_the_experiment_and_its_page(project, one_thread, no_curves, capsys):
    # Each job of the first run ends after five steps, as if it had been stopped.
    with pytest.raises(SystemExit) as end:
        bias.main(["--experiment"])
    assert end.value.code == 130
    assert "the same command goes on from here" in capsys.readouterr().out
    bias.main(["--experiment", "--report", "--results", "results.md"])
    assert "bias: 2 of 2 runs, into results.md" in capsys.readouterr().out
    assert os.listdir("runs/experiments/bias") == []

    record = records.read("experiments/measured/bias/sogclr_64_seed1.json.gz")
    (row,) = record["bias"]
    assert (row["epoch"], row["gamma"], row["anchors"]) == (1.5, 0.5, 192)
    assert record["points"].keys() == {"true", "batch", "u", "stored u"}
    # The model is frozen, so the mean of two visits is nearer to the truth than one of them.
    for side in ("image", "text"):
        assert row[side]["u"]["deviation"] < row[side]["batch"]["deviation"]

    page = (project / "results.md").read_text()
    assert "| sogclr, batch 64 | 0.50 | stored u | " in page
    assert "| openclip, batch 64 | 1.00 | batch | " in page
    assert page.count("openclip") == 1
    with open("experiments/measured/bias.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"

    bias.main(["--experiment"])
    assert capsys.readouterr().out == ""


def test_the_page_of_results_is_what_the_records_give(monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = read_suite(os.path.relpath(bias.SUITE))
    text = bias_page.section(suite, records.current(suite))
    with open("docs/results.md", encoding="utf-8") as f:
        page = f.read()
    assert f"<!-- bias -->\n\n{text}\n\n<!-- end of bias -->\n" in page, "run: make results"


def test_what_cannot_be_measured_is_refused(tmp_path):
    os.makedirs(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="has no checkpoint"):
        bias.checkpoints_of(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="there is no folder"):
        bias.checkpoints_of(str(tmp_path / "nothing"))
    with pytest.raises(SystemExit):
        bias.parse([])
