base = "cc12m.py"
algorithm = "fastclip-v3"
lr_tau = 1e-4
rho = 8.5
