"""Every option of a run, in one table: its meaning, its type and its default.

A config file is plain Python, a few assignments that are run over these defaults.
`base = "other.py"` (a path relative to the file) starts from another config. `--key=value` on the
command line comes last. A config file is *code* and can do whatever Python can: run only those you
have read.

    python train.py configs/emoji_v3.py --lr=2e-3 --max_steps=100
"""

import ast
import contextlib
import dataclasses
import difflib
import glob
import inspect
import math
import os
import re
import select
import signal
import sys
import types
import typing
from dataclasses import dataclass
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot work. The message says which, why, and what to do."""


class BadRun(RuntimeError):
    """Why a run ends: shown as one line, without a traceback."""


# Of all samples (or steps): if more cannot be used, a run ends, and verifying the data fails. They
# need a look before more is spent.
MAX_BAD = 0.01


@dataclass
class Config:
    # ---- the method (loss.py, optim.py) ----

    # A name in the table ALGORITHMS of loss.py: openclip, sogclr, isogclr, fastclip-v0 to -v3.
    algorithm: str = "fastclip-v3"
    # The paper's equations, or those of the code that made its published numbers.
    equations: Literal["paper", "release"] = "paper"
    # Margin of RGCL: the larger, the larger tau stays (isogclr, v2, v3).
    rho: float = 6.5
    # Epsilon added to u inside the logarithm (all but openclip).
    eps_u: float = 1e-14
    # Inner learning rate gamma: its constant, or where its cosine ends. Large in short runs.
    gamma_min: float = 0.2
    # auto: the usual one of the algorithm, constant for sogclr and isogclr, cosine for v0 to v3.
    gamma_schedule: Literal["auto", "constant", "cosine"] = "auto"
    # Epochs until gamma reaches gamma_min; 0: half of the epochs.
    gamma_decay_epochs: float = 0.0
    # Recompute gamma every step instead of every epoch.
    gamma_smooth: bool = False
    # Initial temperature, global or per sample.
    tau_init: float = 0.07
    # Learning rate of the temperature; None: the model's.
    lr_tau: float | None = None
    # auto: cosine for openclip and v0, constant for per-sample tau, threshold (a third of the
    # learning rate once tau <= 0.03) for v3.
    lr_tau_schedule: Literal["auto", "constant", "cosine", "threshold"] = "auto"

    # ---- the model (model.py); None keeps the named model's own number ----

    # RN50, ViT-B-32, ViT-B-16 or timm:NAME; the numbers below change its size.
    model: str = "ViT-B-32"
    # Side of the square input, pixels.
    image_size: int | None = None
    # Side of a ViT's patches, pixels.
    patch_size: int | None = None
    # Dimension d of the joint feature space.
    embed_dim: int | None = None
    # ViT: blocks. ResNet: a tuple of four depths, one per stage.
    vision_layers: int | tuple | None = None
    # ViT: width of a token. ResNet: channels of the stem's last convolution.
    vision_width: int | None = None
    # ResNet: BatchNorm, or GroupNorm (no statistics across samples).
    vision_norm: Literal["batch", "group"] | None = None
    # Longest caption, tokens.
    context_length: int | None = None
    # Text transformer: width.
    text_width: int | None = None
    # Text transformer: attention heads.
    text_heads: int | None = None
    # Text transformer: blocks.
    text_layers: int | None = None
    # Recompute activations in the backward pass: less memory, about a third slower.
    grad_checkpointing: bool = False

    # ---- the data (data.py) ----

    # Tar shards, one pattern or several: 'shards/{00000..00331}.tar', 'pipe:CMD {00..99}.tar'.
    train_data: tuple = ()
    # How many samples they hold, for --plan where they are not at hand; 0: read their index.
    train_samples: int = 0
    # '' reads captions from KEY.txt; otherwise this entry of KEY.json, a string or a list of them.
    caption_key: str = ""
    # KEY.txt holds one caption per line, of which one is drawn; otherwise it is one caption.
    caption_lines: bool = False
    # Count a remote set that has no statistics by reading it once before the training.
    index_remote: bool = False
    # Share of what looks like samples that the index may leave out: 0.01 is one in a hundred.
    allow_left_out: float = 0.01
    # Random resized crop: smallest and largest share of the image's area.
    crop_scale: tuple = (0.9, 1.0)
    # Decoder of training JPEGs. pillow and simplejpeg (a package) are faster for large pictures,
    # nvjpeg decodes on the GPU: see ingest/images.py.
    decoder: Literal["torchvision", "pillow", "simplejpeg", "nvjpeg"] = "torchvision"
    # Parallel read positions; must divide batch_size. Changing it changes the order of samples.
    lanes: int | Literal["auto"] = "auto"
    # Samples of a lane that are shuffled together, held compressed in memory.
    shuffle_block: int | Literal["auto"] = "auto"
    # Decoding processes per rank; 0 decodes in the training process. Never changes the batches.
    workers: int | Literal["auto"] = "auto"

    # ---- the length of the run ----

    # Global batch, samples over all ranks.
    batch_size: int = 1024
    # Samples per rank in one forward pass; smaller than batch_size / ranks accumulates exactly;
    # 0: no accumulation.
    micro_batch: int = 0
    # Passes over the data.
    epochs: float = 30.0
    # End, schedules too, after this many steps if the epochs are not over before; 0: epochs decide.
    max_steps: int = 0

    # ---- the optimizer (optim.py) ----

    # sgdm: SGD with momentum beta1.
    optimizer: Literal["adamw", "lamb", "lion", "sgdm"] = "adamw"
    # Peak learning rate.
    lr: float = 1e-3
    # Learning rate at the end of the cosine.
    lr_min: float = 0.0
    # Steps of linear warm-up.
    warmup_steps: int = 10_000
    # Weight decay of matrices; biases, norms and the temperature have none.
    weight_decay: float = 0.1
    # First moment, or momentum.
    beta1: float = 0.9
    # Second moment; None: 0.999 for a ResNet, 0.98 for a ViT (Lion: 0.99).
    beta2: float | None = None
    # Adam's epsilon; None: 1e-8 for a ResNet, 1e-6 for a ViT.
    eps: float | None = None
    # Largest gradient norm; 0: no clipping.
    grad_clip: float = 0.0

    # ---- evaluation (eval.py) ----

    # A set with classes (zero-shot) or captions (retrieval): a folder or tar shards, see
    # docs/evaluating.md. Several sets: {'NAME': 'PLACE', 'OTHER': 'PLACE'}.
    eval_data: tuple | dict = ()
    # A file with a class name per line, for sets without one; {'NAME': 'FILE'}: of each set.
    eval_names: str | dict = ""
    # A file with a prompt per line, {c} stands for the class; {'NAME': 'FILE'}: of each set.
    eval_templates: str | dict = ""
    # Evaluate every so many steps; 0: at the end only.
    eval_steps: int = 0
    # Samples per rank in one forward pass of the evaluation.
    eval_batch: int = 256

    # ---- saving and logging (runtime/) ----

    # The run's folder; '': runs/NAME-OF-THE-CONFIG.
    out_dir: str = ""
    # none, auto (the newest checkpoint in out_dir, if any), a checkpoint's folder, or a run's: then
    # the newest checkpoint in it.
    resume: str = "none"
    # Continue although settings of the method differ from those of the checkpoint (METHOD_KEYS of
    # runtime/checkpoint.py).
    resume_changes: bool = False
    # Save every so many steps; 0: once an epoch. The end is always saved.
    save_steps: int = 0
    # Save every so many minutes, too; 0: never.
    save_minutes: float = 0.0
    # Write checkpoints beside the training, which then waits only for a copy in memory.
    save_background: bool = True
    # Newest checkpoints to keep; with 1 there is none to fall back on.
    keep: int = 2
    # Save and end this job after so many of its steps, or a time: '90m', '23.5h'; 0: never.
    stop_after: int | str = 0
    # Leave out steps with a non-finite loss or gradient, up to 1 %, where otherwise the run stops.
    skip_nonfinite: bool = False
    # A row of metrics.jsonl every so many steps. Without a terminal, rows are also printed, but at
    # most one every 10 s (with 1: each of them), and the last.
    log_steps: int = 10
    # Also write TensorBoard events to out_dir (pip install tensorboard).
    tensorboard: bool = False
    # Also log to this Weights & Biases project (pip install wandb).
    wandb: str = ""
    # Print what this config would do, and stop.
    plan: bool = False
    # Samples per second of one GPU, for the plan; 0: what others have published.
    plan_speed: float = 0.0
    # Price of a GPU-hour in dollars, for the plan; 0: no costs are shown.
    plan_price: float = 0.0

    # ---- the machine (dist.py, runtime/hardware.py) ----

    # auto (cuda if there is one), cuda or cpu.
    device: str = "auto"
    # Precision of the towers; auto: bf16 on a GPU that has it, else fp32. The loss is always fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # torch.compile both towers, in parts, and the loss; auto: on CUDA.
    compile: bool | Literal["auto"] = "auto"
    # The type in which gradients travel between ranks.
    grad_wire: Literal["fp32", "bf16"] = "fp32"
    # Gradient bucket, MB: smaller ones overlap earlier, larger ones are sent more efficiently.
    bucket_mb: float = 25.0
    # Columns of the loss's similarities in memory at a time; 0: all of them, faster. See loss.py.
    loss_tile: int = 0
    # Seconds without a finished step after which a rank gives up and says where.
    timeout: float = 600.0
    # Seed of the weights, the order of samples, crops and captions.
    seed: int = 2024

    def model_numbers(self):
        """The numbers of its model that this config changes: keywords of model.create."""
        return {key: getattr(self, key) for key in MODEL_KEYS if getattr(self, key) is not None}

    def total_steps(self, steps_per_epoch):
        """The length of the run in steps: of its epochs, or max_steps if that is less."""
        steps = max(1, int(self.epochs * steps_per_epoch))
        return min(steps, self.max_steps) if self.max_steps else steps

    def long_warmup(self, total_steps):
        """-> a sentence if warm-up takes more than a third of the run's steps, otherwise ""."""
        if self.warmup_steps <= total_steps / 3:
            return ""
        return (
            f"warmup_steps = {self.warmup_steps} of {total_steps} steps is more than a third of "
            "the run, which hardly trains at its full learning rate: lower warmup_steps"
        )


