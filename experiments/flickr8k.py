# Photographs and sentences in place of drawings and names: retrieval on Flickr8k's test pictures
# (python -m tools.flickr8k SOURCE makes the set of what you have of it).
#
# 12 runs, 1.8 core-hours, 36 core-minutes for each seed (450 samples/s on a core of 2026).
import math

title = "Retrieval on Flickr8k: R@10 from text to picture, among 1,000 pictures"
base = "../configs/flickr8k.py"
seeds = (1, 2, 3)
x_label = "batch size"
measure = "eval/text_to_image_R@10"
curves = True
reference = {
    "OpenCLIP, best tau": "OpenCLIP, usual tau",
    "FastCLIP-v1, best tau": "OpenCLIP, best tau",
    "FastCLIP-v3": "OpenCLIP, best tau",
}

BATCH = 64

settings = dict(batch_size=BATCH, save_steps=0)

# NOT TUNED YET: experiments/tune_flickr8k.py is to choose them
SIDES = {
    "OpenCLIP, usual tau": dict(algorithm="openclip", lr=1e-3),
    "OpenCLIP, best tau": dict(algorithm="openclip", tau_init=0.10, lr_tau=0.0, lr=1e-3),
    "FastCLIP-v1, best tau": dict(algorithm="fastclip-v1", tau_init=0.10, lr=1e-3),
    "FastCLIP-v3": dict(
        algorithm="fastclip-v3", rho=round(math.log(BATCH - 1) - 1, 2), lr_tau=1e-3, lr=1e-3
    ),
}

cases = []
for side, of_side in SIDES.items():
    cases.append(dict(series=side, x=BATCH, settings=of_side))
