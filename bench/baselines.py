"""open_clip from PyPI, for bench.py to measure beside us: its own model, training function, loss and data pipeline, called as its
own main() does. Nothing else in the project needs it: pip install open_clip_torch. Beside it, of a clone of the code that was released
with FastCLIP (github.com/Optimization-AI/fast_clip, a fork of open_clip, without a package), the training step of FastCLIP-v3.

What is ours here is only what it takes to drive and to count: a loader that yields batches from memory, and collectives that add up
what they send, by the rules of dist.traffic (ring algorithms, bytes that one rank sends).
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

import torch
import torch.distributed as c10d

import dist
from config import ConfigError

# Our names for a model's numbers -> where they stand in an open_clip model config.
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


def load(module="open_clip", remedy="pip install open_clip_torch webdataset"):
    """Import a module of open_clip's package, or of a clone; ConfigError with the remedy."""
    try:
        if (
            module == "open_clip_train.data"
            and "pandas" not in sys.modules
            and importlib.util.find_spec("pandas") is None
        ):
            sys.modules["pandas"] = types.ModuleType(
                "pandas"
            )  # it reads CSV files with it, which is not done here
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module} is what we are compared with: {remedy} ({error})") from error


def version():
    try:
        return load().__version__
    except ConfigError:
        return None


def released(folder):
    """Import a clone of the released code -> (its package, its training function, its schedule). ConfigError if it is none."""
    source = os.path.join(folder, "src")
    if not os.path.isdir(os.path.join(source, "fast_clip")):
        raise ConfigError(
            f"{source} has no fast_clip: git clone https://github.com/Optimization-AI/fast_clip, and name the clone"
        )
    sys.path.insert(0, source)
    if not torch.distributed.is_initialized():  # it asks for its rank, and gathers, also when alone
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=torch.distributed.HashStore(),
            rank=0,
            world_size=1,
        )
    remedy = f"see what {folder} requires, and install it"
    return (
        load("fast_clip", remedy),
        load("training.train", remedy).train_one_epoch,
        load("training.scheduler", remedy).cosine_lr,
    )


def create(name, numbers, package=None):
    """The named model, with the numbers (ours) that are changed in it."""
    package = package or load()
    config = package.get_model_config(name)
    if config is None:
        raise ConfigError(f"open_clip has no model {name!r}")
    for key, value in numbers.items():
        if key not in NUMBERS:
            raise ConfigError(
                f"{key} is no number of an open_clip model: in --numbers change {', '.join(NUMBERS)}"
            )
        part, there = NUMBERS[key]
        (config[part] if part else config)[there] = (
            list(value) if isinstance(value, tuple) else value
        )
    return package.CLIP(**config, output_dict=True)


class Trainer:
    """open_clip_train.train.train_one_epoch, or the released code's, on pairs (images float32, normalised; tokens [b, 77]) from an endless iterator. In open_clip
    pixels are normalised by loader workers, so this is done before (`batch_of`) and its step does not pay for it; ours does it in the step."""

    def __init__(
        self,
        model,
        numbers,
        batch,
        precision,
        device,
        batches,
        compiled=False,
        count=False,
        clone="",
    ):
        """batch: per rank. count: add up what is sent in `self.traffic`, by purpose. clone: a folder with the released code, for one rank."""
        if device.type == "cuda":  # as both of their main()s do
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
            torch.backends.cuda.enable_cudnn_sdp(True)  # torch's default, which dist.init changes
        elif clone and precision != "fp32":
            raise ConfigError(
                "the released code computes in float32 on a CPU, whatever it is asked for: leave --precision or --released"
            )
        if clone:
            package, training, schedule = released(clone)
        else:
            package, training, schedule = (
                load(),
                load("open_clip_train.train").train_one_epoch,
                load("open_clip_train.scheduler").cosine_lr,
            )
        ranks = dict(rank=dist.rank(), world_size=dist.world_size())
        self.args = types.SimpleNamespace(
            precision={"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}[precision],
            accum_freq=1,
            grad_clip_norm=None,
            distill=False,
            log_every_n_steps=100,
            skip_scheduler=False,
            device=str(device),
            local_rank=dist.rank(),
            wandb=False,
            horovod=False,
            batch_size=batch,
            fastclip=bool(clone),
            temperature_scheme="global_learnable",
            siglip=False,
            model=model,
            **ranks,
        )
        torch.manual_seed(0)
        self.model = create(model, numbers, package).to(device)
        named, buffers = list(self.model.named_parameters()), list(self.model.buffers())
        self.num_parameters, self.buffer_bytes = (
            sum(p.numel() for _, p in named),
            sum(x.numel() * x.element_size() for x in buffers),
        )
        exclude = [
            p
            for n, p in named
            if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
        ]
        ids = {id(p) for p in exclude}
        self.traffic = Counter()
        if dist.world_size() > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(
                self.model, device_ids=[device] if device.type == "cuda" else None
            )
            if count:
                self.model.register_comm_hook(self.traffic, counted_all_reduce)
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=exclude, weight_decay=0.0),
                dict(params=[p for _, p in named if id(p) not in ids], weight_decay=0.1),
            ],
            lr=1e-4,
            betas=(0.9, 0.98),
            eps=1e-6,
        )
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
        self.scheduler = schedule(
            self.optimizer.param_groups if clone else self.optimizer, 1e-4, 100, 10_000
        )
        if clone:  # its settings for FastCLIP-v3 on LAION
            self.loss = package.create_loss(
                types.SimpleNamespace(
                    **vars(self.args),
                    data_size=4096,
                    gamma=0.2,
                    gamma_schedule="cosine",
                    gamma_decay_epochs=10,
                    rho=16.0,
                    fastclip_eps=1e-14,
                    multiply_tau=True,
                )
            )
        else:
            self.loss = package.ClipLoss(
                local_loss=True, gather_with_grad=True, cache_labels=True, **ranks
            )
        if compiled:
            self.model = torch.compile(self.model)
        self.train, self.batches, self.epoch = training, batches, 0
        if count:
            count_collectives(self.traffic)

    def close(self):
        """Nothing needs to be done."""

    def run(self, steps):
        """So many steps: an epoch, to it."""
        self.num_batches, self.num_samples = steps, steps * self.args.batch_size * dist.world_size()
        data = types.SimpleNamespace(dataloader=self, set_epoch=lambda epoch: None)
        self.train(
            self.model,
            {"train": data},
            self.loss,
            self.epoch,
            self.optimizer,
            self.scaler,
            self.scheduler,
            None,
            self.args,
        )
        self.epoch += 1

    def __iter__(self):
        return islice(self.batches, self.num_batches)