HINTS = typing.get_type_hints(Config)
MODEL_KEYS = (
    "image_size",
    "patch_size",
    "embed_dim",
    "vision_layers",
    "vision_width",
    "vision_norm",
    "context_length",
    "text_width",
    "text_heads",
    "text_layers",
)

# Settings of a job. Two jobs of one run may differ in them.
JOB_KEYS = (
    "out_dir",
    "resume",
    "resume_changes",
    "stop_after",
    "plan",
    "plan_speed",
    "plan_price",
)

# Settings that change nothing of what a run finds, only how it is run, saved and shown.
RUNNING_KEYS = (
    *JOB_KEYS,
    "workers",
    "save_steps",
    "save_minutes",
    "save_background",
    "keep",
    "log_steps",
    "tensorboard",
    "wandb",
    "timeout",
)

# What users of open_clip, and of the published FastCLIP code, may type: what to write here.
# fmt: off
OTHER_WORDS = {
    # data
    "train-num-samples": "--train_samples=N, for --plan alone: a run counts the samples itself",
    "data_size": "not needed, the u-state is as large as the index of train_data",
    "val-data": "--eval_data=PLACE, tar shards or a folder (docs/evaluating.md)",
    "imagenet-val": "--eval_data=DIR (docs/evaluating.md)",
    "imagenet-v2": "--eval_data=DIR (docs/evaluating.md)",
    "zeroshot-frequency": "--eval_steps=N, in steps",
    "val-frequency": "--eval_steps=N, in steps",
    "dataset-type": "not needed, the data are always tar shards, as in webdataset",
    "dataset-resampled": "not needed, an epoch sees every sample once",
    "csv-caption-key": "--caption_key=KEY, of the JSON beside each image",
    "csv-img-key": "not needed, the data are tar shards (docs/data.md has a recipe for tables)",
    "csv-separator": "not needed, the data are tar shards (docs/data.md has a recipe for tables)",
    "aug-cfg": "--crop_scale='(0.9, 1)'",
    # model
    "pretrained": "there are no pretrained weights; --resume=RUN continues a run of ours",
    "pretrained-image": "there are no pretrained weights; --resume=RUN continues a run of ours",
    "force-image-size": "--image_size=PIXELS",
    "lock-image": "there is none, both towers are always trained",
    "lock-text": "there is none, both towers are always trained",
    "siglip": "there is none; the table in README.md has the losses",
    "torchcompile": "--compile=True",
    # length and batch
    "batch-size": "--batch_size=N, the batch of all ranks together, not of each",
    "stop_epochs": "--stop_after=N, in steps of this job, or --max_steps=N, of the run",
    "accum-freq": "--micro_batch=N, samples per rank in one forward pass",
    # optimizer
    "warmup": "--warmup_steps=N",
    "wd": "--weight_decay=X",
    "opt": "--optimizer=NAME",
    "momentum": "--beta1=X",
    "grad-clip-norm": "--grad_clip=X",
    "lr-scheduler": "not needed, it is always a warm-up and a cosine, see optim.py",
    "lr-cooldown-end": "--lr_min=X",
    "skip-scheduler": "not needed, write a constant learning rate into optim.lr",
    # method
    "fastclip": "--algorithm=fastclip-v3 (openclip, sogclr, isogclr, fastclip-v0 to -v3)",
    "fastclip_eps": "--eps_u=X",
    "temperature": "--tau_init=X",
    "temperature_scheme": "--algorithm=NAME decides it: see the table in README.md",
    "multiply_tau": "--algorithm=NAME and --equations=paper or release decide it",
    "lr_tau_scheduler": "--lr_tau_schedule=constant, cosine or threshold (their step_thresh)",
    "gamma": "--gamma_min=X",
    # saving and logging
    "name": "--out_dir=FOLDER",
    "logs": "--out_dir=FOLDER",
    "save-frequency": "--save_steps=N, in steps; an epoch by default",
    "save-most-recent": "not needed, --keep=N says how many of the newest checkpoints stay",
    "delete-previous-checkpoint": "--keep=N, how many of the newest checkpoints stay",
    "log-every-n-steps": "--log_steps=N",
    "report-to": "--tensorboard=True, or --wandb=PROJECT",
    "wandb-project-name": "--wandb=PROJECT",
    "profile": "not needed, python -m bench measures a step",
    # machine
    "local-loss": "not needed, each rank always computes the loss of its own rows",
    "gather-with-grad": "not needed, the gradient of the loss is written out, and always exact",
    "dist-backend": "not needed, nccl for GPUs, gloo for CPUs",
    "dist-url": "not needed, torchrun says it",
    "horovod": "not needed, torchrun starts the ranks",
    "use-bn-sync": "there is none; --vision_norm=group has no statistics across samples",
    "ddp-static-graph": "not needed, gradients are reduced by dist.GradReducer",
}
# fmt: on

