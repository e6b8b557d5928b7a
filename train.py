"""Train CLIP with one of seven contrastive algorithms. `train_step` below is Algorithm 1 of FastCLIP (arXiv 2407.01445).

python train.py configs/emoji_v3.py                                     one process, on the GPU if there is one
torchrun --nproc_per_node 8 train.py configs/cc12m_v3.py                one node
python train.py configs/laion315m_v3.py --plan=True                     what it would do
"""

import os
import signal
import sys
import time

import runtime  # noqa: F401 before torch: says how its threads wait  # isort: skip

import torch

import config as configs
import data
import dist
import eval as evaluation
import model as models
import optim
from config import ConfigError
from ingest.index import load_index
from loss import ContrastiveLoss
from runtime import checkpoint, hardware, ranks
from runtime.log import BadRun, Log
from runtime.watchdog import LEAVING, Watchdog, end_with_torchrun


def train_step(
    batch, model, loss, optimizer, reducer, scaler, autocast, c, step, steps_per_epoch, total_steps
):
    """One iteration of Algorithm 1 on this rank's share of the global batch -> (LossOutput, the gradient's norm)."""
    gamma = optim.gamma(c, step, steps_per_epoch, total_steps)
    optim.set_lr(optimizer, c, step, total_steps)
    reducer.zero()
    may_skip = (
        c.skip_nonfinite or scaler.is_enabled()
    )  # a float16 scaler finds its scale by skipping
    buffers = [buffer.clone() for buffer in model.buffers()] if may_skip else None

    # u (and per-sample tau) of the global batch: fetched while the towers run.
    rows = loss.lookup(batch.ids)

    # Features e1, e2 of my samples. With micro-batches: first without gradients, then once more, each with its gradient.
    # The host knows the captions' lengths, so it can leave out their padding (token_index: where there is none) and wait for nothing.
    pieces = [
        (images, tokens, models.pack(lengths, tokens.shape[1], tokens.device))
        for images, tokens, lengths in zip(
            *(
                x.split(c.micro_batch or len(batch.ids))
                for x in (batch.images, batch.tokens, batch.lengths)
            )
        )
    ]
    with torch.set_grad_enabled(len(pieces) == 1), autocast():
        features = [model(images, tokens, token_index) for images, tokens, token_index in pieces]
    image_features, text_features = (torch.cat(parts) for parts in zip(*features))  # (b, d) each

    # Gather features; contrast g; u <- (1 - gamma) u + gamma g; gradients of the objective by the features and by tau.
    out = loss(
        image_features,
        text_features,
        model.logit_scale,
        rows,
        gamma,
        step // steps_per_epoch,
        optim.lr_tau(c, step, total_steps),
    )

    # Back through the towers; gradients are averaged over the ranks meanwhile.
    grads = zip(
        scaler.scale(out.grad_image).split(len(pieces[0][0])),
        scaler.scale(out.grad_text).split(len(pieces[0][0])),
    )
    for i, (piece, grad) in enumerate(zip(pieces, grads)):
        if len(pieces) > 1:
            with autocast(), models.frozen_batch_stats(model):
                features[i] = model(*piece)
        if i == len(pieces) - 1:
            reducer.arm()
        torch.autograd.backward(features[i], grad)
    if out.grad_logit_scale is not None:
        model.logit_scale.grad = scaler.scale(
            out.grad_logit_scale
        )  # already the global batch's, on every rank
    reducer.wait()

    # Update w and tau.
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if c.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, c.grad_clip, grad_norm)
    if may_skip and not torch.isfinite(
        grad_norm + out.objective
    ):  # waits for the device: the price of skipping
        for buffer, before in zip(model.buffers(), buffers):  # batch norm has seen what made it so
            buffer.copy_(before)
        scaler.update()
        return out, grad_norm
    log_scale = model.logit_scale.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    if out.grad_logit_scale is not None:
        optim.finish_tau_step(model.logit_scale, log_scale, c)
    return out, grad_norm


