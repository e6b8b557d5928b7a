"""bench/ at toy size: every mode from the command line, what its rows promise, its instruments."""

import json
import multiprocessing
import os
import shutil
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torchvision.io import write_jpeg

import data
from bench import __main__ as bench
from bench import (
    baselines,
    breakdown,
    harness,
    loader,
    loss,
    made_data,
    measure,
    ours,
    picture,
    report,
    step,
    zeroshot,
)
from config import ConfigError
from conftest import ROOT
from ingest.evaluation import load_sets
from ingest.index import load_index
from loss import ALGORITHMS
from runtime.plan import traffic

pytest.importorskip("open_clip")

TOY_VIT = (
    "--numbers=image_size=32,patch_size=16,vision_layers=1,vision_width=64,"
    "text_width=64,text_heads=1,text_layers=1,embed_dim=32,context_length=40"
)
TOY_RESNET = (
    "--numbers=image_size=64,vision_layers=(1,1,1,1),vision_width=16,"
    "text_width=64,text_heads=1,text_layers=1,embed_dim=32"
)
TOY = (TOY_VIT, "--rounds=1", "--device=cpu")

PROVENANCE = {"date", "commit", "load", "versions"}
VERSIONS = {"python", "torch", "torchvision", "numpy", "webdataset", "timm", "open_clip"}
VERSIONS |= {"triton", "cuda", "cudnn", "nccl", "driver"}


def run(folder, mode, *words):
    """The command at toy size -> the rows of its results file; checks what every mode promises."""
    results = folder / "b.json"
    plot = folder / "b.png"
    bench.main([mode, *words, *TOY, f"--out={results}", f"--plot={plot}"])

    document = json.loads(results.read_text())
    assert document.keys() >= {"machine", "rows", *PROVENANCE}
    assert document["machine"]["cores"] > 0
    assert document["versions"].keys() == VERSIONS
    assert plot.stat().st_size > 10_000

    for row in document["rows"]:
        assert row.keys() >= {"mode", "side", "settings", "unit", "median", "all", *PROVENANCE}
        assert row["mode"] == mode
        assert row["median"] == statistics.median(row["all"]) > 0
    return document["rows"]


# ---- the modes ----


def test_step(tmp_path, in_this_process):
    rows = run(tmp_path, "step", "--batch=4")
    ours_row, open_clip_row = rows
    assert ours_row["side"] == "ours"
    assert open_clip_row["side"] == "open_clip"
    for row in rows:
        assert 1e8 < row["peak_bytes"] < 1e10
        assert 0 < row["mfu"] < row["mfu_padded"] < 1

    assert open_clip_row["ratio"] == 1
    assert ours_row["ratio"] == pytest.approx(ours_row["median"] / open_clip_row["median"])
    assert ours_row["cpu_ratio"] > 0
    assert len(ours_row["cpu_seconds"]) == 1

    all_rows = report.save([ours_row], str(tmp_path / "b.json"))
    assert len(all_rows) == 2, "a row measured again replaces the older one"


def test_step_with_batches_on_the_device(tmp_path, in_this_process, monkeypatch):
    placed = []
    monkeypatch.setattr(made_data, "on_device", on_device_noted(placed))
    rows = run(tmp_path, "step", "--batch=4", "--on_device")
    assert [row["settings"]["on_device"] for row in rows] == [True, True]
    assert len(placed) == 2, "both sides"

    ours_batch, theirs = placed[1][0], placed[0][0]
    assert isinstance(ours_batch, data.Batch)
    assert isinstance(theirs, tuple)
    assert theirs[0].dtype == torch.float32


def on_device_noted(placed):
    """made_data.on_device, which also appends what it returns to `placed`."""
    plain = made_data.on_device

    def on_device(batches, device):
        placed.append(plain(batches, device))
        return placed[-1]

    return on_device


def test_loader(tmp_path, in_this_process):
    words = ("--images=24", "--batch=8", "--size=48", "--decoders", "torchvision", "pillow")
    rows = run(tmp_path, "loader", *words)
    assert [row["side"] for row in rows] == ["open_clip", "ours, torchvision", "ours, pillow"]
    open_clip_row, ours_row, _ = rows
    assert open_clip_row["ratio"] == 1
    assert open_clip_row["kilobytes_per_sample"] > 1
    assert ours_row["settings"]["cores"] == 1
    assert ours_row["ratio"] > 0


