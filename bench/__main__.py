"""How fast, how large, how much is sent: ours beside open_clip from PyPI, in one run and one table.

    python -m bench step --model ViT-B-32 --batch 32
        samples/s, peak memory and MFU of training steps
    python -m bench loader [SHARDS] --size 256
        images/s from tar to ready batch, on one core, or with --workers=2
    python -m bench loss
        time and peak memory of the loss against b and B
    python -m bench wire
        bytes per step by purpose, counted, for every algorithm
    python -m bench breakdown
        where a step's time goes, on --ranks processes
    python -m bench plan
        the time of a step predicted, checked against a real run, and projected over nodes
    python -m bench zeroshot
        images/s and texts/s of a zero-shot evaluation, and one of ImageNet's size: half an hour
    python -m bench all
        all but zeroshot, for docs/performance.md: 22 minutes on two quiet cores; on GPUs at their
        sizes
    python -m bench gpu
        a GPU's first half hour, in four parts: what is right, how fast a step is, and a whole run

How it measures:
* Each side has a fresh process of its own, in which its memory is measured: on a GPU the
  allocator's peak, on a CPU the most that was resident.
* The sides take turns, so that whatever else the machine does meets both. `ratio` is the median
  over the rounds of the ratio within a round.
* Both train in float32 (or --precision) on the same smooth-noise pictures and the same captions, 17
  tokens of 77 at the median, through their own training function. open_clip is given float pixels,
  normalised; ours is given bytes, which its step normalises.
* MFU is useful work, without padding, over the rate of a matrix product that is measured in the
  same rounds.

Rows are merged into the file --out, and all rows there are drawn into --plot. A side that fails,
for lack of memory, say, has a row that says so; the exit status is then 1. `all` and `gpu` leave
out what the file already has, so after an interruption the same command goes on.
"""

import argparse
import importlib.util
import os
import re
import sys
from functools import partial

import torch

import config as configs
from bench import (
    baselines,
    breakdown,
    gpu,
    harness,
    jobs,
    loader,
    loss,
    picture,
    plan,
    report,
    step,
    wire,
    zeroshot,
)
from config import ConfigError
from loss import ALGORITHMS

MODES = {
    "step": step.run,
    "loader": loader.run,
    "loss": loss.run,
    "wire": wire.run,
    "breakdown": breakdown.run,
    "plan": plan.run,
    "zeroshot": zeroshot.run,
}

# What a mode measures unless the command line says otherwise.
DEFAULTS = {
    "step": dict(model="ViT-B-32", batch=32),
    "loader": dict(batch=64, images=2048),
    "loss": dict(model="ViT-B-16", batch=640),
    "wire": dict(model="ViT-B-32", batch=4),
    "breakdown": dict(model="ViT-B-32", batch=8),
    "plan": dict(model="ViT-B-32", batch=8),
    "zeroshot": dict(model="ViT-B-32", batch=256, images=50_000),
}

# The runs of the mode `all`: (mode, what is changed in its defaults).
ON_A_CPU = [
    ("step", dict(model="ViT-B-32", batch=32)),
    ("step", dict(model="RN50", batch=16)),
    ("step", dict(model="ViT-B-16", batch=16)),
    ("loader", dict(size=256)),
    ("loader", dict(size=512)),
    ("loader", dict(size=256, workers=2)),
    ("loss", {}),
    ("wire", {}),
    ("breakdown", {}),
    ("plan", dict(numbers=dict(vision_layers=3, text_layers=3))),
]
ON_A_GPU = [
    ("step", dict(model="ViT-B-16", batch=640, compiled=True)),
    ("step", dict(model="ViT-B-32", batch=256, compiled=True)),
    ("step", dict(model="ViT-B-32", batch=512, compiled=True)),
    ("step", dict(model="RN50", batch=128, compiled=True)),
    ("loader", dict(size=256)),
    ("loader", dict(size=512)),
    ("loader", dict(size=256, workers=2)),
    ("loss", {}),
]
ON_SEVERAL_GPUS = [
    ("wire", dict(batch=256)),
    ("breakdown", dict(batch=256)),
    ("plan", dict(batch=256, check_ranks=[2])),
]


