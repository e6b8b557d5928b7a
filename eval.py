"""Evaluate a checkpoint: zero-shot classification on a set with a class list, and retrieval; a picture of both.

    python eval.py runs/emoji_v3 --eval_data='data/emoji/test/{00000..00001}.tar'

The set is tar shards. With KEY.cls (a class number) in them, and beside them, or in the folder above, classnames.txt (a class a
line) and, if there is one, zeroshot_classification_templates.txt ("a photo of a {c}", a template a line), the files that
CLIP_benchmark reads, it gives zero-shot accuracy. With captions it gives retrieval, R@1, R@5 and R@10 both ways.
"""

import contextlib
import json
import os
import sys
import textwrap
from collections import Counter
from itertools import chain

import torch
import torch.nn.functional as F

import config as configs
import dist
import model as models
from config import ConfigError
from ingest import evaluation
from ingest.tar import usable_samples
from ingest.tokenizer import Tokenizer
from ingest.urls import expand
from runtime import checkpoint, hardware, ranks

CHUNK = 1024  # queries whose similarities to everything are held at once


@torch.no_grad()
def evaluate(
    model, c, device, autocast=contextlib.nullcontext, picture=False, progress=lambda where: None
):
    """The model on c.eval_data, the work shared over the ranks -> {name: share of 1}, the same on every rank.

    With `picture`, rank 0 also writes eval.json and retrieval.png into c.out_dir. progress(where) is told of progress. Raises ConfigError for a set without
    classes and captions, or whose class numbers and class list do not go together.
    """
    model.eval()
    images, captions, classes, positions, bad = encode_images(model, c, device, autocast, progress)
    if bad and dist.rank() == 0:
        print(f"left out of {c.eval_data[0]}: {bad}", flush=True)
    encode = lambda texts: encode_texts(model, texts, c, device, autocast, progress)
    results, queries = {}, None
    names, templates = class_list(c)
    if names and all(label is not None for label in classes):
        if max(classes) >= len(names):
            raise ConfigError(
                f"class {max(classes)} in {c.eval_data[0]}, but classnames.txt has {len(names)} lines: it belongs to another set"
            )
        prompts = encode(
            [template.replace("{c}", name) for name in names for template in templates]
        )
        prompts = F.normalize(
            prompts.unflatten(0, (len(names), len(templates))).mean(1), dim=-1
        )  # (classes, d)
        results.update(zero_shot(images, prompts, torch.tensor(classes, device=device)))
        queries = names, prompts, [[i] for i in classes]
    if any(captions):
        texts = list(
            dict.fromkeys(text for several in captions for text in several)
        )  # each distinct caption once
        number = {text: i for i, text in enumerate(texts)}
        relevant = [[number[text] for text in several] for several in captions]
        text_features = encode(texts)
        results.update(retrieval(images, text_features, relevant))
        queries = queries or (texts, text_features, relevant)
    if not queries:
        raise ConfigError(
            f"{c.eval_data[0]} has neither classes (KEY.cls beside classnames.txt) nor captions (KEY.txt, or set caption_key)"
        )
    if picture:
        pick = torch.randperm(len(queries[0]), generator=torch.Generator().manual_seed(c.seed))[
            :8
        ].tolist()
        best = (queries[1][pick] @ images.T).topk(min(5, len(images)), 1).indices.tolist()
        pixels = fetch(c, model.image_size, {positions[i] for row in best for i in row}, progress)
        if dist.rank() == 0:
            os.makedirs(c.out_dir, exist_ok=True)
            with open(os.path.join(c.out_dir, "eval.json"), "w") as f:
                json.dump(
                    {
                        "eval_data": list(c.eval_data),
                        "images": len(images),
                        "texts": len(queries[0]),
                        "left_out": bad,
                        **results,
                    },
                    f,
                    indent=1,
                )
            draw(
                os.path.join(c.out_dir, "retrieval.png"),
                [queries[0][i] for i in pick],
                [[pixels[positions[i]] for i in row] for row in best],
                [[i in queries[2][j] for j in row] for i, row in zip(pick, best)],
            )
    return results


