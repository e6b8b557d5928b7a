"""What we are compared with: open_clip from PyPI, and the code that was released with FastCLIP.

open_clip (pip install open_clip_torch): its own model, training function, loss and data pipeline,
called as its main() does. Nothing else in the project needs it.

The released code (github.com/Optimization-AI/fast_clip, a fork of open_clip without a package): the
training step of FastCLIP-v3, from a clone.

Only what drives and counts is ours: an iterable that yields batches from memory, and collectives
that add up what they send by the rules of dist.traffic (ring algorithms, bytes sent by one rank).
"""

import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections import Counter
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as c10d

import dist
from config import ConfigError

# The names of a model's numbers here -> (section, name) in a model config of open_clip.
NUMBERS = {
    "embed_dim": ("", "embed_dim"),
    "image_size": ("vision_cfg", "image_size"),
    "patch_size": ("vision_cfg", "patch_size"),
    "vision_layers": ("vision_cfg", "layers"),
    "vision_width": ("vision_cfg", "width"),
    "context_length": ("text_cfg", "context_length"),
    "text_width": ("text_cfg", "width"),
    "text_heads": ("text_cfg", "heads"),
    "text_layers": ("text_cfg", "layers"),
}

PRECISIONS = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}


# ---- importing them ----


def load(module="open_clip", remedy="pip install open_clip_torch webdataset"):
    """Import a module of open_clip's package, or of a clone. Raises ConfigError with the remedy."""
    if module == "open_clip_train.data":
        replace_missing_pandas()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} is what we are compared with: {remedy} ({error})") from error


def replace_missing_pandas():
    """open_clip_train.data imports pandas to read CSV files, which is not done here."""
    if "pandas" not in sys.modules and importlib.util.find_spec("pandas") is None:
        sys.modules["pandas"] = types.ModuleType("pandas")


def version():
    """open_clip's version, or None if it is not installed."""
    try:
        return load().__version__
    except ConfigError:
        return None


class Code(NamedTuple):
    """The parts that are measured, of open_clip or of the released code."""

    package: Any  # models and losses
    train_one_epoch: Any
    cosine_lr: Any


def published():
    """open_clip as it is installed."""
    return Code(
        load(),
        load("open_clip_train.train").train_one_epoch,
        load("open_clip_train.scheduler").cosine_lr,
    )


def released(folder):
    """The released code. Raises ConfigError if the folder is no clone, or cannot be imported."""
    check_clone(folder)
    sys.path.insert(0, os.path.join(folder, "src"))

    # It asks for its rank, and gathers, even if it is alone.
    if not c10d.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        c10d.init_process_group(backend, store=c10d.HashStore(), rank=0, world_size=1)

    remedy = f"see what {folder} requires, and install it"
    return Code(
        load("fast_clip", remedy),
        load("training.train", remedy).train_one_epoch,
        load("training.scheduler", remedy).cosine_lr,
    )


def check_clone(folder):
    """Raises ConfigError if the folder is no clone of the released code."""
    source = os.path.join(folder, "src")
    if not os.path.isdir(os.path.join(source, "fast_clip")):
        raise ConfigError(
            f"{source} has no fast_clip: git clone https://github.com/Optimization-AI/fast_clip, "
            "and name the clone"
        )


# ---- a training step ----


