# The schedule of gamma, with v1, whose temperature is constant: is a cosine better than a constant,
# where should it end, and does it matter that gamma changes by epochs and not by steps? With a
# constant gamma of 1 the average u is this batch's g alone, with nothing remembered.
#
# At the same gamma_min a cosine has the larger gamma on average, so compare the best of each. As
# gamma_min is a setting that is chosen, this is on the held-out training style, not the test's.
#
# 24 runs, 2.1 core-hours, 42 core-minutes for each seed (910 samples/s on a core of 2026).
title = "Zero-shot top-1 on the held-out style against gamma_min, FastCLIP-v1 at batch 64"
base = "../configs/emoji_v1.py"
seeds = (1, 2, 3)
x_label = "gamma_min"
curves = True
reference = {"cosine": "constant", "cosine by steps": "cosine"}

BATCH = 64
EPOCHS = 24
SAMPLES = 11_790  # of tune/train

settings = dict(
    train_data="data/emoji/tune/train/*.tar",
    eval_data="data/emoji/tune/val/*.tar",
    batch_size=BATCH,
    epochs=EPOCHS,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 8),  # eight evaluations: early, and late
    save_steps=0,
)

# 0.3 is that of the emoji configs.
SCHEDULES = {
    "constant": (dict(gamma_schedule="constant"), (0.2, 0.3, 0.6, 1.0)),
    "cosine": (dict(gamma_schedule="cosine"), (0.2, 0.3, 0.6)),
    "cosine by steps": (dict(gamma_schedule="cosine", gamma_smooth=True), (0.3,)),
}

cases = []
for series, (schedule, gamma_mins) in SCHEDULES.items():
    for gamma_min in gamma_mins:
        cases.append(dict(series=series, x=gamma_min, settings=dict(schedule, gamma_min=gamma_min)))
