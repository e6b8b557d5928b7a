# How much does the epsilon inside the logarithm matter? A sample whose u is far below it has
# little weight: it is told from its negatives already.
#
# 36 runs, 3.9 core-hours, 79 core-minutes for each seed (910 samples/s on a core of 2026).
import math

title = "Zero-shot top-1 on the unseen style against epsilon, at batch 64"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
x_label = "eps_u"
log_x = True
reference = {}

BATCH = 64
EPOCHS = 24
SAMPLES = 14_924  # of train
RHO = round(math.log(BATCH - 1) - 1, 2)  # see docs/results.md

settings = dict(
    batch_size=BATCH,
    epochs=EPOCHS,
    lr=1e-3,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 4),  # four evaluations
    save_steps=0,
)

# NOT TUNED YET: as in experiments/algorithms.py
SIDES = {
    "FastCLIP-v1": dict(algorithm="fastclip-v1", tau_init=0.12),
    "FastCLIP-v3": dict(algorithm="fastclip-v3", lr_tau=1e-3, rho=RHO),
}

cases = []
for eps in (1e-14, 1e-8, 1e-4, 1e-3, 1e-2, 1e-1):
    for side, of_side in SIDES.items():
        cases.append(dict(series=side, x=eps, settings=dict(of_side, eps_u=eps)))
