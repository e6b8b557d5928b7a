"""Checkpoints: a folder per step, complete or absent, never half there.

    out_dir/checkpoints/step-00001200/model.pt                   {"state_dict": ...}, loads in open_clip as it is
                                      train.pt                   optimizer, step, scaler, random state, log, resolved config
                                      state-00000-of-00008.pt    each rank's rows of the u-state
                                      SHA256SUMS                 of all of these; `sha256sum -c SHA256SUMS` checks them, too
    out_dir/checkpoints/latest                                   the name of the newest complete folder

Saving copies everything in memory, which is all that training waits for, and writes the copy beside it: into a folder of another name,
flushed to the disk, then renamed; `latest` follows last. Files hold tensors and plain Python types only and are read with
weights_only=True, which runs no code. Before a run is continued every file is compared with its sum; a damaged checkpoint is named,
and the one before is taken.
"""

import dataclasses
import fcntl
import hashlib
import os
import re
import shutil
import socket
import sys
import threading
import time

import torch

import dist
from config import MODEL_KEYS, ConfigError
from runtime import ranks

SUMS = "SHA256SUMS"


class Saver:
    """The checkpoints of one run. All ranks call its methods at the same steps; out_dir is a folder that they share.

    Raises ConfigError if another run is writing there now."""

    def __init__(
        self, config, model, optimizer, loss, scaler, fingerprint="", newest=None, lock=None
    ):
        """fingerprint: of the data set. newest: the checkpoint that this run starts from, if any. lock: what lock_folder() gave, if it did."""
        self.config, self.model, self.optimizer, self.loss, self.scaler = (
            config,
            model,
            optimizer,
            loss,
            scaler,
        )
        self.fingerprint, self.newest, self.root = (
            fingerprint,
            newest,
            os.path.join(config.out_dir, "checkpoints"),
        )
        self.thread = self.held = None
        self.lock = ranks.from_first_rank(
            lambda: lock_folder(config.out_dir, create=True) if lock is None else lock
        )
        for _ in range(30):  # network file systems show new files late
            if os.path.exists(os.path.join(config.out_dir, ".lock")):
                break
            time.sleep(1)
        else:
            raise ConfigError(
                f"rank {dist.rank()} on {socket.gethostname()} does not see {config.out_dir}/.lock, which rank 0 has written: "
                f"out_dir must be on a disk that all hosts share"
            )
        if dist.rank() == 0:
            for name in os.listdir(self.root):  # what a run that was killed has left
                if name.endswith(".partial"):
                    remove(os.path.join(self.root, name))
            # Later checkpoints than the one that this run starts from are damaged, or another course of the run: they are put aside,
            # so that they never count as the ones before.
            for name in steps(self.root):
                if newest is None or step_key(name) > step_key(os.path.basename(newest)):
                    remove(os.path.join(self.root, name + ".abandoned"))
                    os.rename(
                        os.path.join(self.root, name), os.path.join(self.root, name + ".abandoned")
                    )
        dist.barrier()

    def save(self, step, log_state):
        """Begin to save checkpoint `step` -> the seconds for which training waited. With save_background=False it is on the disk on
        return, otherwise after commit(). RuntimeError if a weight is not finite: such a checkpoint is of no use to anybody."""
        start = time.monotonic()
        self.commit()  # one at a time
        weights = self.model.state_dict()
        finite = torch.stack([torch.isfinite(x).all() for x in weights.values()]).tolist()
        if not all(finite):
            name = list(weights)[finite.index(False)]
            raise RuntimeError(
                f"{name} is not finite after step {step}, which is not saved. {self.describe_newest()}"
            )
        state = self.loss.state
        files = {
            state_file(dist.rank(), dist.world_size()): {
                "table": state.table[:-1],
                "columns": state.columns,
                "num_samples": state.num_samples,
                "batchnorm": [x.clone() for x in dist.batchnorm(self.model)],
            }
        }
        if dist.rank() == 0:
            files["model.pt"] = {"state_dict": weights}
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
        with dist.averaged_batchnorm(self.model):  # the clones above stay this rank's own
            self.held = snapshot(files, self.held)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies have arrived
        self.final, self.sums, self.error = os.path.join(self.root, f"step-{step:08d}"), {}, None
        self.thread = threading.Thread(target=self.write, args=(self.final + ".partial",))
        self.thread.start()
        if not self.config.save_background:
            self.commit()
        return time.monotonic() - start

    def write(self, folder):
        """In a thread: this rank's files, and their sums. What goes wrong is kept for commit()."""
        try:
            os.makedirs(folder, exist_ok=True)
            for name, content in self.held.items():
                self.sums[name] = write(os.path.join(folder, name), content)
        except Exception as error:
            self.error = (
                f"rank {dist.rank()} on {socket.gethostname()}: {type(error).__name__}: {error}"
            )

    def writing(self):
        return self.thread is not None and self.thread.is_alive()

    def commit(self):
        """Wait until every rank has written its files, and make the checkpoint the newest -> True, or False if it could not be
        written: then that is said, what there is of it is removed, and the checkpoints before it stay."""
        if self.thread is None:
            return True
        self.thread.join()
        self.thread = None
        results = dist.all_gather_objects((self.sums, self.error))
        errors = [error for _, error in results if error]
        if dist.rank() == 0 and not errors:
            try:
                self.publish({name: digest for sums, _ in results for name, digest in sums.items()})
            except OSError as error:
                errors = [f"rank 0 on {socket.gethostname()}: {type(error).__name__}: {error}"]
        errors = dist.all_gather_objects(errors)[
            0
        ]  # after this the checkpoint is there, on every rank's disk
        if not errors:
            self.newest = self.final
            return True
        if dist.rank() == 0:
            remove(self.final + ".partial")
            disk = shutil.disk_usage(self.root)
            print(
                f"error: {os.path.basename(self.final)} could not be saved: {'; '.join(errors[:4])}. It takes about {self.bytes() / 1e9:.2f} GB; "
                f"{self.root} has {disk.free / 1e9:.2f} of {disk.total / 1e9:.2f} GB free. {self.describe_newest()}",
                file=sys.stderr,
                flush=True,
            )
        return False

    def publish(self, sums):
        """On rank 0, when all files are on the disk."""
        partial = self.final + ".partial"
        unseen = [name for name in sums if not os.path.exists(os.path.join(partial, name))]
        if unseen:
            raise OSError(
                f"rank 0 does not see {', '.join(unseen[:4])}, which other ranks have written: out_dir must be on a disk that all hosts share"
            )
        with open(os.path.join(partial, SUMS), "w") as f:
            f.writelines(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
            flush(f)
        flush_folder(partial)
        os.rename(partial, self.final)
        flush_folder(self.root)
        name = os.path.basename(self.final)
        with open(os.path.join(self.root, "latest.partial"), "w") as f:
            f.write(name)
            flush(f)
        os.replace(os.path.join(self.root, "latest.partial"), os.path.join(self.root, "latest"))
        flush_folder(self.root)
        for old in steps(self.root)[self.config.keep :]:
            remove(os.path.join(self.root, old))

    def describe_newest(self):
        return (
            f"The newest good checkpoint is {self.newest}"
            if self.newest
            else "There is no checkpoint yet"
        )

    def bytes(self):
        """About how large a checkpoint is: weights, moments, and the u-state of all ranks."""
        tensors = (
            *self.model.state_dict().values(),
            *(x for s in self.optimizer.state.values() for x in s.values() if torch.is_tensor(x)),
        )
        return sum(
            x.numel() * x.element_size() for x in tensors
        ) + 4 * self.loss.state.num_samples * len(self.loss.state.columns)

    def close(self):
        """Let the next run write here."""
        if (
            dist.rank() == 0 and self.lock is not None and not self.writing()
        ):  # if something still writes, the process's end does it
            os.close(self.lock)
            self.lock = None


def lock_folder(out_dir, create=False):
    """Lock out_dir for this process, for as long as it lives -> a file descriptor, or None where the file system knows no locks, or
    where there is no such folder (create: make it, and its checkpoints folder). ConfigError if another process has it."""
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
            f"another run is writing to {out_dir} now: wait until it has ended, or choose another --out_dir"
        ) from None
    except OSError:
        return None


