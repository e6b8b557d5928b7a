"""Checkpoints: one folder per step, which is complete or absent, never incomplete.

    out_dir/checkpoints/step-00001200/
        model.pt                   {"state_dict": ...}; open_clip loads it as it is
        train.pt                   optimizer, step, scaler, random state, log, resolved config
        state-00000-of-00008.pt    each rank's rows of the u-state
        SHA256SUMS                 of all of these; `sha256sum -c SHA256SUMS` checks them, too
    out_dir/checkpoints/latest     the name of the newest complete folder

Saving: everything is copied in memory, which is all that training waits for. A thread then writes
the copy into a folder of another name and flushes it to the disk. When the threads of all ranks
have done so, rank 0's renames the folder, and writes `latest` last. So a checkpoint is safe as
early as possible, whatever the training does meanwhile.

Loading: files hold tensors and plain Python types only, and are read with weights_only=True,
which runs no code. Before a run is continued, every file is compared with its sum. A damaged
checkpoint is named, and the one before it is used.
"""

import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time

import torch

import dist
from config import (
    HINTS,
    JOB_KEYS,
    MODEL_KEYS,
    BadRun,
    Config,
    ConfigError,
    files_beside,
    nearest,
    typed,
    writing_to,
)
from runtime import ranks

SUMS = "SHA256SUMS"
STEP_NAME = r"step-\d{8,}"

# Settings that a continued run cannot change: what the checkpoint holds would be of no use, or (for
# tau_init) would hide the change. Other settings of the model show in the shapes of its weights.
FIXED_KEYS = (
    "algorithm",
    "optimizer",
    "batch_size",
    "seed",
    "lanes",
    "shuffle_block",
    "decoder",
    "image_size",
    "text_heads",
    "tau_init",
)

# Settings of the method, which a continued run changes only with resume_changes. Not among them is
# what operators change on the way: the length of the run, the learning rates and their warm-up,
# intervals, and the machine's settings, the precision included (a lower one is a rounding of the
# same method, and a higher one a remedy for numbers that are not finite).
METHOD_KEYS = (
    "equations",
    "rho",
    "eps_u",
    "gamma_min",
    "gamma_schedule",
    "gamma_decay_epochs",
    "gamma_smooth",
    "lr_tau_schedule",
    "caption_key",
    "caption_lines",
    "crop_scale",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "grad_clip",
)

# ---- saving ----


