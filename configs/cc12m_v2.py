base = "cc12m.py"
algorithm = "fastclip-v2"
tau_init = 0.03
lr_tau = 0.0133  # published for CC3M only, carried over
rho = 7.0  # published for CC3M only, carried over
