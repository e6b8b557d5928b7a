"""npm packages of tiny drawings, for the tests of tools/prepare.py, and a fake npm with them."""

import hashlib
import io
import json
import os
import sys
import tarfile

FAKE_NPM = """#!{python}
import pathlib, shutil, sys
assert sys.argv[1] == "pack"
open({log!r}, "a").write(sys.argv[2] + "\\n")
name, _, version = sys.argv[2].removeprefix("@").replace("/", "-").rpartition("@")
file = pathlib.Path({store!r}) / f"{{name}}-{{version}}.tgz"
if not file.exists():
    sys.exit("npm error: ENOTFOUND, no such host")
shutil.copy(file, ".")
"""


def install_npm(tmp_path, monkeypatch):
    """A fake npm first on the PATH, which has the packages in tmp_path/store.

    -> (the store, its log: the packages asked for, one a line).
    """
    store = tmp_path / "store"
    store.mkdir()
    log = tmp_path / "log"
    script = tmp_path / "bin" / "npm"
    script.parent.mkdir()
    script.write_text(FAKE_NPM.format(python=sys.executable, log=str(log), store=str(store)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    return store, log


def square(color, x=2):
    """An icon: a square at x, of 16."""
    return {"body": f'<rect x="{x}" y="2" width="6" height="6" fill="{color}"/>'}


def write_package(path, files):
    """A package of JSON files, {path in the package: content}."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            text = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))


def hashes(folder):
    """{relative path: SHA-256} of all files in the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
