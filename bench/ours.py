"""Our side: train.train_step on batches from memory or from data.Loader, set up by train.build."""

from itertools import islice

import config as configs
import data
import dist
import train
from bench import harness
from loss import get_algorithm, state_columns

# No schedule ends while something is measured.
STEPS_PER_EPOCH = 1000
TOTAL_STEPS = 10_000


class Trainer:
    """Training steps on data.Batches from an iterator, with the interface of baselines.Trainer."""

    traffic = dist.traffic  # bytes sent by this rank, by purpose
    buffer_bytes = 0  # of buffers sent in a step

    def __init__(
        self, args, batches, algorithm="fastclip-v3", compiled=False, num_samples=4096, **settings
    ):
        """num_samples: of the u-state. settings: further keys of the config."""
        c = configs.Config(
            model=args.model,
            algorithm=algorithm,
            batch_size=args.batch * dist.world_size(),
            precision=args.precision,
            compile=compiled,
            warmup_steps=100,
            lr=1e-4,
            **args.numbers,
            **settings,
        )
        device = harness.device_of(args)
        self.t = train.build(c, num_samples, STEPS_PER_EPOCH, TOTAL_STEPS, device)
        self.batches = data.with_global_ids(batches, self.t.loss.algorithm.state)
        self.step_number = 0

    def run(self, steps):
        """So many training steps; returns the last one's objective."""
        for batch in islice(self.batches, steps):
            out = self.step(batch)
        return out.objective.item()

    def step(self, batch):
        """One training step; returns its LossOutput, without waiting for the device."""
        batch = batch._replace(
            images=batch.images.to(self.t.device, non_blocking=True),
            tokens=batch.tokens.to(self.t.device, non_blocking=True),
        )
        out, _ = train.train_step(self.t, batch, self.step_number)
        self.step_number += 1
        return out

    def close(self):
        """Free the weights, so that the next side's memory is its own.

        They hold hooks, which hold the buckets, which hold the weights. This circle passes through
        C++, where Python's garbage collector cannot see it.
        """
        for bucket in self.t.reducer.buckets:
            bucket.parameters.clear()
            bucket.flat = None
        self.t.reducer.parameters.clear()


def columns_per_sample(algorithm):
    """How many float32 numbers the algorithm of that name keeps per sample, and sends in a step."""
    return len(state_columns(get_algorithm(algorithm)))