# ---- reading ----


def load(argv, saved=None):
    """Command-line words (a config file, then `--key=value`s; both optional) -> Config.

    saved: {key: value} that these words change, instead of the defaults or of a file. Raises
    ConfigError for an unknown key (the nearest is named), a wrong type, a value that cannot work, a
    missing or failing file.
    """
    values = dict(saved or {})
    given = set()
    name = "run"
    for i, word in enumerate(argv):
        if word in ("-h", "--help"):
            print(help_text())
            raise SystemExit(0)
        if word.startswith("--"):
            key, text = split_option(word, argv[i + 1 :])
            if key in given and key in ("train_data", "eval_data"):
                raise ConfigError(
                    f"{key} is given more than once: put the pattern in quotes, so that the shell "
                    f"leaves it as it is, --{key}='...', or give a list, --{key}=\"['...','...']\""
                )
            values[key] = typed(key, parse(text))
            given.add(key)
        elif i == 0 and saved is None:
            values = read(word)
            name = os.path.splitext(os.path.basename(word))[0]
        else:
            first = "a config file" if saved is None else "a folder"
            raise ConfigError(
                f"unexpected word {word!r}: {first} comes first, then only --key=value"
            )

    config = Config(**{key: typed(key, value) for key, value in values.items()})
    config.out_dir = config.out_dir or os.path.join("runs", name)
    check(config)
    return config


