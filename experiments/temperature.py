# How much of the difference is the temperature? OpenCLIP and v1 at a constant one. Does v3 find the
# best by itself? In the picture, its runs stand at the temperature at which they end, which rho
# decides.
#
# 102 runs, 9 to 11 core-hours, a third of them for the first seed, less what batch_size has made.
title = "Zero-shot top-1 on the unseen style against a constant temperature; where v3's settles"
base = "../configs/emoji.py"
seeds = (1, 2, 3)
x_label = "tau, or rho"
log_x = True
reference = {
    "FastCLIP-v1, batch 64": "OpenCLIP, batch 64",
    "FastCLIP-v1, batch 256": "OpenCLIP, batch 256",
}
at_last_tau = ("FastCLIP-v3, batch 64", "FastCLIP-v3, batch 256")

EPOCHS = 24
SAMPLES = 14_924  # of train
# As in experiments/batch_size.py. OpenCLIP and v1 differ in nothing but the loss here.
LR = {64: 2e-3, 256: 4e-3}
LR_V3 = {64: 1e-3, 256: 4e-3}

settings = dict(epochs=EPOCHS, save_steps=0)

cases = []
for batch in LR:
    by_batch = dict(
        batch_size=batch,
        lr=LR[batch],
        warmup_steps=25_600 // batch,  # in samples, the emoji config's
        eval_steps=-(-EPOCHS * SAMPLES // batch // 4),  # four evaluations
    )
    for tau in (0.03, 0.05, 0.07, 0.10, 0.14, 0.20):
        openclip = dict(algorithm="openclip", tau_init=tau, lr_tau=0.0)
        v1 = dict(algorithm="fastclip-v1", tau_init=tau)
        for name, of_side in (("OpenCLIP", openclip), ("FastCLIP-v1", v1)):
            series = f"{name}, batch {batch}"
            cases.append(dict(series=series, x=tau, settings={**by_batch, **of_side}))
    for rho in (1.5, 2.4, 3.1, 3.5, 4.0):
        v3 = dict(algorithm="fastclip-v3", rho=rho, lr=LR_V3[batch], lr_tau=1e-3)
        series = f"FastCLIP-v3, batch {batch}"
        cases.append(dict(series=series, x=f"rho {rho:g}", settings={**by_batch, **v3}))
