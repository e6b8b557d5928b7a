# The paper's equations against those of the published code (DEPARTURES in loss.py). For v1 they
# differ by a factor of the gradient, which AdamW mostly undoes. For v3 the released gradient of tau
# counts the term of the negatives twice, which wants a smaller rho for the same temperature: it has
# two here.
#
# 30 runs, 3.3 core-hours, 66 core-minutes for each seed (910 samples/s on a core of 2026).
title = "The paper's equations and the released ones, at two values of epsilon"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
x_label = "eps_u"
log_x = True
reference = {
    "v1, release": "v1, paper",
    "v3, release": "v3, paper",
    "v3, release, lower rho": "v3, paper",
}

BATCH = 64
EPOCHS = 24
SAMPLES = 14_924  # of train
RHO = 3.1  # of configs/emoji_v3.py

settings = dict(
    batch_size=BATCH,
    epochs=EPOCHS,
    eval_steps=-(-EPOCHS * SAMPLES // BATCH // 8),  # eight evaluations
    save_steps=0,
)

SIDES = {
    "v1, paper": ("emoji_v1", dict(equations="paper")),
    "v1, release": ("emoji_v1", dict(equations="release")),
    "v3, paper": ("emoji_v3", dict(equations="paper")),
    "v3, release": ("emoji_v3", dict(equations="release")),
    "v3, release, lower rho": ("emoji_v3", dict(equations="release", rho=RHO - 2)),
}

cases = []
for eps in (1e-3, 1e-14):
    for side, (config, of_side) in SIDES.items():
        settings_of_case = dict(of_side, eps_u=eps)
        base_of_case = f"../configs/{config}.py"
        cases.append(dict(series=side, x=eps, base=base_of_case, settings=settings_of_case))