def split_option(word, rest):
    """`--key=text` -> (key, text). Whether it is a key of ours is left to `typed`.

    rest: the words after it. Raises ConfigError, which gives the right spelling, for `--key text`
    and `--key= text`, for dashes in our keys, and for the options of other programs.
    """
    spelt, equals, text = word[2:].partition("=")
    if spelt in OTHER_WORDS:
        raise ConfigError(
            f"--{spelt} is an option of open_clip or of the published FastCLIP code. Here: "
            f"{OTHER_WORDS[spelt]}"
        )

    key = spelt.replace("-", "_")
    is_apart = not text and rest and not rest[0].startswith("--")
    is_well_spelt = equals and key == spelt and not is_apart
    if is_well_spelt or key not in HINTS:
        return key, text

    if is_apart:
        text = rest[0]
    if not text:
        text = "True" if HINTS[key] is bool else "..."
    raise ConfigError(f"{word}: write --key=value, here --{key}={text}")


def read(path, readers=()):
    """Run a config file, and first the one that it names as `base` -> {key: value}.

    readers: absolute paths of the files that lead here, by which a circle is found.
    """
    if os.path.abspath(path) in readers:
        raise ConfigError(f"{path}: the config files name each other as base in a circle")
    if not os.path.isfile(path):
        raise ConfigError(f"no config file {path!r}{nearest_config(path)}")

    names = {}
    try:
        with open(path, encoding="utf-8") as f:
            exec(compile(f.read(), path, "exec"), names)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is no text: the first word is a config, a Python file; data are given by "
            "--train_data='...'"
        ) from error
    except Exception as error:
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    assigned = {key: value for key, value in names.items() if is_option(key, value)}

    values = {}
    base = assigned.pop("base", None)
    if base:
        values = read(os.path.join(os.path.dirname(path), base), (*readers, os.path.abspath(path)))
    for key, value in assigned.items():
        typed(key, value, where=path)  # here, so that the message names the file
    return {**values, **assigned}


