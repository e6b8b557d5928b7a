"""A data set is built in a folder beside its place, OUT.tmp, and comes to its place by renaming: at
no moment is there half a set under the name OUT.

A finished set is recognised by the first line of its README.md, which is written last.
"""

import shutil
from pathlib import Path

from config import require


def beside(out: Path, ending: str) -> Path:
    """The path of OUT with this ending: `.tmp`, where it is built."""
    return out.with_name(out.name + ending)


def must_build(out: Path, title: str, force: bool) -> bool:
    """Whether the set with this title is to be built: it is not finished, or force is given.

    Raises ConfigError if OUT is something else, because a folder that no such program made is never
    deleted.
    """
    if not out.exists():
        return True
    require(
        is_finished(out, title),
        f"{out} exists and is not a finished set of this kind ({title}): remove it or choose "
        "another --out",
    )
    if not force:
        print(f"{out} is finished already; --force rebuilds it.")
    return force


def is_finished(folder: Path, title: str) -> bool:
    """Whether a folder holds a finished set with this title, the first line of its README.md."""
    file = folder / "README.md"
    return file.is_file() and file.read_bytes().startswith(title.encode())


def put_in_place(out: Path) -> None:
    """Rename OUT.tmp, which is complete, to OUT. A set that is there already is removed."""
    old = beside(out, ".old")
    shutil.rmtree(old, ignore_errors=True)  # an interrupted run may have left it
    if out.exists():
        out.rename(old)
    beside(out, ".tmp").rename(out)
    shutil.rmtree(old, ignore_errors=True)
