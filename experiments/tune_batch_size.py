# The settings of experiments/batch_size.py are chosen here: on four of the five training styles,
# with the fifth in place of the test style (python -m tools.prepare emoji --tune).
#
# Each of four sides has the same budget: six runs at each of three batch sizes, two learning rates
# times three settings of its temperature. Other batch sizes take what lies between.
#
# 72 runs, 8 core-hours (on a core of 2026: 440 samples/s at batch 16, 910 at 64, 1,370 at 256).
title = "Settings for the comparison of batch sizes, tuned on a training style that is held out"
base = "../configs/emoji.py"
seeds = (1,)
x_label = "batch size"
log_x = True
reference = {}  # one seed: such differences are not worth a column

EPOCHS = 24  # as in the comparison: where a learned temperature settles depends on the length
SAMPLES = 11_790  # of tune/train
LEARNING_RATES = {16: (5e-4, 1e-3), 64: (1e-3, 2e-3), 256: (1e-3, 2e-3)}

settings = dict(
    train_data="data/emoji/tune/train/*.tar",
    eval_data="data/emoji/tune/val/*.tar",
    epochs=EPOCHS,
    save_steps=0,
)

# {side: {setting of its temperature: settings}}
SIDES = {
    "OpenCLIP, tau learned": {
        "from 0.07": dict(algorithm="openclip", tau_init=0.07),
        "from 0.14": dict(algorithm="openclip", tau_init=0.14),
        "slowly": dict(algorithm="openclip", tau_init=0.07, lr_tau=1e-4),
    },
    "OpenCLIP, tau constant": {
        "0.05": dict(algorithm="openclip", tau_init=0.05, lr_tau=0.0),
        "0.10": dict(algorithm="openclip", tau_init=0.10, lr_tau=0.0),
        "0.14": dict(algorithm="openclip", tau_init=0.14, lr_tau=0.0),
    },
    "v1": {
        "tau 0.05": dict(algorithm="fastclip-v1", tau_init=0.05),
        "tau 0.10": dict(algorithm="fastclip-v1", tau_init=0.10),
        "tau 0.14": dict(algorithm="fastclip-v1", tau_init=0.14),
    },
    "v3": {
        "rho 2": dict(algorithm="fastclip-v3", rho=2.0, lr_tau=1e-3),
        "rho 4": dict(algorithm="fastclip-v3", rho=4.0, lr_tau=1e-3),
        "rho 8": dict(algorithm="fastclip-v3", rho=8.0, lr_tau=1e-3),
    },
}

cases = []
for batch, rates in LEARNING_RATES.items():
    by_batch = dict(
        batch_size=batch,
        warmup_steps=25_600 // batch,  # in samples, the emoji config's
        eval_steps=-(-EPOCHS * SAMPLES // batch // 4),  # four evaluations
    )
    for side, temperatures in SIDES.items():
        for temperature, of_side in temperatures.items():
            for lr in rates:
                name = f"{side} {temperature}, lr {lr:g}"
                cases.append(dict(series=name, x=batch, settings={**by_batch, **of_side, "lr": lr}))
