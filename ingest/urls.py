"""Where shards lie: patterns to URLs, URLs to streams of bytes.

A shard is a file's path, or a URL of a scheme in SCHEMES. The webdataset package expands patterns
and opens URLs. What is not a file comes out of a shell command; in place of webdataset's own pipe
stands `Pipe`, which gives up when nothing comes and leaves no process behind.
"""

import glob
import io
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import tarfile
import weakref
from contextlib import suppress
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls

from config import ConfigError, nearest
from ingest.folders import no_shards

# The commands that make the sets of configs/ under data/.
PREPARED = {
    "emoji": "python -m tools.prepare emoji",
    "icons": "python -m tools.prepare icons",
    "flickr8k": "python -m tools.flickr8k SOURCE",
}

PIPE_TIMEOUT = 60  # seconds without a byte from a command before it is killed
BUFFER_BYTES = 1 << 16

# a:b/0.tar is a path: all schemes but these two are followed by //.
SCHEME = re.compile(r"(pipe|file)(?=:)|([A-Za-z][A-Za-z0-9+.-]*)(?=://)")

HUB_FILE = re.compile(
    r"hf://(?P<kind>datasets/|spaces/|(?!datasets/|spaces/))"
    r"(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?"
    r"/(?P<path>.+)"
)
HUB_KINDS = {"datasets/": "dataset", "spaces/": "space", "": "model"}

# No --retry: after half of an answer, curl would write it again from its beginning. Whoever reads
# shards tries again itself.
CURL = "curl --fail --silent --show-error --location --globoff --connect-timeout 30"

# The commands that write a URL's content to standard output. The first whose program is installed
# is used.
# fmt: off
COMMANDS = {
    "s3":    ("aws s3 cp {} -",),
    "gs":    ("gcloud storage cat {}", "gsutil cat {}"),
    "http":  (CURL + " {}",),
    "https": (CURL + " {}",),
}
# fmt: on
SCHEMES = ("pipe", *COMMANDS, "hf")

INSTALL = {
    "aws": "the AWS command line, `pip install awscli`",
    "gcloud": "the Google Cloud command line",
    "gsutil": "gsutil, `pip install gsutil`",
    "curl": "curl, from the system's packages",
}


def scheme_of(url):
    """The scheme of a URL in lower case; '' for a file's path."""
    found = SCHEME.match(url)
    return found[0].lower() if found else ""


def is_local(url):
    """Whether a URL is a file's path, whose size is known and in which one can seek."""
    return scheme_of(url) == ""


# ---- patterns to URLs ----


def split_patterns(patterns):
    """A pattern or several, of which each may be several joined by '::' -> list of patterns."""
    if isinstance(patterns, str):
        patterns = [patterns]
    return [part for pattern in patterns for part in pattern.split("::")]


def expand(patterns):
    """Patterns of shards -> list of URLs.

    {00..99}, {a,b} and ${NAME}, the environment variable WDS_NAME, are expanded by webdataset in
    any pattern; ~ and * in paths only. Raises ConfigError if a pattern cannot be read, matches no
    file, if some of its files are missing, or its URLs cannot be opened on this machine.
    """
    urls = []
    for pattern in split_patterns(patterns):
        found = expand_braces(pattern)
        schemes = {scheme_of(url) for url in found}
        if len(schemes) > 1:
            raise ConfigError(f"{pattern} mixes schemes: write several patterns")

        if is_local(found[0]):
            urls += existing_files(pattern, found)
        else:
            check_remote(pattern, found[0])
            urls += found
    return urls


def expand_braces(pattern):
    """A pattern -> list of URLs and paths, which may contain * and may not exist."""
    try:
        found = expand_urls(pattern)
    except ValueError as error:
        raise ConfigError(f"{pattern}: {error}") from error
    except (AssertionError, KeyError) as error:
        names = " or ".join(f"WDS_{name}" for name in re.findall(r"\$\{(\w+)\}", pattern))
        raise ConfigError(
            f"{pattern}: the environment variable {names} is not set, which ${{NAME}} stands for; "
            "a variable of the shell in pipe: is written $NAME"
        ) from error
    return [file_path(url) if scheme_of(url) == "file" else url for url in found]


def file_path(url):
    """file:PATH or file:///PATH -> PATH."""
    return url2pathname(urlparse(url).path)


