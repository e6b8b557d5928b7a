# Is the lead of FastCLIP at small batches the ResNet's own? A small ViT and a small ConvNeXt in its
# place (an open question of the paper), at a small and at a larger batch.
#
# 48 runs, 6.6 core-hours, 2.2 for each seed (estimated for a core of 2026, from the towers alone:
# 500 and 600 samples/s with the ViT at batch 32 and 256, 880 and 1,400 with the ConvNeXt).
title = "Zero-shot top-1 on the unseen style with other image towers"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
x_label = "batch size"
log_x = True

EPOCHS = 24
SAMPLES = 14_924  # of train

settings = dict(epochs=EPOCHS, save_steps=0)

NO_RESNET = dict(vision_layers=None, vision_width=None)  # the emoji config's are a ResNet's
TOWERS = {  # of 0.2 and 0.3 million parameters
    "ViT": dict(model="ViT-B-32", patch_size=4, vision_width=64, vision_layers=4),
    "ConvNeXt": dict(NO_RESNET, model="timm:test_convnext"),
}

# Those of experiments/batch_size.py, but that v1 at 256 has the rate of the others; not tuned for
# these towers.
LR = {32: 1.4e-3, 256: 4e-3}
TAU_OPENCLIP = 0.14
LR_TAU_OPENCLIP = {32: 0.0, 256: 1e-4}
TAU_V1 = {32: 0.10, 256: 0.14}
RHO = {32: 2.4, 256: 3.5}


def sides_at(batch):
    """{side: its settings} for a batch size."""
    best_openclip = dict(tau_init=TAU_OPENCLIP, lr_tau=LR_TAU_OPENCLIP[batch])
    return {
        "OpenCLIP, usual tau": dict(algorithm="openclip"),
        "OpenCLIP, best tau": dict(algorithm="openclip", **best_openclip),
        "FastCLIP-v1": dict(algorithm="fastclip-v1", tau_init=TAU_V1[batch]),
        "FastCLIP-v3": dict(algorithm="fastclip-v3", rho=RHO[batch], lr_tau=1e-3),
    }


cases = []
reference = {}
for tower, of_tower in TOWERS.items():
    usual = f"{tower}, OpenCLIP, usual tau"
    best = f"{tower}, OpenCLIP, best tau"
    reference[best] = usual
    reference[f"{tower}, FastCLIP-v1"] = best
    reference[f"{tower}, FastCLIP-v3"] = best
    for batch, lr in LR.items():
        by_batch = dict(
            batch_size=batch,
            lr=lr,
            warmup_steps=25_600 // batch,  # in samples, the emoji config's
            eval_steps=-(-EPOCHS * SAMPLES // batch // 4),  # four evaluations
        )
        for side, of_side in sides_at(batch).items():
            of_case = {**of_tower, **by_batch, **of_side}
            cases.append(dict(series=f"{tower}, {side}", x=batch, settings=of_case))