def test_loss(tmp_path, in_this_process):
    words = ("--batch=16", "--global_batch=64", "--tile=16", "--step_batch=2", "--model=ViT-B-32")
    rows = run(tmp_path, "loss", *words)
    assert {row["side"] for row in rows} == {"ours", "ours, loss_tile=16", "open_clip"}
    assert len(rows) == 3 * 7
    assert rows[0]["share_of_step"] > 0
    assert all(row["peak_bytes"] >= 0 for row in rows)


def test_wire_counts_the_bytes_of_the_formula(tmp_path):
    rows = run(tmp_path, "wire", "--batch=2")
    # fastclip-v3 comes a second time, with gradients in bfloat16.
    assert [row["side"] for row in rows] == ["open_clip", *ALGORITHMS, "fastclip-v3"]
    for row in rows:
        assert row["equal"]
        assert row["counted"].keys() == row["formula"].keys()

    of_open_clip = rows[0]["counted"]
    assert of_open_clip.keys() == {"features", "feature gradients", "gradients", "buffers"}
    # 2 samples, image and text, d = 32, 4 bytes.
    assert of_open_clip["features"] == 2 * 2 * 32 * 4
    assert of_open_clip["feature gradients"] == 2 * 2 * 32 * 4

    with_bf16 = rows[-1]
    assert with_bf16["settings"]["grad_wire"] == "bf16"
    assert with_bf16["share"] < 0.55