def encode_images(model, c, device, autocast, progress):
    """-> features [n, d] of the whole set in its order, captions (n lists), classes (n, or None each), positions in the set (n;
    bad samples are left out), {reason: how many were}. ConfigError if none is left."""
    mine, bad = [], Counter()
    for number, batch in enumerate(samples(c, model.image_size)):
        progress(f"evaluation, batch {number} of images")
        with autocast():
            features = model.encode_image(batch.images.to(device, non_blocking=True))
        mine.append(
            (features.float().cpu(), batch.positions.tolist(), batch.captions, batch.classes)
        )
        bad.update(batch.bad)
    everyone = [part for parts in dist.all_gather_objects(mine) for part in parts]
    bad = dict(sum(dist.all_gather_objects(bad), Counter()))
    if not everyone:
        raise ConfigError(f"no sample of {c.eval_data[0]} can be used: {bad}")
    features = torch.cat([part[0] for part in everyone])
    rows = [
        (*row, i) for i, row in enumerate(chain.from_iterable(zip(*part[1:]) for part in everyone))
    ]
    positions, captions, classes, order = zip(*sorted(rows, key=lambda row: row[0]))
    return features[list(order)].to(device), captions, classes, positions, bad


def check(c):
    """ConfigError, from the first sample of c.eval_data, if evaluate would find nothing there to evaluate: asked before a run."""
    kinds = ("json" if c.caption_key else "txt", "cls")
    _, files = next(usable_samples(expand(c.eval_data)[0], kinds, range(1)))
    if kinds[0] not in files and not class_list(c)[0]:
        raise ConfigError(
            f"{c.eval_data[0]} has classes (KEY.cls), but there is no classnames.txt beside it or in the folder above"
        )


def samples(c, image_size):
    return evaluation.read_samples(
        c.eval_data,
        image_size,
        c.caption_key,
        c.eval_batch,
        dist.rank(),
        dist.world_size(),
        c.workers,
    )


def encode_texts(model, texts, c, device, autocast, progress):
    """list of n str -> features [n, d]; every rank encodes a share."""
    tokenizer = Tokenizer(model.context_length)
    share = texts[dist.rank() :: dist.world_size()]
    features = []
    for start in range(0, len(share), c.eval_batch):
        progress(f"evaluation, text {start} of {len(share)}")
        tokens = tokenizer(share[start : start + c.eval_batch])
        lengths = 1 + tokens.argmax(1)  # <end_of_text> is the largest id
        longest = int(lengths.max())
        with autocast():
            token_index = models.pack(lengths, longest, device)
            features.append(
                model.encode_text(tokens[:, :longest].to(device), token_index).float().cpu()
            )
    shares = dist.all_gather_objects(torch.cat(features) if features else None)
    out = torch.empty(len(texts), shares[0].shape[1])
    for r, share in enumerate(shares):
        if share is not None:
            out[r :: len(shares)] = share
    return out.to(device)


def class_list(c):
    """-> (class names, templates) from the files beside the first shard, or in the folder above; no names if there is no class list."""
    shards = os.path.dirname(expand(c.eval_data)[0])

    def lines(name):
        for folder in (shards, os.path.dirname(shards)):
            path = os.path.join(folder, name)
            if os.path.exists(path):
                with open(path, encoding="utf-8") as f:
                    return [line.rstrip("\n") for line in f if line.strip()]
        return []

    return lines("classnames.txt"), lines("zeroshot_classification_templates.txt") or [
        "a photo of a {c}"
    ]


def zero_shot(images, prompts, classes):
    """images [n, d], one prompt per class [classes, d], classes [n] -> top-1, top-5 and mean per-class top-1 accuracy."""
    top = torch.cat(
        [(part @ prompts.T).topk(min(5, len(prompts)), 1).indices for part in images.split(CHUNK)]
    )  # (n, 5)
    hit = top == classes[:, None]
    right = torch.zeros(len(prompts), device=images.device).index_add_(
        0, classes, hit[:, 0].float()
    )
    count = torch.bincount(classes, minlength=len(prompts))
    return {
        "zeroshot_top1": hit[:, 0].float().mean().item(),
        "zeroshot_top5": hit.any(1).float().mean().item(),
        "zeroshot_mean_per_class": (right[count > 0] / count[count > 0]).mean().item(),
    }