def main(argv):
    c = configs.load(argv)
    if c.plan:
        from runtime import plan

        return print(plan.report(c))
    started = time.monotonic()
    os.umask(os.umask(0) | 0o002)  # nothing that a run writes can be changed by everybody
    end_with_torchrun()
    watchdog = saver = stop = lock = None
    try:
        device = dist.init(c.device, c.timeout)
        watchdog = Watchdog(c.timeout)
        # What can be refused is refused here, before anything is trained.
        if not c.train_data:
            raise ConfigError(
                "train_data is empty: name tar shards, for example --train_data='shards/{00000..00331}.tar'"
            )
        world_size = dist.world_size()
        b, rest = divmod(c.batch_size, world_size)
        if rest or (c.micro_batch and b % c.micro_batch):
            raise ConfigError(
                f"batch_size = {c.batch_size} must be a multiple of {world_size} ranks"
                + (f" x micro_batch = {c.micro_batch}" if c.micro_batch else "")
                + f", {world_size * max(1, c.micro_batch)}"
            )
        beats = dict(progress=watchdog.progress, waiting=watchdog.progress)
        lock = ranks.from_first_rank(checkpoint.lock_folder, c.out_dir)
        start_from = ranks.from_first_rank(checkpoint.find, c, **beats)
        index = ranks.from_first_rank(load_index, c.train_data, c.caption_key, **beats)
        if c.eval_data:
            ranks.from_first_rank(load_index, c.eval_data, c.caption_key, evaluation=True, **beats)
            ranks.from_first_rank(evaluation.check, c)
        watchdog.progress("start-up, making the model")
        order = data.Order(index, c.batch_size, c.lanes, c.shuffle_block, c.seed)
        total_steps = min(max(1, int(c.epochs * order.steps_per_epoch)), c.max_steps or 2**62)

        torch.manual_seed(c.seed)
        model = models.create(c.model, c.tau_init, **c.model_numbers()).to(device)
        dtype = hardware.precision(c.precision, device)
        if models.is_resnet(model):
            model.to(memory_format=torch.channels_last)
        dist.broadcast_weights(model)
        optimizer = optim.create(model, c)
        loss = ContrastiveLoss(
            c.algorithm,
            index.num_samples,
            c.equations,
            c.rho,
            c.eps_u,
            c.tau_init,
            device,
            tile=c.loss_tile,
        )
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        step, log_state = (
            checkpoint.load(start_from, model, optimizer, loss, scaler, c, index.fingerprint)
            if start_from
            else (0, None)
        )
        if step > total_steps:
            raise ConfigError(
                f"{start_from} is at step {step}, this run ends at step {total_steps}: raise max_steps or epochs, or start from an earlier one"
            )
        dist.check_same_weights(model)
        model.set_grad_checkpointing(c.grad_checkpointing)
        if hardware.compiles(c.compile, device):
            model.compile_blocks()
        reducer = dist.GradReducer(
            [p for p in model.parameters() if p is not model.logit_scale],
            c.bucket_mb,
            torch.bfloat16 if c.grad_wire == "bf16" else torch.float32,
        )
        autocast = hardware.autocast(dtype, device)
        loader = data.Loader(
            order,
            model.image_size,
            model.context_length,
            c.crop_scale,
            c.caption_key,
            dist.rank(),
            world_size,
            c.workers,
            device,
            start_step=step,
            num_steps=total_steps,
            decoder=c.decoder,
        )
        saver = checkpoint.Saver(
            c, model, optimizer, loss, scaler, index.fingerprint, start_from, lock
        )
        log = Log(c, order, total_steps, step, model, dtype, device, log_state)

        def evaluate():
            with (
                log.pause(),
                torch.compiler.set_stance("force_eager"),
            ):  # other batches than in training: not worth graphs of their own
                watchdog.progress(f"step {step}, evaluating")
                with dist.averaged_batchnorm(model):
                    results = evaluation.evaluate(
                        model, c, device, autocast, step == total_steps, watchdog.progress
                    )
                log.evaluation(step, results)
                model.train()

        def evaluation_due():
            return (
                c.eval_data
                and step
                and (step == total_steps or (c.eval_steps and step % c.eval_steps == 0))
            )

        stop = StopSignals()
        model.train()
        if evaluation_due() and not ranks.from_first_rank(log.has_evaluation, step):
            evaluate()  # the job that saved this step ended before it could
        saved = time.monotonic()
        last_step = (
            min(total_steps, step + c.stop_after)
            if isinstance(c.stop_after, int) and c.stop_after
            else total_steps
        )
        agreement = ranks.Vote(3)

        # The loop.
        watchdog.progress(f"step {step + 1}, waiting for data")
        for batch in loader:
            log.data_is_ready()
            watchdog.progress(f"step {step + 1}")
            out, grad_norm = train_step(
                batch,
                model,
                loss,
                optimizer,
                reducer,
                scaler,
                autocast,
                c,
                step,
                order.steps_per_epoch,
                total_steps,
            )
            step += 1
            log.step(
                step,
                batch,
                out,
                grad_norm,
                reducer.finite,
                optim.gamma(c, step - 1, order.steps_per_epoch, total_steps),
                optimizer,
            )

            # Decisions that all ranks take together, on what any of them knew a step ago.
            leave, due, still_writing = agreement.result()
            leave = leave or step == last_step
            if leave or due or step % (c.save_steps or order.steps_per_epoch) == 0:
                watchdog.progress(f"step {step}, saving")
                with log.pause():
                    saver.commit()  # the one before, before anything can be found wrong with this one
                    log.save_wait += saver.save(step, log.state())
                saved = time.monotonic()
            elif not still_writing:
                saver.commit()
            if evaluation_due() and (
                step == total_steps or not leave
            ):  # who is asked to leave does not stay for it
                evaluate()
            if leave:
                break
            now = time.monotonic()
            agreement.ask(
                bool(stop.asked) or now - started > configs.stop_seconds(c),
                dist.rank() == 0 and bool(c.save_minutes) and now - saved > 60 * c.save_minutes,
                saver.writing(),
            )
            watchdog.progress(f"step {step + 1}, waiting for data")
        watchdog.progress(f"step {step}, saving")
        if not saver.commit():
            raise RuntimeError("the last checkpoint could not be saved: see above")
        dist.check_same_weights(model)
        if step == total_steps:
            log.finish()
        else:
            late = step == last_step or time.monotonic() - started > configs.stop_seconds(c)
            log.left(
                step,
                stop.asked
                or (f"stop_after = {c.stop_after}" if late else "another rank was asked to stop"),
            )
        watchdog.progress(LEAVING)
        dist.barrier()  # nobody goes while another may still need it
    except (Exception, KeyboardInterrupt) as error:
        if saver and (isinstance(error, BadRun) or dist.world_size() == 1):
            saver.commit()  # what is being written is from before the error, and every rank is here
        if watchdog:
            watchdog.failed(error)
        elif not isinstance(error, ConfigError):
            print(
                f"error: rank {os.environ.get('RANK', 0)}, joining the others: {error}",
                file=sys.stderr,
                flush=True,
            )
        raise
    finally:
        if watchdog:
            watchdog.stop()
        if stop:
            stop.restore()
        if saver:
            saver.close()
        elif lock is not None and dist.rank() == 0:
            os.close(lock)


class StopSignals:
    """SIGTERM (torchrun's, Slurm's), SIGUSR1 (Slurm's warning) and Ctrl-C ask for a last checkpoint. Until the loop runs there is
    nothing to save, and they end the process as ever. A second Ctrl-C, later than torchrun's echo of the first, ends it at once."""

    def __init__(self):
        self.asked, self.since = "", 0.0
        self.before = {
            number: signal.signal(number, self.take)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        }

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def take(self, number, frame):
        if number == signal.SIGINT and self.asked and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.since = signal.Signals(number).name, time.monotonic()
            os.write(2, b"\nsaving soon, then leaving\n")  # print is not safe in a signal handler


if __name__ == "__main__":
    ranks.run(main, sys.argv[1:])
