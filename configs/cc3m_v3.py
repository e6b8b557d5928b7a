base = "cc3m.py"
algorithm = "fastclip-v3"
lr_tau = 2e-4
rho = 6.5
