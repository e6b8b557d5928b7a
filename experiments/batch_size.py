# Does FastCLIP win at small batches, and does its lead shrink as the batch grows? All runs see the
# same number of samples. experiments/tune_batch_size.py chose the settings, on other data.
#
# 72 runs, 9 core-hours (on a core of 2026: 440, 750, 910, 1,050, 1,370 and 1,340 samples/s).
import math

title = "Zero-shot top-1 on the unseen style against the batch size, at equal samples seen"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
x_label = "batch size"
log_x = True
reference = "OpenCLIP, tau learned"

EPOCHS = 24
SAMPLES = 14_924  # of train

# NOT TUNED YET: placeholders, from a probe at batch 64 (lr 1e-3, tau 0.1, rho 4).
BATCHES = (16, 32, 64, 128, 256, 512)
LR = {16: 5e-4, 32: 7e-4, 64: 1e-3, 128: 1e-3, 256: 2e-3, 512: 2e-3}
TAU_OPENCLIP = {16: 0.10, 32: 0.10, 64: 0.10, 128: 0.10, 256: 0.10, 512: 0.10}
TAU_V1 = {16: 0.10, 32: 0.10, 64: 0.10, 128: 0.10, 256: 0.10, 512: 0.10}
DISTANCE = 1.0  # of rho below ln(B - 1), see experiments/tune_batch_size.py

settings = dict(epochs=EPOCHS, save_steps=0)

cases = []
for batch in BATCHES:
    by_batch = dict(
        batch_size=batch,
        lr=LR[batch],
        warmup_steps=25_600 // batch,  # in samples, the emoji config's
        eval_steps=-(-EPOCHS * SAMPLES // batch // 8),  # eight evaluations
    )
    sides = {
        "OpenCLIP, tau learned": dict(algorithm="openclip"),
        "OpenCLIP, best tau": dict(algorithm="openclip", tau_init=TAU_OPENCLIP[batch], lr_tau=0.0),
        "FastCLIP-v1, best tau": dict(algorithm="fastclip-v1", tau_init=TAU_V1[batch]),
        "FastCLIP-v3": dict(
            algorithm="fastclip-v3", rho=math.log(batch - 1) - DISTANCE, lr_tau=1e-3
        ),
    }
    for side, of_side in sides.items():
        cases.append(dict(series=side, x=batch, settings={**by_batch, **of_side}))