def retrieval(images, texts, relevant):
    """images [n, d], texts [m, d], relevant: the text numbers of each image -> R@1/5/10: is any right one among the first k?"""
    pairs = {(i, j) for i, several in enumerate(relevant) for j in several}
    results = {}
    for name, queries, targets, right in (
        ("image_to_text", images, texts, lambda q, t: (q, t) in pairs),
        ("text_to_image", texts, images, lambda q, t: (t, q) in pairs),
    ):
        top = torch.cat(
            [
                (part @ targets.T).topk(min(10, len(targets)), 1).indices
                for part in queries.split(CHUNK)
            ]
        ).tolist()
        first = [
            next((rank for rank, t in enumerate(row) if right(q, t)), 10)
            for q, row in enumerate(top)
        ]
        results.update(
            {f"{name}_R@{k}": sum(rank < k for rank in first) / len(first) for k in (1, 5, 10)}
        )
    return results


def fetch(c, image_size, wanted, progress):
    """The images at the positions `wanted` -> {position: uint8 [3, S, S]}: read again, so that no run holds a whole set."""
    mine = {}
    for number, batch in enumerate(samples(c, image_size)):
        progress(f"evaluation, batch {number} of images for the picture")
        mine.update(
            (i, image.clone())
            for i, image in zip(batch.positions.tolist(), batch.images)
            if i in wanted
        )
    return {i: image for part in dist.all_gather_objects(mine) for i, image in part.items()}


def draw(path, queries, images, right):
    """A row per query: its text, then its nearest images (uint8 [3, S, S]), framed green where they are right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(queries),
        1 + len(images[0]),
        figsize=(2.6 + 1.3 * len(images[0]), 1.35 * len(queries)),
        squeeze=False,
        width_ratios=[2.2] + [1] * len(images[0]),
        layout="constrained",
    )
    for row, query, nearest, hits in zip(axes, queries, images, right):
        row[0].text(
            0.95,
            0.5,
            textwrap.fill(query, 32, max_lines=4, placeholder=" ..."),
            va="center",
            ha="right",
            fontsize=10,
        )
        row[0].axis("off")
        for axis, image, hit in zip(row[1:], nearest, hits):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color="#2a9d3a" if hit else "#cccccc", linewidth=4 if hit else 1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(results):
    return "\n".join(f"  {key:<26}{100 * value:6.1f} %" for key, value in results.items())


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        raise ConfigError("usage: python eval.py CHECKPOINT_OR_RUN_FOLDER [--key=value ...]")
    folder = argv[0]
    is_run = os.path.isdir(os.path.join(folder, "checkpoints"))
    folder = checkpoint.find(
        configs.Config(out_dir=folder, resume="auto" if is_run else folder),
        names=("model.pt", "train.pt"),
    )
    if not folder:
        raise ConfigError(f"{argv[0]} has no checkpoint yet")
    saved = checkpoint.read(os.path.join(folder, "train.pt"))["config"]
    c = configs.load(
        [f"--{key}={value!r}" for key, value in saved.items() if key in configs.HINTS]
        + [f"--out_dir={argv[0]}"]
        + argv[1:]
    )
    if not c.eval_data:
        raise ConfigError(
            "eval_data is empty: name the shards, for example --eval_data='data/emoji/test/*.tar'"
        )
    device = dist.init(c.device, c.timeout)
    model = models.create(c.model, c.tau_init, **c.model_numbers()).to(device)
    checkpoint.load_model(folder, model, c)
    results = evaluate(
        model,
        c,
        device,
        hardware.autocast(hardware.precision(c.precision, device), device),
        picture=True,
    )
    if dist.rank() == 0:
        print(
            f"{folder} on {' '.join(c.eval_data)}\n{table(results)}\n  {c.out_dir}/eval.json, {c.out_dir}/retrieval.png"
        )
    dist.barrier()  # nobody goes while another may still need it


if __name__ == "__main__":
    ranks.run(main, sys.argv[1:])