class Saver:
    """The checkpoints of one run. All ranks call its methods at the same steps.

        saver.save(step, log_state)    # copies in memory, and begins to write
        saver.writing()                # is it still being written?
        saver.wait()                   # until it is the newest checkpoint; False if it failed

    out_dir is a folder that all ranks share.
    """

    def __init__(
        self, config, model, optimizer, loss, scaler, fingerprint="", newest=None, lock=None
    ):
        """fingerprint: of the data set, kept in the checkpoint.
        newest: the checkpoint that this run starts from, if any.
        lock: what lock_folder() has returned, if it was called.

        Raises ConfigError if another run is writing to out_dir now, or if a rank does not see it.
        """
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.loss = loss
        self.scaler = scaler
        self.fingerprint = fingerprint
        self.root = os.path.join(config.out_dir, "checkpoints")

        # The newest good checkpoint: its folder, or None.
        self.newest = newest

        # The save under way: the thread that writes, the final name of its folder, and whether all
        # ranks have written it.
        self.thread = None
        self.folder = ""
        self.saved = False
        self.group = dist.background_group()  # by which the threads talk

        # What it writes, {file name: content}. The next save uses the memory again.
        self.copies = None

        def lock_here():
            return lock_folder(config.out_dir, create=True) if lock is None else lock

        self.lock = ranks.from_first_rank(lock_here)
        check_shared(config.out_dir)
        if dist.rank() == 0:
            self.remove_unfinished()
            self.put_abandoned_aside()
        ranks.from_first_rank(self.check_space)

    def remove_unfinished(self):
        """Remove what a run that was killed while saving has left."""
        for name in os.listdir(self.root):
            if name.endswith(".partial"):
                remove(os.path.join(self.root, name))

    def put_abandoned_aside(self):
        """Rename the checkpoints that are later than the one that this run starts from.

        They are damaged, or belong to a course of the run that was given up. They must not count as
        checkpoints to keep or to return to.
        """
        abandoned = []
        for name in steps(self.root):
            is_kept = self.newest and step_key(name) <= step_key(os.path.basename(self.newest))
            if not is_kept:
                abandoned.append(name)
        if not abandoned:
            return

        # First, so that --resume=auto cannot return to one of them if this process dies here.
        if self.newest:
            self.write_latest(os.path.basename(self.newest))
        for name in abandoned:
            path = os.path.join(self.root, name)
            remove(path + ".abandoned")
            os.rename(path, path + ".abandoned")
        warn(f"put aside as .abandoned, in {self.root}: {', '.join(abandoned)}")

    def check_space(self):
        """ConfigError if the disk has no room for a checkpoint; a warning if for too few of them.

        Before the first step there are no moments yet: they take at least as much as the weights.
        """
        num_bytes = self.num_bytes()
        if not self.optimizer.state:
            num_bytes += sum(dist.num_bytes(p) for p in self.model.parameters())

        free = shutil.disk_usage(self.root).free
        sizes = f"a checkpoint takes {num_bytes / 1e9:.2f} GB or more, {free / 1e9:.2f} GB are free"
        if free < num_bytes:
            raise ConfigError(
                f"{self.root} has no room: {sizes}; make room, or choose another --out_dir"
            )

        # The oldest is removed after the newest is complete.
        still_to_come = self.config.keep + 1 - len(steps(self.root))
        if free < still_to_come * num_bytes:
            warn(
                f"{self.root} may become full: {sizes}, and keep = {self.config.keep} needs room "
                f"for {still_to_come} more"
            )

    # ---- step 1: copy ----

    def save(self, step, log_state):
        """Begin to save checkpoint `step` -> the seconds for which training waited.

        It is on the disk after wait(), or on return with save_background=False. Raises
        BadRun if a weight is not finite, because such a checkpoint is useless.
        """
        start = time.monotonic()
        self.wait()  # only one save at a time
        self.check_finite(step)

        files = self.contents(step, log_state)
        with dist.averaged_batchnorm(self.model):
            self.copies = copy_to_cpu(files, self.copies)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # until the copies have arrived

        self.folder = folder_of(self.config, step)
        self.saved = False
        self.thread = threading.Thread(target=self.write_and_publish)
        self.thread.start()

        if not self.config.save_background:
            self.wait()
        return time.monotonic() - start

    def writing(self):
        return self.thread is not None and self.thread.is_alive()

    def wait(self):
        """Wait until every rank has written its files -> whether the checkpoint is complete.

        If it is not, rank 0 has said why, what there was of it is removed, and the checkpoints
        before it stay.
        """
        if self.thread is None:
            return True
        self.thread.join()
        self.thread = None
        return self.saved

    def check_finite(self, step):
        weights = self.model.state_dict()
        finite = torch.stack([torch.isfinite(x).all() for x in weights.values()]).tolist()
        if all(finite):
            return
        name = list(weights)[finite.index(False)]
        raise BadRun(
            f"{name} is not finite after step {step}, which is not saved. {self.describe_newest()}"
        )

    def contents(self, step, log_state):
        """-> {file name: content} of this rank. The tensors are not copied yet."""
        state = self.loss.state
        files = {}
        files[state_file(dist.rank(), dist.world_size())] = {
            "table": state.table[:-1],
            "columns": state.columns,
            "num_samples": state.num_samples,
            # These are copies: they stay this rank's own while model.pt gets the mean of all ranks.
            "batchnorm": [x.clone() for x in dist.batchnorm(self.model)],
        }
        if dist.rank() == 0:
            files["model.pt"] = {"state_dict": self.model.state_dict()}
            files["train.pt"] = {
                "step": step,
                "world_size": dist.world_size(),
                "optimizer": self.optimizer.state_dict(),
                "log": log_state,
                "scaler": self.scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "fingerprint": self.fingerprint,
                "config": dataclasses.asdict(self.config),
            }
        return files

    # ---- step 2: write, in a thread ----

    def write_and_publish(self):
        """Write this rank's files. When all ranks have, make the checkpoint the newest."""
        sums, error = self.write_files()
        try:
            results = dist.all_gather_objects((sums, error), self.group)
            errors = [error for _, error in results if error]
            if dist.rank() == 0 and not errors:
                errors = self.publish([sums for sums, _ in results])
            # Rank 0 decides. The others count it as saved only after it is complete.
            errors = dist.all_gather_objects(errors, self.group)[0]
        except RuntimeError:
            return  # another rank has died, which the watchdog reports

        if not errors:
            self.newest = self.folder
            self.saved = True
        elif dist.rank() == 0:
            self.report_failed_save(errors)

    def write_files(self):
        """-> ({file name: SHA-256} of this rank's files, what went wrong in words, or None)"""
        sums = {}
        try:
            os.makedirs(self.folder + ".partial", exist_ok=True)
            for name, content in self.copies.items():
                path = os.path.join(self.folder + ".partial", name)
                sums[name] = write_file(path, content)
        except Exception as error:
            return sums, describe_on_rank(error)
        return sums, None

    # ---- step 3: publish, in rank 0's thread ----

    def publish(self, sums_of_ranks):
        """When all files are written: make the folder complete and known -> [] or [what is wrong].

        sums_of_ranks: {file name: SHA-256} of each rank.
        """
        sums = {}
        for sums_of_rank in sums_of_ranks:
            sums.update(sums_of_rank)
        try:
            self.complete(sums)
            self.write_latest(os.path.basename(self.folder))
            for name in steps(self.root)[self.config.keep :]:
                remove(os.path.join(self.root, name))
        except OSError as error:
            return [describe_on_rank(error)]
        return []

    def complete(self, sums):
        """Give the folder its sums, {file name: SHA-256}, and its name. OSError if it cannot be."""
        partial = self.folder + ".partial"
        unseen = [name for name in sums if not os.path.exists(os.path.join(partial, name))]
        if unseen:
            raise OSError(
                f"rank 0 does not see {', '.join(unseen[:4])}, which other ranks have written: "
                f"out_dir must be on a disk that all hosts share"
            )

        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
        write_text(os.path.join(partial, SUMS), "".join(lines))
        flush_folder(partial)
        os.rename(partial, self.folder)
        flush_folder(self.root)

    def write_latest(self, name):
        latest = os.path.join(self.root, "latest")
        write_text(latest + ".partial", name)
        os.replace(latest + ".partial", latest)
        flush_folder(self.root)

    def report_failed_save(self, errors):
        """Remove what there is of the checkpoint, and print why there is none."""
        remove(self.folder + ".partial")
        disk = shutil.disk_usage(self.root)
        print(
            f"error: {os.path.basename(self.folder)} could not be saved: {'; '.join(errors[:4])}. "
            f"It takes about {self.num_bytes() / 1e9:.2f} GB; {self.root} has "
            f"{disk.free / 1e9:.2f} of {disk.total / 1e9:.2f} GB free. {self.describe_newest()}",
            file=sys.stderr,
            flush=True,
        )

    def describe_newest(self):
        if self.newest:
            return f"The newest good checkpoint is {self.newest}"
        return "There is no checkpoint yet"

    def num_bytes(self):
        """About how large a checkpoint is: weights, moments, and the u-state of all ranks."""
        tensors = list(self.model.state_dict().values())
        for moments in self.optimizer.state.values():
            tensors += [x for x in moments.values() if torch.is_tensor(x)]

        state = self.loss.state
        return sum(dist.num_bytes(x) for x in tensors) + 4 * state.num_samples * len(state.columns)

    def close(self):
        """Let the next run write to out_dir."""
        # If a thread still writes, the lock is released by the end of the process.
        if dist.rank() == 0 and self.lock is not None and not self.writing():
            os.close(self.lock)
            self.lock = None


