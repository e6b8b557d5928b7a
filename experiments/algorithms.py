# All algorithms at one small batch: is each FastCLIP variant better than OpenCLIP, and than the
# older method that it comes from (v1 from SogCLR, v2 from iSogCLR)? And is v3 at least as good as
# v1 and v2? The settings are those of configs/emoji_*.py.
# NOT TUNED YET: SogCLR, iSogCLR, v0 and v2 (experiments/tune_algorithms.py).
#
# 24 runs, 2.6 core-hours, 53 core-minutes for each seed (910 samples/s on a core of 2026).
title = "All algorithms at batch 64: zero-shot top-1 on the unseen style"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
x_label = "batch size"
curves = True
# How one schedule of gamma compares with the other, all else equal: experiments/gamma.py.
reference = "OpenCLIP, best tau"

BATCH = 64
EPOCHS = 24
SAMPLES = 14_924  # of train

settings = dict(
    batch_size=BATCH,
    epochs=EPOCHS,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 4),  # four evaluations
    save_steps=0,
)

CONFIGS = {
    "OpenCLIP, usual tau": "openclip",
    "OpenCLIP, best tau": "openclip_tuned",
    "SogCLR": "sogclr",
    "iSogCLR": "isogclr",
    "FastCLIP-v0": "v0",
    "FastCLIP-v1": "v1",
    "FastCLIP-v2": "v2",
    "FastCLIP-v3": "v3",
}

cases = []
for series, config in CONFIGS.items():
    cases.append(dict(series=series, x=BATCH, base=f"../configs/emoji_{config}.py", settings={}))