def is_option(key, value):
    """Whether a name of a config file is an option: not a _helper, a function or a module."""
    return not (key.startswith("_") or callable(value) or isinstance(value, types.ModuleType))


def files_beside(path):
    """-> the paths of what is in the folder in which `path` would be."""
    folder = os.path.dirname(path)
    return glob.glob(os.path.join(glob.escape(folder), "*"))


def nearest_config(path):
    """A hint: the config, beside `path` or in configs/, whose name is most like that of `path`."""
    configs = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
    configs = os.path.relpath(configs)

    # In the folder of train.py there are modules, not configs.
    found = files_beside(os.path.join(configs, "x"))
    if os.path.dirname(path):
        found += files_beside(path)
    paths = {os.path.basename(file): file for file in found if file.endswith(".py")}

    name = os.path.basename(path.rstrip("/")).removesuffix(".py") + ".py"
    near = difflib.get_close_matches(name, paths, 1)
    return f"; did you mean {paths[near[0]]!r}?" if near else f"; there are some in {configs}/"


def parse(text):
    """The text of `--key=TEXT` -> a Python literal if it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def typed(key, value, where="command line"):
    """Check one value against the table -> the value in its type. ConfigError if it is wrong."""
    if key not in HINTS:
        near = nearest(key, HINTS) or "; --help lists them all"
        raise ConfigError(f"{where}: unknown key {key!r}{near}")

    hint = HINTS[key]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str and is_number:
        value = str(value)  # --out_dir=2024
    for option in options(hint):
        if option is tuple and isinstance(value, (str, list, tuple)):
            return as_tuple(value)
        if option is float and type(value) is int:
            return float(value)
        if admits(option, value):
            return value

    allowed = " or ".join(describe(option) for option in options(hint))
    near = nearest(str(value), [option for option in options(hint) if isinstance(option, str)])
    raise ConfigError(
        f"{where}: {key} = {value!r} is of type {type(value).__name__}; it must be {allowed}{near} "
        f"({key}: {comment_of(key)})"
    )


def as_tuple(value):
    """A single value is one element, unless it is an empty string."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return () if value == "" else (value,)