class Trainer:
    """train_one_epoch of open_clip or of the released code, on batches from an iterator.

    A batch: images float32 (b, 3, S, S), normalised, and tokens int64 (b, 77), from batch_of. In
    open_clip the loader's workers normalise, so its step does not pay for it; ours does.
    """

    def __init__(self, args, device, batches, compiled=False, count=False, clone=""):
        """args: the command line's. count: add up what is sent in `self.traffic`, by purpose.

        clone: a folder with the released code, which is then measured, on one rank. Raises
        ConfigError if it is none, or if it cannot compute in args.precision.
        """
        on_gpu = device.type == "cuda"
        if clone and not on_gpu and args.precision != "fp32":
            raise ConfigError(
                "the released code computes in float32 on a CPU, whatever it is asked for: leave "
                "out --precision or --released"
            )
        if on_gpu:
            set_gpu_defaults()

        self.batches = batches
        self.epoch = 0
        self.traffic = Counter()
        code = released(clone) if clone else published()
        self.train_one_epoch = code.train_one_epoch
        self.args = training_args(args, device, bool(clone))

        torch.manual_seed(0)
        model = create_model(args.model, args.numbers, code.package).to(device)
        self.buffer_bytes = sum(dist.num_bytes(x) for x in model.buffers())

        self.optimizer = create_optimizer(model)
        self.scaler = torch.amp.GradScaler(device.type) if args.precision == "fp16" else None
        self.scheduler = code.cosine_lr(
            self.optimizer.param_groups if clone else self.optimizer, 1e-4, 100, 10_000
        )
        if clone:
            self.loss = released_loss(code.package, self.args)
        else:
            self.loss = clip_loss(dist.rank(), dist.world_size())

        if dist.world_size() > 1:
            devices = [device] if on_gpu else None
            model = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices)
            if count:
                model.register_comm_hook(self.traffic, counted_all_reduce)
        self.model = torch.compile(model) if compiled else model
        if count:
            count_collectives(self.traffic)

    def close(self):
        """Nothing needs to be done."""

    def run(self, steps):
        """So many training steps, which are an epoch to train_one_epoch."""
        self.num_batches = steps
        self.num_samples = steps * self.args.batch_size * dist.world_size()
        data = types.SimpleNamespace(dataloader=self, set_epoch=lambda epoch: None)
        self.train_one_epoch(
            self.model,
            {"train": data},
            self.loss,
            self.epoch,
            self.optimizer,
            self.scaler,
            self.scheduler,
            None,  # no distillation
            self.args,
        )
        self.epoch += 1

    def __iter__(self):
        """As a data loader: the batches of this epoch."""
        return islice(self.batches, self.num_batches)


def set_gpu_defaults():
    """What the main() of both sets on a GPU, and cuDNN's attention, torch's default.

    dist.init, which has run before, turns the latter off.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(True)


def training_args(args, device, fastclip):
    """The command line of open_clip, or of the released code, as train_one_epoch reads it."""
    return types.SimpleNamespace(
        model=args.model,
        batch_size=args.batch,
        precision=PRECISIONS[args.precision],
        device=str(device),
        rank=dist.rank(),
        local_rank=dist.rank(),
        world_size=dist.world_size(),
        accum_freq=1,
        grad_clip_norm=None,
        distill=False,
        log_every_n_steps=100,
        skip_scheduler=False,
        wandb=False,
        horovod=False,
        siglip=False,
        fastclip=fastclip,
        temperature_scheme="global_learnable",
    )


def create_model(name, numbers, package):
    """The named model of `package`, with the numbers that are changed in it {our name: value}."""
    config = package.get_model_config(name)
    if config is None:
        raise ConfigError(f"open_clip has no model {name!r}")

    for key, value in numbers.items():
        if key not in NUMBERS:
            raise ConfigError(
                f"{key} is no number of an open_clip model: --numbers may change "
                f"{', '.join(NUMBERS)}"
            )
        section, their_key = NUMBERS[key]
        target = config[section] if section else config
        target[their_key] = list(value) if isinstance(value, tuple) else value
    return package.CLIP(**config, output_dict=True)


def create_optimizer(model):
    """AdamW with the parameter groups and the settings of both main()s."""
    decayed = []
    not_decayed = []
    for name, p in model.named_parameters():
        exempt = p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
        if exempt:
            not_decayed.append(p)
        else:
            decayed.append(p)

    groups = [
        {"params": not_decayed, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-6)


def clip_loss(rank, world_size):
    """open_clip's loss, as it recommends it for many ranks."""
    return load().ClipLoss(
        local_loss=True,
        gather_with_grad=True,
        cache_labels=True,
        rank=rank,
        world_size=world_size,
    )


def released_loss(package, args):
    """The released code's loss, with its settings for FastCLIP-v3 on LAION."""
    settings = types.SimpleNamespace(
        **vars(args),
        data_size=4096,
        gamma=0.2,
        gamma_schedule="cosine",
        gamma_decay_epochs=10,
        rho=16.0,
        fastclip_eps=1e-14,
        multiply_tau=True,
    )
    return package.create_loss(settings)