def describe_on_rank(error):
    return f"rank {dist.rank()} on {socket.gethostname()}: {describe(error)}"


def lock_folder(out_dir, create=False):
    """Lock out_dir for this process, for as long as it lives -> a file descriptor.

    create: make the folder, and its checkpoints folder, if it is missing.
    -> None if there is no such folder, or if the file system has no locks.
    Raises ConfigError if another process has locked it, or if nothing can be written there.
    """
    with writing_to(out_dir):
        check_writable(out_dir)
        if not create and not os.path.isdir(out_dir):
            return None
        os.makedirs(os.path.join(out_dir, "checkpoints"), exist_ok=True)
        lock = os.open(os.path.join(out_dir, ".lock"), os.O_RDWR | os.O_CREAT, 0o644)

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"another run is writing to {out_dir} now: wait until it has ended, or choose another "
            f"--out_dir"
        ) from None
    except OSError:
        return None


def folder_of(config, step):
    """-> the folder of the checkpoint that is saved after a step."""
    return os.path.join(config.out_dir, "checkpoints", f"step-{step:08d}")


def check_writable(folder):
    """OSError if no file can be made in the folder or, where there is none yet, in its parent."""
    folder = os.path.abspath(folder)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_shared(out_dir):
    """ConfigError if this rank does not see the lock file of rank 0."""
    path = os.path.join(out_dir, ".lock")
    for _ in range(30):  # seconds: network file systems show new files late
        if os.path.exists(path):
            return
        time.sleep(1)
    raise ConfigError(
        f"rank {dist.rank()} on {socket.gethostname()} does not see {path}, which rank 0 has "
        f"written: out_dir must be on a disk that all hosts share"
    )


