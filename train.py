"""Train CLIP with one of seven contrastive algorithms. `train_step` below is Algorithm 1 of FastCLIP (arXiv 2407.01445).

    python train.py configs/emoji_v3.py                                     one process, on the GPU if there is one
    torchrun --nproc_per_node 8 train.py configs/cc12m_v3.py                one node
    python train.py configs/laion315m_v3.py --plan=True                     what it would do
"""

import os
import sys

# On CPUs that this process shares with its data workers, a thread of torch that waits must not spin for long: it would hold
# a core that the one it waits for needs. Read once, when torch is loaded; nothing of it matters on a GPU.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import torch

import checkpoint
import config as configs
import data
import dist
import eval as evaluation
import model as models
import optim
import watch
from config import ConfigError
from loss import ContrastiveLoss
from shards import load_index


def train_step(batch, model, loss, optimizer, reducer, scaler, autocast, c, step, steps_per_epoch, total_steps):
    """One iteration of Algorithm 1 on this rank's share of the global batch -> LossOutput."""
    gamma = optim.gamma(c, step, steps_per_epoch, total_steps)
    optim.set_lr(optimizer, c, step, total_steps)
    reducer.zero()

    # u (and per-sample tau) of the global batch: fetched while the towers run.
    rows = loss.lookup(batch.ids)

    # Features e1, e2 of my samples. With micro-batches: first without gradients, then once more, each with its gradient.
    # The host knows the captions' lengths, so it can leave out their padding (slots: where there is none) and wait for nothing.
    pieces = [(images, tokens, models.pack(lengths, tokens.shape[1], tokens.device)) for images, tokens, lengths
              in zip(*(x.split(c.micro_batch or len(batch.ids)) for x in (batch.images, batch.tokens, batch.lengths)))]
    with torch.set_grad_enabled(len(pieces) == 1), autocast():
        features = [model(images, tokens, slots) for images, tokens, slots in pieces]
    image_features, text_features = (torch.cat(parts) for parts in zip(*features))              # (b, d) each

    # Gather features; contrast g; u <- (1 - gamma) u + gamma g; gradients of the objective by the features and by tau.
    out = loss(image_features, text_features, model.logit_scale, rows, gamma, step // steps_per_epoch,
               optim.lr_tau(c, step, total_steps))

    # Back through the towers; gradients are averaged over the ranks meanwhile.
    grads = zip(scaler.scale(out.grad_image).split(len(pieces[0][0])), scaler.scale(out.grad_text).split(len(pieces[0][0])))
    for i, (piece, grad) in enumerate(zip(pieces, grads)):
        if len(pieces) > 1:
            with autocast(), models.frozen_batch_stats(model):
                features[i] = model(*piece)
        if i == len(pieces) - 1:
            reducer.arm()
        torch.autograd.backward(features[i], grad)
    if out.grad_logit_scale is not None:
        model.logit_scale.grad = scaler.scale(out.grad_logit_scale)       # already the global batch's, on every rank
    reducer.wait()

    # Update w and tau.
    if c.grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
    log_scale = model.logit_scale.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    if out.grad_logit_scale is not None:
        optim.finish_tau_step(model.logit_scale, log_scale, c)
    return out


def main(argv):
    c = configs.load(argv)
    if c.plan:
        import plan
        return print(plan.report(c))
    device = dist.init(c.device, c.timeout)
    step = watchdog = None
    try:
        # What can be refused is refused here, before anything is trained.
        if not c.train_data:
            raise ConfigError("train_data is empty: name tar shards, for example --train_data='shards/{00000..00331}.tar'")
        world_size = dist.world_size()
        b, rest = divmod(c.batch_size, world_size)
        if rest or (c.micro_batch and b % c.micro_batch):
            raise ConfigError(f"batch_size = {c.batch_size} must be a multiple of {world_size} ranks" +
                              (f" x micro_batch = {c.micro_batch}" if c.micro_batch else "") + f", {world_size * max(1, c.micro_batch)}")
        start_from = checkpoint.find(c)
        index = from_first_rank(load_index, c.train_data, c.caption_key)
        if c.eval_data:
            from_first_rank(load_index, c.eval_data, c.caption_key, evaluation=True)
            from_first_rank(evaluation.check, c)
        order = data.Order(index, c.batch_size, c.lanes, c.shuffle_block, c.seed)
        total_steps = min(max(1, int(c.epochs * order.steps_per_epoch)), c.max_steps or 2 ** 62)

        torch.manual_seed(c.seed)
        model = models.create(c.model, c.tau_init, **c.model_numbers()).to(device)
        dtype = dist.precision(c.precision, device)
        if models.is_resnet(model):
            model.to(memory_format=torch.channels_last)
        dist.broadcast_weights(model)
        optimizer = optim.create(model, c)
        loss = ContrastiveLoss(c.algorithm, index.num_samples, c.equations, c.rho, c.eps_u, c.tau_init, device)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        step = checkpoint.load(start_from, model, optimizer, loss, scaler, c) if start_from else 0
        dist.check_same_weights(model)
        model.set_grad_checkpointing(c.grad_checkpointing)
        if c.compile is True or (c.compile == "auto" and device.type == "cuda"):
            model.compile_blocks()
        reducer = dist.GradReducer([p for p in model.parameters() if p is not model.logit_scale], c.bucket_mb,
                                   torch.bfloat16 if c.grad_wire == "bf16" else torch.float32)
        autocast = dist.autocast(dtype, device)
        loader = data.Loader(order, model.image_size, model.context_length, c.crop_scale, c.caption_key, dist.rank(), world_size,
                             c.workers, device, start_step=step, num_steps=total_steps)
        log = watch.Log(c, order, total_steps, step, model, dtype, device)

        # The loop.
        watchdog = dist.Watchdog(c.timeout)
        model.train()
        for batch in loader:
            log.data_is_ready()
            out = train_step(batch, model, loss, optimizer, reducer, scaler, autocast, c, step, order.steps_per_epoch, total_steps)
            step += 1
            watchdog.beat(f"step {step}")
            last = step == total_steps
            save = last or step % (c.save_steps or order.steps_per_epoch) == 0
            log.step(step, batch, out, optim.gamma(c, step - 1, order.steps_per_epoch, total_steps), optimizer, flush=save)
            if save:
                checkpoint.save(c.out_dir, step, model, optimizer, loss, scaler, c, c.keep)
                log.restart_clock()
                watchdog.beat(f"saving step {step}")
            if c.eval_data and (last or (c.eval_steps and step % c.eval_steps == 0)):
                dist.average_batchnorm(model)
                log.evaluation(step, evaluation.evaluate(model, c, device, autocast, picture=last))
                watchdog.beat(f"evaluating step {step}")
                model.train()
        dist.check_same_weights(model)
        log.finish()
    except ConfigError:
        raise
    except Exception as error:
        print(f"error: rank {dist.rank()}, {'start-up' if step is None else f'step {step + 1}'}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    finally:
        if watchdog:
            watchdog.stop()
    dist.shutdown()


def from_first_rank(function, *args, **options):
    """Rank 0's result, or its ConfigError, on every rank: a set is indexed once, not by each of a hundred ranks."""
    result = None
    if dist.rank() == 0:
        try:
            result = function(*args, **options)
        except ConfigError as error:
            result = error
    result = dist.all_gather_objects(result)[0]
    if isinstance(result, ConfigError):
        raise result
    return result


if __name__ == "__main__":
    configs.or_exit(main, sys.argv[1:])
