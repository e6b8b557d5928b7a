base = "emoji.py"
algorithm = "fastclip-v1"
# The best temperature of three, on a style held out of the training, and a learning rate as good as
# its double and better than a half and a quarter (experiments/tune_batch_size.py).
tau_init = 0.1
lr = 2e-3
