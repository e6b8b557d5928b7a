"""Our side: train.train_step on batches from memory or from data.Loader, set up by train.build."""

from itertools import islice

import torch

import config as configs
import dist
import model as models
import optim
import train
from bench import harness
from loss import ALGORITHMS, ContrastiveLoss
from runtime import hardware

# No schedule ends while something is measured.
STEPS_PER_EPOCH = 1000
TOTAL_STEPS = 10_000


class Trainer:
    """Training steps on data.Batches from an iterator, with the interface of baselines.Trainer."""

    traffic = dist.traffic  # bytes sent by this rank, by purpose
    buffer_bytes = 0  # buffers are not sent in a step

    def __init__(
        self, args, batches, algorithm="fastclip-v3", compiled=False, num_samples=4096, **settings
    ):
        """num_samples: of the u-state. settings: further keys of the config."""
        self.config = configs.Config(
            model=args.model,
            algorithm=algorithm,
            batch_size=args.batch * dist.world_size(),
            precision=args.precision,
            warmup_steps=100,
            lr=1e-4,
            **args.numbers,
            **settings,
        )
        self.device = harness.device_of(args)
        self.batches = batches
        self.step_number = 0
        self.build(compiled, num_samples)

    def build(self, compiled, num_samples):
        c = self.config
        torch.manual_seed(0)
        self.model = models.create(c.model, c.tau_init, **c.model_numbers()).to(self.device).train()
        dtype = hardware.precision(c.precision, self.device)
        if models.is_resnet(self.model):
            self.model.to(memory_format=torch.channels_last)
        dist.broadcast_weights(self.model)
        self.optimizer = optim.create(self.model, c)
        self.loss = ContrastiveLoss(c.algorithm, num_samples, device=self.device, tile=c.loss_tile)
        if compiled:
            self.model.compile_blocks()
        self.reducer = dist.GradReducer(
            [p for p in self.model.parameters() if p is not self.model.logit_scale],
            c.bucket_mb,
            torch.bfloat16 if c.grad_wire == "bf16" else torch.float32,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.autocast = hardware.autocast(dtype, self.device)

    def run(self, steps):
        """So many training steps; returns the last one's objective."""
        for batch in islice(self.batches, steps):
            out = self.step(batch)
        return out.objective.item()

    def step(self, batch):
        """One training step; returns its LossOutput, without waiting for the device."""
        batch = batch._replace(
            images=batch.images.to(self.device, non_blocking=True),
            tokens=batch.tokens.to(self.device, non_blocking=True),
        )
        out, _ = train.train_step(
            batch,
            self.model,
            self.loss,
            self.optimizer,
            self.reducer,
            self.scaler,
            self.autocast,
            self.config,
            self.step_number,
            STEPS_PER_EPOCH,
            TOTAL_STEPS,
        )
        self.step_number += 1
        return out

    def close(self):
        """Free the weights, so that the next side's memory is its own.

        They hold hooks, which hold the buckets, which hold the weights. This circle passes through
        C++, where Python's garbage collector cannot see it.
        """
        for bucket in self.reducer.buckets:
            bucket.parameters.clear()
            bucket.flat = None
        self.reducer.parameters.clear()


def state_columns(algorithm):
    """How many float32 numbers per sample an algorithm keeps, and so sends in a step."""
    kind = ALGORITHMS[algorithm]
    columns = 2 if kind.state else 0
    if kind.tau == "sample":
        columns += 7
    return columns
