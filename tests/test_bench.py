"""bench.py at toy size: every mode from the command line, what its rows promise, counted bytes equal to the formula, a profile's parts."""

import json
import statistics

import pytest
import torch
import torch.distributed.nn
from torchvision.io import write_jpeg

import data
import dist
from bench import __main__ as bench
from bench import baselines, harness, report
from config import ConfigError
from ingest.index import load_index
from runtime import plan

pytest.importorskip("open_clip")
TOY = (
    "--numbers=image_size=32,patch_size=16,vision_layers=1,vision_width=64,text_width=64,text_heads=1,text_layers=1,embed_dim=32,context_length=40",
    "--rounds=1",
    "--device=cpu",
)


REAL = {name: getattr(dist, name) for name in ("world_size", "all_gather", "all_reduce")}


class Here:
    """harness.Worker without a process: importing torch once is enough for most of these tests."""

    def __init__(self, function, *args):
        self.steps = function(*args)

    def ask(self, request=None):
        self.value = self.steps.send(request)

    def answer(self):
        return self.value

    def close(self):
        self.steps.close()
        for (
            name,
            function,
        ) in REAL.items():  # a worker may change them: it would have had the process to itself
            setattr(dist, name, function)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(
        torch.distributed.nn, "all_gather", torch.distributed.nn.all_gather
    )  # will be changed, and so changed back
    monkeypatch.setattr(harness, "Worker", Here)
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tmp_path, *words):
    bench.main([*words, *TOY, f"--out={tmp_path}/b.json", f"--plot={tmp_path}/b.png"])
    with open(tmp_path / "b.json") as f:
        document = json.load(f)
    assert {"machine", "versions", "commit", "date"} <= document.keys() and document["machine"][
        "cores"
    ] > 0
    assert (
        document["versions"].keys() == {"python", "torch", "open_clip"}
        and (tmp_path / "b.png").stat().st_size > 10_000
    )
    for row in document["rows"]:
        assert {
            "mode",
            "side",
            "settings",
            "unit",
            "median",
            "all",
            "date",
            "commit",
            "versions",
        } <= row.keys()
        assert row["mode"] == words[0] and row["median"] == statistics.median(row["all"]) > 0
    return document["rows"]


