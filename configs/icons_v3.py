base = "icons.py"
algorithm = "fastclip-v3"
lr_tau = 1e-3  # as for emoji, over about as many steps; not tuned here
# About 1 below ln(B - 1), the most that a caption's negatives in a batch can diverge from the
# uniform distribution (docs/results.md). Not tuned here.
rho = 4.5
