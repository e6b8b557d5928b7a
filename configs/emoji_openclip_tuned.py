base = "emoji.py"
algorithm = "openclip"
# OpenCLIP with a constant temperature, the best of three, and the best of three learning rates, on
# a style held out of the training (experiments/tune_batch_size.py). Learned as usual, its
# temperature falls to 0.03, which costs points.
tau_init = 0.1
lr_tau = 0.0
lr = 2e-3
