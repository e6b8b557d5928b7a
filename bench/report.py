"""What bench.py has measured: rows, added up in a JSON file with where, when and of what they are; a table; a picture."""

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess

import torch

from bench import baselines, harness
from config import ConfigError
from runtime import plan


def row(mode, side, settings, unit, values, **more):
    return dict(
        mode=mode,
        side=side,
        settings=settings,
        unit=unit,
        median=statistics.median(values),
        all=values,
        **more,
    )


def beside(rows):
    """Add to each row its ratio with open_clip's, round by round, compiled with compiled. Where there are others at work on the machine, the
    ratio of the CPU time (all threads, what they spin included) is the steadier one."""
    theirs = {r["side"]: r for r in rows}
    for r in rows:
        other = theirs["open_clip compiled" if r["side"].endswith("compiled") else "open_clip"]
        r["ratio"] = statistics.median(x / y for x, y in zip(r["all"], other["all"]))
        if "cpu_seconds" in r:
            r["cpu_ratio"] = statistics.median(
                y / x for x, y in zip(r["cpu_seconds"], other["cpu_seconds"])
            )
    return rows


def machine():
    name = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        name = next(
            (line.split(":")[1].strip() for line in f if line.startswith("model name")), name
        )
    return dict(
        cpu=name,
        cores=harness.cores(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def commit():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    git = lambda *words: subprocess.run(
        ["git", *words], capture_output=True, text=True, cwd=here
    ).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "-uno", "--", ":!assets") else ""
    )


def check(out):
    """-> the document to which results are to be added. ConfigError if it is of another machine, or cannot be written: before anything is measured."""
    if not os.path.isdir(os.path.dirname(out) or "."):
        raise ConfigError(f"{out} cannot be written: there is no folder {os.path.dirname(out)}")
    document = dict(machine=machine(), rows=[])
    if os.path.exists(out):
        with open(out) as f:
            document = json.load(f)
        if document["machine"] != machine():
            raise ConfigError(
                f"{out} was measured on another machine, {document['machine']}: name another --out"
            )
    return document


def save(rows, out):
    """Rows take the place of older ones with the same mode, side, settings and algorithm -> all rows."""
    document = check(out)
    now = dict(
        commit=commit(),
        date=datetime.datetime.now().isoformat(timespec="minutes"),
        load=os.getloadavg()[1],
        versions=dict(
            python=platform.python_version(), torch=torch.__version__, open_clip=baselines.version()
        ),
    )
    key = lambda r: json.dumps(
        [r["mode"], r["side"], r["settings"], r.get("algorithm")], sort_keys=True
    )
    new = {key(r) for r in rows}
    document["rows"] = [r for r in document["rows"] if key(r) not in new] + [
        {**r, **now} for r in rows
    ]
    document.update(now)
    with open(out + ".partial", "w") as f:
        json.dump(document, f, indent=1)
    os.replace(out + ".partial", out)
    return document["rows"]


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


def table(rows):
    for r in rows:
        settings = " ".join(
            f"{k}={v}"
            for k, v in r["settings"].items()
            if k not in ("model", "source") and v != "fp32"
        )
        more = [form.format(r[k]) for k, form in SHOWN.items() if k in r] + [
            f"peak {plan.size(r.get('peak_bytes', 0))}"
        ] * ("peak_bytes" in r)
        name = r["settings"].get("model", r["settings"].get("source", ""))
        value = plan.size(r["median"]) if r["unit"] == "bytes" else f"{r['median']:.4g} {r['unit']}"
        spread = f"{min(r['all']):.4g}..{max(r['all']):.4g}" if len(set(r["all"])) > 1 else ""
        print(
            f"{r['mode']:<10}{name:<15}{r['side']:<22}{value:>16}  {spread:<16}{', '.join(more):<50}  {settings}"
        )


