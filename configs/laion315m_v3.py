base = "laion315m.py"
algorithm = "fastclip-v3"
lr_tau = 5e-5
rho = 16.0
