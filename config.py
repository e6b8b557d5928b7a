"""Every setting of a run, in one table: its type, its default and a line of why.

A config file is plain Python, a few assignments each, run over these defaults. `base = "other.py"` (a path relative to
the file) starts from another config. `--key=value` on the command line comes last. A config file is *code* and can do
whatever Python can: run only those you have read.

    python train.py configs/emoji_v3.py --lr=2e-3 --max_steps=100
"""

import ast
import dataclasses
import difflib
import math
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from typing import Literal, Optional, Union


class ConfigError(ValueError):
    """A setting that cannot work. The message says which, why, and what to do."""


def setting(default, help):
    return field(default=default, metadata={"help": help})


Auto = Literal["auto"]


@dataclass
class Config:
    # the method (loss.py)
    algorithm: Literal[
        "openclip", "sogclr", "isogclr", "fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3"
    ] = setting("fastclip-v3", "which of the seven algorithms, see the table in loss.py")
    equations: Literal["paper", "release"] = setting(
        "paper", "the paper's equations, or those of the code that made its published numbers"
    )
    rho: float = setting(6.5, "RGCL margin: larger keeps tau larger (isogclr, v2, v3)")
    eps_u: float = setting(1e-14, "epsilon added to u inside the logarithm (all but openclip)")
    gamma_min: float = setting(
        0.2,
        "inner learning rate gamma: its constant, or where its cosine ends; keep it large in short runs",
    )
    gamma_schedule: Union[Literal["constant", "cosine"], Auto] = setting(
        "auto", "auto: constant for sogclr and isogclr, cosine for v0..v3"
    )
    gamma_decay_epochs: float = setting(
        0.0, "epochs until gamma reaches gamma_min; 0: half of the epochs"
    )
    gamma_smooth: bool = setting(False, "recompute gamma every step instead of every epoch")
    tau_init: float = setting(0.07, "initial temperature, global or per sample")
    lr_tau: Optional[float] = setting(None, "learning rate of the temperature; None: the model's")
    lr_tau_schedule: Union[Literal["constant", "cosine", "threshold"], Auto] = setting(
        "auto",
        "auto: cosine for openclip and v0, constant for per-sample tau, threshold (a third once tau <= 0.03) for v3",
    )

    # the model (model.py); None keeps the named model's own number
    model: str = setting(
        "ViT-B-32", "RN50, ViT-B-32, ViT-B-16 or timm:NAME; the numbers below change its size"
    )
    image_size: Optional[int] = setting(None, "side of the square input, pixels")
    patch_size: Optional[int] = setting(None, "ViT patch side, pixels")
    embed_dim: Optional[int] = setting(None, "dimension d of the joint feature space")
    vision_layers: Union[int, tuple, None] = setting(
        None, "ViT: blocks; ResNet: a tuple of four stage depths"
    )
    vision_width: Optional[int] = setting(
        None, "ViT: token width; ResNet: channels of the stem's last convolution"
    )
    vision_norm: Optional[Literal["batch", "group"]] = setting(
        None, "ResNet: BatchNorm, or GroupNorm (no statistics across samples)"
    )
    context_length: Optional[int] = setting(None, "longest caption, tokens")
    text_width: Optional[int] = setting(None, "text transformer width")
    text_heads: Optional[int] = setting(None, "text transformer attention heads")
    text_layers: Optional[int] = setting(None, "text transformer blocks")
    grad_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, about a third slower"
    )

    # the data (data.py)
    train_data: tuple = setting(
        (),
        "tar shards: one pattern or several, e.g. 'shards/{00000..00331}.tar' or 'pipe:CMD {00..99}.tar'",
    )
    train_samples: int = setting(
        0,
        "how many samples they hold, for --plan where the shards are not at hand; 0: read their index",
    )
    caption_key: str = setting(
        "",
        "'' reads KEY.txt; otherwise this entry of KEY.json, a string or a list to draw one from",
    )
    caption_lines: bool = setting(
        False, "KEY.txt holds one caption per line and one is drawn; otherwise it is one caption"
    )
    index_remote: bool = setting(
        False, "count a remote set without statistics by reading it once before training"
    )
    crop_scale: tuple = setting(
        (0.9, 1.0), "random resized crop: smallest and largest share of the image's area"
    )
    decoder: Literal["torchvision", "pillow", "simplejpeg", "nvjpeg"] = setting(
        "torchvision",
        "of training JPEGs; pillow and simplejpeg (a package) are faster for large pictures, nvjpeg is the GPU's: see images.py",
    )
    lanes: Union[int, Auto] = setting(
        "auto",
        "parallel read positions; must divide batch_size; changing it changes the order of samples",
    )
    shuffle_block: Union[int, Auto] = setting(
        "auto", "samples of a lane shuffled together, held compressed in memory"
    )
    workers: Union[int, Auto] = setting(
        "auto",
        "decoding processes per rank; 0 decodes in the training process; never changes the batches",
    )

    # the length of the run
    batch_size: int = setting(1024, "global batch, samples over all ranks")
    micro_batch: int = setting(
        0,
        "samples per rank in one forward pass; smaller than batch_size/ranks accumulates exactly; 0: no accumulation",
    )
    epochs: float = setting(30.0, "passes over the data")
    max_steps: int = setting(
        0, "stop after this many steps; schedules then end there; 0: epochs decide"
    )

    # the optimizer (optim.py)
    optimizer: Literal["adamw", "lamb", "lion", "sgdm"] = setting(
        "adamw", "sgdm: SGD with momentum beta1"
    )
    lr: float = setting(1e-3, "peak learning rate")
    lr_min: float = setting(0.0, "where the cosine ends")
    warmup_steps: int = setting(10_000, "linear warm-up, steps")
    weight_decay: float = setting(
        0.1, "on matrices only, never on biases, norms or the temperature"
    )
    beta1: float = setting(0.9, "first moment / momentum")
    beta2: Optional[float] = setting(
        None, "second moment; None: 0.999 for a ResNet, 0.98 for a ViT (Lion: 0.99)"
    )
    eps: Optional[float] = setting(None, "Adam's epsilon; None: 1e-8 for a ResNet, 1e-6 for a ViT")
    grad_clip: float = setting(0.0, "largest gradient norm; 0: no clipping")

    # evaluation (eval.py)
    eval_data: tuple = setting(
        (),
        "tar shards with KEY.cls beside classnames.txt (zero-shot), or with captions (retrieval)",
    )
    eval_steps: int = setting(0, "evaluate every so many steps; 0: at the end only")
    eval_batch: int = setting(256, "samples per rank in one forward pass of the evaluation")

    # saving and watching (checkpoint.py, train.py)
    out_dir: str = setting("", "the run's folder; '': runs/NAME-OF-THE-CONFIG")
    resume: str = setting(
        "none", "none, auto (the newest checkpoint in out_dir, if any), or a checkpoint's folder"
    )
    save_steps: int = setting(
        0, "save every so many steps; 0: once an epoch; the end is always saved"
    )
    save_minutes: float = setting(0.0, "save every so many minutes too; 0: never")
    save_background: bool = setting(
        True, "write checkpoints beside the training, which then only waits for a copy in memory"
    )
    keep: int = setting(2, "newest checkpoints to keep; with 1 there is none to fall back on")
    stop_after: Union[int, str] = setting(
        0,
        "save and end this job after so many of its steps, or a time: '90m', '23.5h'; 0: run to the end",
    )
    skip_nonfinite: bool = setting(
        False,
        "leave out steps with a non-finite loss or gradient, up to 1 %, where otherwise the run stops",
    )
    log_steps: int = setting(10, "a row of metrics.jsonl every so many steps")
    tensorboard: bool = setting(False, "also write TensorBoard events to out_dir")
    wandb: str = setting("", "also log to this Weights & Biases project")
    plan: bool = setting(False, "print what this config would do, and stop")

    # the machine (dist.py, train.py)
    device: str = setting("auto", "auto (cuda if there is one), cuda, cpu")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "of the towers; auto: bf16 on a GPU that has it, else fp32; the loss is always fp32"
    )
    compile: Union[bool, Auto] = setting("auto", "torch.compile each block; auto: on CUDA")
    grad_wire: Literal["fp32", "bf16"] = setting(
        "fp32", "the type in which gradients travel between ranks"
    )
    bucket_mb: float = setting(
        25.0, "gradient bucket, MB: smaller overlaps earlier, larger sends more efficiently"
    )
    loss_tile: int = setting(
        0,
        "columns of the loss's similarities in memory at a time; 0: all of them, faster; see loss.py",
    )
    timeout: float = setting(
        600.0, "seconds without a finished step before a rank gives up and says where"
    )
    seed: int = setting(2024, "of the weights, the order of samples, crops and captions")

    def model_numbers(self):
        """The numbers that this config changes in its named model -> keyword arguments of model.create."""
        return {key: getattr(self, key) for key in MODEL_KEYS if getattr(self, key) is not None}


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


