"""Tar shards of pictures with captions, as img2dataset writes them, and zero-shot test sets.

A sample is a dict {png, caption, source, name, license}, and in a test set also its number "cls".
Samples of another kind need a function in place of members_of. The same samples give the same
bytes: no clock, no user name.
"""

import json
import random
from pathlib import Path

SEED = 0  # of the shuffle


def members_of(sample: dict, key: str) -> dict:
    """A sample as TarWriter takes it: {"__key__": key, extension: bytes}."""
    meta = {
        "key": key,
        "caption": sample["caption"],
        "source": sample["source"],
        "name": sample["name"],
        "license": sample["license"],
        "status": "success",
    }
    members = {
        "__key__": key,
        "png": sample["png"],
        "txt": sample["caption"].encode(),
        "json": json.dumps(meta).encode(),
    }
    if "cls" in sample:
        members["cls"] = str(sample["cls"]).encode()
    return members


def write_shards(
    samples: list[dict], folder: Path, per_shard: int = 1000, seed: int = SEED, members=members_of
) -> None:
    """Write the samples, shuffled, so that each shard is a fair mixture.

    folder: not there yet. members: function (sample, key) -> dict for TarWriter. Raises OSError if
    the folder cannot be written.
    """
    folder.mkdir(parents=True)
    samples = random.Random(seed).sample(samples, len(samples))
    for shard, start in enumerate(range(0, len(samples), per_shard)):
        write_shard(samples[start : start + per_shard], folder, shard, start, members)


def write_shard(
    samples: list[dict], folder: Path, shard: int, first: int, members=members_of
) -> None:
    """Write one shard with its counts: 00000.tar and 00000_stats.json, for shard = 0.

    first: the number of its first sample, from which the keys count. Raises OSError.
    """
    # Imported late: it imports torch, seconds that --help and the rendering processes do without.
    from webdataset import TarWriter

    path = folder / f"{shard:05d}.tar"
    with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number, sample in enumerate(samples, first):
            tar.write(members(sample, f"{number:09d}"))

    stats = {"count": len(samples), "successes": len(samples)}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats) + "\n")


def write_test(samples: list[dict], folder: Path) -> list[str]:
    """Write samples as a set for zero-shot classification, their captions being the classes.

    Each sample gets its "cls". Returns the names of the classes. Raises OSError as write_shards.
    """
    classes = sorted({sample["caption"] for sample in samples})
    for sample in samples:
        sample["cls"] = classes.index(sample["caption"])
    write_shards(samples, folder)

    # CLIP_benchmark's convention. The template is the bare name, as training captions are.
    (folder / "classnames.txt").write_text("\n".join(classes) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}\n")
    return classes


def read_shards(folder: Path) -> list[dict]:
    """The samples {png, caption, source, name, license} of shards that write_shards wrote."""
    from webdataset import WebDataset  # late, as in write_shard

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    samples = []
    for found in WebDataset(shards, shardshuffle=False, empty_check=False):
        meta = json.loads(found["json"])
        about = {key: meta[key] for key in ("caption", "source", "name", "license")}
        samples.append({"png": found["png"], **about})
    return samples
