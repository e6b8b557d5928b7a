"""Where shards lie: patterns to URLs, URLs to streams of bytes."""

import glob
import io
import os
import select
import signal
import subprocess
import tarfile
import weakref
from contextlib import suppress

from braceexpand import braceexpand

from config import ConfigError

PIPE_TIMEOUT = 60  # seconds without a byte from a command before it is killed


class Pipe(io.RawIOBase):
    """What a shell command writes, as a stream. Reading raises TimeoutError when nothing comes for PIPE_TIMEOUT seconds; at the end,
    OSError if the command failed. Closing, or the end of the program, kills the command with all that it has started."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )  # which makes it a process group that can be killed whole
        self.end = weakref.finalize(self, end_command, self.process)
        self.ready = select.poll()
        self.ready.register(self.process.stdout, select.POLLIN)

    def readable(self):
        return True

    def readinto(self, buffer):
        if not self.ready.poll(PIPE_TIMEOUT * 1000):
            raise TimeoutError(f"nothing came for {PIPE_TIMEOUT} s")
        n = self.process.stdout.readinto(buffer)
        if not n:
            if (
                self.process.returncode == 0
            ):  # tarfile would go on for hours, skipping what a header claims to be there
                raise tarfile.ReadError("breaks off")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(PIPE_TIMEOUT)
            if self.process.returncode != 0:
                raise OSError(f"the command failed, exit status {self.process.returncode}")
        return n

    def close(self):
        self.end()
        super().close()


def end_command(process):
    """Kill a command's process group, if it is still running. Killed before its pipe is closed, it cannot complain about that."""
    if process.returncode is None:  # nobody has waited for it, so that its number is still its own
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    with suppress(
        subprocess.TimeoutExpired
    ):  # what hangs inside the kernel, on a dead disk, is left to itself
        process.wait(1)


def open_url(url):
    """A path, or pipe:COMMAND -> a stream of bytes."""
    return io.BufferedReader(Pipe(url[5:]), 1 << 16) if url.startswith("pipe:") else open(url, "rb")


def expand(patterns):
    """Patterns with {00..99} and, for files, * -> list of urls. ConfigError if one matches nothing, or some of its files are missing."""
    urls = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found = list(braceexpand(os.path.expanduser(pattern)))
        except ValueError as error:
            raise ConfigError(f"{pattern}: {error}") from error
        if not pattern.startswith("pipe:"):
            found = [
                path
                for name in found
                for path in (sorted(glob.glob(name)) if glob.has_magic(name) else [name])
            ]
            missing = [path for path in found if not os.path.exists(path)]
            if len(missing) == len(found):
                raise ConfigError(
                    f"{pattern} matches no file, as seen from {os.getcwd()}: correct the pattern"
                )
            if missing:
                raise ConfigError(
                    f"{pattern}: {missing[0]} does not exist, {len(missing)} of {len(found)} shards are missing: "
                    "fetch them, or narrow the pattern"
                )
        urls += found
    return urls


def is_local(url):
    """Whether a URL is a file's path."""
    return not url.startswith("pipe:")
