"""train.py with faults in it: python tests/faults.py FAULT@STEP:RANK[,...] [train.py's words].

kill             the rank kills itself (SIGKILL)
hang             it sleeps for an hour
raise            it raises ValueError
TERM, USR1, INT  it sends itself that signal
feature          the features of its third sample are NaN in this step
gradient         its gradient is NaN in this step
leak             every step from this one on keeps 1 MB and opens a file (the soak test must see it)
eval-kill        in the evaluation after this step the rank kills itself, once that step is saved
eval-TERM        it sends itself SIGTERM when that evaluation begins

Steps count from 1. With FASTCLIP_IDS=FILE every rank appends the ids of its samples to FILE, a
line a step.
"""

import os
import signal
import sys
import time

import torch

import dist
import train
from runtime import ranks

plain_step = train.train_step
plain_evaluate = train.evaluation.evaluate
leaked = []


def install(faults):
    """Make train.train_step and eval.evaluate do the faults {(step, rank): name}, each once."""
    faulty = Faulty(faults)
    train.train_step = faulty.train_step
    train.evaluation.evaluate = faulty.evaluate


def uninstall():
    train.train_step = plain_step
    train.evaluation.evaluate = plain_evaluate


class Faulty:
    def __init__(self, faults):
        self.faults = faults
        self.steps_done = 0

    def train_step(self, t, batch, step):
        self.steps_done = step + 1
        record_ids(batch)
        if leaks(self.faults, step + 1):
            leaked.append((bytearray(os.urandom(1 << 20)), open(os.devnull)))
            return plain_step(t, batch, step)

        fault = self.take(is_in_evaluation=False)
        act(fault)
        hook = spoil(fault, t.model, batch)
        try:
            return plain_step(t, batch, step)
        finally:
            if hook:
                hook.remove()

    def evaluate(self, model, c, *args, **options):
        fault = self.take(is_in_evaluation=True)
        if fault == "eval-kill":
            wait_until_saved(c, self.steps_done)
        act(fault.removeprefix("eval-"))
        return plain_evaluate(model, c, *args, **options)

    def take(self, is_in_evaluation):
        """-> the fault that is due now on this rank, "" if there is none."""
        place = (self.steps_done, dist.rank())
        if self.faults.get(place, "").startswith("eval-") == is_in_evaluation:
            return self.faults.pop(place, "")
        return ""


def wait_until_saved(c, step):
    """Wait until the newest checkpoint is of this step, for 20 seconds at most."""
    latest = os.path.join(c.out_dir, "checkpoints", "latest")
    for _ in range(200):
        if os.path.exists(latest):
            with open(latest) as f:
                if f.read() == f"step-{step:08d}":
                    return
        time.sleep(0.1)


def record_ids(batch):
    if "FASTCLIP_IDS" in os.environ:
        line = " ".join(str(i) for i in batch.ids.tolist())
        with open(os.environ["FASTCLIP_IDS"], "a") as f:
            f.write(line + "\n")


def leaks(faults, step):
    """Has a leak begun on this rank?"""
    for (first_step, rank), name in faults.items():
        if name == "leak" and rank == dist.rank() and first_step <= step:
            return True
    return False


def act(fault):
    """The faults that happen before a step."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "hang":
        time.sleep(3600)
    elif fault == "raise":
        raise ValueError("boom")
    elif fault in ("TERM", "USR1", "INT"):
        os.kill(os.getpid(), getattr(signal, "SIG" + fault))


def spoil(fault, model, batch):
    """The faults that happen within a step -> the hook that does it, or None."""
    if fault == "feature":
        nan = torch.zeros(len(batch.ids), 1)  # (b, 1), added to the image features
        nan[2] = float("nan")
        return model.register_forward_hook(lambda module, args, out: (out[0] + nan, out[1]))
    if fault == "gradient":
        return model.text_projection.register_hook(lambda grad: grad * float("nan"))
    return None


def parse(text):
    """Read faults: "kill@5:1,hang@7:0" -> {(5, 1): "kill", (7, 0): "hang"}"""
    faults = {}
    for word in text.split(","):
        if word:
            name, place = word.split("@")
            step, rank = place.split(":")
            faults[int(step), int(rank)] = name
    return faults


if __name__ == "__main__":
    install(parse(sys.argv[1]))
    ranks.run(train.main, sys.argv[2:])
