"""The life of a job: ranks, failure detection, lock, signals, votes, saving, evaluation, messages.

A run may take several jobs, one after the other (time limits, pre-emption, crashes): each continues
from the newest checkpoint. `train.main` reads as the method because everything else stands here.
"""

import os
import signal
import sys
import time

import torch

import dist
from config import BadRun, ConfigError, stop_seconds
from ingest import evaluation
from ingest.index import (
    load_index,
    note_caption_lines,
    warn_of_repeated_shards,
    warn_of_shared_shards,
)
from runtime import checkpoint, hardware, results
from runtime.log import Log, check_packages
from runtime.ranks import Interrupted, Vote, from_first_rank
from runtime.watchdog import LEAVING, Watchdog, end_with_torchrun


class Job:
    """One job of a run, on one rank.

        with Job(config) as job:
            index = job.load_index()
            step = job.resume(t, index)
            job.start(t, index, step, evaluate)
            for batch in job.batches(loader):
                ...
                job.save_if_due(step)
                job.evaluate_if_due(step)
                if job.leaving:
                    break
            job.finish(step)

    Entering joins the process group and starts failure detection. An exception inside is told to
    all ranks, which end and name it. Leaving releases the lock on the run's folder.

    device: this rank's torch.device. log: the run's Log, from `start` on. leaving: True when this
    job ends after the present step, because the run is done, its time is up, or a signal came.
    evaluation_left: True when a signal came during the last evaluation, which was left.
    """

    def __init__(self, config):
        self.config = config
        self.started = time.monotonic()
        self.leaving = False
        self.evaluation_left = False
        self.evaluation_sets = []
        self.device = None
        self.log = None
        self.watchdog = None
        self.lock = None
        self.saver = None
        self.signals = None

    # ---- start and end ----

    def __enter__(self):
        try:
            self.join()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, (Exception, KeyboardInterrupt)):
                self.fail(error)
        finally:
            self.close()

    def join(self):
        """Join the process group, start failure detection, lock the run's folder."""
        c = self.config
        # Files of a run are never writable by everybody, whatever the umask.
        os.umask(os.umask(0) | 0o002)
        end_with_torchrun()
        self.device = dist.init(c.device, c.timeout)
        hardware.report_idle_gpus(self.device)
        self.watchdog = Watchdog(c.timeout)
        check_batch_size(c, dist.world_size())
        from_first_rank(check_packages, c)
        self.lock = from_first_rank(checkpoint.lock_folder, c.out_dir)

    def fail(self, error):
        """Tell the other ranks why this one ends; keep a checkpoint that is still being written."""
        if self.signals:
            self.signals.is_silent = True  # torchrun will send one, and there is no step to save
        if self.saver and (isinstance(error, BadRun) or dist.world_size() == 1):
            # It was begun before the error, and the threads of all ranks complete it.
            self.saver.wait()
        if self.watchdog:
            self.watchdog.failed(error)
        elif not isinstance(error, ConfigError):
            rank = os.environ.get("RANK", 0)
            print(f"error: rank {rank}, joining the others: {error}", file=sys.stderr, flush=True)

    def close(self):
        if self.watchdog:
            self.watchdog.stop()
        if self.signals:
            self.signals.restore()
        if self.saver:
            self.saver.close()
        elif self.lock is not None and dist.rank() == 0:
            os.close(self.lock)

    # ---- before the loop ----

    def progress(self, where):
        """Report progress: this rank ends when there was none for config.timeout seconds."""
        self.watchdog.progress(where)

    def once(self, function, *args, **options):
        """Call function on rank 0, where it may take long -> its result, on every rank.

        It is given progress=, to report on the way.
        """
        return from_first_rank(
            function, *args, progress=self.progress, waiting=self.progress, **options
        )

    def load_index(self):
        """The index of the training data; the evaluation data are looked at, too.

        Raises ConfigError for a checkpoint or data that cannot be used.
        """
        c = self.config
        self.start_from = self.once(checkpoint.find, c)
        if self.start_from:
            from_first_rank(checkpoint.check_settings, self.start_from, c)
        index = self.once(
            load_index,
            c.train_data,
            c.caption_key,
            count_remote=c.index_remote,
            allow_left_out=c.allow_left_out,
        )
        from_first_rank(warn_of_repeated_shards, index)
        if not c.caption_lines:
            from_first_rank(note_caption_lines, index)
        if c.eval_data:
            self.evaluation_sets = self.once(evaluation.load_sets, c)
            shards = [shard for data in self.evaluation_sets for shard in data.source.shards]
            from_first_rank(warn_of_shared_shards, index, shards)
        self.progress("start-up, making the model")
        return index

    def resume(self, t, index):
        """Continue from the checkpoint that config.resume asks for -> the number of steps done.

        Raises ConfigError for a checkpoint of another run, RuntimeError if the weights of the ranks
        differ.
        """
        step = 0
        self.log_state = None
        if self.start_from:
            step, self.log_state = checkpoint.load(
                self.start_from,
                t.model,
                t.optimizer,
                t.loss,
                t.scaler,
                self.config,
                index.fingerprint,
            )
        if step > t.total_steps:
            raise ConfigError(
                f"{self.start_from} is at step {step}, this run ends at step {t.total_steps} "
                f"(epochs = {self.config.epochs:g}, max_steps = {self.config.max_steps}): "
                "raise max_steps or epochs, or start from an earlier one"
            )
        dist.check_same_weights(t.model)
        return step

    def start(self, t, index, step, evaluate):
        """Open the run's folder and its log, listen to signals, make up for a missed evaluation.

        evaluate(model, sets, config, device, autocast, checkpoint_name, progress, stop) -> list of
        the results of sets, see runtime/results.py. It raises Interrupted on all ranks soon after
        stop() is true on any of them.
        """
        c = self.config
        self.t = t
        self.step = step
        self.evaluate = evaluate
        self.last_step = t.total_steps
        if isinstance(c.stop_after, int) and c.stop_after:
            self.last_step = min(t.total_steps, step + c.stop_after)

        self.saver = checkpoint.Saver(
            c,
            t.model,
            t.optimizer,
            t.loss,
            t.scaler,
            index.fingerprint,
            self.start_from,
            self.lock,
        )
        self.log = Log(t, index.num_samples, step, self.log_state)
        self.signals = StopSignals()
        self.saved_step = step
        self.saved_at = time.monotonic()
        self.votes = Vote(3)

        # The job that saved this step may have ended before its evaluation.
        if self.evaluation_is_due(step) and not from_first_rank(self.log.has_evaluation, step):
            self.run_evaluation(step)

    # ---- the loop ----

    def batches(self, loader):
        """Yield the loader's batches. After each step, ask all ranks what to do after the next."""
        if self.leaving:
            return
        self.progress(f"step {self.step + 1}, waiting for data")
        for batch in loader:
            self.log.data_is_ready()
            self.progress(f"step {self.step + 1}")
            yield batch
            self.ask_votes()
            self.progress(f"step {self.step + 1}, waiting for data")

    def ask_votes(self):
        """Start a vote on what only some ranks know: a signal, the clock, bad samples.

        It is answered one step later, so that no step waits for it.
        """
        c = self.config
        now = time.monotonic()
        wants_to_leave = self.was_signalled() or now - self.started > stop_seconds(c)
        save_is_due = (
            dist.rank() == 0 and c.save_minutes > 0 and now - self.saved_at > 60 * c.save_minutes
        )
        self.votes.ask(wants_to_leave, save_is_due, sum(self.log.bad.values()))

    def save_if_due(self, step):
        """Begin a checkpoint if this step ends the job, an interval or some minutes."""
        self.step = step
        leave, save_is_due, self.log.num_bad = self.votes.result()
        self.leaving = leave > 0 or step == self.last_step

        interval = self.config.save_steps or self.t.steps_per_epoch
        if self.leaving or save_is_due or step % interval == 0:
            self.save(step)

    def save(self, step):
        self.progress(f"step {step}, saving")
        with self.log.pause():
            # Wait for the checkpoint before, so that nothing found wrong with this one can harm it.
            self.saver.wait()
            log_state = self.log.state()
            # Only rank 0 saves weights: of weights that differ, the others would be lost unnoticed.
            dist.check_same_weights(self.t.model)
            self.log.save_wait += self.saver.save(step, log_state)
        self.saved_step = step
        self.saved_at = time.monotonic()

    def evaluation_is_due(self, step):
        c = self.config
        if not c.eval_data or step == 0:
            return False
        return step == self.t.total_steps or (c.eval_steps > 0 and step % c.eval_steps == 0)

    def evaluate_if_due(self, step):
        """Evaluate, unless this job was asked to leave: then the next job makes up for it."""
        if self.evaluation_is_due(step) and (step == self.t.total_steps or not self.leaving):
            self.run_evaluation(step)

    def run_evaluation(self, step):
        """Evaluate. If a signal comes to any rank, this job ends, and the next makes up for it."""
        self.progress(f"step {step}, evaluating")
        try:
            with self.log.pause():
                found = self.results_of_evaluation(step)
        except Interrupted:
            self.evaluation_left = True
            self.leaving = True
            if self.saved_step != step:
                self.save(step)
            return
        self.log.evaluation(step, found)

    def results_of_evaluation(self, step):
        t = self.t
        is_last = step == t.total_steps
        name = results.checkpoint_name(checkpoint.folder_of(self.config, step))
        # Eager, because its batches differ from training's: not worth graphs of their own.
        with torch.compiler.set_stance("force_eager"), dist.averaged_batchnorm(t.model):
            found = self.evaluate(
                t.model,
                self.evaluation_sets,
                self.config,
                self.device,
                t.autocast,
                checkpoint_name=name if is_last else "",
                progress=self.progress,
                stop=self.was_signalled,
            )
        t.model.train()
        return found

    def was_signalled(self):
        return bool(self.signals.received)

    # ---- after the loop ----

    def finish(self, step):
        """Wait for the last checkpoint, say how the job ended, and leave together with all ranks.

        Raises BadRun if it could not be saved.
        """
        self.progress(f"step {step}, saving")
        if not self.saver.wait():
            raise BadRun("the last checkpoint could not be saved: see above")

        if step == self.t.total_steps and not self.evaluation_left:
            self.log.finish()
        else:
            self.log.left(step, self.reason_to_leave(step))

        # No rank goes while another may still need it.
        self.progress(LEAVING)
        dist.barrier()

    def reason_to_leave(self, step):
        c = self.config
        if self.evaluation_left:
            return f"{self.signals.received or 'a signal'} during the evaluation"
        if self.signals.received:
            return self.signals.received
        if step == self.last_step or time.monotonic() - self.started > stop_seconds(c):
            return f"stop_after = {c.stop_after}"
        return "another rank was asked to stop"