def existing_files(pattern, names):
    """Names of files, maybe with ~ and * -> list of paths. ConfigError: missing ones, folders."""
    paths = []
    for name in names:
        name = os.path.expanduser(name)
        if glob.has_magic(name):
            paths += sorted(glob.glob(name))
        else:
            paths.append(name)

    missing = [path for path in paths if not os.path.exists(path)]
    if len(missing) == len(paths):
        check_is_one_pattern(pattern)
        raise ConfigError(nothing_there(pattern, paths))
    if missing:
        raise ConfigError(
            f"{pattern}: {missing[0]} does not exist, {len(missing)} of {len(paths)} shards are "
            "missing: fetch them, or narrow the pattern"
        )
    for path in paths:
        if os.path.isdir(path):
            raise ConfigError(no_shards(path))
    return paths


def nothing_there(pattern, paths):
    """A pattern of which no file exists -> the message.

    paths: what it stands for; none if it has a * that matches nothing.
    """
    hint = hint_at_files(paths[0] if paths else pattern)
    is_plain = paths == [os.path.expanduser(pattern)]
    if is_plain and os.path.islink(paths[0]):
        return f"{pattern} is a link to {os.readlink(paths[0])}, where nothing is"
    if is_plain:
        return f"there is no file or folder {pattern}, as seen from {os.getcwd()}{hint}"
    return f"{pattern} matches no file, as seen from {os.getcwd()}: correct the pattern{hint}"


def hint_at_files(path):
    """The end of the message about a path that is not there: a similar one, or how to make it."""
    hint = nearest_name(path)
    for name, command in PREPARED.items():
        if not hint and path.startswith(f"data/{name}/"):
            return f"; `{command}` makes it"
    return hint


def nearest_name(path, is_file=True):
    """A hint: the name spelt most alike in the place of that part of a path which is not there."""
    parent, name = os.path.split(path.rstrip("/"))
    if parent and not os.path.isdir(parent):
        return nearest_name(parent, is_file=False)
    if glob.has_magic(name):
        return ""
    try:
        found = os.listdir(parent or ".")
    except OSError:
        return ""
    if not is_file:
        found = [other for other in found if os.path.isdir(os.path.join(parent, other))]
    return nearest(name, found)


def check_is_one_pattern(pattern):
    """ConfigError if what matches no file is several names with spaces or commas between them."""
    names = re.split(r"[\s,]+", pattern.strip(" ,[]()"))
    if len(names) > 1 and all(name.endswith(".tar") or os.path.exists(name) for name in names):
        raise ConfigError(
            f"{pattern!r} is taken for one name and matches no file: give several as a list, "
            f"\"{names}\", or join them by '::', {'::'.join(names)!r}"
        )


def check_remote(pattern, url):
    """ConfigError unless URLs like this one can be opened on this machine. Sends nothing."""
    scheme = scheme_of(url)
    if scheme not in SCHEMES:
        schemes = ", ".join(f"{name}:" for name in SCHEMES)
        raise ConfigError(
            f"{pattern}: shards cannot be read from {scheme}:, only from a path, file:, {schemes}; "
            "any command that writes a shard to its standard output will do as pipe:COMMAND"
        )
    if "*" in url and scheme != "pipe":
        raise ConfigError(
            f"{pattern}: * works for files only, a remote folder is not listed: "
            "name the shards as {00000..00331}"
        )
    try:
        command_of(url)
    except OSError as error:
        raise ConfigError(f"{pattern}: {error}") from error


# ---- other files beside a shard ----

# The last file name of a remote URL that ends with .tar. In pipe: it stands somewhere in a command.
REMOTE_SHARD = re.compile(r"([^/\s'\"=;|&?]*)\.tar(?!.*\.tar)", re.DOTALL)


def shard_name(url):
    """The file name of a shard, as 00000.tar."""
    if is_local(url):
        return os.path.basename(url)
    found = REMOTE_SHARD.search(url)
    return found[0] if found else ""


def sibling(url, name):
    """The URL of the file `name` in a shard's folder; '' if the shard's own name cannot be found.

    {stem} in `name` stands for the shard's name without .tar.
    """
    if is_local(url):
        stem, dot_tar, _ = os.path.basename(url).rpartition(".tar")
        if not dot_tar:
            return ""
        return os.path.join(os.path.dirname(url), name.format(stem=stem))

    found = REMOTE_SHARD.search(url)
    if not found:
        return ""
    return url[: found.start()] + name.format(stem=found[1]) + url[found.end() :]


