"""What was measured: rows, added to a JSON file with where, when and of what they are; and a table.

A row: mode, side, settings, unit, all (a value for each round), median, and what the mode adds. In
place of unit, all and median it may have `failed` or `skipped`, which say why there is no value.
The file: machine, rows, and in each row the commit, date, load and versions that it was measured
with, and the job that measured it, if it was one of several (bench/jobs.py).
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import textwrap

import torch

from bench import baselines, harness
from config import ConfigError
from runtime import plan

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- rows ----


def row(mode, side, settings, unit, values, **more):
    """values: one for each round."""
    return dict(
        mode=mode,
        side=side,
        settings=settings,
        unit=unit,
        median=statistics.median(values),
        all=values,
        **more,
    )


def failed(mode, side, settings, reason, **more):
    """The row of what could not be measured. reason: one line."""
    return dict(mode=mode, side=side, settings=settings, failed=reason, **more)


def skipped(mode, side, settings, reason):
    """The row of what this machine cannot measure. reason: one line."""
    return dict(mode=mode, side=side, settings=settings, skipped=reason)


def with_values(rows):
    """Those rows that have values."""
    return [row for row in rows if "all" in row]


def with_ratios(rows):
    """The rows, each with its `ratio` to open_clip: the median of the ratios within a round.

    Compiled sides are compared with the compiled open_clip. If that failed, there is no ratio.
    Where CPU time was measured (all threads, spinning included), `cpu_ratio` is open_clip's over
    the side's: the steadier ratio if others work on the same machine.
    """
    measured = with_values(rows)
    by_side = {row["side"]: row for row in measured}
    for row in measured:
        compiled = row["side"].endswith("compiled")
        baseline = by_side.get("open_clip compiled" if compiled else "open_clip")
        if not baseline:
            continue
        row["ratio"] = median_ratio(row["all"], baseline["all"])
        if "cpu_seconds" in row:
            row["cpu_ratio"] = median_ratio(baseline["cpu_seconds"], row["cpu_seconds"])
    return rows


def median_ratio(numerators, denominators):
    return statistics.median(x / y for x, y in zip(numerators, denominators))


# ---- where, when and of what ----


def machine():
    """The machine that a results file belongs to: {cpu, cores, gpu}."""
    return dict(
        cpu=cpu_name(),
        cores=harness.cores(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def cpu_name():
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def versions():
    """The exact versions that the figures depend on; None: not installed."""
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=package_version("torchvision"),
        numpy=package_version("numpy"),
        webdataset=package_version("webdataset"),
        timm=package_version("timm"),
        open_clip=baselines.version(),
        triton=package_version("triton"),
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        nccl=nccl_version(),
        driver=driver_version(),
    )


def nccl_version():
    """NCCL's version, such as "2.27.5"; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def driver_version():
    """The version of NVIDIA's driver; None without one."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (printed_by(words) or "\n").splitlines()[0] or None


def package_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(folder=ROOT):
    """The short commit of a clone, with "+" if tracked files are changed that can change results.

    "" if the folder is no clone, or there is no git on this machine.
    """
    left_out = (":!assets", ":!docs", ":!experiments/*.gz", ":!experiments/*.png")
    head = git(folder, "rev-parse", "--short", "HEAD")
    changed_files = git(folder, "status", "--porcelain", "-uno", "--", *left_out)
    return head + "+" if changed_files else head


def git(folder, *words):
    """What a git command prints; "" if it fails, or there is no git."""
    return printed_by(["git", *words], folder)


def printed_by(words, folder=None):
    """What a command prints; "" if it fails, or is not on this machine."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


# ---- the results file ----


def check(path):
    """The document that results will be added to: {machine, rows, ...}.

    Called before anything is measured. Raises ConfigError if the folder does not exist, or the file
    was measured on another machine.
    """
    folder = os.path.dirname(path)
    if folder and not os.path.isdir(folder):
        raise ConfigError(f"{path} cannot be written: there is no folder {folder}")
    if not os.path.exists(path):
        return dict(machine=machine(), rows=[])

    with open(path) as f:
        document = json.load(f)
    if document["machine"] != machine():
        raise ConfigError(
            f"{path} was measured on another machine, {document['machine']}: name another --out"
        )
    return document