def options(hint):
    """A type hint -> list of the types and literal values that it admits."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return list(typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        found = []
        for part in typing.get_args(hint):
            found += options(part)
        return found
    return [None if hint is type(None) else hint]


def admits(option, value):
    """Whether `value` is of the type, or is the literal value, `option`."""
    if isinstance(option, type):
        return option is type(value)
    return option == value and type(option) is type(value)


def describe(option):
    if option is bool:
        return "True or False"
    return option.__name__ if isinstance(option, type) else repr(option)


def nearest(word, words, cutoff=0.6):
    """A hint for an error message: "; did you mean 'lr'?" for the word spelt most alike, or "".

    cutoff: how much alike, from 0 to 1 (difflib.get_close_matches).
    """
    found = difflib.get_close_matches(word, words, 1, cutoff)
    return f"; did you mean {found[0]!r}?" if found else ""


def named_sets(c):
    """c.eval_data -> {name of an evaluation set: its place, a tuple of str}.

    A set that is given without a name has the name "".
    """
    if isinstance(c.eval_data, dict):
        return {name: as_tuple(place) for name, place in c.eval_data.items()}
    return {"": c.eval_data} if c.eval_data else {}


# ---- checking ----

NOT_NEGATIVE = (
    "lr",
    "weight_decay",
    "warmup_steps",
    "lr_min",
    "rho",
    "eps_u",
    "micro_batch",
    "max_steps",
    "grad_clip",
    "gamma_decay_epochs",
    "eval_steps",
    "save_steps",
    "save_minutes",
    "seed",
    "lr_tau",
    "loss_tile",
    "allow_left_out",
    "plan_speed",
    "plan_price",
)
POSITIVE = ("batch_size", "epochs", "keep", "log_steps", "eval_batch", "bucket_mb", "timeout")


def check(c):
    """ConfigError for what cannot work. World size and data are checked where they are known."""
    for key in NOT_NEGATIVE:
        value = getattr(c, key)
        require(value is None or value >= 0, f"{key} = {value} must not be negative")
    for key in POSITIVE:
        value = getattr(c, key)
        require(value > 0, f"{key} = {value} must be positive")
    check_method(c)
    check_data(c)

    is_stages = isinstance(c.vision_layers, tuple)
    require(
        not is_stages or len(c.vision_layers) == 4,
        f"vision_layers = {c.vision_layers}: a ResNet has four stages",
    )
    require(
        c.device in ("auto", "cuda", "cpu"),
        f"device = {c.device!r} must be auto, cuda or cpu; choose among GPUs with "
        "CUDA_VISIBLE_DEVICES",
    )
    stop_seconds(c)


def check_method(c):
    require(
        c.batch_size >= 2,
        "batch_size = 1 has no negatives: a contrastive loss needs at least 2",
    )
    require(
        0 < c.gamma_min <= 1,
        f"gamma_min = {c.gamma_min} must lie in (0, 1]: it is the weight of the new estimate in u",
    )
    require(
        0.01 <= c.tau_init <= 1,
        # TAU_MIN and TAU_MAX of loss.py, which imports this file.
        f"tau_init = {c.tau_init} must lie in [0.01, 1], the range in which tau is kept",
    )
    require(c.lr_min <= c.lr, f"lr_min = {c.lr_min} is above lr = {c.lr}")


def check_data(c):
    scale = c.crop_scale
    require(
        len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
        f"crop_scale = {scale} must be (smallest, largest) with 0 < smallest <= largest <= 1",
    )
    for key, smallest in (("lanes", 1), ("shuffle_block", 1), ("workers", 0)):
        value = getattr(c, key)
        require(value == "auto" or value >= smallest, f"{key} = {value} is too small")
    require(
        c.lanes == "auto" or c.batch_size % c.lanes == 0,
        f"lanes = {c.lanes} does not divide batch_size = {c.batch_size}: each step takes "
        "batch_size/lanes samples from every lane",
    )
    places = {"train_data": c.train_data}
    for name, patterns in named_sets(c).items():
        places[f"eval_data, {name}" if name else "eval_data"] = patterns
    for key, patterns in places.items():
        require(
            all(isinstance(pattern, str) for pattern in patterns),
            f"{key} must hold strings, got {patterns}",
        )
    check_set_names(c)


def check_set_names(c):
    """ConfigError for names of evaluation sets that cannot be keys, or of sets that are not there.

    The names stand in metrics.jsonl, as eval/NAME/zeroshot_top1, and in names of files.
    """
    sets = named_sets(c)
    for name, patterns in sets.items():
        require(
            isinstance(name, str) and re.fullmatch(r"[\w.-]*", name),
            f"eval_data: {name!r} cannot be the name of a set: use letters, digits, - _ and .",
        )
        require(not name or patterns, f"eval_data: the set {name!r} has no place")
    for key in ("eval_names", "eval_templates"):
        files = getattr(c, key)
        for name in files if isinstance(files, dict) else ():
            require(
                name in sets,
                f"{key} names the set {name!r}, which eval_data does not"
                f"{nearest(str(name), [other for other in sets if other])}",
            )


@contextlib.contextmanager
def writing_to(folder, option="out_dir"):
    """A ConfigError, with the operating system's reason, for an OSError of what is inside.

    option: the name of the option that gives the folder.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{option} = {folder!r} cannot be written: {error.strerror or error}; make "
            f"room, or allow writing there, or choose another --{option}"
        ) from error