# ---- URLs to streams of bytes ----


def open_url(url, quiet=False):
    """A path or URL -> a stream of bytes. Raises OSError, while reading also what Pipe raises.

    quiet: what a command writes to standard error is not shown, because it may fail.
    """
    if is_local(url):
        return open(url, "rb")
    try:
        return gopen(url, "rb", quiet=quiet)
    except ValueError as error:
        raise OSError(f"no URL that can be opened: {error}") from error


def open_command(url, mode="rb", bufsize=0, quiet=False):
    """The handler of all remote schemes in webdataset's gopen: a URL -> a stream of bytes."""
    if mode != "rb":
        raise ValueError(f"{url}: here, URLs are only read")
    command, environment = command_of(url)
    return io.BufferedReader(Pipe(command, environment, quiet), BUFFER_BYTES)


gopen_schemes.update(dict.fromkeys(SCHEMES, open_command))


def command_of(url):
    """A URL -> (shell command that writes its content, environment variables that it needs).

    Raises OSError if a program or package for it is missing.
    """
    scheme = scheme_of(url)
    if scheme == "pipe":
        return url.removeprefix("pipe:"), {}
    if scheme == "hf":
        return hub_command(url)
    return first_installed(COMMANDS[scheme], url), {}


def first_installed(commands, url):
    """Commands with {} for a URL -> the first whose program is installed, made for this URL.

    Raises OSError, which says what to install, if there is none.
    """
    programs = [command.split()[0] for command in commands]
    for program, command in zip(programs, commands):
        if shutil.which(program):
            return command.format(shlex.quote(url))

    wanted = " or ".join(INSTALL[program] for program in programs)
    raise OSError(f"{' or '.join(programs)} is not installed: install {wanted}")


def hub_command(url):
    """hf://[datasets/]OWNER/NAME[@REVISION]/PATH -> what command_of returns."""
    try:
        from huggingface_hub import get_token, hf_hub_url
    except ImportError as error:
        raise OSError("huggingface_hub is not installed: pip install huggingface_hub") from error

    parts = HUB_FILE.fullmatch(url)
    if not parts:
        raise OSError(f"{url} is not hf://[datasets/]OWNER/NAME[@REVISION]/PATH")
    address = hf_hub_url(
        parts["repo"],
        parts["path"],
        repo_type=HUB_KINDS[parts["kind"]],
        revision=parts["revision"],
    )

    curl = first_installed([CURL + " {}"], address)
    token = get_token()
    if not token:
        return curl, {}
    # The token does not appear among curl's arguments, which every user of the machine can list.
    header = 'printf \'header = "Authorization: Bearer %s"\\n\' "$FASTCLIP_HUB_TOKEN"'
    return f"{header} | {curl} --config -", {"FASTCLIP_HUB_TOKEN": token}


class Pipe(io.RawIOBase):
    """The standard output of a shell command, as a stream.

    Reading raises TimeoutError when nothing comes for PIPE_TIMEOUT seconds and, at the end, OSError
    if the command failed. Closing the stream, or the end of the program, kills the command with
    all that it has started.
    """

    def __init__(self, command, environment=None, quiet=False):
        # A session of its own makes the command a process group, which can be killed as a whole.
        self.process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self.end = weakref.finalize(self, end_command, self.process)
        self.ready = select.poll()
        self.ready.register(self.process.stdout, select.POLLIN)

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.ready.poll(PIPE_TIMEOUT * 1000):
            raise TimeoutError(f"nothing came for {PIPE_TIMEOUT} s")
        count = self.process.stdout.readinto(buffer)
        if not count:
            self.check_end()
        return count

    def check_end(self):
        """At the end of the stream: raise OSError if the command failed."""
        # A second read at the end: tarfile believes a header that claims more than came, and would
        # go on for hours to skip it.
        if self.process.returncode == 0:
            raise tarfile.ReadError("breaks off")

        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PIPE_TIMEOUT)
        if self.process.returncode != 0:
            raise OSError(f"the command failed, exit status {self.process.returncode}")

    def close(self):
        self.end()
        super().close()


def end_command(process):
    """Kill a command's process group, if it is still running."""
    # Killed before its pipe is closed, the command cannot complain about the closed pipe. Without a
    # return code nobody has waited for the process, so its number still belongs to it.
    if process.returncode is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()

    # A process that hangs inside the kernel, on a dead disk, is left behind.
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