def copy_to_cpu(tree, memory=None):
    """Nested dicts, lists and tensors -> the same on the CPU, in memory of its own.

    memory: an earlier result, whose tensors are used again where they fit.
    Copies from a GPU may still be under way on return.
    """
    if isinstance(tree, dict):
        old = memory if isinstance(memory, dict) else {}
        return {key: copy_to_cpu(value, old.get(key)) for key, value in tree.items()}

    if isinstance(tree, (list, tuple)):
        old = memory if isinstance(memory, list) else []
        copies = []
        for i, value in enumerate(tree):
            copies.append(copy_to_cpu(value, old[i] if i < len(old) else None))
        return copies

    if not torch.is_tensor(tree):
        return tree

    if not fits(memory, tree):
        # This keeps the strides, too: channels_last stays channels_last.
        memory = torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda)
    return memory.copy_(tree.detach(), non_blocking=True)


def fits(memory, x):
    """Can tensor x be copied into `memory` without loss of shape, dtype or layout?"""
    if not torch.is_tensor(memory):
        return False
    return memory.shape == x.shape and memory.dtype == x.dtype and memory.stride() == x.stride()


# ---- files ----


def state_file(rank, world_size):
    return f"state-{rank:05d}-of-{world_size:05d}.pt"


class HashingFile:
    """A file to write to that also computes the SHA-256 of what is written."""

    def __init__(self, file):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def write_file(path, content):
    """torch.save, down to the disk -> the file's SHA-256 in hexadecimal."""
    with open(path, "wb") as f:
        hashing = HashingFile(f)
        torch.save(content, hashing)
        flush(f)
    return hashing.sha256.hexdigest()


def write_text(path, text):
    with open(path, "w") as f:
        f.write(text)
        flush(f)


def flush(f):
    f.flush()
    os.fsync(f.fileno())


def flush_folder(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path):
    """Remove a folder or a file, if it is there.

    A folder is renamed first, so that no checkpoint is ever seen while it is being removed.
    """
    if os.path.isdir(path):
        if not path.endswith(".partial"):
            unfinished = path + ".old.partial"
            shutil.rmtree(unfinished, ignore_errors=True)
            os.rename(path, unfinished)
            path = unfinished
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.remove(path)