@pytest.mark.parametrize(
    "name, embed_dim, parameters",
    [("ViT-B-32", 512, 151_277_313), ("RN50", 1024, 102_007_137), ("ViT-B-16", 512, 149_620_737)],
)
@pytest.mark.parametrize("num_ranks, B", [(8, 1024), (32, 5120)])
def test_with_bf16_gradients_a_step_sends_little_more_than_half(
    name, embed_dim, parameters, num_ranks, B
):
    our_parts = traffic(B, embed_dim, 2, 2 * parameters)
    our_bytes = sum(count(num_ranks) for count in our_parts.values())
    open_clip_parts = baselines.traffic_formula(B // num_ranks, embed_dim, parameters, 0)
    open_clip_bytes = sum(count(num_ranks) for count in open_clip_parts.values())
    assert our_bytes <= 0.55 * open_clip_bytes


def test_breakdown(tmp_path, monkeypatch):
    monkeypatch.setattr(breakdown, "SIDES", [("fastclip-v3", "bf16"), ("open_clip", "fp32")])
    rows = run(tmp_path, "breakdown", "--batch=4", "--size=48")
    assert [row["side"] for row in rows] == ["fastclip-v3", "open_clip"]
    for row in rows:
        parts = dict(row["parts_ms"])
        assert parts.keys() == {"compute", "optimizer", "exposed", "data", "other", "hidden"}
        assert parts["compute"] > 0
        assert parts["exposed"] > 0
        assert parts["optimizer"] >= 0
        assert parts["data"] >= 0
        assert parts["hidden"] >= 0
        assert 0 <= row["hidden_share"] <= 1

        parts.pop("hidden")
        assert sum(parts.values()) == pytest.approx(row["median"])


def test_plan(tmp_path):
    rows = run(tmp_path, "plan", "--batch=4", "--check_ranks", "2", "--links", "100", "400")
    checked, *projected = rows
    assert checked["predicted_ms"] > 0
    assert checked["alpha_us"] > 0
    assert checked["bytes_per_second"] > 1e6

    times = {}
    for row in projected:
        times[row["side"], row["nodes"], row["settings"]["gbit"]] = row["median"]
    assert len(times) == 3 * 7 * 2
    for nodes in (8, 64):
        bf16 = times["fastclip-v3 bf16", nodes, 100]
        fp32 = times["fastclip-v3 fp32", nodes, 100]
        open_clip = times["open_clip fp32", nodes, 100]
        assert bf16 <= fp32 <= open_clip


SMALL_SETS = ("--images=40", "--classes=6", "--part_images=12", "--part_classes=5")


def test_zeroshot(tmp_path, in_this_process, monkeypatch):
    monkeypatch.setattr(zeroshot, "default_workers", no_workers)
    monkeypatch.setattr(zeroshot, "SIZE", 48)
    folder = tmp_path / "whole"
    words = (*SMALL_SETS, "--whole_peer", f"--folder={folder}")
    rows = run(tmp_path, "zeroshot", *words)
    assert [(row["side"], row["unit"]) for row in rows] == [
        ("ours", "images/s"),
        ("open_clip", "images/s"),
        ("ours", "texts/s"),
        ("open_clip", "texts/s"),
        ("ours", "s"),
        ("open_clip", "s"),
    ]
    assert [row["ratio"] for row in rows[1::2]] == [1, 1, 1]
    assert rows[2]["settings"]["classes"] == 5
    assert rows[2]["settings"]["templates"] == 80

    whole = rows[4]
    assert whole["settings"]["images"] == 40
    parts = whole["finding_seconds"], whole["image_seconds"], whole["text_seconds"]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(whole["median"])
    assert whole["peak_bytes"] > 1e8

    args = bench.parse(["zeroshot", "--images=41", *SMALL_SETS[1:]])
    with pytest.raises(ConfigError, match="holds 40 .JPEG in 6 classes, not 41 in 6"):
        zeroshot.make_whole(args, str(folder))


def no_workers():
    return 0


def test_both_sides_of_zeroshot_evaluate_the_same_set_and_time_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(zeroshot, "default_workers", no_workers)
    monkeypatch.setattr(zeroshot, "start_server", no_workers)
    folder = str(tmp_path / "set")
    made_data.make_class_folders(folder, 48, 530, 6)
    args = bench.with_defaults(bench.parse(["zeroshot", *TOY]))
    cpu = torch.device("cpu")

    our_side = zeroshot.Ours(args, folder, cpu)
    (found,) = load_sets(our_side.config)
    theirs = zeroshot.OpenClip(args, folder, cpu)
    samples = theirs.loader().dataset.samples
    paths = [os.path.join(folder, path) for path in found.source.paths]
    assert list(zip(paths, found.source.labels)) == samples
    assert len(samples) == 530

    assert found.names == list(theirs.package.IMAGENET_CLASSNAMES[:6])
    for our_prompt, their_prompt in zip(found.templates, theirs.package.OPENAI_IMAGENET_TEMPLATES):
        assert our_prompt.replace("{c}", "dog") == their_prompt("dog")
    assert len(found.templates) == 80

    for side in (our_side, theirs):
        start = time.perf_counter()
        parts = side.evaluate()
        seconds = time.perf_counter() - start
        assert min(parts) > 0
        assert 0.9 * seconds < sum(parts) <= seconds, "no part is counted twice, none is left out"


@pytest.mark.parametrize(
    "words, reason",
    [
        (("--part_images=41",), "is larger than the whole"),
        (("--part_classes=7",), "is larger than the whole"),
        (("--classes=1001", "--images=2000"), "5 to 1,000 classes"),
        (("--part_classes=4",), "5 to 1,000 classes"),
    ],
)
def test_sets_that_zeroshot_cannot_use_are_refused(words, reason):
    args = bench.with_defaults(bench.parse(["zeroshot", *SMALL_SETS, *words, *TOY]))
    with pytest.raises(ConfigError, match=reason):
        zeroshot.run(args)


# ---- what the measured code promises ----


def test_memory_does_not_grow_with_the_number_of_micro_batches(in_this_process):
    """GradCache: beside the images and the features, a step takes what one micro-batch takes."""
    args = bench.parse(["step", "--model=ViT-B-32", *TOY])

    def peak(batch, micro_batch):
        batches = made_data.make_batches(32, 40, batch, count=2)
        changed = harness.changed(args, batch=batch)
        trainer = ours.Trainer(changed, iter(batches), micro_batch=micro_batch)
        trainer.run(1)
        return measure.peak_of(lambda: trainer.run(1), torch.device("cpu"))

    growth_in_pieces = peak(64, micro_batch=4) - peak(16, micro_batch=4)
    growth_at_once = peak(64, micro_batch=0) - peak(16, micro_batch=0)
    # Measured: 918 and 14,153 bytes per sample.
    assert growth_in_pieces < 0.1 * growth_at_once


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "model, image_size, numbers, settings",
    [
        ("ViT-B-32", 32, TOY_VIT, {}),
        ("ViT-B-32", 32, TOY_VIT, dict(micro_batch=2)),
        ("ViT-B-32", 32, TOY_VIT, dict(algorithm="fastclip-v2", grad_clip=1.0)),
        ("RN50", 64, TOY_RESNET, {}),
    ],
)
def test_a_step_on_cuda_does_not_wait(model, image_size, numbers, settings):
    args = bench.parse(["step", f"--model={model}", "--batch=8", numbers, "--precision=bf16"])
    batches = made_data.make_batches(image_size, 40, 8)
    trainer = ours.Trainer(args, iter(batches), **settings)
    trainer.run(2)
    batches = made_data.pinned(batches[2:], torch.device("cuda"))

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data.with_global_ids(batches):
            trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tiled_loss_does_not_grow_with_the_global_batch(in_this_process):
    """... beyond the gathered features, 2 d floats of a pair, and 28 other floats of it."""
    args = bench.parse(["loss", "--model=ViT-B-32", *TOY, "--tile=64"])

    def peaks_of(side, sizes):
        worker = harness.Worker(loss.worker, args, side, 256)
        worker.send()
        peaks = {}
        for B in sizes:
            worker.send((64, B))
            _, peak_bytes = worker.receive()
            features_bytes = 2 * B * 256 * 4
            peaks[B] = peak_bytes - features_bytes
        worker.close()
        return peaks

    tiled = peaks_of("ours, loss_tile=64", (512, 1024, 4096))
    untiled = peaks_of("ours", (512, 4096))
    assert tiled[1024] - tiled[512] <= (1024 - 512) * 28 * 4, tiled
    assert tiled[4096] - tiled[512] <= (4096 - 512) * 28 * 4, tiled
    assert untiled[4096] - untiled[512] > 5 * (tiled[4096] - tiled[512])


