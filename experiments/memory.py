# Why does FastCLIP lead: because u remembers, or because of the rest of it? With a gamma of 1, u is
# the g of this batch, and nothing is remembered. What is left is the loss of the batch with the
# epsilon and without the positive among the candidates and, in v3, the rule for the temperature.
# All other settings are those of experiments/batch_size.py, which are tuned with a memory.
#
# 45 runs, of which batch_size has made 27; the others take 2.3 core-hours.
title = "With and without a memory (gamma = 1): zero-shot top-1 on the unseen style"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
x_label = "batch size"
log_x = True
trend = True
reference = {
    "FastCLIP-v1, no memory": "OpenCLIP, best tau",
    "FastCLIP-v1": "FastCLIP-v1, no memory",
    "FastCLIP-v3, no memory": "OpenCLIP, best tau",
    "FastCLIP-v3": "FastCLIP-v3, no memory",
}

EPOCHS = 24
SAMPLES = 14_924  # of train

# As in experiments/batch_size.py.
LR = {32: 1.4e-3, 64: 2e-3, 256: 4e-3}
LR_OPENCLIP = {**LR, 64: 4e-3}
LR_V1 = {**LR, 256: 8e-3}
LR_V3 = {**LR, 64: 1e-3}
TAU_OPENCLIP = {32: 0.14, 64: 0.10, 256: 0.14}
LR_TAU_OPENCLIP = {32: 0.0, 64: 0.0, 256: 1e-4}
TAU_V1 = {32: 0.10, 64: 0.10, 256: 0.14}
RHO = {32: 2.4, 64: 3.1, 256: 3.5}

NO_MEMORY = dict(gamma_schedule="constant", gamma_min=1.0)

settings = dict(epochs=EPOCHS, save_steps=0)

cases = []
for batch in LR:
    by_batch = dict(
        batch_size=batch,
        lr=LR[batch],
        warmup_steps=25_600 // batch,  # in samples, the emoji config's
        eval_steps=-(-EPOCHS * SAMPLES // batch // 4),  # four evaluations
    )
    openclip = dict(
        algorithm="openclip",
        tau_init=TAU_OPENCLIP[batch],
        lr_tau=LR_TAU_OPENCLIP[batch],
        lr=LR_OPENCLIP[batch],
    )
    v1 = dict(algorithm="fastclip-v1", tau_init=TAU_V1[batch], lr=LR_V1[batch])
    v3 = dict(algorithm="fastclip-v3", rho=RHO[batch], lr=LR_V3[batch], lr_tau=1e-3)
    sides = {
        "OpenCLIP, best tau": openclip,
        "FastCLIP-v1, no memory": {**v1, **NO_MEMORY},
        "FastCLIP-v1": v1,
        "FastCLIP-v3, no memory": {**v3, **NO_MEMORY},
        "FastCLIP-v3": v3,
    }
    for side, of_side in sides.items():
        cases.append(dict(series=side, x=batch, settings={**by_batch, **of_side}))
