"""Checkpoints: a folder per step, complete or absent, never half there.

    out_dir/checkpoints/step-00001200/model.pt                   {"state_dict": ...}, loads in open_clip as it is
                                      train.pt                   optimizer, step, scaler, random state, resolved config
                                      state-00000-of-00008.pt    each rank's rows of the u-state
    out_dir/checkpoints/latest                                   the name of the newest complete folder

Everything is written into a folder of another name, flushed to the disk and then renamed; `latest` follows last. Files
hold tensors and plain Python types only and are read with weights_only=True, which runs no code.
"""

import dataclasses
import os
import re
import shutil

import torch

import dist
from config import MODEL_KEYS, ConfigError


def save(out_dir, step, model, optimizer, loss, scaler, config, keep):
    """Write checkpoint `step` (all ranks call this, out_dir is shared between them) -> its path; older ones beyond `keep` go."""
    root = os.path.join(out_dir, "checkpoints")
    final = os.path.join(root, f"step-{step:08d}")
    partial = final + ".partial"
    if dist.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
    dist.barrier()
    dist.average_batchnorm(model)
    state = loss.state
    write(os.path.join(partial, state_file(dist.rank(), dist.world_size())),
          {"table": state.table[:-1].cpu(), "columns": state.columns, "num_samples": state.num_samples})
    if dist.rank() == 0:
        write(os.path.join(partial, "model.pt"), {"state_dict": {k: v.cpu().contiguous() for k, v in model.state_dict().items()}})
        write(os.path.join(partial, "train.pt"), {
            "step": step, "world_size": dist.world_size(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "rng": torch.get_rng_state(), "config": dataclasses.asdict(config)})
    dist.barrier()                                          # every rank's file is on the disk
    if dist.rank() == 0:
        shutil.rmtree(final, ignore_errors=True)            # of an earlier run that was continued from before this step
        os.rename(partial, final)
        with open(os.path.join(root, "latest.partial"), "w") as f:
            f.write(os.path.basename(final))
            flush(f)
        os.replace(os.path.join(root, "latest.partial"), os.path.join(root, "latest"))
        flush_folder(root)
        older = sorted(d for d in os.listdir(root) if re.fullmatch(r"step-\d{8}", d) and d < os.path.basename(final))
        for old in older[:max(0, len(older) + 1 - keep)]:
            shutil.rmtree(os.path.join(root, old), ignore_errors=True)
    dist.barrier()
    return final


def state_file(rank, world_size):
    return f"state-{rank:05d}-of-{world_size:05d}.pt"


def write(path, content):
    with open(path, "wb") as f:
        torch.save(content, f)
        flush(f)


def flush(f):
    f.flush()
    os.fsync(f.fileno())


def flush_folder(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def find(config):
    """config.resume -> the checkpoint folder to start from, or None. ConfigError if it is asked for and not there, or if a
    new run would be written over an old one."""
    root = os.path.join(config.out_dir, "checkpoints")
    latest = os.path.join(root, "latest")
    if config.resume in ("auto", "none"):
        newest = None
        if os.path.exists(latest):
            with open(latest) as f:
                newest = os.path.join(root, f.read().strip())
        if newest and config.resume == "none":
            raise ConfigError(f"{config.out_dir} already holds a run, saved at {os.path.basename(newest)}. Continue it with "
                              f"--resume=auto, choose another --out_dir, or delete that folder")
        return newest
    if not os.path.exists(os.path.join(config.resume, "train.pt")):
        raise ConfigError(f"resume = {config.resume!r} is no checkpoint: it has no train.pt (give a folder like runs/NAME/checkpoints/step-00001000)")
    return config.resume


def read(path):
    """Load one file of a checkpoint to the CPU; ConfigError if it is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: is this a checkpoint folder?") from None
    except Exception as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}: {error}); use the checkpoint before it") from error


def load_model(path, model, config=None):
    """Copy the weights in the folder `path` into model; ConfigError if they are another model's (naming what differs)."""
    weights, here = read(os.path.join(path, "model.pt"))["state_dict"], model.state_dict()
    wrong = [f"{k} is {list(weights[k].shape) if k in weights else 'absent'} there and {list(here[k].shape) if k in here else 'absent'} here"
             for k in {**here, **weights} if k not in weights or k not in here or weights[k].shape != here[k].shape]
    if wrong:
        there = read(os.path.join(path, "train.pt"))["config"]
        keys = [f"{k} = {there.get(k)!r} there, {getattr(config, k)!r} here" for k in ("model", *MODEL_KEYS)
                if config and there.get(k) != getattr(config, k)]
        raise ConfigError(f"{path} holds another model: {'; '.join(keys or wrong[:1])} ({len(wrong)} tensors differ, the first: {wrong[0]})")
    model.load_state_dict(weights)


def load(path, model, optimizer, loss, scaler, config):
    """Continue from the folder `path` -> the number of steps done. Every rank calls this. The world size may be another
    than the one that saved: rows of the u-state are found by sample id. ConfigError if the checkpoint is of another model,
    algorithm or data set."""
    load_model(path, model, config)
    train = read(os.path.join(path, "train.pt"))
    there = train["config"]
    for key in ("algorithm", "optimizer", "batch_size", "seed", "lanes", "shuffle_block"):
        if there[key] != getattr(config, key):
            raise ConfigError(f"{path} was trained with {key} = {there[key]!r}, this run has {getattr(config, key)!r}; a continued run cannot change it")
    fresh = [{k: v for k, v in group.items() if k in ("weight_decay", "betas", "eps", "momentum")} for group in optimizer.param_groups]
    optimizer.load_state_dict(train["optimizer"])
    for group, settings in zip(optimizer.param_groups, fresh):
        group.update(settings)                              # the moments are the checkpoint's, the settings this run's
    if train["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(train["scaler"])
    torch.set_rng_state(train["rng"])
    state, K = loss.state, train["world_size"]
    for r in range(K) if K != dist.world_size() else [dist.rank()]:     # id i was saved by rank i mod K, in row i // K
        saved = read(os.path.join(path, state_file(r, K)))
        if saved["columns"] != state.columns or saved["num_samples"] != state.num_samples:
            raise ConfigError(f"{path} keeps {saved['columns']} for {saved['num_samples']} samples, this run {state.columns} for "
                              f"{state.num_samples}: it is of another algorithm or data set")
        if not state.columns:
            break
        ids = torch.arange(r, state.num_samples, K)
        mine = ids % dist.world_size() == dist.rank()
        state.table[ids[mine] // dist.world_size()] = saved["table"][:len(ids)][mine].to(state.table.device)
    return train["step"]