# ---- what is measured on ----


def test_shards_are_made_of_photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(ConfigError, match="photos has no .jpg"):
        made_data.make_shards(str(tmp_path), 32, 8, str(folder), shards=2)

    red = torch.zeros(3, 90, 100, dtype=torch.uint8)
    red[0] = 255
    write_jpeg(red, str(folder / "red.jpg"))
    pattern = made_data.make_shards(str(tmp_path), 32, 8, str(folder), shards=2)

    order = data.Order(load_index(pattern), 8)
    (batch,) = data.Loader(order, 16, workers=0, num_steps=1)
    assert batch.images[:, 0].float().mean() > 250
    assert batch.images[:, 1:].float().mean() < 5
    assert len(set(batch.ids.tolist())) == 8


def test_captions_have_the_promised_length():
    lengths = made_data.caption_lengths(1001)
    assert int(lengths.median()) == 17
    assert int(lengths.min()) >= 5
    assert int(lengths.max()) <= 77
    assert torch.equal(lengths, made_data.caption_lengths(1001))


def test_made_batches_are_as_a_loader_makes_them():
    (batch,) = made_data.make_batches(32, 40, 6, count=1)
    assert batch.images.shape == (6, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.tokens.shape[1] % 8 == 0
    assert batch.lengths.max() <= batch.tokens.shape[1]
    for tokens, length in zip(batch.tokens, batch.lengths):
        assert tokens[0] == made_data.START_OF_TEXT
        assert tokens.argmax() == length - 1, "the end is the largest token"
        assert (tokens[1:length] > 0).all()
        assert (tokens[length:] == 0).all()


# ---- a profile, taken apart ----


def test_flops_of_a_pair():
    args = bench.parse(["step", "--batch=4", "--model=ViT-B-32", *TOY])
    shape = harness.model_shape(args)
    assert step.padded_flops(args) == 3 * (shape.image_flops + 40 * shape.token_flops)
    assert step.useful_flops(args) < step.padded_flops(args)


def test_spans():
    spans = measure.union([(5, 6), (0, 2), (1, 3)])
    assert spans == [(0, 3), (5, 6)]
    assert measure.length(spans) == 4
    assert measure.without(spans, [(1, 2), (2.5, 5.5)]) == [(0, 1), (2, 2.5), (5.5, 6)]


def event(name, start, end, thread=1, device_type=DeviceType.CPU, is_user_annotation=False):
    """As torch's profiler reports it; times in seconds."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=1e6 * start, end=1e6 * end),
        thread=thread,
        device_type=device_type,
        is_user_annotation=is_user_annotation,
    )


def test_parts_of_a_step_on_a_cpu():
    events = [
        event("enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__", 0, 1),
        event("aten::mm", 1, 4),
        event("aten::addmm", 3, 5),
        event("gloo:all_reduce", 4, 7, thread=2),
        event("aten::add", 6, 7, thread=2),  # gloo's own work
        event("Optimizer.step#AdamW.step", 7, 8),
        event("aten::_foreach_add_", 7, 8),
    ]
    parts = measure.parts_of(events, 10.0, on_gpu=False)
    assert parts == pytest.approx(
        dict(compute=4, optimizer=1, exposed=2, data=1, other=2, hidden=1)
    )


def test_parts_of_a_step_on_a_gpu():
    on_gpu = dict(device_type=DeviceType.CUDA)
    events = [
        event("aten::mm", 0, 9),  # the host's part is not counted
        event("sm90_gemm", 1, 5, **on_gpu),
        event("ncclDevKernel_AllReduce", 4, 7, **on_gpu),
        event("Optimizer.step#AdamW.step", 7, 8, is_user_annotation=True, **on_gpu),
        event("multi_tensor_apply_kernel", 7, 8, **on_gpu),
    ]
    parts = measure.parts_of(events, 8.5, on_gpu=True)
    assert parts == pytest.approx(
        dict(compute=4, optimizer=1, exposed=2, data=0, other=1.5, hidden=1)
    )


# ---- the command line and the results file ----


def test_all_runs_every_mode_but_zeroshot():
    args = bench.parse(["all", "--device=cpu", "--rounds=3"])
    all_jobs = bench.jobs_of_all(args)
    # Half an hour of zeroshot is asked for by its name.
    assert {job.run for job in all_jobs} == set(bench.MODES.values()) - {zeroshot.run}
    assert [(job.args.model, job.args.batch) for job in all_jobs if job.run is step.run] == [
        ("ViT-B-32", 32),
        ("RN50", 16),
        ("ViT-B-16", 16),
    ]
    assert all(job.args.rounds == 3 for job in all_jobs)
    assert len({job.name for job in all_jobs}) == len(all_jobs)


def test_a_mode_has_its_own_defaults_and_the_command_line_wins():
    def settled(*words):
        return bench.with_defaults(bench.parse([*words, "--device=cpu"]))

    assert (settled("loss").model, settled("loss").batch) == ("ViT-B-16", 640)
    assert (settled("loss", "--batch=8").model, settled("loss", "--batch=8").batch) == (
        "ViT-B-16",
        8,
    )
    assert settled("step").numbers == {}
    assert settled("step", TOY_RESNET).numbers["vision_layers"] == (1, 1, 1, 1)


def test_results_of_the_readme_are_read_merged_and_drawn(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    shutil.copy(os.path.join(ROOT, "assets", "bench_cpu.json"), path)
    before = json.loads(path.read_text())
    monkeypatch.setattr(report, "machine", lambda: before["machine"])

    row = {key: value for key, value in before["rows"][0].items() if key not in PROVENANCE}
    rows = report.save([row], str(path))
    assert len(rows) == len(before["rows"])
    assert rows[-1]["side"] == row["side"]
    assert rows[-1]["versions"].keys() == VERSIONS

    picture.draw(rows, str(tmp_path / "b.png"))
    assert (tmp_path / "b.png").stat().st_size > 100_000
    report.print_table(rows)


def test_commit_is_empty_where_there_is_none(tmp_path, monkeypatch):
    assert report.commit(str(tmp_path)) == "", "not a clone"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.commit() == "", "no git"


def test_versions_of_a_gpu(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", yes)
    monkeypatch.setattr(torch.cuda.nccl, "version", two_numbers)
    assert report.driver_version() == "580.65.06"
    assert report.nccl_version() == "2.27"


def yes():
    return True


def two_numbers():
    return 2, 27


def test_results_of_another_machine_are_refused(tmp_path):
    (tmp_path / "b.json").write_text('{"machine": {"cpu": "another"}, "rows": []}')
    with pytest.raises(ConfigError, match="another machine"):
        bench.main(["step", f"--out={tmp_path}/b.json"])  # before anything is measured


def test_a_results_file_in_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        report.check(str(tmp_path / "no" / "b.json"))


@pytest.mark.parametrize("words", [("wire", "--ranks=1"), ("plan", "--check_ranks", "1")])
def test_what_is_sent_needs_two_ranks(words):
    with pytest.raises(ConfigError, match="2 of them or more"):
        bench.parse(words)


def test_too_few_images_are_refused():
    args = bench.parse(["loader", "--images=24", "--size=32"])
    with pytest.raises(ConfigError, match="fewer than two batches"):
        loader.run(harness.changed(args, batch=16))


def test_a_folder_without_the_released_code_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="git clone"):
        bench.main(["step", f"--released={tmp_path}"])  # before anything is measured


def test_without_open_clip_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'open_clip'")

    monkeypatch.setattr(baselines.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install open_clip_torch"):
        bench.main(["step"])


def test_what_a_process_raises_reaches_the_command():
    args = bench.parse(["plan", *TOY])
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        harness.on_ranks(1, divide_by_zero, args)


def divide_by_zero(args):
    yield 1 / 0


# ---- what fails ----


def run_out_of_memory_at(request):
    """A side that counts the requests, and runs out of memory at one of them."""
    value = None
    while True:
        asked = yield value
        if asked == request:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nGPU 0 has")
        value = asked


def test_a_side_that_fails_leaves_the_others_alone(in_this_process, capsys):
    workers = {
        "small": harness.Worker(run_out_of_memory_at, -1),
        "large": harness.Worker(run_out_of_memory_at, 2),
    }
    values = harness.take_turns(workers, [1, 2, 3], "test")
    assert values["small"] == [1, 2, 3]
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert values["large"] == [1, harness.Failed(reason), harness.Failed(reason)]
    assert harness.measured(values["large"]) == [1]
    assert "test, large failed: CUDA out of memory" in capsys.readouterr().err


def exit_or_sleep(seconds):
    yield
    if not seconds:
        os._exit(7)
    time.sleep(seconds)


def test_a_process_that_dies_or_hangs_is_a_side_that_fails(monkeypatch):
    # Forked, it need not import torch again.
    monkeypatch.setattr(harness, "SPAWN", multiprocessing.get_context("fork"))
    monkeypatch.setattr(harness, "END_SECONDS", 0.1)
    workers = {
        "dies": harness.Worker(exit_or_sleep, 0),
        "hangs": harness.Worker(exit_or_sleep, 600),
    }
    for worker in workers.values():
        worker.send()
        worker.receive()
    values = harness.take_turns(workers, [None], "test", limit=0.5)
    # It was set up above: what is asked first is the end of one, and the sleep of the other.
    assert values["dies"][0].reason.startswith("a measuring process died with exit status 7")
    assert values["hangs"] == [harness.Failed("no answer within 0.5 seconds")]
    workers["hangs"].process.join(10)
    assert not workers["hangs"].process.is_alive()


def without_memory_for(monkeypatch, side, batch=None):
    """Let a side of the step mode run out of memory, at every batch size or at one."""
    plain = step.make_trainer

    def make_trainer(args, name, batches, device):
        if name == side and args.batch in (batch, args.batch if batch is None else batch):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(args, name, batches, device)

    monkeypatch.setattr(step, "make_trainer", make_trainer)


def test_a_side_without_memory_has_a_row_that_says_so(tmp_path, in_this_process, monkeypatch):
    without_memory_for(monkeypatch, "open_clip")
    out = tmp_path / "b.json"
    words = ["step", "--batch=4", *TOY, f"--out={out}", f"--plot={tmp_path}/b.png"]
    assert bench.main(words) == 1

    ours_row, open_clip_row = json.loads(out.read_text())["rows"]
    assert ours_row["median"] > 0
    assert "ratio" not in ours_row, "there is nothing to compare it with"
    assert open_clip_row["failed"] == "OutOfMemoryError: CUDA out of memory"
    assert "failed: OutOfMemoryError" in report.table_line(open_clip_row)


def test_a_loss_without_memory_at_one_size_keeps_the_others():
    settings = dict(b=4, B=16, d=32)
    failed = harness.Failed("OutOfMemoryError: CUDA out of memory")
    row = loss.row_of("open_clip", settings, [(0.001, 100), failed])
    assert (row["median"], row["peak_bytes"]) == (1.0, 100)
    row = loss.row_of("open_clip", settings, [failed, failed])
    assert row["failed"] == failed.reason
    assert "median" not in row
