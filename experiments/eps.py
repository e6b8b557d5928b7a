# How much does the epsilon inside the logarithm matter? A sample whose u is far below it has
# little weight: it is told from its negatives already. With v1 alone: in v3 epsilon moves the
# temperature, too. It is a setting that is chosen, so this is on the held-out training style, not
# on the test's.
#
# 18 runs, 1.6 core-hours, 31 core-minutes for each seed (910 samples/s on a core of 2026).
title = "Zero-shot top-1 on the held-out style against epsilon, at batch 64"
base = "../configs/emoji_v1.py"
seeds = (1, 2, 3)
x_label = "eps_u"
log_x = True
reference = {}

BATCH = 64
EPOCHS = 24
SAMPLES = 11_790  # of tune/train

settings = dict(
    train_data="data/emoji/tune/train/*.tar",
    eval_data="data/emoji/tune/val/*.tar",
    batch_size=BATCH,
    epochs=EPOCHS,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 8),  # eight evaluations
    save_steps=0,
)

cases = []
for eps in (1e-14, 1e-8, 1e-4, 1e-3, 1e-2, 1e-1):
    cases.append(dict(series="FastCLIP-v1", x=eps, settings=dict(eps_u=eps)))
