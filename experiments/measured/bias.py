# How far from the true g are its estimates, g of a batch and u, and how does that depend on the
# batch size, on gamma and on the course of training? Run by `python -m tools.bias --experiment`,
# which measures the checkpoints in the middle of epochs 2, 5, 8, ..., 23.
#
# 6 runs, about an hour of one core, a tenth of it for measuring.
import math

title = "How far the estimates of g are from the truth, along training"
base = "../../configs/emoji.py"
seeds = (1,)
x_label = "batch size"

EPOCHS = 24
SAMPLES = 14_924  # of train

# Untuned: errors are measured here, not top-1.
LR = {16: 5e-4, 64: 1e-3, 256: 2e-3}
DISTANCE = 1.0  # of rho below ln(B - 1)

settings = dict(epochs=EPOCHS, eval_steps=0, keep=99)


def settings_of(batch):
    """What depends on the batch size."""
    steps_per_epoch = SAMPLES // batch
    return dict(
        batch_size=batch,
        lr=LR[batch],
        warmup_steps=25_600 // batch,  # in samples, the emoji config's
        save_steps=round(1.5 * steps_per_epoch),
        rho=math.log(batch - 1) - DISTANCE,
        lr_tau=1e-3,
    )


cases = []
for batch in LR:
    cases.append(dict(series="v3", x=batch, settings=settings_of(batch)))
for gamma in (0.1, 0.9):
    constant = dict(gamma_schedule="constant", gamma_min=gamma)
    by_batch = settings_of(64)
    cases.append(dict(series=f"v3, gamma {gamma}", x=64, settings={**by_batch, **constant}))
# Its learned temperature gets lower than v3's.
openclip = dict(algorithm="openclip", lr_tau=None)
cases.append(dict(series="OpenCLIP", x=64, settings={**settings_of(64), **openclip}))