def main(argv):
    """Measure what the command line asks for; returns the exit status."""
    args = parse(argv)
    # Refuse what cannot work before anything is measured.
    baselines.load()
    if args.released:
        baselines.check_clone(args.released)
    report.check(args.out)

    if args.mode == "gpu":
        rows = jobs.run_missing(gpu.jobs_of(args), args, partial(gpu.show, args))
    elif args.mode == "all":
        rows = jobs.run_missing(jobs_of_all(args), args, partial(picture.draw, path=args.plot))
    else:
        rows = MODES[args.mode](with_defaults(args))
        report.print_table(rows)
        picture.draw(report.save(rows, args.out), args.plot)
    return jobs.exit_status(rows)


def with_defaults(args):
    """The arguments with the mode's defaults, where the command line says nothing else."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return harness.changed(args, **{**DEFAULTS[args.mode], **given})


def jobs_of_all(args):
    """The list of Jobs that the mode `all` runs on this machine."""
    chosen = ON_A_CPU
    if harness.device_of(args).type == "cuda":
        chosen = ON_A_GPU
        if torch.cuda.device_count() > 1:
            chosen = ON_A_GPU + ON_SEVERAL_GPUS

    result = []
    for mode, changes in chosen:
        job_args = harness.changed(args, **{**DEFAULTS[mode], **changes})
        words = [mode, *(f"{key}={value}" for key, value in changes.items() if key != "numbers")]
        result.append(jobs.Job(" ".join(words), MODES[mode], job_args))
    return result


# ---- the command line ----


def parse(argv):
    """The command line's arguments. Raises ConfigError for what no mode could measure."""
    args = parser().parse_args(argv)
    on_gpu = harness.device_of(args).type == "cuda"
    if not args.precision:
        args.precision = "bf16" if on_gpu else "fp32"
    if args.toy and not args.out:
        raise ConfigError("--toy needs --out=FILE, since its figures are no results to keep")
    if not args.out:
        args.out = f"assets/bench_{'gpu' if on_gpu else 'cpu'}.json"
    if args.rounds is None:
        args.rounds = 3 if args.mode == "zeroshot" else 5
    if args.minutes is None:
        args.minutes = 8.0 if args.mode == "gpu" else 0.0
    if args.mode == "gpu" and not args.limit:
        args.limit = 300.0
    if args.mode == "gpu" and not on_gpu and not args.toy:
        raise ConfigError(
            "gpu measures a GPU, and torch sees none here: --toy tries it on a CPU, at toy size"
        )
    if not args.plot:
        args.plot = os.path.splitext(args.out)[0] + ".png"

    alone_in_wire = args.mode == "wire" and args.ranks < 2
    alone_in_plan = args.mode == "plan" and min(args.check_ranks) < 2
    if alone_in_wire or alone_in_plan:
        raise ConfigError(
            f"{args.mode} measures what is sent between ranks: it needs 2 of them or more"
        )
    return args


def parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common_options(parser)
    add_step_options(parser.add_argument_group("step"))
    add_loader_options(parser.add_argument_group("loader"))
    add_loss_options(parser.add_argument_group("loss"))
    add_rank_options(parser.add_argument_group("wire, breakdown, plan"))
    add_plan_options(parser.add_argument_group("plan"))
    add_zeroshot_options(parser.add_argument_group("zeroshot"))
    add_job_options(parser.add_argument_group("all, gpu"))
    return parser


def add_common_options(parser):
    add = parser.add_argument
    add("mode", choices=[*MODES, "all", "gpu"])
    add(
        "shards",
        nargs="?",
        default="",
        help="loader, breakdown: tar shards, or a folder of photographs to make them from; "
        "default: made from noise",
    )
    add("--model", help="default: ViT-B-32; loss (whose step it is a share of): ViT-B-16")
    add(
        "--batch",
        type=int,
        help="samples of a rank in a step; loss: b; zeroshot: ours, default 256",
    )
    add("--images", type=int, help="loader: in a turn, default 2048; zeroshot: in all, 50000")
    add(
        "--numbers",
        type=model_numbers,
        default={},
        help="change the model, for example: vision_layers=2,text_layers=2",
    )
    precisions = ["fp32", "bf16", "fp16"]
    add("--precision", choices=precisions, help="default: bf16 on a GPU, fp32 on a CPU")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--algorithm", default="fastclip-v3", choices=list(ALGORITHMS), help="step, plan")
    add("--rounds", type=int, help="turns of each side (default: 5; zeroshot: 3)")
    add(
        "--limit",
        type=float,
        default=0.0,
        help="seconds in which a measuring process must answer; 0: any time, in gpu 300",
    )
    add("--out", help="default: assets/bench_cpu.json, or bench_gpu.json where there is a GPU")
    add("--plot", help="default: as --out, with .png")


