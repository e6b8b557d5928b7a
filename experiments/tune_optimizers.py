# A learning rate for each optimizer in experiments/optimizers.py, chosen on four of the five
# training styles with the fifth in place of the test style (python -m tools.prepare emoji --tune).
# The same budget for each: three learning rates.
#
# 12 runs, 62 core-minutes (910 samples/s on a core of 2026).
title = "Learning rates of four optimizers, tuned on a training style that is held out"
base = "../configs/emoji_v1.py"
seeds = (1,)
x_label = "learning rate"
reference = {}  # one seed: such differences are not worth a column
log_x = True

BATCH = 64
EPOCHS = 24
SAMPLES = 11_790  # of tune/train

settings = dict(
    train_data="data/emoji/tune/train/*.tar",
    eval_data="data/emoji/tune/val/*.tar",
    batch_size=BATCH,
    epochs=EPOCHS,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 4),  # four evaluations
    save_steps=0,
)

LEARNING_RATES = {
    "adamw": (5e-4, 1e-3, 2e-3),
    "lamb": (2e-3, 5e-3, 1e-2),
    "lion": (1e-4, 2e-4, 4e-4),
    "sgdm": (0.3, 1.0, 3.0),
}
# At the middle learning rate AdamW, Lion and SGD (with its momentum) take away 1e-4 of a weight
# per step, as in the emoji config. LAMB scales its whole step by the weights' norm.
WEIGHT_DECAY = {"adamw": 0.1, "lamb": 0.1, "lion": 0.5, "sgdm": 1e-5}

cases = []
for optimizer, rates in LEARNING_RATES.items():
    for lr in rates:
        of_case = dict(optimizer=optimizer, lr=lr, weight_decay=WEIGHT_DECAY[optimizer])
        cases.append(dict(series=optimizer, x=lr, settings=of_case))
