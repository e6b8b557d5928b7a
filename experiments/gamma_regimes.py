# Does the best gamma depend on the length of the run and on the batch size? The fewer visits of a
# sample, the less an average can gather; the larger the batch, the less it has to. v1, as in
# experiments/gamma.py, which has batch 64 and 24 epochs.
#
# 36 runs, 2.9 core-hours, most of them at batch 16 (on a core of 2026: 440 samples/s at batch 16,
# 910 at 64, 1,370 at 256).
title = "Zero-shot top-1 on the held-out style against gamma_min: short runs, and other batch sizes"
base = "../configs/emoji_v1.py"
seeds = (1, 2, 3)
x_label = "gamma_min"

SAMPLES = 11_790  # of tune/train

# The rate that all sides share in experiments/batch_size.py, where v1 has twice this at 256.
LR = {16: 1e-3, 64: 2e-3, 256: 4e-3}
TAU = {16: 0.10, 64: 0.10, 256: 0.14}

settings = dict(
    train_data="data/emoji/tune/train/*.tar",
    eval_data="data/emoji/tune/val/*.tar",
    save_steps=0,
)

REGIMES = ((64, 8), (256, 24), (16, 24))  # batch size, epochs
GAMMA_MINS = (0.3, 0.8)

cases = []
reference = {}
for batch, epochs in REGIMES:
    warmup_samples = 1_067 * epochs  # with 24 epochs the emoji config's
    regime = f"batch {batch}, {epochs} epochs"
    reference[f"cosine, {regime}"] = f"constant, {regime}"
    for schedule in ("constant", "cosine"):
        for gamma_min in GAMMA_MINS:
            of_case = dict(
                batch_size=batch,
                epochs=epochs,
                lr=LR[batch],
                tau_init=TAU[batch],
                warmup_steps=warmup_samples // batch,
                eval_steps=-(-epochs * SAMPLES // batch // 4),  # four evaluations
                gamma_schedule=schedule,
                gamma_min=gamma_min,
            )
            cases.append(dict(series=f"{schedule}, {regime}", x=gamma_min, settings=of_case))
