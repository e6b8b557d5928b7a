# The settings of experiments/flickr8k.py are chosen here, on the pictures of val/, by the same
# budget for all sides: three settings of the temperature, then half and twice the learning rate
# with the best of them.
#
# 20 runs, 3.0 core-hours, 1.8 for the first 12 (450 samples/s on a core of 2026).
import math

title = "Settings for the comparison on Flickr8k, chosen on its validation pictures"
base = "../configs/flickr8k.py"
seeds = (1,)
x_label = "batch size"
measure = "eval/text_to_image_R@10"
reference = {}  # one seed: such differences are not worth a column
best_of = ("OpenCLIP, tau learned", "OpenCLIP, tau constant", "v1", "v3")

BATCH = 64
MIDDLE_LR = 1e-3

settings = dict(batch_size=BATCH, eval_data="data/flickr8k/val/*.tar", save_steps=0)

# The best of the three settings, {side: it}, as far as the runs have shown it. Its runs with other
# learning rates are listed once it is here.
BEST = {}

learned = dict(algorithm="openclip")
sides = {
    "OpenCLIP, tau learned": {
        "from 0.07": dict(learned, tau_init=0.07),
        "from 0.14": dict(learned, tau_init=0.14),
        "slowly": dict(learned, tau_init=0.07, lr_tau=1e-4),
    },
    "OpenCLIP, tau constant": {},
    "v1": {},
    "v3": {},
}
for tau in (0.07, 0.10, 0.14):
    openclip = dict(algorithm="openclip", tau_init=tau, lr_tau=0.0)
    v1 = dict(algorithm="fastclip-v1", tau_init=tau)
    sides["OpenCLIP, tau constant"][f"{tau:.2f}"] = openclip
    sides["v1"][f"tau {tau:.2f}"] = v1
for distance in (0.2, 1.0, 2.0):  # of rho below ln(B - 1), see docs/results.md
    rho = round(math.log(BATCH - 1) - distance, 2)
    sides["v3"][f"d {distance}"] = dict(algorithm="fastclip-v3", rho=rho, lr_tau=1e-3)

cases = []
for side, temperatures in sides.items():
    for temperature, of_side in temperatures.items():
        rates = [MIDDLE_LR]
        if temperature == BEST.get(side):
            rates += [MIDDLE_LR / 2, MIDDLE_LR * 2]
        for lr in rates:
            series = f"{side} {temperature}, lr {lr:g}"
            cases.append(dict(series=series, x=BATCH, settings=dict(of_side, lr=lr)))