def save(rows, path, job=None):
    """Add rows to the file, in place of older ones with the same identity. Returns all rows.

    job: the name of the job that measured them; all older rows of that job are removed.
    """
    document = check(path)
    provenance = dict(
        commit=commit(),
        date=datetime.datetime.now().isoformat(timespec="minutes"),
        load=os.getloadavg()[1],
        versions=versions(),
    )
    document.update(provenance)

    replaced = {identity(row) for row in rows}
    kept = [row for row in document["rows"] if identity(row) not in replaced]
    if job:
        kept = [row for row in kept if row.get("job") != job]
        provenance["job"] = job
    document["rows"] = kept + [{**row, **provenance} for row in rows]

    # A rename, so that the file is complete at every moment.
    with open(path + ".partial", "w") as f:
        json.dump(document, f, indent=1)
    os.replace(path + ".partial", path)
    return document["rows"]


def identity(row):
    """What says which measurement a row is of, as text."""
    key = [row["mode"], row["side"], row["settings"], row.get("algorithm")]
    return json.dumps(key, sort_keys=True)


# ---- the table ----

# Key of a row -> how the table shows it.
SHOWN = {
    "ratio": "{:.2f} x",
    "cpu_ratio": "{:.2f} x in CPU time",
    "mfu": "MFU {:.0%}",
    "mfu_padded": "padded {:.0%}",
    "share": "{:.3f} of open_clip's",
    "share_at_8_ranks": "{:.3f} at 8 ranks",
    "equal": "formula: {}",
    "share_of_step": "{:.2%} of a step",
    "hidden_share": "{:.0%} of communication hidden",
    "predicted_ms": "predicted {:.0f} ms",
    "error": "{:+.0%}",
    "efficiency": "efficiency {:.0%}",
    "finding_seconds": "finding {:.1f} s",
    "image_seconds": "images {:.0f} s",
    "text_seconds": "texts {:.0f} s",
}


# Mode -> what the reader of its rows must know.
NOTES = {
    "step": "The sides differ in more than the step. On a GPU, open_clip's main() allows TF32 in "
    "float32 products and ours does not (in bf16 and fp16 it is no matter). Before a step, "
    "open_clip copies float32 images to the device, and waits for them; ours copies bytes "
    "(--on_device leaves both copies out). Its images are NCHW, for RN50 too, ours channels_last. "
    "It waits for the device, to log, after the first and the last of a turn's 20 steps.",
    "zeroshot": "The sides differ in how they encode. Ours takes images and prompts 256 at a time "
    "(--batch) and leaves out padding; open_clip takes 64 images, its default, and the prompts of "
    "10 classes, padded to the full context. Memory is without the data workers'.",
}


def print_table(rows):
    for row in rows:
        print(table_line(row))
    for mode, note in NOTES.items():
        if any(row["mode"] == mode for row in rows):
            print(textwrap.fill(note, 100))


def table_line(row):
    """mode, model or source, side, median, range over the rounds, what the mode adds, settings."""
    settings = row["settings"]
    name = settings.get("model", settings.get("source", ""))
    others = " ".join(
        f"{key}={value}"
        for key, value in settings.items()
        if key not in ("model", "source") and value != "fp32"
    )

    what = f"{row['mode']:<10}{name:<15}{row['side']:<21} "
    for reason in ("failed", "skipped"):
        if reason in row:
            return f"{what}{reason}: {row[reason]}  {others}"

    values = row["all"]
    spread = f"{min(values):.4g}..{max(values):.4g}" if min(values) < max(values) else ""
    more = [form.format(row[key]) for key, form in SHOWN.items() if key in row]
    if "peak_bytes" in row:
        more.append(f"peak {plan.size(row['peak_bytes'])}")
    more = ", ".join(more)

    return f"{what}{value_of(row):>16}  {spread:<16}{more:<50}  {others}"


def value_of(row):
    """The row's median with its unit, as text."""
    if row["unit"] == "bytes":
        return plan.size(row["median"])
    return f"{row['median']:.4g} {row['unit']}"
