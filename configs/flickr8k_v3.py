base = "flickr8k.py"
algorithm = "fastclip-v3"
lr_tau = 1e-3
rho = 3.1  # ln(batch_size - 1) - 1, see docs/results.md; not tuned