def batch_of(batch, context_length, with_ids=False):
    """A data.Batch as open_clip's pipeline would yield it: (images, tokens).

    images float32 (b, 3, S, S), normalised; tokens int64 (b, context_length), zero-padded.
    with_ids: as the released code's pipeline does, with the samples' ids, twice.
    """
    mean = torch.tensor(load().OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(load().OPENAI_DATASET_STD)[:, None, None]
    images = ((batch.images.float() / 255 - mean) / std).contiguous()

    padding = context_length - batch.tokens.shape[1]
    tokens = torch.nn.functional.pad(batch.tokens, (0, padding))
    if with_ids:
        return images, tokens, batch.ids, batch.ids
    return images, tokens


# ---- the loss alone ----


def loss_as_first_of(num_ranks, autocast):
    """The step of ClipLoss on rank 0 of num_ranks, alone: function(image, text, logit_scale).

    Its gather makes copies, and in the backward pass adds up their gradients; nothing is sent.
    """

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return tuple(x.clone() for _ in range(num_ranks))

        @staticmethod
        def backward(ctx, *grads):
            return torch.stack(grads).sum(0)

    loss = clip_loss(0, num_ranks)
    torch.distributed.nn.all_gather = Gather.apply

    def step(image_features, text_features, logit_scale):
        image_features = image_features.detach().requires_grad_()
        text_features = text_features.detach().requires_grad_()
        logit_scale = logit_scale.detach().requires_grad_()
        with autocast():
            value = loss(image_features, text_features, logit_scale.exp())
        value.backward()

    return step


# ---- what is sent ----


def counted_all_reduce(traffic, bucket):
    """DistributedDataParallel's own all-reduce of a bucket of gradients, counted."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    num_ranks = dist.world_size()
    traffic["gradients"] += 2 * (num_ranks - 1) * size_of(bucket.buffer()) // num_ranks
    return allreduce_hook(c10d.group.WORLD, bucket)


def count_collectives(traffic):
    """Wrap the collectives that ClipLoss and DistributedDataParallel call, to count what they send.

    The gather's backward pass is a reduce-scatter: (K-1)/K of what goes in. On gloo torch makes it
    of an all-to-all, and that of scatters, of which each rank is the root once.
    """

    def gathered(out, x, *args, **options):
        return (dist.world_size() - 1) * size_of(x)

    def scattered(out, x, *args, **options):
        return share_of_others(x or [])

    def broadcast(group, tensors, *args, **options):
        return share_of_others(tensors)

    count_calls("all_gather", traffic, "features", gathered)
    count_calls("reduce_scatter", traffic, "feature gradients", scattered)
    count_calls("all_to_all", traffic, "feature gradients", scattered)
    count_calls("scatter", traffic, "feature gradients", scattered)
    count_calls("_broadcast_coalesced", traffic, "buffers", broadcast)


def count_calls(name, traffic, purpose, bytes_sent):
    """Replace the collective of that name in torch.distributed by one that counts.

    bytes_sent: function of the collective's arguments.
    """
    collective = getattr(c10d, name)

    def counted(*args, **options):
        traffic[purpose] += bytes_sent(*args, **options)
        return collective(*args, **options)

    setattr(c10d, name, counted)


def size_of(x):
    """The bytes of a tensor, or of a sequence of them."""
    if isinstance(x, torch.Tensor):
        return dist.num_bytes(x)
    return sum(size_of(each) for each in x)


def share_of_others(x):
    return (dist.world_size() - 1) * size_of(x) // dist.world_size()


def traffic_formula(batch_size, embed_dim, parameters, buffer_bytes):
    """The bytes that a rank sends in a step: {purpose: function of the number of ranks}.

    As runtime.plan.traffic does for ours. batch_size: per rank. parameters: with logit_scale, in
    float32. buffer_bytes: DistributedDataParallel copies rank 0's buffers along a chain.
    """

    def gathered(num_ranks):
        return (num_ranks - 1) * batch_size * 2 * embed_dim * 4

    def gradients(num_ranks):
        return 2 * (num_ranks - 1) * parameters * 4 // num_ranks

    def buffers(num_ranks):
        return (num_ranks - 1) * buffer_bytes // num_ranks

    return {
        "features": gathered,
        "feature gradients": gathered,
        "gradients": gradients,
        "buffers": buffers,
    }


# ---- the data pipeline ----


def pipeline(shards, num_samples, batch_size, image_size, context_length, workers):
    """This rank's loader: get_wds_dataset with open_clip's training transforms and tokenizer."""
    args = types.SimpleNamespace(
        train_data=shards,
        train_num_samples=num_samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=batch_size,
        workers=workers,
        world_size=dist.world_size(),
        seed=0,
    )
    transform = load().image_transform(image_size, is_train=True)
    tokenizer = load().SimpleTokenizer(context_length=context_length)
    source = load("open_clip_train.data")

    # webdataset 1.0 marks where a shard ends. open_clip 3.3 takes the mark for a file and fails.
    if "eof_value" in inspect.signature(source.tar_file_expander).parameters:
        source.tar_file_expander = partial(source.tar_file_expander, eof_value=None)

    return source.get_wds_dataset(args, transform, True, tokenizer=tokenizer).dataloader
