base = "emoji.py"
algorithm = "fastclip-v3"
lr_tau = 1e-3
rho = 4.0  # decides where tau settles
