# Many samples, each seen a few times only, as in data from the web: 264,273 icons for three epochs
# (python -m tools.prepare icons). The measure is the mean over ten unseen icon sets. The model is
# that of the emoji set, and the settings are those of experiments/batch_size.py at this batch size;
# nothing is tuned on icons. As u is renewed twice after the first visit, gamma ends at 0.6.
#
# 12 runs, 3 core-hours, 1 for each seed (950 samples/s on a core of 2026).
title = "Icons, three epochs: zero-shot top-1, mean of ten unseen sets"
base = "../configs/icons.py"
seeds = (1, 2, 3)
x_label = "batch size"
measure = "eval/*/zeroshot_top1"
curves = True
reference = {
    "OpenCLIP, best tau": "OpenCLIP, usual tau",
    "FastCLIP-v1, best tau": "OpenCLIP, best tau",
    "FastCLIP-v3": "OpenCLIP, best tau",
}

BATCH = 128
EPOCHS = 3
SAMPLES = 264_273

settings = dict(
    vision_width=16,
    embed_dim=128,
    text_width=128,
    text_layers=1,
    batch_size=BATCH,
    epochs=EPOCHS,
    lr=2.8e-3,
    warmup_steps=500,
    gamma_min=0.6,
    eval_steps=SAMPLES // BATCH,  # each epoch
    save_steps=0,
)

SIDES = {
    "OpenCLIP, usual tau": dict(algorithm="openclip"),
    "OpenCLIP, best tau": dict(algorithm="openclip", tau_init=0.14, lr_tau=1e-4),
    "FastCLIP-v1, best tau": dict(algorithm="fastclip-v1", tau_init=0.12),
    "FastCLIP-v3": dict(algorithm="fastclip-v3", rho=3.3, lr_tau=1e-3),
}

cases = []
for side, of_side in SIDES.items():
    cases.append(dict(series=side, x=BATCH, settings=of_side))