def steps(root):
    """-> the names of the checkpoints in the folder root, newest first; [] if there is no root."""
    if not os.path.isdir(root):
        return []
    names = [name for name in os.listdir(root) if re.fullmatch(STEP_NAME, name)]
    return sorted(names, key=step_key, reverse=True)


def step_key(name):
    """The key that orders names of checkpoints by step, also beyond 8 digits."""
    return len(name), name


def describe(error):
    return f"{type(error).__name__}: {error}"


# ---- finding ----


def find(config, names=None, progress=lambda where: None):
    """config.resume -> the checkpoint folder to start from, or None.

    For "auto", and for the folder of a run, it is the newest checkpoint that is not damaged;
    damaged ones are named on stderr.

    names: verify these files only, not all of them.
    progress(where): called while files are verified.
    Raises ConfigError if the checkpoint asked for is missing or damaged, if all are damaged, or
    if a new run would be written over an old one.
    """
    root = os.path.join(config.out_dir, "checkpoints")
    requested = None if config.resume in ("auto", "none") else config.resume.rstrip("/")
    if requested is not None and not os.path.isdir(requested):
        raise ConfigError(f"resume = {requested!r} does not exist{describe_nearby(requested)}")
    if steps(root) and not names:
        check_not_overwritten(config, root, steps(root)[0])

    if requested:
        return find_requested(requested, names, progress)
    if steps(root):
        return find_newest(root, names, progress)
    return None


def check_not_overwritten(config, root, newest):
    """ConfigError if out_dir already holds a run that this one does not continue."""
    if config.resume == "auto":
        return
    if config.resume != "none":
        # A checkpoint of out_dir, its folder of checkpoints, or out_dir itself.
        requested = os.path.abspath(config.resume)
        own = os.path.abspath(root)
        if own in (requested, os.path.dirname(requested), os.path.join(requested, "checkpoints")):
            return
    raise ConfigError(
        f"{config.out_dir} already holds a run, saved at {newest}. Continue it with --resume=auto, "
        f"choose another --out_dir, or delete that folder"
    )


def find_requested(folder, names, progress):
    """-> the folder that config.resume names, or the newest one in it; verified."""
    for root in (folder, os.path.join(folder, "checkpoints")):
        if steps(root):
            newest = find_newest(root, names, progress)
            print(f"resume = {folder!r}: its newest checkpoint is {newest}", flush=True)
            return newest

    if not re.fullmatch(STEP_NAME, os.path.basename(folder)):
        inside = os.path.join(folder, "x")
        raise ConfigError(
            f"resume = {folder!r} is neither a checkpoint nor a run{describe_nearby(inside)}"
        )
    wrong = verify(folder, names, progress)
    if wrong:
        raise ConfigError(f"{folder} cannot be used: {wrong}; use another checkpoint")
    return folder


def describe_nearby(folder):
    """-> the end of a message: which checkpoints there are in place of this folder."""
    parent = os.path.dirname(folder)
    if steps(parent):
        return f"; {parent} holds {', '.join(steps(parent))}"
    runs = [path for path in files_beside(folder) if steps(os.path.join(path, "checkpoints"))]
    return nearest(folder, runs, cutoff=0.0) or (
        "; it is auto, a checkpoint (runs/NAME/checkpoints/step-00001000) or the folder of a run"
    )


def find_newest(root, names, progress):
    """-> the newest of the checkpoints in the folder root that is not damaged."""
    existing = steps(root)
    latest = read_latest(root)
    if not re.fullmatch(STEP_NAME, latest):
        warn(f"{root}/latest names no checkpoint ({latest[:40]!r}): the newest complete one counts")
        latest = existing[0]

    # A folder that is newer than `latest` belongs to a save that was killed just after its rename.
    candidates = [name for name in existing if step_key(name) <= step_key(latest)]
    if candidates and candidates[0] != existing[0]:
        warn(f"{existing[0]} is not used: it is later than {latest}, which {root}/latest names")

    damaged = []
    for name in candidates or existing:
        folder = os.path.join(root, name)
        wrong = verify(folder, names, progress)
        if not wrong:
            if name != latest:
                warn(f"using {name}, the newest checkpoint that is complete")
            return folder
        damaged.append(f"{name}: {wrong}")
        warn(f"{folder} is damaged: {wrong}")

    raise ConfigError(
        f"all checkpoints in {root} are damaged ({'; '.join(damaged)}); restore one, or delete the "
        f"folder and start anew"
    )


