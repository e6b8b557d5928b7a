base = "emoji.py"
algorithm = "fastclip-v3"
lr_tau = 1e-3
# Where tau settles, a caption's negatives diverge from the uniform distribution by rho, which is at
# most ln(B - 1) in a batch. About 1 below it was best on a style held out of the training
# (experiments/tune_batch_size.py).
rho = 3.1
