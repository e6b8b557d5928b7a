"""Build a real image-text dataset from drawings that npm packages carry: no crawling.

    python -m tools.prepare emoji          # data/emoji: 85 MB, about half a minute on two cores
    python -m tools.prepare emoji --tune   # and data/emoji/tune, from it: 65 MB, some seconds
    python -m tools.prepare icons          # data/icons: about 1 GB; resumes where it was stopped

emoji (tools/emoji.py) has five drawing styles to train on and one to test on; icons
(tools/icons.py) has over 150 icon sets, and ten. The steps: fetch the packages (npm pack), read
their icons, render each SVG as a PNG of 64 pixels, shuffle, and write tar shards as img2dataset
does. All of it happens in OUT.tmp, which is renamed to OUT at the end.
"""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

from tools import emoji, icons


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out or f"data/{args.set}").resolve()
    try:
        build_or_exit(out, args)
        if args.tune and not (out / "tune").exists():
            emoji.build_tune(out, emoji.TUNE)
    except KeyboardInterrupt:
        kept = "what was drawn" if args.set == "icons" else "what was downloaded"
        sys.exit(f"prepare: interrupted. Run again: {kept} is kept.")
    except RuntimeError as error:
        sys.exit(f"prepare: {error}")
    except OSError as error:
        sys.exit(f"prepare: cannot write {out} (or its .tmp or .cache beside it): {error}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare",
        description="Build a real image-text dataset (64 px, tar shards) from drawings in npm "
        "packages.",
        epilog="emoji: about 15,000 training pairs in five drawing styles, zero-shot test in a "
        "sixth; 9.4 MB to download. icons: about 300,000 training pairs, zero-shot tests on ten "
        "sets of other makers; 104 MB to download.",
    )
    parser.add_argument("set", choices=["emoji", "icons"], help="which set to build")
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
        help="emoji: also divide the training set by styles, into OUT/tune/train and OUT/tune/val",
    )
    parser.add_argument("--force", action="store_true", help="rebuild a finished set")
    args = parser.parse_args(argv)
    if args.tune and args.set != "emoji":
        parser.error("--tune is for emoji; icons always has its sets for tuning, in OUT/val")
    return args


def build_or_exit(out: Path, args: argparse.Namespace) -> None:
    """Build the set in OUT.tmp, then rename it to OUT. Exits if OUT is something else."""
    title = emoji.TITLE if args.set == "emoji" else icons.TITLE
    if out.exists():
        # Never delete a folder that this program did not make.
        if not is_finished(out, title):
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
    # An interrupted run may have left these two. Icons go on in the first.
    shutil.rmtree(old, ignore_errors=True)
    if args.set == "emoji":
        shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True, exist_ok=True)
    cache.mkdir(exist_ok=True)
    build = emoji.build if args.set == "emoji" else icons.build
    build(tmp, cache, max(1, args.workers))

    # Renames only: at no moment is there half a set under the name `out`.
    if out.exists():
        out.rename(old)
    tmp.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    print(f"{out} is ready. {cache} may be deleted.")


def is_finished(folder: Path, title: str) -> bool:
    """Whether a folder holds the set of this title, and this program has finished it."""
    file = folder / "README.md"
    return file.is_file() and file.read_text(encoding="utf-8").startswith(title)


if __name__ == "__main__":
    # A batch system's SIGTERM ends the program as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