def read_latest(root):
    """-> the content of the file `latest`, "" if there is none. It may be damaged."""
    try:
        with open(os.path.join(root, "latest"), errors="replace") as f:
            return f.read().strip()
    except OSError:
        return ""


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)


def verify(folder, names=None, progress=lambda where: None):
    """Compare the files of a checkpoint with their sums -> what is wrong, in words, or None.

    names: of the files to verify; all of them, by default.
    """
    try:
        sums = read_sums(folder)
        for name in names or [*sums, "model.pt", "train.pt"]:
            path = os.path.join(folder, name)
            progress(f"start-up, verifying {path}")
            if sha256_of(path) != sums.get(name):
                size = os.path.getsize(path)
                return f"{name} is not what was written ({size} bytes, another SHA-256)"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (OSError, ValueError) as error:
        return describe(error)
    return None


def read_sums(folder):
    """-> {file name: SHA-256}. Raises OSError or ValueError if the file of sums is damaged."""
    sums = {}
    with open(os.path.join(folder, SUMS)) as f:
        for line in f:
            digest, name = line.split()
            sums[name] = digest
    return sums


def sha256_of(path):
    sha256 = hashlib.sha256()
    with open(path, "rb") as f:
        while data := f.read(1 << 20):
            sha256.update(data)
    return sha256.hexdigest()


# ---- loading ----


