"""What takes too long for `make test`: many kills, a search for leaks, and the cost of saving.

    python tests/soak.py kills [--kills=50]
        2 ranks under torchrun, killed at random moments of starting, training, saving and
        evaluating: the run must end as if it never had been
    python tests/soak.py memory [--steps=4000]
        the emoji set with workers: memory and open files of every process must not grow
    python tests/soak.py stall
        a ViT-B-32 and its AdamW moments (1.9 GB), saved in the background and at once

Each part adds its figures to assets/soak.json, and ends with status 1 if what must hold does not.
`make soak` runs all three.
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

import conftest  # noqa: F401 (it sets the path of the imports below)

# isort: split
import config
import model as models
import shapes
from conftest import ROOT
from helpers import (
    TINY,
    TORCHRUN,
    assert_same_run,
    checkpoint_root,
    environment,
    newest_checkpoint,
    words_of,
)
from loss import ContrastiveLoss
from runtime import checkpoint

RESULTS = os.path.join(ROOT, "assets", "soak.json")
PICTURE = os.path.join(ROOT, "assets", "soak_memory.png")


def record(name, figures):
    """Add the figures of one part, with machine, versions, commit and date, to the results."""
    git = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()

    results = {}
    if os.path.exists(RESULTS):
        with open(RESULTS) as f:
            results = json.load(f)
    results[name] = {
        **figures,
        "command": f"python tests/soak.py {' '.join(sys.argv[1:])}",
        "machine": f"{os.cpu_count()} x {cpu_name()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }
    with open(RESULTS, "w") as f:
        json.dump(results, f, indent=1)
    print(json.dumps(results[name], indent=1))


def cpu_name():
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


# ---- processes ----

GONE = (FileNotFoundError, ProcessLookupError)  # what /proc raises for a process that has ended


def read(path):
    with open(path) as f:
        return f.read()


def stat_fields(pid):
    """-> the fields of /proc/PID/stat after the name: state, parent, ..."""
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def family(pid):
    """A process and all its living descendants -> ids, parents first. A zombie counts as dead."""
    children = []
    try:
        if stat_fields(pid)[0] == "Z":
            return []
        for task in os.listdir(f"/proc/{pid}/task"):
            children += read(f"/proc/{pid}/task/{task}/children").split()
    except GONE:
        return []

    pids = [pid]
    for child in children:
        pids += family(int(child))
    return pids


def role(pid):
    """What a process of a run is."""
    try:
        command = read(f"/proc/{pid}/cmdline")
        parent = int(stat_fields(pid)[1])
    except GONE:
        return "gone"

    if "multiprocessing.forkserver" in command:
        # The server's children are the workers. It has nothing to do after it has made them.
        return "worker" if role(parent) in ("server", "worker") else "server"
    if "torch.distributed.run" in command:
        return "torchrun"
    if "train.py" in command or "faults.py" in command:
        return "rank"
    if "resource_tracker" in command:
        return "tracker"
    return "other"


# ---- kills ----

MOMENTS = ("start-up", "training", "training", "evaluation")
EVAL_STEPS = 40  # not a multiple of the steps between two kills


class Kills:
    """What happened to the run that is killed: figures for the results."""

    def __init__(self):
        self.ways = {}  # {way of killing: how often}
        self.moments = {}  # {moment: how often}
        self.slowest_end = 0.0  # seconds
        self.last_saved_step = None


def kills(folder, count, steps, seed, done=0):
    """One run of 2 ranks with a worker each, killed `count` times, and then left to end.

    It must be the same, bit for bit, as a run that is never killed.

    done: so many kills have already been survived in this folder; the run is continued.
    """
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
    settings = {
        **TINY,
        "train_data": shapes.write(os.path.join(folder, "set")),
        "eval_data": shapes.write(os.path.join(folder, "test"), 4, 1000, seed=1, classes=True),
        "eval_steps": EVAL_STEPS,
        "eval_batch": 32,
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
    uninterrupted = os.path.join(folder, "whole")
    killed = os.path.join(folder, "killed")

    start = time.monotonic()
    with open(os.path.join(folder, "whole.log"), "a") as log:
        assert launch(settings, uninterrupted, log).wait() == 0, "the uninterrupted run failed"
    seconds = time.monotonic() - start
    print(f"the uninterrupted run of {steps} steps took {seconds:.0f} s", flush=True)

    draw = random.Random(seed)
    figures = Kills()
    with open(os.path.join(folder, "killed.log"), "a") as log:
        for number in tqdm(range(done, count), "kills"):
            moment = draw.choice(MOMENTS)
            figures.moments[moment] = figures.moments.get(moment, 0) + 1
            if moment == "start-up":
                # Then it includes indexing.
                remove_index(settings["train_data"])

            run = launch(settings, killed, log)
            wait_for(moment, run, killed, log.name, draw)
            kill_in_a_random_way(run, number, draw, figures)
            if has_checkpoint(killed):
                figures.last_saved_step = int(newest_checkpoint(killed).removeprefix("step-"))
        assert launch(settings, killed, log).wait() == 0, f"see {log.name}"

    assert_same_run(uninterrupted, killed, steps)
    record(
        "kills",
        {
            "kills": count,
            "of_these_in_an_earlier_session": done,
            "ways_in_this_one": figures.ways,
            "moments_in_this_one": figures.moments,
            "steps": steps,
            "save_steps": settings["save_steps"],
            "eval_steps": EVAL_STEPS,
            "last_kill_after_step": figures.last_saved_step,
            "slowest_to_end_s": round(figures.slowest_end, 1),
            "damaged_checkpoints": read(log.name).count("is damaged"),
            "same_weights_moments_state_and_metrics": True,
        },
    )


def launch(settings, out_dir, log):
    """torchrun with 2 ranks, in a session of its own -> Popen."""
    script = os.path.join(ROOT, "train.py")
    words = words_of(**settings, out_dir=out_dir)
    return subprocess.Popen(
        [*TORCHRUN, "--standalone", "--nproc_per_node", "2", script, *words],
        env=environment(),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def has_checkpoint(out_dir):
    root = checkpoint_root(out_dir)
    return os.path.isdir(root) and len(checkpoint.steps(root)) > 0


def remove_index(train_data):
    index = os.path.join(os.path.dirname(train_data), "index.json")
    if os.path.exists(index):
        os.remove(index)


def wait_for(moment, run, out_dir, log_path, draw):
    """Wait for a random point of starting, of training (and saving), or of an evaluation."""
    if moment == "start-up":
        time.sleep(draw.uniform(0, 10))
        return

    with open(log_path) as log:
        log.seek(0, os.SEEK_END)
        while "; from step" not in log.read():
            check_still_running(run, log_path)
            time.sleep(0.1)

    metrics = os.path.join(out_dir, "metrics.jsonl")
    if moment == "evaluation":
        while not is_evaluating(metrics):
            check_still_running(run, log_path)
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 3))
        return

    # In steps, not in seconds, so that the run gets on even on a slow machine.
    last = count_lines(metrics) + draw.randrange(1, 50)
    while count_lines(metrics) < last:
        check_still_running(run, log_path)
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.3))


def check_still_running(run, log_path):
    assert run.poll() is None, f"it ended too early: give more --steps, or see {log_path}"


def is_evaluating(metrics):
    """Whether the last row of metrics.jsonl is that of a step after which an evaluation is due."""
    if not os.path.exists(metrics):
        return False
    lines = read(metrics).splitlines()
    try:
        row = json.loads(lines[-1])
    except (IndexError, ValueError):
        return False  # nothing yet, or a line that is just being written
    return "objective" in row and row["step"] % EVAL_STEPS == 0


def count_lines(path):
    if not os.path.exists(path):
        return 0
    with open(path, "rb") as f:
        return f.read().count(b"\n")


def kill_in_a_random_way(run, number, draw, figures):
    """Kill all processes, one rank, torchrun or a worker, or terminate; wait for the end of all."""
    everyone = set(family(run.pid))
    way, targets = choose_targets(run, everyone, draw)

    start = time.monotonic()
    for pid in targets:
        os.kill(pid, signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL)
    while run.poll() is None or any(family(pid) for pid in everyone):
        everyone.update(family(run.pid))
        # A rank that is just joining the others looks for them for `timeout` + 60 s.
        if time.monotonic() - start > 300:
            left = [(pid, role(pid)) for pid in everyone if family(pid)]
            raise AssertionError(f"300 s after kill {number} ({way}) there are {left}")
        time.sleep(0.05)

    figures.slowest_end = max(figures.slowest_end, time.monotonic() - start)
    figures.ways[way] = figures.ways.get(way, 0) + 1


def choose_targets(run, everyone, draw):
    """-> (way of killing, ids of the processes to kill)"""
    way = draw.choice(["all", "rank", "torchrun", "worker", "SIGTERM"])
    if way in ("torchrun", "SIGTERM"):
        # torchrun passes SIGTERM on to its ranks.
        return way, [run.pid]
    if way in ("rank", "worker"):
        candidates = sorted(pid for pid in everyone if role(pid) == way)
        if candidates:
            return way, [draw.choice(candidates)]
        # There is no such process yet.
    return "all", everyone


# ---- memory ----


def memory(folder, steps, fault):
    """A run on the emoji set with 2 workers, which saves and evaluates now and then.

    Every process is measured once a second, and none may grow. fault: of tests/faults.py, or "".
    """
    shutil.rmtree(folder, ignore_errors=True)
    script = ["tests/faults.py", fault] if fault else ["train.py"]
    command = [
        sys.executable,
        *script,
        "configs/emoji_v3.py",
        f"--out_dir={os.path.abspath(folder)}",
        f"--max_steps={steps}",
        "--epochs=10000",
        f"--save_steps={steps // 20}",
        f"--eval_steps={steps // 4}",
        "--workers=2",
        "--device=cpu",
    ]
    start = time.monotonic()
    with open(folder + ".log", "w") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        series = measure_processes(run)
    assert run.returncode == 0, f"see {folder}.log"
    minutes = (time.monotonic() - start) / 60

    # The workers of the evaluation come and go.
    longest = max(len(rows) for rows in series.values())
    series = {key: rows for key, rows in series.items() if len(rows) > 0.8 * longest}
    draw_series(series, PICTURE)

    processes = {}
    for number, ((name, _), rows) in enumerate(sorted(series.items())):
        processes[f"{name} {number}"] = summarise(rows)
    record("memory", {"steps": steps, "minutes": round(minutes, 1), "processes": processes})
    assert not any(row["grew"] for row in processes.values()), "a process grows"


def measure_processes(run):
    """Once a second until the run ends -> {(role, id): [(seconds, MB, open files)]}"""
    series = {}
    start = time.monotonic()
    while run.poll() is None:
        for pid in family(run.pid):
            try:
                key = (role(pid), pid)
                row = (time.monotonic() - start, own_megabytes(pid), open_files(pid))
            except (*GONE, PermissionError):
                continue
            series.setdefault(key, []).append(row)
        time.sleep(1)
    return series


def own_megabytes(pid):
    """The memory that this process shares with no other."""
    kilobytes = 0
    for line in read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(("Private_Clean", "Private_Dirty")):
            kilobytes += int(line.split()[1])
    return kilobytes / 1e3


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def second_and_last_fifth(values):
    """-> their medians. The first fifth is warm-up."""
    fifth = len(values) // 5
    return statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])


def grew(values, share, least):
    """Has the median risen by more than a share of it, and by more than `least`?"""
    early, late = second_and_last_fifth(values)
    return late - early > max(share * early, least)


def summarise(rows):
    """The figures of one process. rows: [(seconds, MB, open files)]"""
    megabytes = [row[1] for row in rows]
    files = [row[2] for row in rows]
    early_megabytes, late_megabytes = second_and_last_fifth(megabytes)
    early_files, late_files = second_and_last_fifth(files)
    return {
        "MB_second_fifth": round(early_megabytes),
        "MB_last_fifth": round(late_megabytes),
        "files_second_fifth": early_files,
        "files_last_fifth": late_files,
        "grew": grew(megabytes, share=0.03, least=8.0) or grew(files, share=0, least=2),
    }


def draw_series(series, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for (name, _), rows in sorted(series.items()):
        minutes = [row[0] / 60 for row in rows]
        axes[0].plot(minutes, [row[1] for row in rows], label=name)
        axes[1].plot(minutes, [row[2] for row in rows], label=name)

    axes[0].set_title("memory of its own, MB")
    axes[1].set_title("open files")
    for axis in axes:
        axis.set(xlabel="minutes", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ---- stall ----


class LargeRun:
    """A ViT-B-32, its AdamW moments, and the u-state of the paper's 12 M pairs on one rank."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = models.create("ViT-B-32")
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [dict(name="decay", params=parameters)], 1e-4, fused=True
        )
        self.loss = ContrastiveLoss("fastclip-v3", 9_187_328)
        self.images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
        self.tokens = torch.ones(2, 16, dtype=torch.long)

    def step(self):
        """A training step on two pairs -> seconds"""
        start = time.monotonic()
        self.optimizer.zero_grad()
        image_features, text_features = self.model(self.images, self.tokens)
        (image_features.sum() + text_features.sum()).backward()
        self.optimizer.step()
        return time.monotonic() - start

    def saver(self, folder, background):
        c = config.Config(out_dir=folder, save_background=background, keep=1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return checkpoint.Saver(c, self.model, self.optimizer, self.loss, scaler)


def stall(folder, repeats=3):
    """How long training waits for a save, and how much slower steps are while it is written."""
    shutil.rmtree(folder, ignore_errors=True)
    run = LargeRun()
    step_alone = statistics.median(run.step() for _ in range(2 * repeats))
    figures = {"seconds_of_a_step": round(step_alone, 2)}

    for name in ("beside", "at_once"):
        background = name == "beside"
        out = os.path.join(folder, name)
        saver = run.saver(out, background)
        waits, writes, steps_meanwhile = measure_saves(run, saver, repeats, name)
        figures[f"training_waits_s_{name}"] = round(statistics.median(waits), 2)
        figures[f"until_it_is_safe_s_{name}"] = round(statistics.median(writes), 2)
        if steps_meanwhile:
            figures["seconds_of_a_step_meanwhile"] = round(statistics.median(steps_meanwhile), 2)
        figures["GB"] = round(saver.num_bytes() / 1e9, 2)
        saver.close()
        shutil.rmtree(out)

    record("stall", figures)
    assert figures["training_waits_s_beside"] < figures["training_waits_s_at_once"]


def measure_saves(run, saver, repeats, label):
    """-> three lists of seconds: training waits; a checkpoint is safe; each step meanwhile."""
    waits = []
    writes = []
    steps_meanwhile = []
    for number in tqdm(range(1 + repeats), label):
        start = time.monotonic()
        wait = saver.save(number, {})
        while saver.writing():
            steps_meanwhile.append(run.step())
        assert saver.wait()

        # The first save also has to allocate its memory.
        if number > 0:
            waits.append(wait)
            writes.append(time.monotonic() - start)
    return waits, writes, steps_meanwhile


# ---- the command line ----


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=["kills", "memory", "stall"])
    add("--kills", type=int, default=50)
    add("--steps", type=int, help="of the run: kills 1600, memory 4000")
    add("--done", type=int, default=0, help="kills: so many have been survived in --folder already")
    add("--seed", type=int, default=0, help="of the moments and ways of killing")
    add("--fault", default="", help="memory: of tests/faults.py; leak@500:0 must be found")
    add("--folder", default=os.path.join(ROOT, "runs", "soak"))
    return parser.parse_args(argv)


def main(argv):
    a = parse(argv)
    folder = os.path.join(a.folder, a.part)
    os.makedirs(a.folder, exist_ok=True)
    if a.part == "kills":
        kills(folder, a.kills, a.steps or 1600, a.seed, a.done)
    elif a.part == "memory":
        memory(folder, a.steps or 4000, a.fault)
    else:
        stall(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
