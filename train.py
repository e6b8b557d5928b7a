"""Train CLIP with one of the contrastive algorithms in loss.py.

`train_step` is Algorithm 1 of FastCLIP (arXiv 2407.01445), `build` makes everything that it needs,
`main` is the life of a run. Here and in optim.py, t is the Trainer and c the Config.

    python train.py configs/emoji_v3.py                         one process, on a GPU if any
    torchrun --nproc_per_node gpu train.py configs/cc12m_v3.py  all GPUs of one node
    python train.py configs/laion315m_v3.py --plan=True         what this config would do
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import runtime  # noqa: F401  isort: skip (it must set GOMP_SPINCOUNT before torch is loaded)
import torch

import config as configs
import data
import dist
import eval as evaluation
import loss as losses
import model as models
import optim
from runtime import hardware, plan, ranks
from runtime.job import Job


@dataclass
class Trainer:
    """Everything that train_step needs, on one rank. Made by `build`."""

    config: configs.Config
    device: torch.device
    dtype: torch.dtype  # in which the towers compute
    model: models.CLIP
    loss: losses.ContrastiveLoss  # with the u-state: a table of u (and tau) per sample
    optimizer: torch.optim.Optimizer
    reducer: dist.GradReducer
    scaler: torch.amp.GradScaler  # enabled with float16 only
    autocast: Callable  # makes the context in which the towers run
    steps_per_epoch: int
    total_steps: int

    @property
    def may_skip(self):
        """Whether a non-finite step is left out: a float16 scaler needs it to find its scale."""
        return self.config.skip_nonfinite or self.scaler.is_enabled()

    def flops(self):
        """FLOPs forward: {"image": of one image, "token": of one token of a caption}."""
        length = self.model.context_length
        flops = models.forward_flops(self.model, length)
        return {"image": flops["image"], "token": flops["text"] / length}


def train_step(t, batch, step):
    """One iteration of Algorithm 1 on this rank's share of the global batch.

    t: Trainer. batch: data.Batch of b samples. step: counted from 0 over the whole run.
    Returns (LossOutput, norm of the averaged gradient ()). Nothing here waits for the device,
    unless steps may be skipped.
    """
    gamma, lr_tau = optim.set_schedules(t, step)
    saved_buffers = optim.save_buffers(t)
    t.reducer.zero()

    # The u-state of the global batch. Its look-up is under way while the towers run.
    lookup = t.loss.lookup(batch.ids)

    # Features e1 (images) and e2 (texts) of this rank's samples.
    pieces = micro_batches(batch, t.config.micro_batch)
    features = encode(t, pieces)
    e1 = torch.cat([image for image, _ in features])  # (b, d)
    e2 = torch.cat([text for _, text in features])  # (b, d)

    # Gather the features, contrast them, update u; gradients w.r.t. the features and tau.
    epoch = step // t.steps_per_epoch
    out = t.loss(e1, e2, t.model.logit_scale, lookup, gamma, epoch, lr_tau)

    # Back through the towers. Full gradient buckets are all-reduced meanwhile.
    backward(t, pieces, features, out)
    t.reducer.wait()

    # Update w and tau.
    grad_norm = optim.update(t, out, saved_buffers)
    return out, grad_norm


def micro_batches(batch, size):
    """A batch -> list of (images, tokens, token_index), `size` samples each; 0: one of all.

    The host knows the captions' lengths. So their padding is left out (token_index says where
    there is none), and nothing waits for the device.
    """
    size = size or len(batch.ids)
    images = batch.images.split(size)
    tokens = batch.tokens.split(size)
    lengths = batch.lengths.split(size)

    pieces = []
    for image, token, length in zip(images, tokens, lengths):
        token_index = models.pack(length, token.shape[1], token.device)
        pieces.append((image, token, token_index))
    return pieces


def encode(t, pieces):
    """The features of each piece, (image (n, d), text (n, d)), of unit length.

    A single piece keeps its graph. Several are encoded without one: `backward` encodes each once
    more, so that the activations of only one piece are in memory at a time.
    """
    with torch.set_grad_enabled(len(pieces) == 1), t.autocast():
        return [t.model(*piece) for piece in pieces]


def backward(t, pieces, features, out):
    """Back-propagate the gradients of the features; those of the parameters add up over pieces."""
    size = len(pieces[0][0])
    grad_image = t.scaler.scale(out.grad_image).split(size)
    grad_text = t.scaler.scale(out.grad_text).split(size)

    for i, piece in enumerate(pieces):
        piece_features = features[i]
        if len(pieces) > 1:
            with t.autocast(), models.frozen_batch_stats(t.model):
                piece_features = t.model(*piece)

        # Gradients are complete only in the last backward pass: from then on they may be reduced.
        if i == len(pieces) - 1:
            t.reducer.arm()
        torch.autograd.backward(piece_features, (grad_image[i], grad_text[i]))

    # Every rank knows tau's gradient over the global batch: it needs no reduction.
    if out.grad_logit_scale is not None:
        t.model.logit_scale.grad = t.scaler.scale(out.grad_logit_scale)


def build(c, num_samples, steps_per_epoch, total_steps, device):
    """Config -> Trainer, with new weights drawn from c.seed. All ranks call it and get the same.

    num_samples: N of the data set, for the u-state; ids run from 0 to N-1. Raises ConfigError for
    a model that does not exist or does not fit, and for a precision that the device lacks.
    """
    dtype = hardware.precision(c.precision, device)
    torch.manual_seed(c.seed)
    model = models.create(c.model, c.tau_init, **c.model_numbers()).to(device)
    if models.is_resnet(model):
        model.to(memory_format=torch.channels_last)
    model.set_grad_checkpointing(c.grad_checkpointing)
    model.train()
    dist.broadcast_weights(model)

    optimizer = optim.create(model, c)
    loss = losses.ContrastiveLoss(
        c.algorithm,
        num_samples,
        equations=c.equations,
        rho=c.rho,
        eps_u=c.eps_u,
        tau_init=c.tau_init,
        device=device,
        tile=c.loss_tile,
    )

    if hardware.compiles(c.compile, device):
        model.compile_blocks()
    weights = [p for p in model.parameters() if p is not model.logit_scale]
    wire = torch.bfloat16 if c.grad_wire == "bf16" else torch.float32
    return Trainer(
        config=c,
        device=device,
        dtype=dtype,
        model=model,
        loss=loss,
        optimizer=optimizer,
        reducer=dist.GradReducer(weights, c.bucket_mb, wire),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        autocast=hardware.autocast(dtype, device),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def main(argv):
    c = configs.load(argv)
    losses.get_algorithm(c.algorithm)  # an unknown name is refused first
    if c.plan:
        print(plan.report(c))
        return

    with Job(c) as job:  # a failure in here ends every rank and names the cause
        # Validate config and data before anything is allocated.
        index = job.load_index()
        order = data.Order(index, c.batch_size, c.lanes, c.shuffle_block, c.seed)
        total_steps = c.total_steps(order.steps_per_epoch)

        t = build(c, index.num_samples, order.steps_per_epoch, total_steps, job.device)
        step = job.resume(t, index)
        loader = data.Loader(
            order,
            t.model.image_size,
            t.model.context_length,
            crop_scale=c.crop_scale,
            caption_key=c.caption_key,
            caption_lines=c.caption_lines,
            decoder=c.decoder,
            rank=dist.rank(),
            world_size=dist.world_size(),
            workers=c.workers,
            device=job.device,
            start_step=step,
            num_steps=total_steps,
        )
        job.start(t, index, step, evaluation.evaluate)

        for batch in job.batches(loader):
            out, grad_norm = train_step(t, batch, step)
            step += 1
            job.log.step(step, batch, out, grad_norm)
            job.save_if_due(step)
            job.evaluate_if_due(step)
            if job.leaving:
                break
        job.finish(step)


if __name__ == "__main__":
    ranks.run(main, sys.argv[1:])