def snapshot(tree, held=None):
    """Nested dicts, lists and tensors -> the same on the CPU, in memory of its own; that of `held`, an earlier result, is used
    again where it fits. Copies from a GPU may still be under way on return."""
    if isinstance(tree, dict):
        return {
            k: snapshot(v, held.get(k) if isinstance(held, dict) else None) for k, v in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return [
            snapshot(v, held[i] if isinstance(held, list) and i < len(held) else None)
            for i, v in enumerate(tree)
        ]
    if not torch.is_tensor(tree):
        return tree
    if not (
        torch.is_tensor(held)
        and held.shape == tree.shape
        and held.dtype == tree.dtype
        and held.stride() == tree.stride()
    ):
        held = torch.empty_like(
            tree, device="cpu", pin_memory=tree.is_cuda
        )  # strides too: channels_last stays so
    return held.copy_(tree.detach(), non_blocking=True)


def state_file(rank, world_size):
    return f"state-{rank:05d}-of-{world_size:05d}.pt"


class Digest:
    """A file to write to, and the SHA-256 of what was written."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def write(path, content):
    """torch.save, down to the disk -> the file's SHA-256 in hexadecimal."""
    with open(path, "wb") as f:
        digest = Digest(f)
        torch.save(content, digest)
        flush(f)
    return digest.sha256.hexdigest()


def flush(f):
    f.flush()
    os.fsync(f.fileno())


def flush_folder(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path):
    """A folder or a file, if it is there. A folder is renamed first, so that none is ever seen half removed."""
    if os.path.isdir(path):
        if not path.endswith(".partial"):
            shutil.rmtree(path + ".old.partial", ignore_errors=True)
            os.rename(path, path + ".old.partial")
            path += ".old.partial"
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.exists(path):
        os.remove(path)


def steps(root):
    """The checkpoints' names, newest first."""
    return sorted(
        (d for d in os.listdir(root) if re.fullmatch(r"step-\d{8,}", d)), key=step_key, reverse=True
    )


def step_key(name):
    """What orders checkpoints' names by step."""
    return len(name), name


def verify(folder, names=None, progress=lambda where: None):
    """What is wrong with the files of a checkpoint (or with `names` among them), in words; None if all are as they were written."""
    try:
        with open(os.path.join(folder, SUMS)) as f:
            sums = {name: digest for digest, name in (line.split() for line in f)}
        for name in names or [*sums, "model.pt", "train.pt"]:
            progress(f"start-up, verifying {os.path.join(folder, name)}")
            with open(os.path.join(folder, name), "rb") as f:
                sha256 = hashlib.sha256()
                while data := f.read(1 << 20):
                    sha256.update(data)
                if sha256.hexdigest() != sums.get(name):
                    return f"{name} is not what was written ({os.path.getsize(f.name)} bytes, another SHA-256)"
    except FileNotFoundError as error:
        return f"{os.path.basename(error.filename)} is missing"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def find(config, names=None, progress=lambda where: None):
    """config.resume -> the checkpoint folder to start from, or None. Every file (or `names`) is compared with its sum; of "auto"'s
    checkpoints the newest undamaged one is taken, and the damaged ones are named on stderr. ConfigError if what is asked for is not
    there, or if a new run would be written over an old one. progress(where) is told of progress."""
    root = os.path.join(config.out_dir, "checkpoints")
    there = steps(root) if os.path.isdir(root) else []
    another = config.resume not in ("auto", "none") and os.path.abspath(
        os.path.dirname(config.resume.rstrip("/"))
    ) != os.path.abspath(root)
    if there and (config.resume == "none" or another) and not names:
        raise ConfigError(
            f"{config.out_dir} already holds a run, saved at {there[0]}. Continue it with --resume=auto, "
            f"choose another --out_dir, or delete that folder"
        )
    if config.resume not in ("auto", "none"):
        if not os.path.isdir(config.resume):
            raise ConfigError(
                f"resume = {config.resume!r} is no checkpoint (give a folder like runs/NAME/checkpoints/step-00001000)"
            )
        if wrong := verify(config.resume, names, progress):
            raise ConfigError(f"{config.resume} cannot be used: {wrong}; use another checkpoint")
        return config.resume
    if not there:
        return None
    try:
        with open(os.path.join(root, "latest"), errors="replace") as f:
            latest = f.read().strip()
    except OSError:
        latest = ""
    # A newer folder than `latest` is of a save that was not finished, by a rename.
    candidates = [d for d in there if step_key(d) <= step_key(latest)] or there
    damaged = []
    for name in candidates:
        folder = os.path.join(root, name)
        wrong = verify(folder, names, progress)
        if not wrong:
            if name != latest:
                print(
                    f"warning: continuing from {name}, the newest checkpoint that is whole",
                    file=sys.stderr,
                    flush=True,
                )
            return folder
        damaged.append(f"{name}: {wrong}")
        print(f"warning: {folder} is damaged: {wrong}", file=sys.stderr, flush=True)
    raise ConfigError(
        f"all checkpoints in {root} are damaged ({'; '.join(damaged)}); restore one, or delete the folder and start anew"
    )


def read(path, mmap=False):
    """Load one file of a checkpoint to the CPU; ConfigError if it is missing or damaged. mmap: read only what is then used."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: is this a checkpoint folder?") from None
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}: {error}); use the checkpoint before it"
        ) from error


def load_model(path, model, config=None):
    """Copy the weights in the folder `path` into model; ConfigError if they are another model's (naming what differs)."""
    weights, here = read(os.path.join(path, "model.pt"))["state_dict"], model.state_dict()
    wrong = [
        f"{k} is {list(weights[k].shape) if k in weights else 'absent'} there and {list(here[k].shape) if k in here else 'absent'} here"
        for k in {**here, **weights}
        if k not in weights or k not in here or weights[k].shape != here[k].shape
    ]
    if wrong:
        there = read(os.path.join(path, "train.pt"))["config"]
        keys = [
            f"{k} = {there.get(k)!r} there, {getattr(config, k)!r} here"
            for k in ("model", *MODEL_KEYS)
            if config and there.get(k) != getattr(config, k)
        ]
        raise ConfigError(
            f"{path} holds another model: {'; '.join(keys or wrong[:1])} ({len(wrong)} tensors differ, the first: {wrong[0]})"
        )
    model.load_state_dict(weights)


def load(path, model, optimizer, loss, scaler, config, fingerprint=""):
    """Continue from the folder `path` -> (the number of steps done, the log's state). Every rank calls this. The world size may be
    another than the one that saved: rows of the u-state are found by sample id. ConfigError if the checkpoint is of another model,
    algorithm or data set."""
    load_model(path, model, config)
    train = read(os.path.join(path, "train.pt"))
    there = {
        **{f.name: f.default for f in dataclasses.fields(config)},
        **train["config"],
    }  # a key may be younger than the checkpoint
    for key in (
        "algorithm",
        "optimizer",
        "batch_size",
        "seed",
        "lanes",
        "shuffle_block",
        "decoder",
    ):
        if there[key] != getattr(config, key):
            raise ConfigError(
                f"{path} was trained with {key} = {there[key]!r}, this run has {getattr(config, key)!r}; a continued run cannot change it"
            )
    if train["fingerprint"] != fingerprint:
        raise ConfigError(
            f"{path} was trained on another data set, or on another order of shards: its index differs from that of "
            f"train_data = {config.train_data}, so ids would mean other samples"
        )
    fresh = [
        {k: v for k, v in group.items() if k in ("weight_decay", "betas", "eps", "momentum")}
        for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(train["optimizer"])
    for group, settings in zip(optimizer.param_groups, fresh):
        group.update(settings)  # the moments are the checkpoint's, the settings this run's
    for p, state in optimizer.state.items():
        for (
            name,
            x,
        ) in state.items():  # fused optimizers walk through memory: moments lie as their weights do
            if torch.is_tensor(x) and x.shape == p.shape and x.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)
    if train["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(train["scaler"])
    torch.set_rng_state(train["rng"])
    state, K = loss.state, train["world_size"]
    for r in (
        range(K) if K != dist.world_size() else [dist.rank()]
    ):  # id i was saved by rank i mod K, in row i // K
        saved = read(os.path.join(path, state_file(r, K)), mmap=True)
        if saved["columns"] != state.columns or saved["num_samples"] != state.num_samples:
            raise ConfigError(
                f"{path} keeps {saved['columns']} for {saved['num_samples']} samples, this run {state.columns} for "
                f"{state.num_samples}: it is of another algorithm or data set"
            )
        if K == dist.world_size():
            for x, own in zip(dist.batchnorm(model), saved["batchnorm"]):
                x.copy_(own)
        if not state.columns:
            break
        ids = torch.arange(r, state.num_samples, K)
        mine = ids % dist.world_size() == dist.rank()
        state.table[ids[mine] // dist.world_size()] = saved["table"][: len(ids)][mine].to(
            state.table.device
        )
    return train["step"], train["log"]