def test_step(tmp_path, here):
    ours, theirs = run(tmp_path, "step", "--batch=4")
    assert (ours["side"], theirs["side"]) == ("ours", "open_clip") and theirs["ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["median"] / theirs["median"])
    assert all(1e8 < row["peak_bytes"] < 1e10 and 0 < row["mfu"] < 1 for row in (ours, theirs))
    assert ours["cpu_ratio"] > 0 and len(ours["cpu_seconds"]) == 1
    again = report.save([ours], str(tmp_path / "b.json"))
    assert len(again) == 2  # in the old one's place


def test_loader(tmp_path, here):
    theirs, ours, pillow = run(
        tmp_path,
        "loader",
        "--images=24",
        "--batch=8",
        "--size=48",
        "--decoders",
        "torchvision",
        "pillow",
    )
    assert (theirs["side"], ours["side"], pillow["side"]) == (
        "open_clip",
        "ours, torchvision",
        "ours, pillow",
    ) and theirs["ratio"] == 1
    assert (
        ours["settings"]["cores"] == 1 and 0 < ours["ratio"] and theirs["kilobytes_per_sample"] > 1
    )


def test_shards_are_made_of_photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(ConfigError, match="photos has no .jpg"):
        harness.make_shards(str(tmp_path), 32, 8, str(folder), shards=2)
    red = torch.zeros(3, 90, 100, dtype=torch.uint8)
    red[0] = 255
    write_jpeg(red, str(folder / "red.jpg"))
    pattern = harness.make_shards(str(tmp_path), 32, 8, str(folder), shards=2)
    (batch,) = data.Loader(data.Order(load_index(pattern), 8), 16, workers=0, num_steps=1)
    assert (
        batch.images[:, 0].float().mean() > 250
        and batch.images[:, 1:].float().mean() < 5
        and len(set(batch.ids.tolist())) == 8
    )


def test_loss(tmp_path, here):
    rows = run(
        tmp_path,
        "loss",
        "--batch=16",
        "--global_batch=64",
        "--tile=16",
        "--step_batch=2",
        "--model=ViT-B-32",
    )
    assert {row["side"] for row in rows} == {"ours", "ours, loss_tile=16", "open_clip"} and len(
        rows
    ) == 3 * 7
    assert rows[0]["share_of_step"] > 0 and all(row["peak_bytes"] >= 0 for row in rows)


def test_wire_is_counted_and_is_the_formula(tmp_path):
    rows = run(tmp_path, "wire", "--batch=2")
    assert [row["side"] for row in rows] == [
        "open_clip",
        "openclip",
        "sogclr",
        "isogclr",
        *(f"fastclip-v{i}" for i in range(4)),
        "fastclip-v3",
    ]
    assert all(row["equal"] and row["counted"].keys() == row["formula"].keys() for row in rows)
    assert {"features", "feature gradients", "gradients", "buffers"} == rows[0]["counted"].keys()
    assert (
        rows[0]["counted"]["feature gradients"] == rows[0]["counted"]["features"] == 2 * 32 * 4 * 2
    )
    assert rows[-1]["settings"]["grad_wire"] == "bf16" and rows[-1]["share"] < 0.55


@pytest.mark.parametrize(
    "name,d,parameters",
    [("ViT-B-32", 512, 151_277_313), ("RN50", 1024, 102_007_137), ("ViT-B-16", 512, 149_620_737)],
)
@pytest.mark.parametrize("ranks,B", [(8, 1024), (32, 5120)])
def test_with_bf16_gradients_a_step_sends_little_more_than_half(name, d, parameters, ranks, B):
    ours = sum(count(ranks) for count in plan.traffic(B, d, 2, 2 * parameters).values())
    theirs = sum(count(ranks) for count in baselines.formula(B // ranks, d, parameters, 0).values())
    assert ours <= 0.55 * theirs


def test_breakdown(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DIVIDED", [("fastclip-v3", "bf16"), ("open_clip", "fp32")])
    rows = run(tmp_path, "breakdown", "--batch=4", "--size=48")
    for row in rows:
        assert row["parts_ms"].keys() == {
            "compute",
            "optimizer",
            "exposed",
            "data",
            "other",
            "hidden",
        }
        assert (
            all(value >= 0 for name, value in row["parts_ms"].items() if name != "other")
            and row["parts_ms"]["compute"] > 0
        )
        assert sum(
            value for name, value in row["parts_ms"].items() if name != "hidden"
        ) == pytest.approx(row["median"])
        assert 0 < row["parts_ms"]["exposed"] and 0 <= row["hidden_share"] <= 1


def test_plan(tmp_path):
    rows = run(tmp_path, "plan", "--batch=4", "--check_ranks", "2", "--links", "100", "400")
    assert (
        rows[0]["predicted_ms"] > 0
        and rows[0]["alpha_us"] > 0
        and rows[0]["bytes_per_second"] > 1e6
    )
    projected = {
        (row["side"], row["nodes"], row["settings"]["gbit"]): row["median"] for row in rows[1:]
    }
    assert len(projected) == 3 * 7 * 2
    assert all(
        projected["fastclip-v3 bf16", n, 100]
        <= projected["fastclip-v3 fp32", n, 100]
        <= projected["open_clip fp32", n, 100]
        for n in (8, 64)
    )


def test_memory_does_not_grow_with_the_number_of_micro_batches(here):
    """GradCache: beside the images themselves and the features, a step takes what one micro-batch takes."""
    a = bench.parse(["step", "--model=ViT-B-32", *TOY])
    peaks = {}
    for batch, micro in ((16, 0), (16, 4), (64, 4), (64, 0)):
        a = harness.changed(a, batch=batch)
        batches = iter(harness.made_batches(32, 40, batch, count=2))
        trainer = harness.Ours(a, batches, micro_batch=micro)
        trainer.run(1)
        peaks[batch, micro] = harness.peak_of(lambda: trainer.run(1), torch.device("cpu"))
    assert peaks[64, 4] - peaks[16, 4] < 0.1 * (peaks[64, 0] - peaks[16, 0]), (
        peaks
    )  # 918 and 14,153 bytes of a sample


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "model,numbers,settings",
    [
        ("ViT-B-32", TOY[0], {}),
        ("ViT-B-32", TOY[0], dict(micro_batch=2)),
        ("ViT-B-32", TOY[0], dict(algorithm="fastclip-v2", grad_clip=1.0)),
        (
            "RN50",
            "--numbers=image_size=64,vision_layers=(1,1,1,1),vision_width=16,text_width=64,text_heads=1,text_layers=1,embed_dim=32",
            {},
        ),
    ],
)
def test_a_step_does_not_wait_for_the_gpu(model, numbers, settings):
    a = harness.changed(
        bench.parse(["step", f"--model={model}", numbers, "--precision=bf16"]), batch=8
    )
    trainer = harness.Ours(
        a, iter(batches := harness.made_batches(64 if model == "RN50" else 32, 40, 8)), **settings
    )
    trainer.run(2)
    batches = [
        batch._replace(images=batch.images.pin_memory(), tokens=batch.tokens.pin_memory())
        for batch in batches[2:]
    ]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tiled_loss_does_not_grow_with_the_global_batch(here):
    """... beyond the gathered features, 2 d floats of a pair, and some numbers: 28 floats of it."""
    a = harness.changed(bench.parse(["loss", "--model=ViT-B-32", *TOY, "--tile=64"]), rounds=1)

    def peaks_of(side, sizes):
        worker, peaks = Here(bench.loss_worker, a, side, 256), {}
        worker.ask()
        for B in sizes:
            worker.ask((64, B))
            peaks[B] = worker.answer()[1] - 2 * B * 256 * 4
        worker.close()
        return peaks

    tiled, whole = peaks_of("ours, loss_tile=64", (512, 1024, 4096)), peaks_of("ours", (512, 4096))
    assert tiled[1024] - tiled[512] <= 512 * 28 * 4 and tiled[4096] - tiled[512] <= 3584 * 28 * 4, (
        tiled
    )
    assert whole[4096] - whole[512] > 5 * (tiled[4096] - tiled[512])


def test_captions_have_the_promised_length():
    lengths = harness.caption_lengths(1001)
    assert int(lengths.median()) == 17 and 5 <= int(lengths.min()) and int(lengths.max()) <= 77
    assert torch.equal(lengths, harness.caption_lengths(1001))


def test_spans():
    spans = harness.union([(5, 6), (0, 2), (1, 3)])
    assert spans == [(0, 3), (5, 6)] and harness.length(spans) == 4
    assert harness.without(spans, [(1, 2), (2.5, 5.5)]) == [(0, 1), (2, 2.5), (5.5, 6)]


def test_what_cannot_be_is_said(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError("No module named 'open_clip'")

    (tmp_path / "b.json").write_text('{"machine": {"cpu": "another"}, "rows": []}')
    with pytest.raises(ConfigError, match="another machine"):
        bench.main(["step", f"--out={tmp_path}/b.json"])  # before anything is measured
    with pytest.raises(ConfigError, match="no folder"):
        report.check(str(tmp_path / "no" / "b.json"))
    for words in (["wire", "--ranks=1"], ["plan", "--check_ranks", "1"]):
        with pytest.raises(ConfigError, match="2 of them or more"):
            bench.parse(words)
    with pytest.raises(ConfigError, match="fewer than two batches"):
        bench.loader(harness.changed(bench.parse(["loader", "--images=24", "--size=32"]), batch=16))
    with pytest.raises(ConfigError, match="git clone"):
        baselines.released(str(tmp_path))
    monkeypatch.setattr(baselines.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install open_clip_torch"):
        bench.main(["step"])
