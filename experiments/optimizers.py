# Four optimizers, each at the learning rate that experiments/tune_optimizers.py chose for it, on
# other data. With v1, whose temperature no optimizer moves.
#
# 12 runs, 79 core-minutes, 26 for each seed (910 samples/s on a core of 2026).
title = "Zero-shot top-1 on the unseen style with four optimizers, FastCLIP-v1 at batch 64"
base = "../configs/emoji_v1.py"
seeds = (1, 2, 3)
x_label = "batch size"
curves = True
reference = "AdamW"

BATCH = 64
EPOCHS = 24
SAMPLES = 14_924  # of train

settings = dict(
    batch_size=BATCH,
    epochs=EPOCHS,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 8),  # eight evaluations
    save_steps=0,
)

# NOT TUNED YET: the middle of each grid in experiments/tune_optimizers.py
OPTIMIZERS = {
    "AdamW": dict(optimizer="adamw", lr=1e-3, weight_decay=0.1),
    "LAMB": dict(optimizer="lamb", lr=5e-3, weight_decay=0.1),
    "Lion": dict(optimizer="lion", lr=2e-4, weight_decay=0.5),
    "SGD with momentum": dict(optimizer="sgdm", lr=1.0, weight_decay=1e-5),
}

cases = []
for series, of_series in OPTIMIZERS.items():
    cases.append(dict(series=series, x=BATCH, settings=of_series))