def require(condition, message):
    if not condition:
        raise ConfigError(message)


def stop_seconds(config):
    """config.stop_after in seconds if it is a time, else infinity.

    Raises ConfigError if it is neither a time nor a number of steps.
    """
    value = config.stop_after
    if isinstance(value, int) and value >= 0:
        return math.inf
    time = re.fullmatch(r"(\d+(?:\.\d*)?)([smh])", str(value))
    if not time:
        raise ConfigError(
            f"stop_after = {value!r} must be a number of steps, or a time such as '600s', '90m' "
            "or '23.5h'"
        )
    return float(time[1]) * {"s": 1, "m": 60, "h": 3600}[time[2]]


# ---- showing ----


def as_text(config):
    """The resolved config as assignments: saved in the run's folder, loadable as a config."""
    lines = [f"{f.name} = {getattr(config, f.name)!r}\n" for f in dataclasses.fields(config)]
    return "".join(lines)


def comment_of(key):
    """The comment above an option in the table, as one line."""
    lines = [line.strip() for line in inspect.getsource(Config).splitlines()]
    number = 0
    while not lines[number].startswith(f"{key}: "):
        number += 1

    comment = []
    while lines[number - 1].startswith("# ") and not lines[number - 1].startswith("# ----"):
        number -= 1
        comment.insert(0, lines[number].removeprefix("# "))
    return " ".join(comment)


def help_text():
    """The table above, with its comments, as the text of --help."""
    lines = ["usage: python train.py [CONFIG.py] [--key=value ...]"]
    comment = []
    for line in inspect.getsource(Config).splitlines():
        line = line.strip()
        if line.startswith("# ----"):
            lines += ["", line.strip("# -") + ":", ""]
        elif line.startswith("#"):
            comment.append(line[2:])
        elif option := re.fullmatch(r"(\w+): (.+) = (.+)", line):
            name, hint, default = option.groups()
            lines.append(f"  --{name}={default}")
            lines += [f"        {text}" for text in comment]
            lines.append(f"        [{hint}]")
            comment = []
        elif line.startswith("def "):
            break
    return "\n".join(lines)


def or_exit(function, *args):
    """Call, and turn a ConfigError or a BadRun into one line on stderr and exit status 1.

    Ctrl-C ends the program without a traceback, with the status that a shell gives it. So does a
    reader of standard output that has seen enough, as in `| head`.
    """
    try:
        result = function(*args)
        sys.stdout.flush()
        return result
    except (ConfigError, BadRun) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        if not has_lost_reader(sys.stdout):
            raise
        # What is still in the buffer is written at the end of the program.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def has_lost_reader(stream):
    """Whether a stream is a pipe of which the other end is closed: other pipes may break, too."""
    poll = select.poll()
    poll.register(stream, 0)  # an error is reported in any case
    return any(event & select.POLLERR for _, event in poll.poll(0))
