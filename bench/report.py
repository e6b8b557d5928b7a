"""What was measured: rows, added to a JSON file with where, when and of what they are; and a table.

A row: mode, side, settings, unit, all (a value for each round), median, and what the mode adds. The
file: machine, rows, and in each row the commit, date, load and versions that it was measured with.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess

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


def with_ratios(rows):
    """The rows, each with its `ratio` to open_clip: the median of the ratios within a round.

    Compiled sides are compared with the compiled open_clip. Where CPU time was measured (all
    threads, spinning included), `cpu_ratio` is open_clip's over the side's: the steadier ratio if
    others work on the same machine.
    """
    by_side = {row["side"]: row for row in rows}
    for row in rows:
        compiled = row["side"].endswith("compiled")
        baseline = by_side["open_clip compiled" if compiled else "open_clip"]
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
    )


def package_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(folder=ROOT):
    """The short commit of a clone, with "+" if tracked files outside assets/ are changed.

    "" if the folder is no clone, or there is no git on this machine.
    """
    head = git(folder, "rev-parse", "--short", "HEAD")
    changed_files = git(folder, "status", "--porcelain", "-uno", "--", ":!assets")
    return head + "+" if changed_files else head


def git(folder, *words):
    """What a git command prints; "" if it fails, or there is no git."""
    try:
        result = subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder)
    except OSError:
        return ""
    return result.stdout.strip()


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


def save(rows, path):
    """Add rows to the file, in place of older ones with the same identity. Returns all rows."""
    document = check(path)
    provenance = dict(
        commit=commit(),
        date=datetime.datetime.now().isoformat(timespec="minutes"),
        load=os.getloadavg()[1],
        versions=versions(),
    )

    replaced = {identity(row) for row in rows}
    kept = [row for row in document["rows"] if identity(row) not in replaced]
    document["rows"] = kept + [{**row, **provenance} for row in rows]
    document.update(provenance)

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
    "share": "{:.3f} of open_clip's",
    "share_at_8_ranks": "{:.3f} at 8 ranks",
    "equal": "formula: {}",
    "share_of_step": "{:.2%} of a step",
    "hidden_share": "{:.0%} of communication hidden",
    "predicted_ms": "predicted {:.0f} ms",
    "error": "{:+.0%}",
    "efficiency": "efficiency {:.0%}",
}


def print_table(rows):
    for row in rows:
        print(table_line(row))


def table_line(row):
    """mode, model or source, side, median, range over the rounds, what the mode adds, settings."""
    settings = row["settings"]
    name = settings.get("model", settings.get("source", ""))
    others = " ".join(
        f"{key}={value}"
        for key, value in settings.items()
        if key not in ("model", "source") and value != "fp32"
    )

    values = row["all"]
    if row["unit"] == "bytes":
        median = plan.size(row["median"])
    else:
        median = f"{row['median']:.4g} {row['unit']}"
    spread = f"{min(values):.4g}..{max(values):.4g}" if min(values) < max(values) else ""

    more = [form.format(row[key]) for key, form in SHOWN.items() if key in row]
    if "peak_bytes" in row:
        more.append(f"peak {plan.size(row['peak_bytes'])}")
    more = ", ".join(more)

    what = f"{row['mode']:<10}{name:<15}{row['side']:<22}"
    return f"{what}{median:>16}  {spread:<16}{more:<50}  {others}"