def counted_all_reduce(traffic, bucket):
    """DistributedDataParallel's own all-reduce of a bucket, counted."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    traffic["gradients"] += (
        2
        * (dist.world_size() - 1)
        * bucket.buffer().numel()
        * bucket.buffer().element_size()
        // dist.world_size()
    )
    return allreduce_hook(c10d.group.WORLD, bucket)


def batch_of(batch, context_length, indices=False):
    """A data.Batch -> what open_clip's pipeline would yield: (float32, normalised; tokens padded to the full context); the released code's
    has the sample's number twice, too."""
    mean, std = (
        torch.tensor(getattr(load(), "OPENAI_DATASET_" + name))[:, None, None]
        for name in ("MEAN", "STD")
    )
    tokens = torch.nn.functional.pad(batch.tokens, (0, context_length - batch.tokens.shape[1]))
    images = ((batch.images.float() / 255 - mean) / std).contiguous()
    return (images, tokens, batch.ids, batch.ids) if indices else (images, tokens)


def count_collectives(traffic):
    """Wrap the collectives that ClipLoss's gather-with-grad and DistributedDataParallel call. The gather's backward is a reduce-scatter:
    (K-1)/K of what goes in. On gloo torch makes it of an all-to-all, and that of scatters, of which each rank is the root once."""

    def wrap(name, purpose, sent):
        function = getattr(c10d, name)

        def counted(*args, **options):
            traffic[purpose] += sent(*args, **options)
            return function(*args, **options)

        setattr(c10d, name, counted)

    size = lambda x: (
        sum(map(size, x)) if isinstance(x, (list, tuple)) else x.numel() * x.element_size()
    )
    share = lambda x: (dist.world_size() - 1) * size(x) // dist.world_size()
    wrap("all_gather", "features", lambda out, x, *_, **__: (dist.world_size() - 1) * size(x))
    wrap("reduce_scatter", "feature gradients", lambda out, x, *_, **__: share(x))
    wrap("all_to_all", "feature gradients", lambda out, x, *_, **__: share(x))
    wrap("scatter", "feature gradients", lambda out, x, *_, **__: share(x or []))
    wrap("_broadcast_coalesced", "buffers", lambda group, tensors, *_, **__: share(list(tensors)))


def formula(batch, d, parameters, buffer_bytes):
    """What it sends in a step, as plan.traffic has it: {purpose: function of the number of ranks}. batch: per rank; parameters: with
    logit_scale, in float32; buffers, of DistributedDataParallel: rank 0's, along a chain."""
    gathered = lambda k: (k - 1) * batch * 2 * d * 4
    return {
        "features": gathered,
        "feature gradients": gathered,
        "gradients": lambda k: 2 * (k - 1) * parameters * 4 // k,
        "buffers": lambda k: (k - 1) * buffer_bytes // k,
    }


def loss_as_one_of(ranks, autocast):
    """ClipLoss of rank 0 of so many, alone: its gather is a copy, with the gradient's sum, and nothing is sent."""

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return tuple(x.clone() for _ in range(ranks))

        @staticmethod
        def backward(ctx, *grads):
            return torch.stack(grads).sum(0)

    loss = load().ClipLoss(
        local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=ranks
    )
    torch.distributed.nn.all_gather = Gather.apply

    def step(image_features, text_features, logit_scale):
        image_features, text_features, logit_scale = (
            x.detach().requires_grad_() for x in (image_features, text_features, logit_scale)
        )
        with autocast():
            value = loss(image_features, text_features, logit_scale.exp())
        value.backward()

    return step


def pipeline(shards, num_samples, batch, image_size, context_length, workers):
    """get_wds_dataset with its training transforms and tokenizer, this rank's part -> (loader, batches in a pass)."""
    args = types.SimpleNamespace(
        train_data=shards,
        train_num_samples=num_samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=batch,
        workers=workers,
        world_size=dist.world_size(),
        seed=0,
    )
    tokenizer = load().SimpleTokenizer(context_length=context_length)
    transform = load().image_transform(image_size, is_train=True)
    source = load("open_clip_train.data")
    if (
        "eof_value" in inspect.signature(source.tar_file_expander).parameters
    ):  # webdataset 1.0 marks where a shard ends, which open_clip
        source.tar_file_expander = partial(
            source.tar_file_expander, eof_value=None
        )  # 3.3 takes for a file and fails
    loader = source.get_wds_dataset(args, transform, True, tokenizer=tokenizer).dataloader
    return loader, loader.num_batches
