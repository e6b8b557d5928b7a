base = "icons.py"
algorithm = "fastclip-v3"
lr_tau = 1e-3  # as for emoji, over about as many steps; not tuned here
rho = 3.5  # the best for emoji at this batch size (docs/results.md); not tuned here