def read(path, mmap=False):
    """Load one file of a checkpoint to the CPU. ConfigError if it is missing or damaged.

    mmap: read only the tensors that are then used.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: is this a checkpoint folder?") from None
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be read ({describe(error)}); use the checkpoint before it"
        ) from error


def load(path, model, optimizer, loss, scaler, config, fingerprint=""):
    """Continue from the folder `path` -> (number of steps done, the log's state).

    All ranks call this. The number of ranks may be another than the one that saved: rows of the
    u-state are found by sample id. Raises ConfigError if the checkpoint is of another model or data
    set; check_settings is to be called before.
    """
    load_model(path, model, config)
    train = read(os.path.join(path, "train.pt"))
    check_data(path, train, config, fingerprint)

    load_optimizer(optimizer, train["optimizer"])
    if train["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(train["scaler"])
    torch.set_rng_state(train["rng"])

    load_rank_states(path, model, loss.state, train["world_size"])
    return train["step"], train["log"]


def load_model(path, model, config=None):
    """Copy the weights in the folder `path` into model.

    Raises ConfigError, which says what differs, if they are another model's.
    """
    saved = read(os.path.join(path, "model.pt"))["state_dict"]
    here = model.state_dict()

    different = []
    for name in {**here, **saved}:
        if shape_of(saved, name) != shape_of(here, name):
            different.append(
                f"{name} is {shape_of(saved, name)} there and {shape_of(here, name)} here"
            )
    if different:
        settings = different_settings(path, config) if config else []
        raise ConfigError(
            f"{path} holds another model: {'; '.join(settings or different[:1])} "
            f"({len(different)} tensors differ, the first: {different[0]})"
        )
    model.load_state_dict(saved)


def shape_of(weights, name):
    return list(weights[name].shape) if name in weights else "absent"


def different_settings(path, config):
    """-> sentences on the settings of the model that are not those of the checkpoint."""
    sentences = []
    for key, (there, here) in changed_settings(path, config).items():
        if key in ("model", *MODEL_KEYS):
            sentences.append(f"{key} = {there!r} there, {here!r} here")
    return sentences


def changed_settings(path, config):
    """-> {key: (its value in the checkpoint, its value here)} of all that differ, but JOB_KEYS."""
    saved = saved_config(path)
    changes = {}
    for field in dataclasses.fields(config):
        there = getattr(saved, field.name)
        here = getattr(config, field.name)
        if there != here and field.name not in JOB_KEYS:
            changes[field.name] = (there, here)
    return changes


def saved_config(path):
    """-> the Config with which the checkpoint in the folder `path` was saved.

    A key that is younger than the checkpoint had its default value then, and keys that are gone are
    left out. The file has lists in place of tuples.
    """
    saved = read(os.path.join(path, "train.pt"), mmap=True)["config"]
    values = {key: typed(key, value, path) for key, value in saved.items() if key in HINTS}
    return Config(**values)


def check_settings(path, config):
    """Print what this run changes against the checkpoint that it starts from.

    Raises ConfigError for a key of FIXED_KEYS, and for METHOD_KEYS unless config.resume_changes.
    It reads little, so that it can come before anything is allocated.
    """
    changes = {}
    for key, (there, here) in changed_settings(path, config).items():
        changes[key] = f"{key}: {there!r} -> {here!r}"

    fixed = [changes[key] for key in FIXED_KEYS if key in changes]
    if fixed:
        raise ConfigError(
            f"{path} was trained with other settings, which a continued run cannot change "
            f"({'; '.join(fixed)}): put them back, or start a new run"
        )
    method = [changes[key] for key in METHOD_KEYS if key in changes]
    if method and not config.resume_changes:
        raise ConfigError(
            f"{path} was trained with other settings of the method ({'; '.join(method)}): put them "
            "back, or continue with the new ones by --resume_changes=True"
        )
    for change in changes.values():
        print(f"changed since {path}: {change}", flush=True)


def check_data(path, train, config, fingerprint):
    """ConfigError if the checkpoint is of another data set. train: the content of train.pt."""
    if train["fingerprint"] != fingerprint:
        raise ConfigError(
            f"{path} was trained on another data set, or on another order of shards: its index "
            f"differs from that of train_data = {config.train_data}, so ids would mean other "
            f"samples"
        )


def load_optimizer(optimizer, saved):
    """Take the moments from the checkpoint, and keep this run's settings."""
    settings_here = []
    for group in optimizer.param_groups:
        kept = ("weight_decay", "betas", "eps", "momentum")
        settings_here.append({key: group[key] for key in kept if key in group})

    optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, settings_here):
        group.update(settings)

    # Fused optimizers go through memory in its order, so moments need the strides of their weights.
    for p, state in optimizer.state.items():
        for name, x in state.items():
            if torch.is_tensor(x) and x.shape == p.shape and x.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)


def load_rank_states(path, model, state, saved_world_size):
    """Fill this rank's rows of the u-state, and its BatchNorm statistics, from the ranks' files.

    Among K ranks, sample id i belongs to rank i mod K, as row i // K of its table. At the same
    number of ranks a rank reads its own file only, otherwise it picks its ids from all of them.
    """
    same_world = saved_world_size == dist.world_size()
    for rank in [dist.rank()] if same_world else range(saved_world_size):
        saved = read(os.path.join(path, state_file(rank, saved_world_size)), mmap=True)
        if saved["columns"] != state.columns or saved["num_samples"] != state.num_samples:
            raise ConfigError(
                f"{path} keeps {saved['columns']} for {saved['num_samples']} samples, this run "
                f"{state.columns} for {state.num_samples}: it is of another algorithm or data set"
            )

        if same_world:
            for x, own in zip(dist.batchnorm(model), saved["batchnorm"]):
                x.copy_(own)
        if not state.columns:
            break

        ids = torch.arange(rank, state.num_samples, saved_world_size)  # in the order of saved rows
        belongs_here = ids % dist.world_size() == dist.rank()
        rows = saved["table"][: len(ids)][belongs_here]
        state.table[ids[belongs_here] // dist.world_size()] = rows.to(state.table.device)
