"""train.py with faults in it: python tests/faults.py FAULT@STEP:RANK[,...] and then train.py's words.

kill      the rank kills itself (-9)             hang      it sleeps for ever
raise     it raises ValueError                   TERM, USR1, INT   it sends itself that signal
feature   the features of its third sample are NaN in this step
gradient  its gradient is NaN in this step
leak      every step from this one on keeps 1 MB and opens a file (the soak test must see it)
Steps count from 1. With FASTCLIP_IDS=FILE every rank appends the ids of its samples to FILE, a line a step.
"""

import os
import signal
import sys
import time

import torch

import dist
import train
from runtime import ranks

plain_step, leaked = train.train_step, []


def install(faults):
    """faults: {(step, rank): name} -> train.train_step does them, once."""

    def step_with_faults(batch, model, loss, optimizer, reducer, scaler, autocast, c, step, *rest):
        rank = dist.rank()
        if "FASTCLIP_IDS" in os.environ:
            with open(os.environ["FASTCLIP_IDS"], "a") as f:
                f.write(" ".join(map(str, batch.ids.tolist())) + "\n")
        leaks = [
            s for (s, r), name in faults.items() if name == "leak" and r == rank and s <= step + 1
        ]
        if leaks:
            leaked.append((bytearray(os.urandom(1 << 20)), open(os.devnull)))
        fault, hook = faults.pop((step + 1, rank), None) if not leaks else None, None
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == "hang":
            time.sleep(3600)
        elif fault == "raise":
            raise ValueError("boom")
        elif fault in ("TERM", "USR1", "INT"):
            os.kill(os.getpid(), getattr(signal, "SIG" + fault))
        elif fault == "feature":
            spoil = torch.zeros(len(batch.ids), 1)
            spoil[2] = float("nan")
            hook = model.register_forward_hook(lambda module, args, out: (out[0] + spoil, out[1]))
        elif fault == "gradient":
            hook = model.text_projection.register_hook(lambda grad: grad * float("nan"))
        try:
            return plain_step(
                batch, model, loss, optimizer, reducer, scaler, autocast, c, step, *rest
            )
        finally:
            if hook:
                hook.remove()

    train.train_step = step_with_faults


def parse(text):
    """ "kill@5:1,hang@7:0" -> {(5, 1): "kill", (7, 0): "hang"}"""
    faults = {}
    for word in filter(None, text.split(",")):
        name, place = word.split("@")
        step, rank = place.split(":")
        faults[int(step), int(rank)] = name
    return faults


if __name__ == "__main__":
    install(parse(sys.argv[1]))
    ranks.run(train.main, sys.argv[2:])