def add_step_options(group):
    add = group.add_argument
    add("--compiled", action="store_true", help="both sides compiled, too")
    add(
        "--released",
        default="",
        help="a clone of github.com/Optimization-AI/fast_clip, to measure it, too",
    )
    add(
        "--on_device",
        action="store_true",
        help="the batches are on the device before the first step, for both sides",
    )
    add("--steps", type=int, default=0, help="steps in a turn; 0: 1, or 20 on a GPU")


def add_loader_options(group):
    decoders = ["torchvision", "pillow"]
    if importlib.util.find_spec("simplejpeg"):
        decoders.append("simplejpeg")

    add = group.add_argument
    add("--size", type=int, default=256, help="shorter side of made pictures, pixels")
    add(
        "--decoders",
        nargs="+",
        default=decoders,
        help="ours with each of these (default: those that are installed)",
    )
    add(
        "--workers",
        type=int,
        default=0,
        help="0 is one core and no other process; zeroshot: as many as eval.py takes",
    )


def add_loss_options(group):
    add = group.add_argument
    add("--global_batch", type=int, default=5120, help="B, also of wire and plan")
    add("--tile", type=int, default=512, help="loss_tile")
    add(
        "--step_batch",
        type=int,
        default=0,
        help="batch of the step that the loss is compared with; 0: 8, or b on a GPU",
    )


def add_rank_options(group):
    add = group.add_argument
    add(
        "--ranks",
        type=int,
        default=2,
        help="wire (2 or more), breakdown: processes on this machine, each with a GPU of its own "
        "if there are any",
    )
    add(
        "--grad_wire",
        default="fp32",
        choices=["fp32", "bf16"],
        help="plan: the type in which gradients travel",
    )
    add("--bucket_mb", type=float, default=25.0, help="breakdown: size of our gradient buckets")


def add_plan_options(group):
    add = group.add_argument
    add(
        "--check_ranks",
        type=int,
        nargs="+",
        default=[2, 4],
        help="numbers of processes for which it is checked here, 2 or more",
    )
    add("--plan_model", default="ViT-B-16", help="what is projected over nodes")
    add(
        "--tflops",
        type=float,
        default=150.0,
        help="what a GPU computes, useful work of this model",
    )
    add("--links", type=int, nargs="+", default=[100, 200, 400], help="Gbit/s of a node")
    add("--alpha", type=float, default=10.0, help="latency of a message, microseconds")


def add_zeroshot_options(group):
    add = group.add_argument
    add("--classes", type=int, default=1000, help="of the whole set (default: %(default)s)")
    add(
        "--part_images",
        type=int,
        default=1024,
        help="of the small set that is evaluated by turns (default: %(default)s)",
    )
    add(
        "--part_classes",
        type=int,
        default=10,
        help="of that set, with 80 prompts each (default: %(default)s)",
    )
    add("--part_only", action="store_true", help="leave out the whole set")
    add("--whole_peer", action="store_true", help="open_clip evaluates the whole set, too")
    add(
        "--folder",
        default="",
        help="of the whole set; made there if there is none, and kept (default: a temporary one)",
    )


def add_job_options(group):
    add = group.add_argument
    add("--part", default="", choices=["", *gpu.PARTS], help="gpu: this one only; default: all")
    add(
        "--minutes",
        type=float,
        help="after so many, nothing more is started; 0: no limit (default: 0, in gpu 8)",
    )
    add("--retry", action="store_true", help="measure again what failed, or missed its goal")
    add("--toy", action="store_true", help="gpu: tiny models, nothing compiled, to try it anywhere")


def model_numbers(text):
    """vision_layers=(1,1,1,1),vision_width=16 -> {"vision_layers": (1, 1, 1, 1), ...}."""
    # At commas that are not inside of parentheses.
    assignments = re.split(r",(?![^(]*\))", text)
    numbers = {}
    for assignment in assignments:
        key, value = assignment.split("=")
        numbers[key] = configs.typed(key, configs.parse(value))
    return numbers


if __name__ == "__main__":
    sys.exit(configs.or_exit(main, sys.argv[1:]))