def picture(rows, out):
    """All rows -> one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(19, 8.5), layout="constrained")
    of = lambda mode: [r for r in rows if r["mode"] == mode]

    def bars(axis, rows, group, value, title, unit, note=None):
        """Groups of bars, one for each side."""
        groups, sides = (
            list(dict.fromkeys(map(group, rows))),
            list(dict.fromkeys(r["side"] for r in rows)),
        )
        for i, side in enumerate(sides):
            mine = [r for r in rows if r["side"] == side]
            x = [
                groups.index(group(r)) + (i - (len(sides) - 1) / 2) * 0.8 / len(sides) for r in mine
            ]
            drawn = axis.bar(x, [value(r) for r in mine], 0.8 / len(sides), label=side)
            if note:
                axis.bar_label(drawn, [note(r) for r in mine], fontsize=8)
        axis.set_xticks(range(len(groups)), groups, fontsize=8)
        axis.set(title=title, ylabel=unit)

    ratio = lambda r: f"{r['ratio']:.2f}x" if r["side"].startswith("ours") else ""
    steps = lambda r: (
        f"{r['settings']['model']}\nbatch {r['settings']['batch']}"
        + (f"\n{r['settings']['precision']}" if r["settings"]["precision"] != "fp32" else "")
    )
    bars(axes[0, 0], of("step"), steps, lambda r: r["median"], "training step", "samples/s", ratio)
    bars(axes[0, 1], of("step"), steps, lambda r: r["peak_bytes"] / 1e9, "memory at its peak", "GB")
    bars(
        axes[0, 2],
        of("loader"),
        lambda r: (
            f"{r['settings']['source'].replace(' ', chr(10), 1)}\n{str(r['settings']['workers']) + ' workers' if r['settings']['workers'] else 'one core'}"
        ),
        lambda r: r["median"],
        "tar to ready batch",
        "images/s",
        ratio,
    )
    losses = of("loss")
    B0 = statistics.mode([r["settings"]["b"] for r in losses]) if losses else 0
    beyond = lambda r: (r["peak_bytes"] - r["gathered_bytes"]) / 1e6
    for axis, value, title, unit in (
        (axes[0, 3], lambda r: r["median"], "time of the loss", "ms"),
        (axes[1, 0], beyond, "its memory at the peak, beyond the features", "MB"),
    ):
        for side in dict.fromkeys(r["side"] for r in losses):
            points = sorted(
                (r["settings"]["B"], value(r))
                for r in losses
                if r["side"] == side and r["settings"]["b"] == B0
            )
            axis.plot(*zip(*points), marker="o", label=side)
        axis.set(title=f"{title}, b = {B0}", xlabel="global batch B", ylabel=unit, ylim=(0, None))
    axis, wires = axes[1, 1], of("wire")
    for i, purpose in enumerate(
        dict.fromkeys(p for r in wires for p in r["at_8_ranks"] if p != "batch")
    ):
        points = [
            (r["at_8_ranks"][purpose] / 1e6, y)
            for y, r in enumerate(wires)
            if r["at_8_ranks"].get(purpose)
        ]
        axis.scatter(*zip(*points), s=60, color=f"C{i}", label=purpose)
    axis.set_yticks(
        range(len(wires)), [f"{r['side']} {r['settings']['grad_wire']}" for r in wires], fontsize=8
    )
    axis.set(
        title=f"sent in a step by one of 8 ranks, {wires[0]['at_8_ranks']['batch'] if wires else 0} pairs each",
        xlabel="MB",
        xscale="log",
    )
    axis.set_ylim(len(wires) - 0.5, -2.5)  # from above, with room for what the colours mean
    name, divided = (
        lambda r: f"{r['side']} {r['settings']['grad_wire']}",
        [r for r in of("breakdown") if r["settings"]["bucket_mb"] == 25],
    )
    axis = axes[1, 2]
    stack(
        axis,
        [(name(r), {k: v for k, v in r["parts_ms"].items() if k != "hidden"}) for r in divided],
    )
    for i, r in enumerate(divided):  # what lies beside the computation, not behind it
        axis.barh(
            i + 0.38,
            r["parts_ms"]["hidden"],
            0.12,
            color="black",
            label="communication, hidden" if i == 0 else None,
        )
    axis.set(
        title="where a step's time goes",
        xlabel="ms",
        xlim=(0, 1.25 * max((r["median"] for r in divided), default=1)),
    )
    axis = axes[1, 3]
    for i, side in enumerate(dict.fromkeys(r["side"] for r in of("plan") if "nodes" in r)):
        for link, style in zip(
            sorted({r["settings"]["gbit"] for r in of("plan") if "nodes" in r}), (":", "--", "-")
        ):
            mine = [
                r for r in of("plan") if r["side"] == side and r["settings"].get("gbit") == link
            ]
            axis.plot(
                [r["nodes"] for r in mine],
                [r["efficiency"] for r in mine],
                style,
                color=f"C{i}",
                label=f"{side}, {link} Gbit/s",
            )
    B = next((r["settings"]["B"] for r in of("plan") if "nodes" in r), 0)
    axis.set(
        title=f"projected share of computing, B = {B:,}",
        xlabel="nodes of 8 GPUs",
        xscale="log",
        ylim=(0, 1.02),
    )
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    axes[0, 2].margins(y=0.3)
    places = {
        axes[0, 2]: ("upper center", 2),
        axes[1, 1]: ("upper center", 4),
        axes[1, 2]: ("upper right", 1),
    }  # where nothing is drawn
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            where, columns = places.get(axis, ("best", 1))
            axis.legend(fontsize=7, loc=where, ncols=columns)
    figure.savefig(out, dpi=90)
    plt.close(figure)


def stack(axis, bars):
    """[(label, {part: value})] -> horizontal stacked bars."""
    left = [0.0] * len(bars)
    for part in dict.fromkeys(part for _, parts in bars for part in parts):
        values = [parts.get(part, 0) for _, parts in bars]
        axis.barh(range(len(bars)), values, 0.6, left=left, label=part)
        left = [x + y for x, y in zip(left, values)]
    axis.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axis.invert_yaxis()
