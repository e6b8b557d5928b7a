base = "cc3m.py"
algorithm = "fastclip-v2"
tau_init = 0.03
lr_tau = 0.0133
rho = 7.0
