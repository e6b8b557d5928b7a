# The settings of those algorithms in experiments/algorithms.py that experiments/tune_batch_size.py
# has not tuned, on the same data (python -m tools.prepare emoji --tune) and with the same budget:
# three settings of the temperature, then twice the learning rate with the best of them.
#
# 16 runs, 1.4 core-hours, 62 core-minutes for the first 12 (910 samples/s on a core of 2026).
import math

title = "Settings for the comparison of all algorithms, tuned on a training style that is held out"
base = "../configs/emoji.py"
seeds = (1,)
x_label = "batch size"
reference = {}  # one seed: such differences are not worth a column
best_of = ("SogCLR", "iSogCLR", "FastCLIP-v0", "FastCLIP-v2")

BATCH = 64
EPOCHS = 24
SAMPLES = 11_790  # of tune/train
LEARNING_RATES = (1e-3, 2e-3)  # half of the first lost 3 to 6 points there

settings = dict(
    train_data="data/emoji/tune/train/*.tar",
    eval_data="data/emoji/tune/val/*.tar",
    batch_size=BATCH,
    epochs=EPOCHS,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 4),  # four evaluations
    save_steps=0,
)

# The best of the three settings, {side: it}, as far as the runs have shown it. Its runs with other
# learning rates are listed once it is here.
BEST = {}

sides = {
    "SogCLR": {},
    "iSogCLR": {},
    "FastCLIP-v0": {
        "from 0.07": dict(algorithm="fastclip-v0", tau_init=0.07),
        "from 0.14": dict(algorithm="fastclip-v0", tau_init=0.14),
        "slowly": dict(algorithm="fastclip-v0", tau_init=0.07, lr_tau=1e-4),
    },
    "FastCLIP-v2": {},
}
for tau in (0.07, 0.10, 0.14):
    sogclr = dict(algorithm="sogclr", tau_init=tau, gamma_min=0.6)
    sides["SogCLR"][f"tau {tau:.2f}"] = sogclr
for distance in (0.2, 1.0, 2.0):  # of rho below ln(B - 1), see docs/results.md
    rho = round(math.log(BATCH - 1) - distance, 2)
    per_sample = dict(tau_init=0.12, lr_tau=5e-3, rho=rho)
    isogclr = dict(per_sample, algorithm="isogclr", gamma_min=0.6)
    v2 = dict(per_sample, algorithm="fastclip-v2")
    sides["iSogCLR"][f"d {distance}"] = isogclr
    sides["FastCLIP-v2"][f"d {distance}"] = v2

cases = []
for side, temperatures in sides.items():
    for temperature, of_side in temperatures.items():
        is_best = temperature == BEST.get(side)
        for lr in LEARNING_RATES if is_best else LEARNING_RATES[:1]:
            series = f"{side} {temperature}, lr {lr:g}"
            cases.append(dict(series=series, x=BATCH, settings=dict(of_side, lr=lr)))
