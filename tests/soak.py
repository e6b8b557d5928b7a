"""What takes too long for `make test`: a run killed -9 many times, one watched for leaks, and how long saving holds training up.

    python tests/soak.py kills [--kills=50]        2 ranks under torchrun, killed at random moments; it must end as if never killed
    python tests/soak.py memory [--steps=4000]     the emoji set with workers; memory and open files of every process must stay flat
    python tests/soak.py stall                     a ViT-B-32 and its AdamW moments (1.8 GB), written beside the training and at once

Each adds its figures to assets/soak.json and ends with status 1 if what must hold does not. `make soak` runs all three.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

import torch
from tqdm import tqdm

import config
import conftest  # noqa: F401 (the path)
import model as models
import shapes
from conftest import ROOT
from helpers import TINY, assert_same_run, newest, words_of
from loss import ContrastiveLoss
from runtime import checkpoint

RESULTS = os.path.join(ROOT, "assets", "soak.json")


def note(name, figures):
    """Add the figures of one part, with machine, versions, commit and date, to the results."""
    with open("/proc/cpuinfo") as f:
        cpu = next(
            (line.split(":")[1].strip() for line in f if line.startswith("model name")),
            platform.machine(),
        )
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    results = json.load(open(RESULTS)) if os.path.exists(RESULTS) else {}
    results[name] = {
        **figures,
        "command": f"python tests/soak.py {' '.join(sys.argv[1:])}",
        "machine": f"{os.cpu_count()} x {cpu}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
    with open(RESULTS, "w") as f:
        json.dump(results, f, indent=1)
    print(json.dumps(results[name], indent=1))


# ---- processes ----


def family(pid):
    """A process and all its living descendants -> pids, parents first. (A zombie counts as dead.)"""
    try:
        with open(f"/proc/{pid}/stat") as f:
            if f.read().rpartition(")")[2].split()[0] == "Z":
                return []
        children = [
            int(p)
            for task in os.listdir(f"/proc/{pid}/task")
            for p in open(f"/proc/{pid}/task/{task}/children").read().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(p for child in children for p in family(child))]


def role(pid):
    """What a process of a run is."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            text = f.read().decode()
        with open(f"/proc/{pid}/stat") as f:
            parent = int(f.read().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    if (
        "multiprocessing.forkserver" in text
    ):  # the server itself may die without harm: its work is done
        return "worker" if role(parent) in ("server", "worker") else "server"
    for name, sign in (
        ("torchrun", "torch.distributed.run"),
        ("rank", "train.py"),
        ("rank", "faults.py"),
        ("tracker", "resource_tracker"),
    ):
        if sign in text:
            return name
    return "other"


# ---- kills ----


def kills(folder, count, steps, seed, done=0):
    """One run of 2 ranks with a worker each, killed `count` times at random moments in one of four ways, and then left to end.
    done: that many kills have been survived in this folder already, and are gone on from."""
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
    settings = {
        **TINY,
        "train_data": shapes.write(os.path.join(folder, "set")),
        "algorithm": "fastclip-v2",
        "max_steps": steps,
        "epochs": 10000,
        "save_steps": 4,
        "log_steps": 1,
        "keep": 3,
        "workers": 1,
        "timeout": 60,
        "resume": "auto",
    }
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        os.path.join(ROOT, "train.py"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def launch(out_dir, log):
        return subprocess.Popen(
            torchrun + words_of(**settings, out_dir=out_dir),
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    whole, killed = os.path.join(folder, "whole"), os.path.join(folder, "killed")
    with open(os.path.join(folder, "whole.log"), "a") as log:
        start = time.monotonic()
        assert launch(whole, log).wait() == 0, "the uninterrupted run failed"
        print(
            f"the uninterrupted run of {steps} steps took {time.monotonic() - start:.0f} s",
            flush=True,
        )

    def rows(path):
        if not os.path.exists(path):
            return 0
        with open(path, "rb") as f:
            return f.read().count(b"\n")

    draw, ways, slowest, saved, in_startup = random.Random(seed), {}, 0.0, [], 0
    metrics = os.path.join(killed, "metrics.jsonl")
    with open(os.path.join(folder, "killed.log"), "a") as log:
        for number in tqdm(range(done, count), "kills"):
            run = launch(killed, log)
            everyone = set()
            if draw.random() < 0.1:  # sometimes before it trains
                time.sleep(draw.uniform(0, 8))
                in_startup += 1
            else:
                place, where = (
                    draw.randrange(1, 50),
                    open(log.name),
                )  # in steps, so that slow machines get on too
                where.seek(0, os.SEEK_END)
                while "; from step" not in where.read():
                    assert run.poll() is None, f"it does not start again: see {log.name}"
                    time.sleep(0.1)
                first = rows(metrics)
                while rows(metrics) < first + place:
                    assert run.poll() is None, (
                        f"it ended before kill {number}: --steps={2 * steps}, or see {log.name}"
                    )
                    time.sleep(0.005)
                time.sleep(draw.uniform(0, 0.3))
            everyone.update(family(run.pid))
            way = draw.choice(["all", "rank", "torchrun", "worker"])
            target = {"all": everyone, "torchrun": [run.pid]}.get(way) or [
                p for p in everyone if role(p) == way
            ]
            if not target:  # there is no such process yet
                way, target = "all", everyone
            if way in ("rank", "worker"):
                target = [draw.choice(sorted(target))]
            start = time.monotonic()
            for pid in target:
                os.kill(pid, signal.SIGKILL)
            while run.poll() is None or any(
                family(pid) for pid in everyone
            ):  # nothing of it may stay behind
                everyone.update(family(run.pid))
                # A rank that is just joining the others looks for them for `timeout` + 60 s.
                assert time.monotonic() - start < 300, (
                    f"300 s after kill {number} ({way}) there are {[(p, role(p)) for p in everyone if family(p)]}"
                )
                time.sleep(0.05)
            slowest = max(slowest, time.monotonic() - start)
            ways[way] = ways.get(way, 0) + 1
            if os.path.isdir(os.path.join(killed, "checkpoints")) and checkpoint.steps(
                os.path.join(killed, "checkpoints")
            ):
                saved.append(int(newest(killed)[5:]))
        assert launch(killed, log).wait() == 0, f"see {log.name}"
    assert_same_run(whole, killed, steps)
    log = open(os.path.join(folder, "killed.log")).read()
    note(
        "kills",
        {
            "kills": count,
            "of_these_in_an_earlier_session": done,
            "ways_in_this_one": ways,
            "before_training": in_startup,
            "steps": steps,
            "save_steps": settings["save_steps"],
            "last_kill_after_step": saved[-1],
            "slowest_to_end_s": round(slowest, 1),
            "damaged_checkpoints": log.count("is damaged"),
            "same_weights_moments_state_and_metrics": True,
        },
    )


# ---- memory ----


def resident(pid):
    """-> (MB in memory that are this process's own, open files)"""
    with open(f"/proc/{pid}/smaps_rollup") as f:
        own = sum(
            int(line.split()[1])
            for line in f
            if line.startswith(("Private_Clean", "Private_Dirty"))
        )
    return own / 1e3, len(os.listdir(f"/proc/{pid}/fd"))


def grew(values, share=0.03, least=8.0):
    """Is the median of the last fifth of a series above that of its second fifth by more than a share, and by at least `least`?
    (The first fifth is warm-up.)"""
    fifth = len(values) // 5
    early, late = statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])
    return late - early > max(share * early, least)


def memory(folder, steps, fault):
    """A run on the emoji set with 2 workers, saving and evaluating now and then; every process is looked at once a second."""
    shutil.rmtree(folder, ignore_errors=True)
    script = (
        [os.path.join(ROOT, "tests", "faults.py"), fault]
        if fault
        else [os.path.join(ROOT, "train.py")]
    )
    command = [
        sys.executable,
        *script,
        os.path.join(ROOT, "configs", "emoji_v3.py"),
        f"--out_dir={folder}",
        f"--max_steps={steps}",
        "--epochs=10000",
        f"--save_steps={steps // 20}",
        f"--eval_steps={steps // 4}",
        "--workers=2",
        "--device=cpu",
    ]
    series, start = {}, time.monotonic()
    with open(folder + ".log", "w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while run.poll() is None:
            for pid in family(run.pid):
                try:
                    series.setdefault((role(pid), pid), []).append(
                        (time.monotonic() - start, *resident(pid))
                    )
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    pass
            time.sleep(1)
    assert run.returncode == 0, f"see {folder}.log"
    series = {
        key: rows
        for key, rows in series.items()
        if len(rows) > 0.8 * max(map(len, series.values()))
    }  # evaluation's workers come and go
    draw(series, os.path.join(ROOT, "assets", "soak_memory.png"))
    rows = {
        f"{name} {i}": {
            "MB_second_fifth": round(
                statistics.median(r[1] for r in rows[len(rows) // 5 : 2 * len(rows) // 5])
            ),
            "MB_last_fifth": round(statistics.median(r[1] for r in rows[-(len(rows) // 5) :])),
            "files_second_fifth": statistics.median(
                r[2] for r in rows[len(rows) // 5 : 2 * len(rows) // 5]
            ),
            "files_last_fifth": statistics.median(r[2] for r in rows[-(len(rows) // 5) :]),
            "grew": grew([r[1] for r in rows]) or grew([r[2] for r in rows], 0, 2),
        }
        for i, ((name, _), rows) in enumerate(sorted(series.items()))
    }
    note(
        "memory",
        {"steps": steps, "minutes": round((time.monotonic() - start) / 60, 1), "processes": rows},
    )
    assert not any(row["grew"] for row in rows.values()), "a process grows"


def draw(series, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for (name, pid), rows in sorted(series.items()):
        times, own, files = zip(*rows)
        for axis, values in zip(axes, (own, files)):
            axis.plot([t / 60 for t in times], values, label=name)
    for axis, title in zip(axes, ("memory of its own, MB", "open files")):
        axis.set(title=title, xlabel="minutes", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ---- stall ----


def stall(folder, repeats=3):
    """For how long a save holds training up, and how much slower steps are while it is written."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = models.create("ViT-B-32")
    optimizer = torch.optim.AdamW(
        [dict(name="decay", params=list(model.parameters()))], 1e-4, fused=True
    )
    loss = ContrastiveLoss(
        "fastclip-v3", 9_187_328
    )  # the u-state of the paper's 12 M pairs, all on this rank
    images, tokens = (
        torch.zeros(2, 3, 224, 224, dtype=torch.uint8),
        torch.ones(2, 16, dtype=torch.long),
    )

    def step():
        start = time.monotonic()
        optimizer.zero_grad()
        sum(x.sum() for x in model(images, tokens)).backward()
        optimizer.step()
        return time.monotonic() - start

    alone = statistics.median(step() for _ in range(2 * repeats))
    figures = {"seconds_of_a_step": round(alone, 2)}
    for background in (True, False):
        c = config.Config(
            out_dir=os.path.join(folder, str(background)), save_background=background, keep=1
        )
        saver = checkpoint.Saver(
            c, model, optimizer, loss, torch.amp.GradScaler("cpu", enabled=False)
        )
        waits, writes, beside = [], [], []
        for n in tqdm(range(1 + repeats), "beside the training" if background else "at once"):
            start = time.monotonic()
            wait = saver.save(n, {})
            while saver.writing():
                beside.append(step())
            assert saver.commit()
            if n:  # the first one also has to find its memory
                waits.append(wait)
                writes.append(time.monotonic() - start)
        name = "beside" if background else "at_once"
        figures[f"training_waits_s_{name}"] = round(statistics.median(waits), 2)
        figures[f"until_it_is_safe_s_{name}"] = round(statistics.median(writes), 2)
        if beside:
            figures["seconds_of_a_step_meanwhile"] = round(statistics.median(beside), 2)
        figures["GB"] = round(saver.bytes() / 1e9, 2)
        saver.close()
        shutil.rmtree(c.out_dir)
    note("stall", figures)
    assert figures["training_waits_s_beside"] < figures["training_waits_s_at_once"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["kills", "memory", "stall"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, help="of the run: kills 1600, memory 4000")
    parser.add_argument(
        "--done",
        type=int,
        default=0,
        help="kills: so many have been survived in --folder, go on from there",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments and ways of killing")
    parser.add_argument(
        "--fault",
        default="",
        help="memory: a fault of tests/faults.py, for example leak@500:0, which must be found",
    )
    parser.add_argument("--folder", default=os.path.join(ROOT, "runs", "soak"))
    a = parser.parse_args()
    place = os.path.join(a.folder, a.part)
    os.makedirs(a.folder, exist_ok=True)
    if a.part == "kills":
        kills(place, a.kills, a.steps or 1600, a.seed, a.done)
    elif a.part == "memory":
        memory(place, a.steps or 4000, a.fault)
    else:
        stall(place)
