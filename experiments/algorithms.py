# All algorithms at one small batch: is each FastCLIP variant better than OpenCLIP, and than the
# older method that it comes from (v1 from SogCLR, v2 from iSogCLR)? And is v3 at least as good as
# v1 and v2?
#
# 24 runs, 2.6 core-hours, 53 core-minutes for each seed (910 samples/s on a core of 2026).
import math

title = "All algorithms at batch 64: zero-shot top-1 on the unseen style"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
x_label = "batch size"
curves = True
reference = {
    "OpenCLIP, best tau": "OpenCLIP, tau learned",
    "FastCLIP-v0": "OpenCLIP, tau learned",
    "SogCLR": "OpenCLIP, best tau",
    "iSogCLR": "OpenCLIP, best tau",
    "FastCLIP-v1": "SogCLR",
    "FastCLIP-v2": "iSogCLR",
    "FastCLIP-v3": "FastCLIP-v1",
}

BATCH = 64
EPOCHS = 24
SAMPLES = 14_924  # of train
RHO = round(math.log(BATCH - 1) - 1, 2)  # see docs/results.md

settings = dict(
    batch_size=BATCH,
    epochs=EPOCHS,
    lr=1e-3,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 8),  # eight evaluations
    save_steps=0,
)

# NOT TUNED YET: what the runs of experiments/tune_batch_size.py at this batch size have shown so
# far (OpenCLIP, v1, v3), and guesses (the others: experiments/tune_algorithms.py).
SIDES = {
    "OpenCLIP, tau learned": dict(algorithm="openclip"),
    "OpenCLIP, best tau": dict(algorithm="openclip", tau_init=0.10, lr_tau=0.0),
    "SogCLR": dict(algorithm="sogclr", tau_init=0.12, gamma_min=0.6),
    "iSogCLR": dict(algorithm="isogclr", tau_init=0.12, lr_tau=5e-3, rho=RHO, gamma_min=0.6),
    "FastCLIP-v0": dict(algorithm="fastclip-v0"),
    "FastCLIP-v1": dict(algorithm="fastclip-v1", tau_init=0.12),
    "FastCLIP-v2": dict(algorithm="fastclip-v2", tau_init=0.12, lr_tau=5e-3, rho=RHO),
    "FastCLIP-v3": dict(algorithm="fastclip-v3", lr_tau=1e-3, rho=RHO),
}

cases = []
for side, of_side in SIDES.items():
    cases.append(dict(series=side, x=BATCH, settings=of_side))