def load(argv):
    """Command-line words (a config file, then `--key=value`s; both may be missing) -> Config.

    Raises ConfigError for an unknown key (the nearest is named), a wrong type, a missing or failing file.
    """
    values, name = {}, "run"
    for i, word in enumerate(argv):
        if word in ("-h", "--help"):
            print(help_table())
            raise SystemExit(0)
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            if not equals:
                raise ConfigError(f"{word}: write --key=value, for example --{key}=...")
            values[key] = parse(text)
        elif i == 0:
            values, name = read(word), os.path.splitext(os.path.basename(word))[0]
        else:
            raise ConfigError(
                f"unexpected word {word!r}: a config file comes first, then only --key=value"
            )
    config = Config(**{key: typed(key, value) for key, value in values.items()})
    config.out_dir = config.out_dir or os.path.join("runs", name)
    check(config)
    return config


def read(path, seen=()):
    """Run a config file (and first the one that it names as `base`) -> {key: value}."""
    if os.path.abspath(path) in seen:
        raise ConfigError(f"{path}: the config files name each other as base in a circle")
    if not os.path.isfile(path):
        near = difflib.get_close_matches(
            path,
            [
                os.path.join(os.path.dirname(path), f)
                for f in os.listdir(os.path.dirname(path) or ".")
            ]
            if os.path.isdir(os.path.dirname(path) or ".")
            else [],
            1,
        )
        raise ConfigError(
            f"no config file {path!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    names = {}
    with open(path, encoding="utf-8") as f:
        try:
            exec(compile(f.read(), path, "exec"), names)
        except Exception as error:
            raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    names = {
        k: v
        for k, v in names.items()
        if not k.startswith("_") and not callable(v) and not isinstance(v, type(os))
    }
    base = names.pop("base", None)
    values = (
        read(os.path.join(os.path.dirname(path), base), (*seen, os.path.abspath(path)))
        if base
        else {}
    )
    for key in names:
        typed(key, names[key], where=path)  # so that the message names the file
    return {**values, **names}


def parse(text):
    """`--key=TEXT`: a Python literal where it is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def typed(key, value, where="command line"):
    """Check one value against the table and return it as its type; ConfigError names the key and the nearest one."""
    if key not in HINTS:
        near = difflib.get_close_matches(key, HINTS, 1)
        raise ConfigError(
            f"{where}: unknown key {key!r}"
            + (f"; did you mean {near[0]!r}?" if near else "; --help lists them all")
        )
    if HINTS[key] is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # --out_dir=2024
    for option in options(HINTS[key]):
        if option is tuple and isinstance(value, (str, list, tuple)):
            return (value,) if isinstance(value, str) and value else tuple(value)
        if option is float and type(value) is int:
            return float(value)
        if option is type(value) or (
            not isinstance(option, type) and option == value and type(option) is type(value)
        ):
            return value
    allowed = " or ".join(
        o.__name__ if isinstance(o, type) else repr(o) for o in options(HINTS[key])
    )
    near = difflib.get_close_matches(
        str(value), [o for o in options(HINTS[key]) if isinstance(o, str)], 1
    )
    raise ConfigError(
        f"{where}: {key} = {value!r} is of type {type(value).__name__}; it must be {allowed}"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def options(hint):
    """A type hint -> the types and literal values that it admits."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) is Union:
        return [option for arg in typing.get_args(hint) for option in options(arg)]
    return [None if hint is type(None) else hint]


def check(c):
    """Refuse what cannot work, before anything is allocated. World size and data are checked where they are known."""

    def refuse(unless, message):
        if not unless:
            raise ConfigError(message)

    for key in (
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
    ):
        value = getattr(c, key)
        refuse(value is None or value >= 0, f"{key} = {value} must not be negative")
    for key in ("batch_size", "epochs", "keep", "log_steps", "eval_batch", "bucket_mb", "timeout"):
        refuse(getattr(c, key) > 0, f"{key} = {getattr(c, key)} must be positive")
    refuse(
        c.batch_size >= 2, "batch_size = 1 has no negatives: a contrastive loss needs at least 2"
    )
    refuse(
        0 < c.gamma_min <= 1,
        f"gamma_min = {c.gamma_min} must lie in (0, 1]: it is the weight of the new estimate in u",
    )
    refuse(
        0.01 <= c.tau_init <= 1,
        f"tau_init = {c.tau_init} must lie in [0.01, 1], the range in which tau is kept",
    )
    refuse(c.lr_min <= c.lr, f"lr_min = {c.lr_min} is above lr = {c.lr}")
    refuse(
        len(c.crop_scale) == 2 and 0 < c.crop_scale[0] <= c.crop_scale[1] <= 1,
        f"crop_scale = {c.crop_scale} must be (smallest, largest) with 0 < smallest <= largest <= 1",
    )
    for key in ("lanes", "shuffle_block", "workers"):
        value = getattr(c, key)
        refuse(value == "auto" or value >= (key != "workers"), f"{key} = {value} is too small")
    refuse(
        c.lanes == "auto" or c.batch_size % c.lanes == 0,
        f"lanes = {c.lanes} does not divide batch_size = {c.batch_size}: each step takes batch_size/lanes samples from every lane",
    )
    refuse(
        isinstance(c.vision_layers, (int, type(None))) or len(c.vision_layers) == 4,
        f"vision_layers = {c.vision_layers}: a ResNet has four stages",
    )
    stop_seconds(c)
    refuse(
        c.device in ("auto", "cuda", "cpu"),
        f"device = {c.device!r} must be auto, cuda or cpu; choose among GPUs with CUDA_VISIBLE_DEVICES",
    )
    for key in ("train_data", "eval_data"):
        refuse(
            all(isinstance(p, str) for p in getattr(c, key)),
            f"{key} must hold strings, got {getattr(c, key)}",
        )


def stop_seconds(config):
    """config.stop_after as seconds, where it is a time, else infinity. ConfigError if it is neither a time nor a number of steps."""
    if isinstance(config.stop_after, int) and config.stop_after >= 0:
        return math.inf
    time = re.fullmatch(r"(\d+(?:\.\d*)?)([smh])", str(config.stop_after))
    if not time:
        raise ConfigError(
            f"stop_after = {config.stop_after!r} must be a number of steps, or a time such as '600s', '90m' or '23.5h'"
        )
    return float(time[1]) * {"s": 1, "m": 60, "h": 3600}[time[2]]


def as_text(config):
    """The resolved config as assignments: printed at the start, saved in the run's folder, loadable as a config."""
    return "".join(f"{f.name} = {getattr(config, f.name)!r}\n" for f in dataclasses.fields(config))


def help_table():
    rows = ["usage: python train.py [CONFIG.py] [--key=value ...]\n"]
    for f in dataclasses.fields(Config):
        kinds = "|".join(
            o.__name__ if isinstance(o, type) else str(o) for o in options(HINTS[f.name])
        )
        rows.append(f"  --{f.name}={f.default!r}\n        {f.metadata['help']}  [{kinds}]")
    return "\n".join(rows)


def or_exit(function, *args):
    """Call, and turn a ConfigError into one line on stderr and exit status 1."""
    try:
        return function(*args)
    except ConfigError as error:
        sys.exit(f"error: {error}")
