# How much does the epsilon inside the logarithm matter? A sample whose u is far below it has
# little weight: it is told from its negatives already.
#
# 36 runs, 3.9 core-hours, 79 core-minutes for each seed (910 samples/s on a core of 2026).
title = "Zero-shot top-1 on the unseen style against epsilon, at batch 64"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
x_label = "eps_u"
log_x = True
reference = {}

BATCH = 64
EPOCHS = 24
SAMPLES = 14_924  # of train

settings = dict(
    batch_size=BATCH,
    epochs=EPOCHS,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 8),  # eight evaluations
    save_steps=0,
)

CONFIGS = {"FastCLIP-v1": "../configs/emoji_v1.py", "FastCLIP-v3": "../configs/emoji_v3.py"}

cases = []
for eps in (1e-14, 1e-8, 1e-4, 1e-3, 1e-2, 1e-1):
    for side, config in CONFIGS.items():
        cases.append(dict(series=side, x=eps, base=config, settings=dict(eps_u=eps)))
