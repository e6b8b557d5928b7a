# The settings of experiments/batch_size.py are chosen here: on four of the five training styles,
# with the fifth in place of the test style (python -m tools.prepare emoji --tune).
#
# Each of four sides has about the same budget, at each of three batch sizes: three settings of its
# temperature at one learning rate, then other rates with the best of them. Where the best of three
# was the last of its row, or tau had not come to rest, more were tried, and never more for FastCLIP
# than for OpenCLIP. OpenCLIP's usual temperature is tried at all rates, though it is the best at
# none of the batch sizes. Other batch sizes take what lies between, or the nearest.
#
# 77 runs, 8 core-hours (two runs side by side: 537 samples/s at batch 32, 910 at 64, 1,090 at 256).
import math

title = "Settings for the comparison of batch sizes, tuned on a training style that is held out"
base = "../configs/emoji.py"
seeds = (1,)
x_label = "batch size"
log_x = True
reference = {}  # one seed: such differences are not worth a column
best_of = ("OpenCLIP, tau learned", "OpenCLIP, tau constant", "v1", "v3")

EPOCHS = 24  # as in the comparison: where a learned temperature settles depends on the length
SAMPLES = 11_790  # of tune/train

# The temperatures are tried at the first rate of a row (these go with the root of the batch), the
# best of them at the others. Half the rate lost 3 to 6 points at batch 64, twice the rate gained
# at 256, so the other rows go upwards only.
LEARNING_RATES = {32: (7e-4, 1.4e-3), 64: (1e-3, 5e-4, 2e-3, 4e-3), 256: (2e-3, 4e-3, 8e-3)}

settings = dict(
    train_data="data/emoji/tune/train/*.tar",
    eval_data="data/emoji/tune/val/*.tar",
    epochs=EPOCHS,
    save_steps=0,
)

# rho of v3 is given by its distance d below ln(B - 1): d = ln(B - 1) - rho. That is the most by
# which a distribution over the negatives of a batch can diverge from the uniform one
# (docs/results.md).
DISTANCES = {32: (0.2, 1.0, 2.0), 64: (0.2, 1.0, 2.0), 256: (0.2, 1.0, 2.0, 3.0)}
# At batch 256 a run has 1,104 steps: is the usual lr_tau too slow for the larger values of rho?
FAST = {32: (), 64: (), 256: (1.0, 2.0)}
TAUS = {32: (0.07, 0.10, 0.14), 64: (0.07, 0.10, 0.14), 256: (0.07, 0.10, 0.14, 0.20)}
TAUS_OPENCLIP = {**TAUS, 32: (0.07, 0.10, 0.14, 0.20), 256: (0.07, 0.10, 0.12, 0.14, 0.17, 0.20)}

USUAL = "from 0.07"


def sides_at(batch):
    """{side: {setting of its temperature: settings}} for a batch size."""
    learned = {
        USUAL: dict(tau_init=0.07),
        "from 0.14": dict(tau_init=0.14),
        "slowly": dict(tau_init=0.07, lr_tau=1e-4),
        "slowly from 0.14": dict(tau_init=0.14, lr_tau=1e-4),
    }
    constant = {f"{tau:.2f}": dict(tau_init=tau, lr_tau=0.0) for tau in TAUS_OPENCLIP[batch]}
    v1 = {f"tau {tau:.2f}": dict(tau_init=tau) for tau in TAUS[batch]}
    v3 = {}
    for distance in DISTANCES[batch]:
        rho = round(math.log(batch - 1) - distance, 2)
        v3[f"d {distance}"] = dict(rho=rho, lr_tau=1e-3)
    for distance in FAST[batch]:
        rho = round(math.log(batch - 1) - distance, 2)
        v3[f"d {distance} fast"] = dict(rho=rho, lr_tau=4e-3)
    return {
        "OpenCLIP, tau learned": ("openclip", learned),
        "OpenCLIP, tau constant": ("openclip", constant),
        "v1": ("fastclip-v1", v1),
        "v3": ("fastclip-v3", v3),
    }


# The best of these settings, {(side, batch size): it}: those that are run with other rates, too.
BEST = {
    ("OpenCLIP, tau learned", 32): "slowly from 0.14",
    ("OpenCLIP, tau constant", 32): "0.14",
    ("v1", 32): "tau 0.10",
    ("v3", 32): "d 1.0",
    ("OpenCLIP, tau constant", 64): "0.10",
    ("v1", 64): "tau 0.10",
    ("v3", 64): "d 1.0",
    ("OpenCLIP, tau learned", 64): "slowly from 0.14",
    ("OpenCLIP, tau learned", 256): "slowly from 0.14",
    ("OpenCLIP, tau constant", 256): "0.14",
    ("v1", 256): "tau 0.14",
    ("v3", 256): "d 2.0",
}

cases = []
for batch, rates in LEARNING_RATES.items():
    by_batch = dict(
        batch_size=batch,
        warmup_steps=25_600 // batch,  # in samples, the emoji config's
        eval_steps=-(-EPOCHS * SAMPLES // batch // 4),  # four evaluations
    )
    for side, (algorithm, temperatures) in sides_at(batch).items():
        for temperature, of_temperature in temperatures.items():
            at_all_rates = temperature in (BEST[side, batch], USUAL)
            for lr in rates if at_all_rates else rates[:1]:
                name = f"{side} {temperature}, lr {lr:g}"
                settings_of_case = dict(algorithm=algorithm, lr=lr, **by_batch, **of_temperature)
                cases.append(dict(series=name, x=batch, settings=settings_of_case))
