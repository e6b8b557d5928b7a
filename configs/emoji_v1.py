base = "emoji.py"
algorithm = "fastclip-v1"
# Both are the best of three on a style held out of the training (experiments/tune_batch_size.py).
tau_init = 0.1
lr = 2e-3