class StopSignals:
    """SIGTERM (torchrun, Slurm), SIGUSR1 (Slurm's warning) and Ctrl-C ask for a last checkpoint.

    Before the loop there is nothing to save, and they end the process as ever. A second Ctrl-C ends
    it at once, if it comes later than torchrun's echo of the first.

    received: the name of the first signal, "" before. is_silent: whether nothing is printed.
    """

    def __init__(self):
        self.is_silent = False
        self.received = ""
        self.received_at = 0.0
        self.handlers = {}
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self.handle)

    def restore(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        is_echo = time.monotonic() - self.received_at <= 2
        if number == signal.SIGINT and self.received and not is_echo:
            raise KeyboardInterrupt
        if not self.received:
            self.received = signal.Signals(number).name
            self.received_at = time.monotonic()
            if dist.rank() == 0 and not self.is_silent:
                # print is not safe in a signal handler.
                os.write(2, b"\nsaving soon, then leaving\n")


def check_batch_size(c, world_size):
    """ConfigError unless the global batch divides among ranks and, on each, micro-batches."""
    if not c.train_data:
        raise ConfigError(
            "train_data is empty: name tar shards, for example "
            "--train_data='shards/{00000..00331}.tar'"
        )
    parts = world_size * max(1, c.micro_batch)
    if c.batch_size % parts:
        micro = f" x micro_batch = {c.micro_batch}" if c.micro_batch else ""
        raise ConfigError(
            f"batch_size = {c.batch_size} must be a multiple of {world_size} ranks{micro}, that is "
            f"of {parts}"
        )
