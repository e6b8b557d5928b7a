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

from config import ConfigError
from tools import emoji, icons
from tools.build_folder import beside, must_build, put_in_place


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out or f"data/{args.set}").resolve()
    try:
        build(out, args)
        if args.tune and not (out / "tune").exists():
            emoji.build_tune(out, emoji.TUNE)
    except KeyboardInterrupt:
        kept = "what was drawn" if args.set == "icons" else "what was downloaded"
        sys.exit(f"prepare: interrupted. Run again: {kept} is kept.")
    except (ConfigError, RuntimeError) as error:
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


def build(out: Path, args: argparse.Namespace) -> None:
    """Build the set, unless it is finished. Raises ConfigError if OUT is something else."""
    the_set = emoji if args.set == "emoji" else icons
    if not must_build(out, the_set.TITLE, args.force):
        return

    tmp = beside(out, ".tmp")
    cache = beside(out, ".cache")
    if args.set == "emoji":  # icons go on with what an interrupted run has left there
        shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True, exist_ok=True)
    cache.mkdir(exist_ok=True)
    the_set.build(tmp, cache, max(1, args.workers))

    put_in_place(out)
    print(f"{out} is ready. {cache} may be deleted.")


if __name__ == "__main__":
    # A batch system's SIGTERM ends the program as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
