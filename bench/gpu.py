"""python -m bench gpu: a GPU's first half hour, in four parts of about eight minutes each.

    A  what is right, and what a step waits for: see bench/checks.py
    B  training steps beside open_clip: ViT-B-32 at 512 pairs and RN50 at 128
    C  the same: ViT-B-16 at 640 pairs, and ViT-B-32 with its batches on the device
    D  whole runs of train.py on JPEGs, and the memory of the loss

Without --part, what the results file lacks is run in this order. After --minutes nothing more is
started; the same command goes on. Beside the results file it keeps a page that people can read
(bench/page.py) and the picture of all modes.
"""

from bench import checks, end_to_end, harness, loss, page, picture, step
from bench.jobs import Job

PARTS = ("A", "B", "C", "D")

# Pairs in a step of ViT-B-16: the paper's, and those for a GPU that runs out of memory with them.
LARGER_BATCH = 640
SMALLER_BATCH = 448

TOY_TEXT = dict(text_width=64, text_heads=1, text_layers=1, embed_dim=32)
TOY_VIT = dict(image_size=32, patch_size=16, vision_layers=1, vision_width=64, **TOY_TEXT)
TOY_RESNET = dict(image_size=64, vision_layers=(1, 1, 1, 1), vision_width=16, **TOY_TEXT)


def jobs_of(args):
    """The list of Jobs that the command line asks for."""
    of_parts = {
        "A": part_a(args),
        "B": part_b(args),
        "C": part_c(args),
        "D": part_d(args),
    }
    chosen = of_parts[args.part] if args.part else sum(of_parts.values(), [])
    if args.toy:
        return [job._replace(args=toy(job.args)) for job in chosen]
    return chosen


def show(args, rows):
    """Draw and describe all rows of the results file."""
    picture.draw(rows, args.plot)
    page.write(rows, args.out, args.plot)


# ---- the parts: times are estimates for an H100 ----


def part_a(args):
    vit = harness.changed(args, model="ViT-B-32", batch=64, compiled=True)
    resnet = harness.changed(vit, model="RN50", batch=32)
    small = harness.changed(vit, batch=32)

    jobs = [
        Job("machine", checks.machine, vit, 0.3),
        Job("numbers ViT-B-32", checks.numbers, vit, 1.3),
        Job("numbers RN50", checks.numbers, resnet, 1.3),
        Job("hooks", checks.hooks, small, 0.5),
        Job("two ranks", checks.two_ranks, small, 0.8),
    ]
    for batch in (128, 256, 512):
        watched = harness.changed(vit, batch=batch)
        jobs.append(Job(f"watch ViT-B-32 {batch}", checks.watch, watched, 0.7))
    watched = harness.changed(resnet, batch=128)
    jobs.append(Job("watch RN50 128", checks.watch, watched, 0.7))
    jobs.append(Job("tests", checks.tests, vit, 1.0))
    return jobs


def part_b(args):
    vit = harness.changed(args, model="ViT-B-32", batch=512, compiled=True, rounds=3)
    resnet = harness.changed(vit, model="RN50", batch=128)
    return [
        Job("step ViT-B-32 512", step.run, vit, 4.0),
        Job("step RN50 128", step.run, resnet, 3.5),
    ]


def part_c(args):
    large = harness.changed(
        args, model="ViT-B-16", batch=LARGER_BATCH, compiled=True, rounds=2, steps=8
    )
    placed = harness.changed(large, model="ViT-B-32", batch=512, steps=args.steps, on_device=True)
    return [
        Job("step ViT-B-16 640", largest_that_fits, large, 4.0),
        Job("step ViT-B-32 512 on the device", step.run, placed, 3.5),
    ]


def largest_that_fits(args):
    """Rows of a step at args.batch and, if a side fails there, of a smaller one, too."""
    rows = step.run(args)
    if any("failed" in row for row in rows):
        smaller = args.batch * SMALLER_BATCH // LARGER_BATCH
        rows += step.run(harness.changed(args, batch=smaller))
    return rows


def part_d(args):
    run = harness.changed(args, model="ViT-B-32", batch=512, images=20_000, size=256)
    few = harness.changed(run, workers=8)
    many = harness.changed(run, workers=16)

    paper = harness.changed(args, model="ViT-B-16", batch=640, global_batch=5120, rounds=3)
    large = harness.changed(
        paper, model="ViT-B-32", batch=4096, global_batch=131_072, tile=4096, step_batch=512
    )
    return [
        Job("run, 8 workers", end_to_end.run, few, 2.0),
        Job("run, 16 workers", end_to_end.run, many, 2.0),
        Job("loss 640 of 5120", loss.run, paper, 1.5),
        Job("loss 4096 of 131072", loss.run, large, 2.0),
    ]


# ---- the same with tiny models ----


def toy(args):
    """A job's arguments, so that it takes seconds on a CPU. Nothing is compiled.

    Batches get smaller by the same factor, so that each job keeps settings of its own.
    """
    return harness.changed(
        args,
        numbers=TOY_RESNET if args.model == "RN50" else TOY_VIT,
        batch=max(4, args.batch // 32),
        global_batch=args.global_batch // 32,
        tile=args.tile // 32,
        step_batch=4,
        workers=args.workers // 8,
        compiled=False,
        rounds=1,
        steps=1,
        images=64,
        size=48,
    )
